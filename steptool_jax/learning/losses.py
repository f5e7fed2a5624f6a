"""Losses on packed batches. Each returns (sum, denominator), both float32 scalars.

The quotient is taken once, over the whole minibatch, so that any split into micro-batches and any
sharding gives the same gradient. Everything is aligned with targets and masked, never by token id.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from steptool_jax.learning import segments
from steptool_jax.types import TokenBatch

Aggregation = Literal["token", "step", "trajectory"]
AGGREGATIONS = ("token", "step", "trajectory")
SumAndDenominator = tuple[jax.Array, jax.Array]


def action_weights(batch: TokenBatch, aggregation: Aggregation) -> jax.Array:
  """float32 [B, T], the weight of each sampled token; their sum is the denominator.

  token: every token counts 1. step / trajectory: the tokens of one step / trajectory share a
  weight of 1, so that long ones do not weigh more.
  """
  action_BT = batch.action_mask.astype(jnp.float32)
  if aggregation == "token":
    return action_BT
  if aggregation == "step":
    start_BT = segments.step_starts(batch)
    # Tokens between two steps fall into the group of the first; they have no weight.
  else:
    start_BT = segments.starts(batch.segment_ids)
  return action_BT / jnp.maximum(segments.group_totals(action_BT, start_BT), 1.0)


def weighted(x_BT: jax.Array, weights_BT: jax.Array) -> SumAndDenominator:
  """(sum of x under the weights, sum of the weights)."""
  # where, not a product alone: an infinity at a masked position must not become NaN.
  return (jnp.where(weights_BT > 0, x_BT, 0.0) * weights_BT).sum(), weights_BT.sum()


def cross_entropy(logprobs_BT: jax.Array, weights_BT: jax.Array) -> SumAndDenominator:
  """- log pi(targets[t]) on demonstrated action tokens."""
  _check(logprobs_BT, weights_BT)
  return weighted(-logprobs_BT, weights_BT)


def ppo_policy(
  logprobs_BT: jax.Array,
  old_logprobs_BT: jax.Array,
  advantages_BT: jax.Array,
  weights_BT: jax.Array,
  clip_low: float,
  clip_high: float,
) -> tuple[SumAndDenominator, dict[str, SumAndDenominator]]:
  """Clipped surrogate (Schulman et al. 2017, eq. 7), negated: -min(rho A, clip(rho) A).

  rho = exp(logprobs - old), clipped to [1 - clip_low, 1 + clip_high]. Also returns the share of
  clipped tokens and the approximate KL to the old policy (k3), for metrics.
  """
  _check(logprobs_BT, old_logprobs_BT, advantages_BT, weights_BT)
  # Outside the mask old log-probs are 0; keep exp from overflowing there.
  log_ratio_BT = jnp.where(weights_BT > 0, logprobs_BT - old_logprobs_BT, 0.0)
  ratio_BT = jnp.exp(log_ratio_BT)
  clipped_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high)
  loss_BT = -jnp.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
  is_clipped_BT = (clipped_BT * advantages_BT < ratio_BT * advantages_BT).astype(jnp.float32)
  metrics = {
    "clip_fraction": weighted(is_clipped_BT, weights_BT),
    "old_kl": weighted(ratio_BT - 1.0 - log_ratio_BT, weights_BT),
  }
  return weighted(loss_BT, weights_BT), metrics


def clipped_value(
  values_BT: jax.Array,
  old_values_BT: jax.Array,
  returns_BT: jax.Array,
  mask_BT: jax.Array,
  clip: float,
) -> SumAndDenominator:
  """0.5 max((V - R)^2, (V_clip - R)^2), V_clip within `clip` of the old value."""
  _check(values_BT, old_values_BT, returns_BT)
  limited_BT = old_values_BT + jnp.clip(values_BT - old_values_BT, -clip, clip)
  error_BT = jnp.maximum(jnp.square(values_BT - returns_BT), jnp.square(limited_BT - returns_BT))
  return weighted(0.5 * error_BT, mask_BT.astype(jnp.float32))


def kl_to_reference(
  logprobs_BT: jax.Array, ref_logprobs_BT: jax.Array, weights_BT: jax.Array
) -> SumAndDenominator:
  """k3 estimate of KL(pi || ref) per token (Schulman 2020): exp(d) - 1 - d, d = ref - logprobs."""
  _check(logprobs_BT, ref_logprobs_BT, weights_BT)
  d_BT = jnp.where(weights_BT > 0, ref_logprobs_BT - logprobs_BT, 0.0)
  return weighted(jnp.exp(d_BT) - 1.0 - d_BT, weights_BT)


def dpo(
  logprobs_BT: jax.Array, ref_logprobs_BT: jax.Array, batch: TokenBatch, beta: float
) -> tuple[SumAndDenominator, dict[str, SumAndDenominator]]:
  """-log sigmoid(beta (h(chosen) - h(rejected))), h = sum over sampled tokens of log(pi / ref).

  Rafailov et al. 2023, eq. 7, on whole trajectories (ETO: Song et al. 2024). Segment s of
  row 2n was chosen over segment s of row 2n + 1. The denominator counts pairs. Metrics: the mean of
  the scaled difference, and the share of pairs in which it is positive.
  """
  _check(logprobs_BT, ref_logprobs_BT)
  segments_per_row = logprobs_BT.shape[1] + 1

  def totals(x_BT):
    sums_BS = jax.vmap(lambda x, ids: jax.ops.segment_sum(x, ids, segments_per_row))(
      jnp.where(batch.action_mask, x_BT, 0.0), batch.segment_ids
    )
    return sums_BS.reshape(-1, 2, segments_per_row)

  present_P2S = totals(jnp.ones_like(logprobs_BT)) > 0
  log_ratio_P2S = totals(logprobs_BT - ref_logprobs_BT)
  margin_PS = beta * (log_ratio_P2S[:, 0] - log_ratio_P2S[:, 1])
  pairs_PS = (present_P2S[:, 0] & present_P2S[:, 1]).astype(jnp.float32)
  metrics = {
    "pair_margin": weighted(margin_PS, pairs_PS),
    "pair_accuracy": weighted((margin_PS > 0).astype(jnp.float32), pairs_PS),
  }
  return weighted(-jax.nn.log_sigmoid(margin_PS), pairs_PS), metrics


def _check(*arrays: jax.Array) -> None:
  chex.assert_rank(arrays, 2)
  chex.assert_equal_shape(arrays)
  chex.assert_type(arrays, jnp.float32)
