"""The first jitted program: log-probs, values, advantages.

It takes a global batch in micro-batches [N, B, T] and loops over the first `count` of them, so that
a short batch costs only its own rows and every batch size shares one compilation.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from steptool_jax.learning import advantages, importance, losses, segments, steptable
from steptool_jax.learning.outputs import Outputs
from steptool_jax.learning.programs.learners import (
  Learner,
  Metrics,
  critic_reads,
  forward,
  micro_of,
  reference_variables,
  zero_outputs,
)
from steptool_jax.learning.steptable import StepTable
from steptool_jax.policy import lora
from steptool_jax.types import TokenBatch, TrainState


def prepare(
  learner: Learner,
  state: TrainState,
  batch_NBT: TokenBatch,
  count: jax.Array,
  table_NBK: StepTable | None = None,
  recorded_NB: jax.Array | None = None,
) -> tuple[TokenBatch, Metrics]:
  """Fills old_logprobs, ref_logprobs and what the algorithm's advantage gives (float32 [N, B, T]).

  table_NBK: the batch's step table, for a critic that is fitted to it. recorded_NB: what the engine
  has recorded for the critic (Learner.records): values [N, B, T], or hidden states of the table's
  entries [N, B, K, D].

  With rollout.reuse the sampler's log-probs, and `recorded_NB`, stand for a forward pass where they
  are close to what it gives for the first micro-batch. Where they are not, all is computed, and the
  surrogate has truncated weights pi / mu.

  The KL penalty, where it is a reward, is that of today's policy, whatever old_logprobs are.
  Advantages are whitened here, over the global batch, because whitening per minibatch would erase
  the signal between trajectories.
  """
  c = learner.config
  passes, gap = _passes(learner, state, batch_NBT, count, table_NBK, recorded_NB)
  flat, (now, ref_BT), table = jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[2:]), (batch_NBT, passes, table_NBK)
  )
  old_BT, mask_BT = now.logprobs, flat.action_mask
  log_ratio_BT = jnp.where(mask_BT, old_BT - ref_BT, 0.0)  # k1
  rewards_BT = flat.rewards
  if c.loss.kl == "reward":
    rewards_BT = rewards_BT - state.kl_coef * log_ratio_BT
  signal, values, returns_BT = {}, now.values, None
  if learner.critic != "none":
    returns_BT = _returns_to_go(learner, flat, rewards_BT)
  normalised = learner.critic == "value" and c.critic.normalise
  if normalised:
    mean, deviation = _scale_of(returns_BT, segments.step_starts(flat))
    values = mean + deviation * now.values
  if learner.fits is not None:
    returns_BK = steptable.gather(returns_BT, table)
    values_BK = learner.fits(table, returns_BK, now.values, c.critic.penalty, c.critic.folds)
    values = steptable.scatter(values_BK, table, flat)
  if learner.algorithm.advantage is not None:
    signal = learner.algorithm.advantage(flat, rewards_BT, values, c)
  metrics = _signal_metrics(learner, flat, returns_BT, values, signal)
  if normalised:
    # The loss has the head's own units, in which value_clip counts as well.
    scaled_BT = (signal["returns"] - mean) / deviation
    signal |= {"values": now.values, "returns": jnp.where(mask_BT, scaled_BT, 0.0)}
  if learner.critic != "none" and c.advantage.whiten:
    weights_BT = losses.action_weights(flat, c.loss.aggregation)
    signal |= {"advantages": advantages.whiten(signal["advantages"], weights_BT)}
  if learner.critic == "double":
    # What an untaught critic says would only lead the actor astray.
    signal |= {
      "advantages": jnp.where(state.step >= learner.critic_steps, signal["advantages"], 0.0)
    }
  if c.rollout.corrected and not c.data.path and signal:
    # The surrogate is linear in the advantages, so weights on these are weights on its tokens.
    weights_BT, more = importance.truncated_weights(
      old_BT, flat, c.rollout.correction, c.rollout.correction_bound
    )
    signal |= {"advantages": signal["advantages"] * weights_BT}
    metrics |= more
  behaviour_BT = jnp.where(mask_BT, flat.behaviour_logprobs, 0.0)
  prepared = flat._replace(
    old_logprobs=behaviour_BT if learner.fixed_behaviour else old_BT,
    ref_logprobs=ref_BT,
    part_ids=None,  # a minibatch need not hold all segments of a trajectory
    trajectory_ids=None,
    **signal,
  )
  starts_BT = segments.step_starts(flat)
  trajectories = (starts_BT & (flat.step_ids == 0)).sum()
  metrics |= {"kl": log_ratio_BT.sum() / jnp.maximum(trajectories, 1)}
  if c.rollout.reuse:
    metrics |= {"sampler_gap": gap, "reused": (gap <= c.rollout.reuse).astype(jnp.float32)}
  else:
    gap_BT = jnp.where(mask_BT, jnp.abs(old_BT - flat.behaviour_logprobs), 0.0)
    sampled = jnp.maximum(mask_BT.sum(), 1)
    metrics |= {
      "sampler_gap": gap_BT.max(),
      "sampler_gap_mean": gap_BT.sum() / sampled,
      "entropy": now.entropy.sum() / sampled,
    }
  return jax.tree.map(lambda x: x.reshape(batch_NBT.tokens.shape), prepared), metrics


def _passes(
  learner: Learner,
  state: TrainState,
  batch_NBT: TokenBatch,
  count: jax.Array,
  table_NBK: StepTable | None,
  recorded_NB: jax.Array | None,
) -> tuple[tuple[Outputs, jax.Array], jax.Array | None]:
  """((the policy's outputs, the reference's log-probs), each [N, B, T]; the gap of rollout.reuse).

  Without a reference its log-probs are the policy's, without rollout.reuse there is no gap.
  """
  variables = lora.join_variables(state.trainable, state.frozen)
  heads = (state.trainable.get("critic"), state.target)

  def of_policy(index):
    micro = micro_of(batch_NBT, index)
    table = None if table_NBK is None else micro_of(table_NBK, index)
    return forward(learner, variables, micro, critic_reads(learner, variables, micro, heads, table))

  def of_reference(index):
    return forward(learner, reference_variables(state), micro_of(batch_NBT, index)).logprobs

  def of_micro(index):
    now = of_policy(index)
    return now, of_reference(index) if learner.with_reference else now.logprobs

  empty = zero_outputs(learner, batch_NBT.tokens.shape, heads=2, table=table_NBK)
  bound = learner.config.rollout.reuse
  if not bound:
    return _filled((empty, empty.logprobs), count, of_micro), None
  now, gap = importance.reused(batch_NBT, count, recorded_NB, empty, of_policy, bound)
  if learner.with_reference:
    return (now, _filled(empty.logprobs, count, of_reference)), gap
  return (now, now.logprobs), gap


def _filled(empty: Any, count: jax.Array, of: Callable[[jax.Array], Any]) -> Any:
  """`empty` [N, ...] with what `of` gives for each of the first `count` micro-batches."""

  def one(index, filled):
    return jax.tree.map(lambda whole, part: whole.at[index].set(part), filled, of(index))

  return jax.lax.fori_loop(0, count, one, empty)


def _returns_to_go(learner: Learner, batch: TokenBatch, rewards_BT: jax.Array) -> jax.Array:
  """float32 [B, T]: what GAE gives with lambda = 1 and V = 0; what comes after a cut counts 0."""
  c = learner.config.advantage
  zeros_BT = jnp.zeros_like(rewards_BT)
  return advantages.gae(
    batch,
    rewards_BT,
    zeros_BT,
    gamma=c.gamma,
    lam=1.0,
    level=c.level,
    broadcast=False,
    step_episodes=learner.algorithm.step_episodes,
  )[0]


def _scale_of(x_BT: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(mean, deviation) of the marked values over the global batch; 1 where they are all the same."""
  mean = jnp.where(mask_BT, x_BT, 0.0).sum() / jnp.maximum(mask_BT.sum(), 1)
  variance = _masked_variance(x_BT, mask_BT)
  return mean, jnp.where(variance > 1e-8, jnp.sqrt(variance), 1.0)


