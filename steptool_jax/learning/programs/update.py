"""The second jitted program: one optimizer step.

As the first one (preparation.py) it loops over the micro-batches [N, B, T] of a batch.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from steptool_jax.learning import double_critic, losses
from steptool_jax.learning.programs import preparation
from steptool_jax.learning.programs.learners import (
  Learner,
  Metrics,
  critic_reads,
  forward,
  micro_of,
  zero_outputs,
)
from steptool_jax.policy import lora, model, sharding
from steptool_jax.types import TokenBatch, TrainState


def compile_programs(learner: Learner) -> tuple[Callable, Callable]:
  """(prepare, update) under jit; the state is donated to update."""
  return (
    sharding.jit(functools.partial(preparation.prepare, learner)),
    sharding.jit(functools.partial(update, learner), donate_argnums=0),
  )


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
    return forward(learner, variables, micro, critic_reads(learner, variables, micro, heads))

  denominators = _total_denominators(learner, batch_NBT, count)

  def loss_of_micro(trainable, micro):
    outputs = outputs_of(trainable, micro)
    terms, metrics = _terms(learner, outputs, micro, state.kl_coef)
    shares = {k: s / denominators[k] for k, (s, _) in (terms | metrics).items()}
    return sum(shares[k] for k in terms), shares

  def one(index, carry):
    grads, totals, finite = carry
    micro = micro_of(batch_NBT, index)
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
    # The heads' loss reaches the layers below them, and warm-up is the heads' alone.
    warm = state.step < learner.critic_steps
    trainable = {
      name: jax.tree.map(lambda new, old: jnp.where(warm, old, new), part, state.trainable[name])
      if name != "critic"
      else part
      for name, part in trainable.items()
    }
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
    outputs = forward(learner, variables, micro, critic_reads(learner, variables, micro, ()))
    terms, _ = _terms(learner, outputs, micro, state.kl_coef)
    return terms["value_loss"][0] / denominators["value_loss"]

  def one(index, grads):
    more = jax.grad(loss_of_micro)(heads, micro_of(batch_NBT, index))
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
  zeros = zero_outputs(learner, batch_NBT.tokens.shape[1:], heads=1)

  def of_micro(index):
    terms, metrics = _terms(learner, zeros, micro_of(batch_NBT, index), jnp.float32(0.0))
    return {name: denominator for name, (_, denominator) in (terms | metrics).items()}

  empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(of_micro, 0))
  totals = jax.lax.fori_loop(
    0, count, lambda index, sums: jax.tree.map(jnp.add, sums, of_micro(index)), empty
  )
  return jax.tree.map(lambda x: jnp.maximum(x, 1e-8), totals)


def _is_finite(batch: TokenBatch) -> jax.Array:
  """bool[], whether all that the trajectories of a micro-batch bring along is finite."""
  inside_BT = batch.segment_ids > 0
  floats = [x for x in jax.tree.leaves(batch) if jnp.issubdtype(x.dtype, jnp.floating)]
  return jnp.all(jnp.stack([jnp.isfinite(x) | ~inside_BT for x in floats]))
