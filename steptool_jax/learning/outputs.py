"""What a loss reads from the policy: log-probs, entropy and values of sampled tokens.

[B, T, V] logits never exist (learning/vocabulary.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from steptool_jax.learning import vocabulary
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
    batch: tokens, targets, segment_ids, until, positions and action_mask are read.
    temperature: of the behaviour policy; one temperature for all log-probs.
    chunk: positions of a row projected at a time.
    heads: hidden [B, T, D] -> values; None leaves a critic out of the program.
  """
  hidden_BTD = model.forward(
    config, variables, batch.tokens, batch.positions, batch.segment_ids, batch.until
  )
  logprobs_BT, entropy_BT = vocabulary.action_logprobs(
    config, variables, hidden_BTD, batch.targets, batch.action_mask, temperature, chunk
  )
  return Outputs(logprobs_BT, entropy_BT, None if heads is None else heads(hidden_BTD))
