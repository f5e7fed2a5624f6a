"""The two jitted programs: prepare (log-probs, values, advantages) and update (one optimizer step).

Both take a global batch in micro-batches [N, B, T] and loop over the first `count` of them, so that
a short batch costs only its own rows and every batch size shares one compilation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from steptool_jax.config import Config
from steptool_jax.learning import (
  advantages,
  critics,
  double_critic,
  importance,
  losses,
  segments,
  steptable,
)
from steptool_jax.learning.algorithms import Algorithm, shares_prompts
from steptool_jax.learning.outputs import Outputs, policy_outputs
from steptool_jax.learning.steptable import StepTable
from steptool_jax.policy import lora, model, sharding
from steptool_jax.types import TokenBatch, TrainState

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Learner:
  """What the two programs close over; all static. config: `algorithms.resolve`d for the row."""

  model: model.ModelConfig
  algorithm: Algorithm
  config: Config
  optimizer: optax.GradientTransformation

  @property
  def with_reference(self) -> bool:
    """Whether a reference policy is evaluated: for a KL penalty, or because the loss reads it."""
    return self.algorithm.reference or self.config.loss.kl != "none"

  @property
  def temperature(self) -> float:
    """The behaviour policy's temperature, which all log-probs take; demonstrations have none."""
    return 1.0 if self.algorithm.rewards == "none" else self.config.rollout.temperature

  @property
  def fixed_behaviour(self) -> bool:
    """Whether old log-probs are the batch's behaviour_logprobs, and not those of today's policy."""
    return bool(self.config.data.path) and self.config.data.behaviour == "start"

  @property
  def critic(self) -> str:
    """Where values come from; `algorithms.resolve` has filled it in."""
    return self.config.critic.kind

  @property
  def fits(self) -> Callable[..., jax.Array] | None:
    """What makes values out of a step table; None: the critic needs no table."""
    return critics.get_critic(self.critic).fit

  @property
  def records(self) -> str:
    """What the engine has recorded for the critic."""
    return critics.recorded(self.config)

  @property
  def critic_steps(self) -> int:
    """First optimizer steps, which train ArCHer's critic alone."""
    t = self.config.train
    return self.config.archer.warmup * t.epochs * t.minibatches


def init_state(learner: Learner, trainable: Any, frozen: Any, seed: int = 0) -> TrainState:
  """A fresh optimizer, today's policy as the reference where one is needed, ArCHer's critic.

  With adapters the reference is the same weights with adapters off, so nothing is copied.
  """
  needs_copy = learner.with_reference and "lora" not in trainable
  reference, target = {}, ()
  if needs_copy:
    reference = jax.tree.map(jnp.copy, model.in_compute_dtype(learner.model, trainable))
  if learner.critic == "double":
    heads = double_critic.init_critic(learner.model.hidden_size, jax.random.key(seed))
    trainable, target = trainable | {"critic": heads}, jax.tree.map(jnp.copy, heads)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    trainable=trainable,
    frozen=frozen,
    reference=reference,
    opt_state=learner.optimizer.init(trainable),
    kl_coef=jnp.asarray(learner.config.loss.kl_coef, jnp.float32),
    target=target,
  )


