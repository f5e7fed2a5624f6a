"""Baselines out of samples instead of a critic: batch, leave-one-out, group, anchor state.

A group is the samples of one task that are in the batch. All sums run over the global batch, under
jit, because the return may hold a KL penalty that only the device knows and because a packed row
and a shard hold parts of groups. Groups are counted by what is there: a rollout that broke down is
in no mean. Every trajectory weighs the same in a baseline, however long it is.
"""

import chex
import jax
import jax.numpy as jnp

from steptool_jax.learning import advantages, segments
from steptool_jax.types import TokenBatch

# Beside a deviation of rewards in [0, 1]: what the rounding of sums leaves does not count.
_EPS = 1e-4


def episode_returns(batch: TokenBatch, rewards_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(R, one): float32 [B, T]. one is 1 at a trajectory's first sampled token and 0 elsewhere; R,
  the sum of its rewards, stands there."""
  one_BT = jnp.where(batch.step_ids == 0, _step_starts(batch), 0.0)
  return step_returns(batch, rewards_BT, 1.0), one_BT


def step_returns(batch: TokenBatch, rewards_BT: jax.Array, gamma: float) -> jax.Array:
  """float32 [B, T]: G_k = sum_{i >= k} gamma^(i - k) r_i on all tokens of step k."""
  zeros_BT = jnp.zeros_like(rewards_BT)
  return advantages.gae(batch, rewards_BT, zeros_BT, gamma=gamma, lam=1.0)[0]


def relative(
  x_BT: jax.Array, weights_BT: jax.Array, ids_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """x against the weighted mean of its group.

  Args:
    x_BT: float32, any.
    weights_BT: float32, >= 0; 0 where an entry is in no group.
    ids_BT: int32, the group, in [0, B T].

  Returns:
    (x - mean, deviation, sum of the weights), float32 [B, T]: all of the entry's group. x - mean is
    exactly 0 in a group of equals. Means something only where a weight is.
  """
  chex.assert_rank([x_BT, weights_BT, ids_BT], 2)
  chex.assert_equal_shape([x_BT, weights_BT, ids_BT])
  chex.assert_type([x_BT, weights_BT], jnp.float32)
  ids = ids_BT.reshape(-1)
  # Counted from the group's smallest: the rounding of a sum must not part equals, since a deviation
  # of rounding noise would blow it up to full size.
  lowest = jax.ops.segment_min(
    jnp.where(weights_BT > 0, x_BT, jnp.inf).reshape(-1), ids, ids.size + 1
  )
  above_BT = jnp.where(weights_BT > 0, x_BT - lowest[ids_BT], 0.0)

  def total(y_BT):
    sums = jax.ops.segment_sum((weights_BT * y_BT).reshape(-1), ids, ids.size + 1)
    return sums[ids_BT]

  weight_BT = total(jnp.ones_like(x_BT))
  some_BT = jnp.where(weight_BT > 0, weight_BT, 1.0)
  centred_BT = above_BT - total(above_BT) / some_BT
  deviation_BT = jnp.sqrt(total(jnp.square(centred_BT)) / some_BT)
  return centred_BT, deviation_BT, weight_BT


def batch_relative(batch: TokenBatch, rewards_BT: jax.Array) -> jax.Array:
  """R - mean of the batch: REINFORCE with a baseline (Williams 1992)."""
  returns_BT, one_BT = episode_returns(batch, rewards_BT)
  centred_BT, _, _ = relative(returns_BT, one_BT, jnp.zeros_like(batch.group_ids))
  return on_trajectory(batch, centred_BT, one_BT)


def leave_one_out(batch: TokenBatch, rewards_BT: jax.Array) -> jax.Array:
  """R - mean of the task's other samples: RLOO (Ahmadian et al. 2024).

  With n samples that is n / (n - 1) (R - mean of all). A sample without others earns 0.
  """
  returns_BT, one_BT = episode_returns(batch, rewards_BT)
  centred_BT, _, count_BT = relative(returns_BT, one_BT, batch.group_ids)
  others_BT = jnp.maximum(count_BT - 1.0, 1.0)
  return on_trajectory(batch, centred_BT * count_BT / others_BT, one_BT)


def group_relative(batch: TokenBatch, rewards_BT: jax.Array) -> jax.Array:
  """(R - mean) / std of the task's samples: GRPO (Shao et al. 2024, section 4.1.2)."""
  returns_BT, one_BT = episode_returns(batch, rewards_BT)
  return on_trajectory(batch, _standardised(returns_BT, one_BT, batch.group_ids), one_BT)


def step_relative(batch: TokenBatch, rewards_BT: jax.Array, gamma: float) -> jax.Array:
  """A_k = sum_{i >= k} gamma^(i - k) (r_i - mean) / std, over all steps of the task's samples.

  GRPO's process supervision (Shao et al. 2024, section 4.1.3, with gamma = 1): rewards are
  normalised first and summed up then. (Returns-to-go that are normalised fall along an episode by
  themselves, so that its last step, a right answer, would be punished.) Each sample has a weight
  of 1 in mean and std. On 384 rollouts of the quickstart's start with the default rewards the mean
  is 2.1 at right answers, .9 at useful calls, -.8 at wrong answers, -1.8 at useless calls.
  """
  start_BT = _step_starts(batch)
  steps_BT = segments.trajectory_totals(batch, start_BT)
  weights_BT = start_BT / jnp.maximum(steps_BT, 1.0)
  own_BT = step_returns(batch, rewards_BT, 0.0)
  normal_BT = start_BT * _standardised(own_BT, weights_BT, batch.group_ids)
  return step_returns(batch, normal_BT, gamma)


def anchor_relative(batch: TokenBatch, rewards_BT: jax.Array, gamma: float) -> jax.Array:
  """(G_k - mean) / std over the steps of the task's samples that begin in the same state.

  GiGPO's step advantage (Feng et al. 2025, arXiv 2505.10978). The state is the last observation (at
  the first step the prompt), token by token, as in the authors' tasks. 0 for a step without its
  like.
  """
  returns_BT = step_returns(batch, rewards_BT, gamma)
  return _on_steps(batch, _standardised(returns_BT, _step_starts(batch), batch.anchor_ids))


def _standardised(x_BT, weights_BT, ids_BT):
  centred_BT, deviation_BT, _ = relative(x_BT, weights_BT, ids_BT)
  return centred_BT / (deviation_BT + _EPS)


def _step_starts(batch):
  start_BT = segments.step_starts(batch)
  return start_BT.astype(jnp.float32)


def _on_steps(batch, x_BT):
  """x of a step's first token on all its tokens."""
  return segments.spread(x_BT, _step_starts(batch), batch.action_mask)


def on_trajectory(batch: TokenBatch, x_BT: jax.Array, one_BT: jax.Array) -> jax.Array:
  """x of a trajectory's first sampled token (where one is 1) on all its sampled tokens."""
  spread_BT = segments.along(batch, 1.0 - one_BT, one_BT * x_BT)
  return jnp.where(batch.action_mask, spread_BT, 0.0)
