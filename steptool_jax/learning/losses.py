"""Losses on packed batches. Each returns (sum, denominator), both float32 scalars.

The quotient is taken once, over the whole minibatch, so that any split into micro-batches and any
sharding gives the same gradient. Everything is aligned with targets and masked, never by token id.
"""

from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from steptool_jax.config import Config, Loss
from steptool_jax.learning import segments
from steptool_jax.types import TokenBatch

Unit = Literal["token", "step", "trajectory"]
UNITS = ("token", "step", "trajectory")
Aggregation = Literal["token", "step", "trajectory", "constant"]
AGGREGATIONS = (*UNITS, "constant")
SumAndDenominator = tuple[jax.Array, jax.Array]


# --- how tokens add up -----------------------------------------------------------------------


def action_weights(batch: TokenBatch, aggregation: Aggregation) -> jax.Array:
  """float32 [B, T], the weight of each sampled token in a sum.

  token, constant: every token counts 1. step / trajectory: the tokens of one step / trajectory
  share a weight of 1, so that long ones do not weigh more.
  """
  action_BT = batch.action_mask.astype(jnp.float32)
  if aggregation in ("token", "constant"):
    return action_BT
  if aggregation == "trajectory" and batch.trajectory_tokens is not None:
    # Its other segments may lie in another minibatch; how many tokens they have is known.
    totals_BT = batch.trajectory_tokens.astype(jnp.float32)
  else:
    totals_BT = segments.group_totals(action_BT, _unit_starts(batch, aggregation))
  return action_BT / jnp.maximum(totals_BT, 1.0)


def aggregate(x_BT: jax.Array, batch: TokenBatch, c: Config) -> SumAndDenominator:
  """A term of the loss: (sum of x under the action weights, what it is divided by).

  That is the sum of the weights. constant: the number of trajectories times the most tokens that
  one can sample, so that a token counts the same in a long trajectory and in a short one (Dr. GRPO,
  Liu et al. 2025, arXiv 2503.20783, section 3.2).
  """
  total, denominator = weighted(x_BT, action_weights(batch, c.loss.aggregation))
  if c.loss.aggregation == "constant":
    longest = min(c.rollout.max_steps * c.rollout.max_step_tokens, c.rollout.max_tokens)
    trajectories = (segments.step_starts(batch) & (batch.step_ids == 0)).sum()
    denominator = (longest * trajectories).astype(jnp.float32)
  return total, denominator


def weighted(x_BT: jax.Array, weights_BT: jax.Array) -> SumAndDenominator:
  """(sum of x under the weights, sum of the weights)."""
  # where, not a product alone: an infinity at a masked position must not become NaN.
  return (jnp.where(weights_BT > 0, x_BT, 0.0) * weights_BT).sum(), weights_BT.sum()


def _unit_starts(batch: TokenBatch, unit: Unit) -> jax.Array:
  # Tokens between two steps fall into the group of the first; they are no action tokens.
  return segments.step_starts(batch) if unit == "step" else segments.starts(batch.segment_ids)


# --- the policy ------------------------------------------------------------------------------


def log_ratio(batch: TokenBatch, logprobs_BT: jax.Array, unit: Unit) -> jax.Array:
  """log(pi / old) of each sampled token, float32 [B, T]; 0 elsewhere.

  step, trajectory: its mean over the unit's tokens, GSPO's sequence ratio (Zheng et al. 2025, arXiv
  2507.18071, eq. 7). Each token keeps a gradient of its own (GSPO-token, eq. 14); where the unit
  has one advantage, that is the gradient of GSPO's objective (eq. 5).
  """
  # Outside the mask old log-probs are 0; keep exp from overflowing there.
  own_BT = jnp.where(batch.action_mask, logprobs_BT - batch.old_logprobs, 0.0)
  if unit == "token":
    return own_BT
  start_BT, action_BT = _unit_starts(batch, unit), batch.action_mask.astype(jnp.float32)
  count_BT = jnp.maximum(segments.group_totals(action_BT, start_BT), 1.0)
  mean_BT = segments.group_totals(own_BT, start_BT) / count_BT
  stop = jax.lax.stop_gradient
  return jnp.where(batch.action_mask, stop(mean_BT) + (own_BT - stop(own_BT)), 0.0)