def _signal_metrics(learner, batch, returns_BT, values, signal: dict[str, jax.Array]) -> Metrics:
  """How far advantages spread before whitening, and how much of the returns V explains."""
  metrics = {}
  if "advantages" in signal:
    variance = _masked_variance(signal["advantages"], batch.action_mask)
    metrics["advantage_std"] = jnp.sqrt(variance)
  if learner.critic != "none":
    values_BT = values[0].v if learner.critic == "double" else values
    # At step starts, where every level fits the values; of returns that no V has a part in.
    starts_BT = segments.step_starts(batch)
    left = _masked_variance(returns_BT - values_BT, starts_BT)
    metrics["explained_variance"] = 1.0 - left / (_masked_variance(returns_BT, starts_BT) + 1e-8)
  return metrics


def _masked_variance(x_BT, mask_BT):
  count = jnp.maximum(mask_BT.sum(), 1)
  mean = jnp.where(mask_BT, x_BT, 0.0).sum() / count
  return jnp.where(mask_BT, jnp.square(x_BT - mean), 0.0).sum() / count


def abstract_recorded(
  learner: Learner, batch_NBT: TokenBatch, table_NBK: StepTable | None
) -> jax.ShapeDtypeStruct | None:
  """The shape of prepare's `recorded_NB` for batches and tables of these shapes."""
  if not learner.records:
    return None
  shape = batch_NBT.tokens.shape
  return jax.eval_shape(lambda: zero_outputs(learner, shape, heads=2, table=table_NBK).values)


def action_logprobs(
  learner: Learner, variables: dict, batch_NBT: TokenBatch, count: jax.Array
) -> jax.Array:
  """Today's log-probs of the sampled tokens, float32 [N, B, T], 0 elsewhere."""

  def of_micro(index):
    return forward(learner, variables, micro_of(batch_NBT, index)).logprobs

  return _filled(jnp.zeros(batch_NBT.tokens.shape, jnp.float32), count, of_micro)