def reference_variables(state: TrainState) -> dict:
  """The reference policy's variables: the frozen copy, or the base model with adapters off."""
  if state.reference:
    return lora.join_variables(state.reference, {})
  return lora.adapters_off(lora.join_variables(state.trainable, state.frozen))


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
  variables = lora.join_variables(state.trainable, state.frozen)
  heads = (state.trainable.get("critic"), state.target)

  def of_policy(index):
    micro = _micro(batch_NBT, index)
    table = None if table_NBK is None else _micro(table_NBK, index)
    return _outputs(learner, variables, micro, _values(learner, variables, micro, heads, table))

  def of_reference(index):
    return _outputs(learner, reference_variables(state), _micro(batch_NBT, index)).logprobs

  def of_micro(index):
    now = of_policy(index)
    return now, of_reference(index) if learner.with_reference else now.logprobs

  def one(index, filled):
    return jax.tree.map(lambda whole, part: whole.at[index].set(part), filled, of_micro(index))

  shape = batch_NBT.tokens.shape
  empty = _zero_outputs(learner, shape, heads=2, table=table_NBK)
  if c.rollout.reuse:
    now, gap = importance.reused(batch_NBT, count, recorded_NB, empty, of_policy, c.rollout.reuse)
    ref_NBT = now.logprobs
    if learner.with_reference:
      ref_NBT = jax.lax.fori_loop(
        0, count, lambda index, ref: ref.at[index].set(of_reference(index)), empty.logprobs
      )
    filled = now, ref_NBT
  else:
    filled = jax.lax.fori_loop(0, count, one, (empty, empty.logprobs))
  flat, (now, ref_BT), table = jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[2:]), (batch_NBT, filled, table_NBK)
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
  metrics |= {
    "kl": log_ratio_BT.sum() / jnp.maximum(trajectories, 1),
  }
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
  return jax.tree.map(lambda x: x.reshape(shape), prepared), metrics


def abstract_recorded(
  learner: Learner, batch_NBT: TokenBatch, table_NBK: StepTable | None
) -> jax.ShapeDtypeStruct | None:
  """The shape of prepare's `recorded_NB` for batches and tables of these shapes."""
  if not learner.records:
    return None
  shape = batch_NBT.tokens.shape
  return jax.eval_shape(lambda: _zero_outputs(learner, shape, heads=2, table=table_NBK).values)


def _returns_to_go(learner: Learner, batch: TokenBatch, rewards_BT: jax.Array) -> jax.Array:
  """float32 [B, T]: what GAE gives with lambda = 1 and V = 0; what comes after a cut counts 0."""
  c = learner.config.advantage
  zeros_BT = jnp.zeros_like(rewards_BT)
  return advantages.gae(
    batch, rewards_BT, zeros_BT, gamma=c.gamma, lam=1.0, level=c.level, broadcast=False
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


def action_logprobs(
  learner: Learner, variables: dict, batch_NBT: TokenBatch, count: jax.Array
) -> jax.Array:
  """Today's log-probs of the sampled tokens, float32 [N, B, T], 0 elsewhere."""

  def one(index, filled):
    outputs = _outputs(learner, variables, _micro(batch_NBT, index))
    return filled.at[index].set(outputs.logprobs)

  zeros_NBT = jnp.zeros(batch_NBT.tokens.shape, jnp.float32)
  return jax.lax.fori_loop(0, count, one, zeros_NBT)


def update(
  learner: Learner, state: TrainState, batch_NBT: TokenBatch, count: jax.Array
) -> tuple[TrainState, Metrics]:
  """One optimizer step on the minibatch; gradients are accumulated over its micro-batches.

  Exact: denominators are those of the whole minibatch, so N micro-batches give the gradient of one
  large batch. Where anything is not finite (the gradient, a term or metric of the loss, what the
  batch brings along) parameters and optimizer stay as they were, and metrics["skipped"] is 1.
  """

  def outputs_of(trainable, micro):
    variables = lora.join_variables(trainable, state.frozen)
    heads = (trainable.get("critic"),)
    return _outputs(learner, variables, micro, _values(learner, variables, micro, heads))

  denominators = _total_denominators(learner, batch_NBT, count)

  def loss_of_micro(trainable, micro):
    outputs = outputs_of(trainable, micro)
    terms, metrics = _terms(learner, outputs, micro, state.kl_coef)
    shares = {k: s / denominators[k] for k, (s, _) in (terms | metrics).items()}
    return sum(shares[k] for k in terms), shares

  def one(index, carry):
    grads, totals, finite = carry
    micro = _micro(batch_NBT, index)
    more, shares = jax.grad(loss_of_micro, has_aux=True)(read, micro)
    grads, totals = jax.tree.map(
      lambda x, y: x + y.astype(x.dtype), (grads, totals), (more, shares)
    )
    return grads, totals, finite & _is_finite(micro)

  # Gradients of what is read, not of what is stored: those of one micro-batch take half the room
  # where storage is float32, and are summed up in float32.
  read = model.in_compute_dtype(learner.model, state.trainable)
  zero_grads = jax.tree.map(jnp.zeros_like, state.trainable)
  zero_totals = {name: jnp.zeros((), jnp.float32) for name in denominators}
  start = (zero_grads, zero_totals, jnp.bool_(True))
  grads, metrics, finite = jax.lax.fori_loop(0, count, one, start)
  grad_norm = optax.global_norm(grads)
  # A clipped ratio or a mask can hide a NaN from the gradient: it is looked for at its source.
  for value in (grad_norm, *metrics.values()):
    finite &= jnp.isfinite(value)
  updates, opt_state = learner.optimizer.update(grads, state.opt_state, state.trainable)
  trainable = optax.apply_updates(state.trainable, updates)
  target = state.target
  if learner.critic == "double":
    target = double_critic.polyak(target, trainable["critic"], learner.config.archer.tau)
  trainable, opt_state, target = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old),
    (trainable, opt_state, target),
    (state.trainable, state.opt_state, state.target),
  )
  metrics = metrics | {"grad_norm": grad_norm, "skipped": 1.0 - finite.astype(jnp.float32)}
  new = {"trainable": trainable, "opt_state": opt_state, "target": target}
  return state._replace(step=state.step + 1, **new), metrics


