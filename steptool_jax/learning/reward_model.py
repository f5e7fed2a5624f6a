"""The step reward model's two jitted programs: scores of steps, and one optimizer step.

Linear heads (SC, Con, IsSolved; rewards/model.py) on the hidden states of a trunk of its own. The
batch is packed in rows and cut into micro-batches [N, B, T], as the policy's. A head's loss is the
binary cross-entropy with soft labels, a mean over the labels that there are in the whole batch:

    L_h = sum w (-y log s(z) - (1 - y) log(1 - s(z))) / sum w        s: the sigmoid, z = h W + b
    L = L_SC + L_Con + L_IsSolved

Shapes: N micro-batches, B rows, T tokens, D hidden, H = 3 heads.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from steptool_jax.policy import lora, model, sharding
from steptool_jax.types import HEADS, TrainState


class Labelled(NamedTuple):
  """Packed trajectories, [B, T] each, with labels where a step ends; None where they are scored."""

  tokens: Any  # int32
  positions: Any  # int32
  segment_ids: Any  # int32, 0 = padding
  labels: Any = None  # float32[B, T, H] in [0, 1]
  weights: Any = None  # float32[B, T, H], 1 where there is a label


def init_heads(size: int) -> dict[str, jax.Array]:
  """{kernel [D, H], bias [H]} float32, zero: every score starts at 1/2."""
  shape = (size, len(HEADS))
  return {"kernel": jnp.zeros(shape, jnp.float32), "bias": jnp.zeros(len(HEADS), jnp.float32)}


def init_state(
  optimizer: optax.GradientTransformation, size: int, trainable: Any, frozen: Any
) -> TrainState:
  """A fresh optimizer and fresh heads on a trunk; the policy's value head is frozen."""
  trainable = trainable | {"reward_heads": init_heads(size)}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    trainable=trainable,
    frozen=frozen,
    reference={},
    opt_state=optimizer.init(trainable),
    kl_coef=jnp.zeros((), jnp.float32),
  )


def logits(config: model.ModelConfig, variables: dict, heads: dict, batch: Labelled) -> jax.Array:
  """float32[B, T, H]; only those at the ends of steps mean anything."""
  hidden_BTD = model.forward(config, variables, batch.tokens, batch.positions, batch.segment_ids)
  hidden_BTD = hidden_BTD.astype(jnp.float32)
  return jnp.matmul(hidden_BTD, heads["kernel"], precision="highest") + heads["bias"]


def scores(
  config: model.ModelConfig, variables: dict, heads: dict, batch_NBT: Labelled, count: jax.Array
) -> jax.Array:
  """Chances in [0, 1], float32[N, B, T, H], of the first `count` micro-batches."""

  def one(index, filled):
    found = jax.nn.sigmoid(logits(config, variables, heads, _micro(batch_NBT, index)))
    return filled.at[index].set(found)

  empty = jnp.zeros((*batch_NBT.tokens.shape, len(HEADS)), jnp.float32)
  return jax.lax.fori_loop(0, count, one, empty)


def losses(logits_BTH: jax.Array, labels_BTH: jax.Array, weights_BTH: jax.Array):
  """(sums [H], denominators [H]) of the binary cross-entropy, float32."""
  each_BTH = optax.sigmoid_binary_cross_entropy(logits_BTH, labels_BTH)
  # where, not a product alone: an infinity where there is no label must not become NaN.
  each_BTH = jnp.where(weights_BTH > 0, each_BTH, 0.0) * weights_BTH
  return each_BTH.sum((0, 1)), weights_BTH.sum((0, 1))


def update(
  config: model.ModelConfig,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  batch_NBT: Labelled,
  count: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer step; gradients are summed over the first `count` micro-batches.

  Exact: denominators are those of the whole batch. Where anything is not finite, state and
  optimizer stay as they were and metrics["skipped"] is 1.
  """
  denominators_H = jnp.maximum(batch_NBT.weights.sum((0, 1, 2)), 1.0)

  def loss_of_micro(trainable, micro):
    variables = lora.join_variables(trainable, state.frozen)
    found = logits(config, variables, trainable["reward_heads"], micro)
    sums_H, _ = losses(found, micro.labels, micro.weights)
    shares_H = sums_H / denominators_H
    return shares_H.sum(), shares_H

  def one(index, carry):
    more = jax.grad(loss_of_micro, has_aux=True)(state.trainable, _micro(batch_NBT, index))
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), carry, more)

  start = (jax.tree.map(jnp.zeros_like, state.trainable), jnp.zeros(len(HEADS), jnp.float32))
  grads, shares_H = jax.lax.fori_loop(0, count, one, start)
  grad_norm = optax.global_norm(grads)
  finite = jnp.isfinite(grad_norm) & jnp.isfinite(shares_H).all()
  updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
  trainable = optax.apply_updates(state.trainable, updates)
  trainable, opt_state = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old),
    (trainable, opt_state),
    (state.trainable, state.opt_state),
  )
  metrics = {f"{name}_loss": shares_H[h] for h, name in enumerate(HEADS)}
  metrics |= {
    "loss": shares_H.sum(),
    "grad_norm": grad_norm,
    "skipped": 1.0 - finite.astype(jnp.float32),
  }
  return state._replace(step=state.step + 1, trainable=trainable, opt_state=opt_state), metrics


def _micro(batch_NBT: Labelled, index) -> Labelled:
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, index, axis=0, keepdims=False), batch_NBT
  )


@functools.cache
def compile_update(config: model.ModelConfig, optimizer: optax.GradientTransformation) -> Callable:
  """`update` under jit; the state is donated."""
  return sharding.jit(functools.partial(update, config, optimizer), donate_argnums=0)


@functools.cache
def compile_scores(config: model.ModelConfig) -> Callable:
  """`scores` under jit."""
  return sharding.jit(functools.partial(scores, config))
