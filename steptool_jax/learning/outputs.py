"""What a loss reads from the policy: log-probs, entropy and values of sampled tokens.

[B, T, V] logits never exist: the hidden states of sampled tokens are moved to the front of their
row and projected in chunks, each recomputed in the backward pass; chunks without a sampled token
are skipped at run time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from steptool_jax.policy import model
from steptool_jax.types import TokenBatch


class Outputs(NamedTuple):
  """float32 [B, T], aligned with targets; log-probs and entropy are 0 outside the action mask.

  values: whatever `heads` made of the hidden states; None without.
  """

  logprobs: jax.Array
  entropy: jax.Array
  values: Any


def policy_outputs(
  config: model.ModelConfig,
  variables: dict,
  batch: TokenBatch,
  *,
  temperature: float,
  chunk: int,
  heads: Callable[[jax.Array], Any] | None = None,
) -> Outputs:
  """One forward pass over a packed batch.

  Args:
    config: architecture (static).
    variables: {'params': ...} or {'params': ..., 'lora': ...}.
    batch: tokens, targets, segment_ids, positions and action_mask are read.
    temperature: of the behaviour policy; one temperature for all log-probs.
    chunk: positions of a row projected at a time.
    heads: hidden [B, T, D] -> values; None leaves a critic out of the program.
  """
  hidden_BTD = model.forward(config, variables, batch.tokens, batch.positions, batch.segment_ids)
  logprobs_BT, entropy_BT = _action_logprobs(
    config, variables, hidden_BTD, batch.targets, batch.action_mask, temperature, chunk
  )
  return Outputs(logprobs_BT, entropy_BT, None if heads is None else heads(hidden_BTD))


def _action_logprobs(config, variables, hidden_BTD, targets_BT, mask_BT, temperature, chunk):
  rows, length = mask_BT.shape
  chunk = min(chunk, length)
  num_chunks = -(-length // chunk)
  # A stable sort of (not sampled) brings the sampled positions to the front in their order.
  order_BT = jnp.argsort(~mask_BT, axis=1, stable=True)
  pad = num_chunks * chunk - length
  order_BT = jnp.pad(order_BT, ((0, 0), (0, pad)))
  index_NBC = order_BT.reshape(rows, num_chunks, chunk).swapaxes(0, 1)
  count_B = mask_BT.sum(axis=1)

  @jax.checkpoint
  def project(hidden_BTD, index_BC):
    hidden_BCD = jnp.take_along_axis(hidden_BTD, index_BC[:, :, None], axis=1)
    targets_BC = jnp.take_along_axis(targets_BT, index_BC, axis=1)
    logits_BCV = model.project_logits(config, variables, hidden_BCD) / temperature
    log_normalizer_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
    probs_BCV = jnp.exp(logits_BCV - log_normalizer_BC[:, :, None])
    entropy_BC = log_normalizer_BC - (probs_BCV * logits_BCV).sum(axis=-1)
    return chosen_BC - log_normalizer_BC, entropy_BC

  def one_chunk(_, inputs):
    number, index_BC = inputs
    skip = jnp.zeros((rows, chunk), jnp.float32)
    any_sampled = jnp.any(count_B > number * chunk)
    return None, jax.lax.cond(any_sampled, project, lambda *_: (skip, skip), hidden_BTD, index_BC)

  _, (logprobs_NBC, entropy_NBC) = jax.lax.scan(
    one_chunk, None, (jnp.arange(num_chunks), index_NBC)
  )
  inverse_BT = jnp.argsort(order_BT[:, :length], axis=1)

  def unsort(x_NBC):
    sorted_BT = x_NBC.swapaxes(0, 1).reshape(rows, num_chunks * chunk)[:, :length]
    x_BT = jnp.take_along_axis(sorted_BT, inverse_BT, axis=1)
    return jnp.where(mask_BT, x_BT, 0.0)

  return unsort(logprobs_NBC), unsort(entropy_NBC)