def fit_values(
  learner: Learner, state: TrainState, batch_NBT: TokenBatch, count: jax.Array
) -> TrainState:
  """One more step of the value head alone, on the minibatch's value loss (critic.passes).

  The policy is read and stays as it is, and so do the step, the schedule and all moments but the
  head's. Nothing changes where the head's gradient is not finite.
  """
  denominators = _total_denominators(learner, batch_NBT, count)
  heads, others = _parted(state.trainable)

  def loss_of_micro(heads, micro):
    variables = lora.join_variables(_joined(heads, others), state.frozen)
    outputs = _outputs(learner, variables, micro, _values(learner, variables, micro, ()))
    terms, _ = _terms(learner, outputs, micro, state.kl_coef)
    return terms["value_loss"][0] / denominators["value_loss"]

  def one(index, grads):
    more = jax.grad(loss_of_micro)(heads, _micro(batch_NBT, index))
    return jax.tree.map(jnp.add, grads, more)

  grads = jax.lax.fori_loop(0, count, one, jax.tree.map(jnp.zeros_like, heads))
  whole = _joined(grads, jax.tree.map(jnp.zeros_like, others))
  updates, opt_state = learner.optimizer.update(whole, state.opt_state, state.trainable)
  trainable = optax.apply_updates(state.trainable, updates)
  finite = jnp.isfinite(optax.global_norm(grads))

  def of_head(path, new, old):
    return jnp.where(finite, new, old) if _is_head(path) else old

  trainable, opt_state = jax.tree_util.tree_map_with_path(
    of_head, (trainable, opt_state), (state.trainable, state.opt_state)
  )
  return state._replace(trainable=trainable, opt_state=opt_state)


def _is_head(path) -> bool:
  return "value_head" in sharding.path_string(path).split("/")


def _parted(trainable: dict) -> tuple[dict, dict]:
  """(the tree with None for all but the value head, the tree with None for the value head)."""
  part = jax.tree_util.tree_map_with_path
  return (
    part(lambda path, x: x if _is_head(path) else None, trainable),
    part(lambda path, x: None if _is_head(path) else x, trainable),
  )


def _joined(heads: dict, others: dict) -> dict:
  return jax.tree.map(
    lambda a, b: b if a is None else a, heads, others, is_leaf=lambda x: x is None
  )


