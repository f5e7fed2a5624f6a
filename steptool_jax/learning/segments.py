"""Linear recurrences along packed rows: the one tool for GAE, broadcasting and per-step sums.

A packed row holds several trajectories. Nothing may flow from one to the next, which is a zero
coefficient at the border, so that one scan serves a whole batch. (lax.scan and not an associative
scan: T small steps cost nothing beside the model, and it compiles ten times faster.)
"""

import jax
import jax.numpy as jnp

from steptool_jax.types import TokenBatch


def linear_recurrence(decay_BT: jax.Array, input_BT: jax.Array, reverse: bool = False) -> jax.Array:
  """x[t] = decay[t] * x[t -/+ 1] + input[t], float32 [B, T]; `reverse` runs from the end."""

  def step(x_B, inputs):
    decay_B, input_B = inputs
    x_B = decay_B * x_B + input_B
    return x_B, x_B

  start_B = jnp.zeros_like(input_BT[:, 0])
  _, out_TB = jax.lax.scan(step, start_B, (decay_BT.T, input_BT.T), reverse=reverse)
  return out_TB.T


def shift_left(x_BT: jax.Array, fill) -> jax.Array:
  """x[t + 1] at t, `fill` at the end of a row."""
  return jnp.concatenate([x_BT[:, 1:], jnp.full_like(x_BT[:, :1], fill)], axis=1)


def shift_right(x_BT: jax.Array, fill) -> jax.Array:
  """x[t - 1] at t, `fill` at the start of a row."""
  return jnp.concatenate([jnp.full_like(x_BT[:, :1], fill), x_BT[:, :-1]], axis=1)


def continues(segment_ids_BT: jax.Array) -> jax.Array:
  """float32, 1 where position t + 1 belongs to the same trajectory as t."""
  return (segment_ids_BT == shift_left(segment_ids_BT, -1)).astype(jnp.float32)


def next_marked(x_BT: jax.Array, marked_BT: jax.Array, continues_BT: jax.Array) -> jax.Array:
  """x at the next marked position after t in the same trajectory, 0 where there is none."""
  marked_BT = marked_BT.astype(jnp.float32)
  at_or_after_BT = linear_recurrence(
    (1.0 - marked_BT) * continues_BT, marked_BT * x_BT, reverse=True
  )
  return continues_BT * shift_left(at_or_after_BT, 0.0)


def step_starts(batch: TokenBatch) -> jax.Array:
  """bool [B, T], the first sampled token of each step."""
  same_step_BT = (
    shift_right(batch.action_mask, False)
    & (batch.step_ids == shift_right(batch.step_ids, -2))
    & (batch.segment_ids == shift_right(batch.segment_ids, -1))
  )
  return batch.action_mask & ~same_step_BT


def starts(segment_ids_BT: jax.Array) -> jax.Array:
  """bool [B, T], the first position of each trajectory (and of the padding)."""
  return segment_ids_BT != shift_right(segment_ids_BT, -1)


def spread(x_BT: jax.Array, from_BT: jax.Array, to_BT: jax.Array, reverse: bool = False):
  """x at marked positions, carried to the positions `to` after them (`reverse`: before them)."""
  from_BT, to_BT = from_BT.astype(jnp.float32), to_BT.astype(jnp.float32)
  return linear_recurrence(to_BT * (1.0 - from_BT), from_BT * x_BT, reverse)


def group_totals(x_BT: jax.Array, group_start_BT: jax.Array) -> jax.Array:
  """Sum of x over the contiguous group that t belongs to; a group starts where `group_start`."""
  inside_BT = 1.0 - group_start_BT.astype(jnp.float32)
  forward_BT = linear_recurrence(inside_BT, x_BT)
  backward_BT = linear_recurrence(shift_left(inside_BT, 0.0), x_BT, reverse=True)
  return forward_BT + backward_BT - x_BT
