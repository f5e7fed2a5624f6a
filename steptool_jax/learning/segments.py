"""Linear recurrences along packed rows: the one tool for GAE, broadcasting and per-step sums.

A packed row holds several trajectories. Nothing may flow from one to the next, which is a zero
coefficient at the border, so that one scan serves a whole batch. (lax.scan and not an associative
scan: T small steps cost nothing beside the model, and it compiles ten times faster.)

A trajectory whose history was changed lies in several segments of several rows. What flows through
a segment is an affine function of what comes in, x + through * incoming. So each segment is one
entry of a table, in which it is found out what comes in where (`along`); a trajectory of one
segment gets 0, and with it the bits that it had without a table.
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


def along(
  batch: TokenBatch, decay_BT: jax.Array, input_BT: jax.Array, reverse: bool = False
) -> jax.Array:
  """x[t] = decay[t] * x[t -/+ 1] + input[t] along whole trajectories, in whatever segments they
  lie; what comes in at a trajectory's start (`reverse`: its end) is 0."""
  return _along(batch, decay_BT, input_BT, reverse)[0]


def next_marked(batch: TokenBatch, x_BT: jax.Array, marked_BT: jax.Array) -> jax.Array:
  """x at the next marked position after t in the same trajectory, 0 where there is none."""
  marked_BT = marked_BT.astype(jnp.float32)
  at_or_after_BT, incoming_BT = _along(batch, 1.0 - marked_BT, marked_BT * x_BT, reverse=True)
  continues_BT = continues(batch.segment_ids)
  next_BT = continues_BT * shift_left(at_or_after_BT, 0.0)
  return next_BT if incoming_BT is None else next_BT + (1.0 - continues_BT) * incoming_BT


def trajectory_totals(batch: TokenBatch, x_BT: jax.Array) -> jax.Array:
  """Sum of x over all positions of t's trajectory."""
  starts_BT = starts(batch.segment_ids)
  totals_BT = group_totals(x_BT, starts_BT)
  if batch.part_ids is None:
    return totals_BT
  ids = batch.trajectory_ids.reshape(-1)
  once = jnp.where(starts_BT, totals_BT, 0.0).reshape(-1)
  return jax.ops.segment_sum(once, ids, ids.size + 1)[batch.trajectory_ids]


def _along(batch, decay_BT, input_BT, reverse):
  """(x, what comes into t's segment from the neighbouring one of its trajectory; None: nothing)."""
  ends_BT, starts_BT = 1.0 - continues(batch.segment_ids), starts(batch.segment_ids)
  inlet_BT, outlet_BT = (ends_BT, starts_BT) if reverse else (starts_BT, ends_BT)
  inlet_BT = inlet_BT.astype(jnp.float32)
  inside_BT = (1.0 - inlet_BT) * decay_BT
  x_BT = linear_recurrence(inside_BT, input_BT, reverse)
  if batch.part_ids is None:
    return x_BT, None
  through_BT = linear_recurrence(inside_BT, inlet_BT * decay_BT, reverse)
  size = batch.part_ids.size + 2  # no part has number 0 or the last one
  at_BT = jnp.where(outlet_BT.astype(bool) & (batch.part_ids > 0), batch.part_ids, size)

  def of_parts(y_BT):
    return jnp.zeros(size, y_BT.dtype).at[at_BT].set(y_BT, mode="drop")

  x_P, through_P, owner_P = map(of_parts, (x_BT, through_BT, batch.trajectory_ids))
  shift = -1 if reverse else 1
  follows_P = (owner_P > 0) & (owner_P == jnp.roll(owner_P, shift))
  most = jax.ops.segment_sum((owner_P > 0).astype(jnp.int32), owner_P, size).max()

  def once(_, incoming_P):
    return jnp.where(follows_P, jnp.roll(x_P + through_P * incoming_P, shift), 0.0)

  # After n rounds the first n segments of every trajectory are right, and stay so.
  incoming_P = jax.lax.fori_loop(0, most, once, jnp.zeros(size, jnp.float32))
  incoming_BT = incoming_P[batch.part_ids]
  return x_BT + through_BT * incoming_BT, incoming_BT


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