def _values(learner, variables, micro, heads, table=None) -> Callable[[jax.Array], Any] | None:
  """hidden states -> what the critic reads of them; heads: ArCHer's, each of which gives values."""
  if learner.critic == "value":
    return lambda hidden_BTD: model.project_values(variables, hidden_BTD)
  if learner.critic == "double":
    return lambda hidden_BTD: tuple(double_critic.project(h, hidden_BTD, micro) for h in heads)
  if table is not None and critics.get_critic(learner.critic).hidden:
    return lambda hidden_BTD: steptable.gather(hidden_BTD.astype(jnp.float32), table)
  return None


def _outputs(learner, variables, micro, heads=None) -> Outputs:
  if sharding.platform() == "tpu" and not shares_prompts(learner.algorithm, learner.config.train):
    micro = micro._replace(until=None)  # segments say it all, to a kernel that asks for less
  return policy_outputs(
    learner.model,
    variables,
    micro,
    temperature=learner.temperature,
    chunk=learner.config.loss.logprob_chunk,
    heads=heads,
  )


def _zero_outputs(learner, shape: tuple[int, ...], heads: int, table=None) -> Outputs:
  """What `_outputs` gives, as zeros of this shape; a forward pass need not be traced to know it."""
  zeros, values = jnp.zeros(shape, jnp.float32), None
  if learner.critic == "value":
    values = zeros
  elif learner.critic == "double":
    values = (double_critic.Utterances(zeros, zeros, zeros),) * heads
  elif table is not None and critics.get_critic(learner.critic).hidden:
    values = jnp.zeros((*table.position.shape, learner.model.hidden_size), jnp.float32)
  return Outputs(zeros, zeros, values)


def _terms(learner, outputs, micro, kl_coef):
  c = learner.config
  terms, metrics = learner.algorithm.loss(outputs, micro, c)
  if c.loss.kl == "loss":
    kl_BT = losses.kl_to_reference(outputs.logprobs, micro.ref_logprobs, micro.action_mask)
    total, denominator = losses.aggregate(kl_BT, micro, c)
    terms = terms | {"kl_loss": (kl_coef * total, denominator)}
  return terms, metrics


def _total_denominators(learner, batch_NBT, count) -> dict[str, jax.Array]:
  """Denominators depend on masks alone, so zeros stand in for the outputs."""
  zeros = _zero_outputs(learner, batch_NBT.tokens.shape[1:], heads=1)

  def of_micro(index):
    terms, metrics = _terms(learner, zeros, _micro(batch_NBT, index), jnp.float32(0.0))
    return {name: denominator for name, (_, denominator) in (terms | metrics).items()}

  empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(of_micro, 0))
  totals = jax.lax.fori_loop(
    0, count, lambda index, sums: jax.tree.map(jnp.add, sums, of_micro(index)), empty
  )
  return jax.tree.map(lambda x: jnp.maximum(x, 1e-8), totals)


def _micro(batch_NBT: TokenBatch, index) -> TokenBatch:
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, index, axis=0, keepdims=False), batch_NBT
  )


def _is_finite(batch: TokenBatch) -> jax.Array:
  """bool[], whether all that the trajectories of a micro-batch bring along is finite."""
  inside_BT = batch.segment_ids > 0
  floats = [x for x in jax.tree.leaves(batch) if jnp.issubdtype(x.dtype, jnp.floating)]
  return jnp.all(jnp.stack([jnp.isfinite(x) | ~inside_BT for x in floats]))


def _masked_variance(x_BT, mask_BT):
  count = jnp.maximum(mask_BT.sum(), 1)
  mean = jnp.where(mask_BT, x_BT, 0.0).sum() / count
  return jnp.where(mask_BT, jnp.square(x_BT - mean), 0.0).sum() / count


def compile_programs(learner: Learner) -> tuple[Callable, Callable]:
  """(prepare, update) under jit; the state is donated to update."""
  return (
    sharding.jit(functools.partial(prepare, learner)),
    sharding.jit(functools.partial(update, learner), donate_argnums=0),
  )
