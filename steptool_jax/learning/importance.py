"""Importance weights for trajectories that another policy has sampled: an earlier one, int8, vLLM.

With rollout.kv_cache = int8 the engine reads rounded keys and values, and a server (rollout.engine
= http) computes with programs of its own, so it samples from mu, and
not from the pi that prepare and update compute. Its log-probs are recorded as sampled, those of mu.
PPO's ratio is sound all the same: old_logprobs, its denominator, is what prepare computes of pi, so
the ratio begins at 1 and its clip bounds how far pi moves. But tokens are met as often as mu says,
and the gradient wants them as often as pi does. The factor that is missing, pi / mu, is what these
weights give, as they do for a lag; uncut, they leave no bias in a token's term, given its history.

What bias stays: weights above the bound are cut (the figure importance_cut; gaps of some hundredths
are far from it). Level 'token' does not correct how often a history is met; 'sequence' does, at the
price of variance. Baselines and the critic are of conversations as mu has led them. Losses without
advantages (rft, eto) take no weights: they choose conversations and learn those, whoever sampled
them.

With rollout.reuse the sampler is today's policy in another program, and its log-probs may stand for
the trainer's (`reused`).
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from steptool_jax.learning import segments
from steptool_jax.learning.outputs import Outputs
from steptool_jax.types import TokenBatch

Level = Literal["token", "sequence", "none"]
LEVELS = ("token", "sequence", "none")
SAMPLE = "sample"  # scope of the loop over the micro-batches that rollout.reuse computes


def truncated_weights(
  logprobs_BT: jax.Array, batch: TokenBatch, level: Level, bound: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Truncated importance weights min(pi / mu, bound) (Ionides 2008), float32 [B, T].

  pi: the policy that learns, before its first update on the batch (logprobs); mu: the one that has
  sampled (batch.behaviour_logprobs). token: each sampled token has its own ratio, as rho in V-trace
  (Espeholt et al. 2018). sequence: all tokens of a trajectory have the product of their ratios.
  none: 1. Outside the action mask 1. Metrics: the mean ratio as it is used, and the share of
  tokens that the bound has cut.
  """
  chex.assert_equal_shape([logprobs_BT, batch.behaviour_logprobs])
  mask_BT = batch.action_mask
  log_ratio_BT = jnp.where(mask_BT, logprobs_BT - batch.behaviour_logprobs, 0.0)
  if level == "sequence":
    totals_BT = segments.trajectory_totals(batch, log_ratio_BT)
    log_ratio_BT = jnp.where(mask_BT, totals_BT, 0.0)
  elif level == "none":
    log_ratio_BT = jnp.zeros_like(log_ratio_BT)
  most = math.log(bound)
  # Cut before exp, which would overflow; what lies outside of the mask stays 1.
  weights_BT = jnp.where(mask_BT, jnp.exp(jnp.minimum(log_ratio_BT, most)), 1.0)
  count = jnp.maximum(mask_BT.sum(), 1)
  metrics = {
    "importance": jnp.where(mask_BT, weights_BT, 0.0).sum() / count,
    "importance_cut": (mask_BT & (log_ratio_BT > most)).sum() / count,
  }
  return weights_BT, metrics


def reused(
  batch_NBT: TokenBatch,
  count: jax.Array,
  recorded_NB: jax.Array | None,
  empty: Outputs,
  of_policy: Callable[[jax.Array], Outputs],
  bound: float,
) -> tuple[Outputs, jax.Array]:
  """(outputs [N, B, ...] without entropy, largest gap of a log-prob that was computed).

  They are the sampler's where its log-probs are within `bound` in the first micro-batch. Else, and
  where the policy is not finite, they are those of a forward pass over all `count`.
  """
  mask_NBT = batch_NBT.action_mask
  sampled_NBT = jnp.where(mask_NBT, batch_NBT.behaviour_logprobs, 0.0)

  def goes_on(carry):
    index, _, gap = carry
    return (index < count) & ((index < 1) | ~(gap <= bound))

  def one(carry):
    index, filled, gap = carry
    found = of_policy(index)
    far = jnp.abs(found.logprobs - sampled_NBT[index]).max()
    filled = jax.tree.map(lambda whole, part: whole.at[index].set(part), filled, found)
    return index + 1, filled, jnp.maximum(gap, far)

  with jax.named_scope(SAMPLE):
    _, computed, gap = jax.lax.while_loop(goes_on, one, (jnp.int32(0), empty, jnp.float32(0.0)))
  reused = Outputs(sampled_NBT, empty.entropy, recorded_NB)
  pick = functools.partial(jnp.where, gap <= bound)
  return jax.tree.map(pick, reused, computed), gap