def policy(
  logprobs_BT: jax.Array, batch: TokenBatch, c: Loss
) -> tuple[jax.Array, dict[str, SumAndDenominator]]:
  """The surrogate's loss of each token, float32 [B, T], by c.surrogate and c.ratio.

  Also returns the share of tokens whose ratio is clipped and the approximate KL to the old policy
  (k3, of tokens), for metrics.
  """
  _check(logprobs_BT, batch.old_logprobs, batch.advantages)
  weights_BT = action_weights(batch, c.aggregation)
  ratio_BT = jnp.exp(log_ratio(batch, logprobs_BT, c.ratio))
  loss_BT, clipped_BT = SURROGATES[c.surrogate](ratio_BT, logprobs_BT, batch.advantages, c)
  own_BT = log_ratio(batch, logprobs_BT, "token")
  metrics = {
    "clip_fraction": weighted(clipped_BT.astype(jnp.float32), weights_BT),
    "old_kl": weighted(jnp.exp(own_BT) - 1.0 - own_BT, weights_BT),
  }
  return loss_BT, metrics


def _ppo(ratio_BT, logprobs_BT, advantages_BT, c: Loss):
  """-min(rho A, clip(rho) A), rho within [1 - clip_low, 1 + clip_high] (Schulman et al. 2017, eq.
  7); a higher clip_high is DAPO's clip-higher (Yu et al. 2025, arXiv 2503.14476)."""
  clipped_BT = jnp.clip(ratio_BT, 1.0 - c.clip_low, 1.0 + c.clip_high) * advantages_BT
  free_BT = ratio_BT * advantages_BT
  return -jnp.minimum(free_BT, clipped_BT), clipped_BT < free_BT


def _dual_clip(ratio_BT, logprobs_BT, advantages_BT, c: Loss):
  """max(PPO's, c A) where A < 0 (Ye et al. 2020, arXiv 1912.09729, eq. 5): a ratio that has run
  away can punish no more than c times."""
  loss_BT, clipped_BT = _ppo(ratio_BT, logprobs_BT, advantages_BT, c)
  most_BT = jnp.where(advantages_BT < 0, -c.dual_clip * advantages_BT, jnp.inf)
  return jnp.minimum(loss_BT, most_BT), clipped_BT | (loss_BT > most_BT)


def _cispo(ratio_BT, logprobs_BT, advantages_BT, c: Loss):
  """-sg(min(rho, 1 + clip_high)) A log pi (MiniMax-M1 2025, arXiv 2506.13585, eq. 4 and 5): the
  weight is clipped, and no token loses its gradient. Without a lower bound, as the authors run
  it."""
  most = 1.0 + c.clip_high
  weight_BT = jax.lax.stop_gradient(jnp.minimum(ratio_BT, most))
  return -weight_BT * advantages_BT * logprobs_BT, ratio_BT > most


def _sapo(ratio_BT, logprobs_BT, advantages_BT, c: Loss):
  """-f(rho) A, f = 4 / tau sigmoid(tau (rho - 1)), tau by the sign of A (Gao et al. 2025, arXiv
  2511.20347): a gate that closes softly on both sides, with slope 1 at rho = 1. Clips nothing."""
  tau_BT = jnp.where(advantages_BT > 0, c.sapo_positive, c.sapo_negative)
  gate_BT = 4.0 / tau_BT * jax.nn.sigmoid(tau_BT * (ratio_BT - 1.0))
  return -gate_BT * advantages_BT, jnp.zeros_like(ratio_BT, bool)


# (ratio, log-probs, advantages, config.loss) -> (loss, whether it was clipped), all [B, T].
SURROGATES: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
  "ppo": _ppo,
  "dual_clip": _dual_clip,
  "cispo": _cispo,
  "sapo": _sapo,
}


# --- other terms -----------------------------------------------------------------------------


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
  logprobs_BT: jax.Array, ref_logprobs_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
  """k3 estimate of KL(pi || ref) per token (Schulman 2020): exp(d) - 1 - d, d = ref - logprobs."""
  _check(logprobs_BT, ref_logprobs_BT)
  d_BT = jnp.where(mask_BT, ref_logprobs_BT - logprobs_BT, 0.0)
  return jnp.exp(d_BT) - 1.0 - d_BT


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
