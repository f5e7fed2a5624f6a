"""The step table of a packed batch: where its steps start, and what is known in front of each.

Critics that need no value at every token (learning/critics.py) read this table and not the rows: an
entry is the state in front of a step, or the one that a trajectory which was cut bootstraps from.
It is built on the host; entries lie in the table's row of their own row, so it is sharded as the
batch is, and what is gathered from a row never leaves its device. The steps of a trajectory of
several segments stand in the rows of these.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from steptool_jax.learning import segments
from steptool_jax.learning.batching import Packed
from steptool_jax.types import TokenBatch, calls_of

_WIDTH = 8  # entries a row has room for, in multiples: few shapes, so few compilations
USUAL_WIDTH = 4 * _WIDTH


class StepTable(NamedTuple):
  """Every field is [B, K]: K entries for the steps of each of B packed rows, in row order."""

  position: Any  # int32, of the state's token in its row; -1 where there is no entry
  final: Any  # bool, the state that a cut trajectory bootstraps from: a value and no return
  task: Any  # int32, 1.. as TokenBatch.group_ids
  peers: Any  # int32, 1.. one number for each (task, step): what the `group` critic compares
  trajectory: Any  # int32, 1.. one number over all rows
  step: Any  # int32, steps done before
  succeeded: Any  # float32, sum of SC over the calls before
  failed: Any  # float32, sum of 1 - SC over the calls before
  last_failed: Any  # float32, 1 - SC of the last call


def build(packed: Packed, width: int = 0) -> StepTable:
  """The table of a packed batch (NumPy); at least `width` entries a row.

  Replayed trajectories, which only ArCHer has, are in no table.
  """
  rows = len(packed.batch.tokens)
  entries: list[list[tuple]] = [[] for _ in range(rows)]
  numbers: dict[tuple[int, int], int] = {}
  for number, (trajectory, places) in enumerate(
    zip(packed.trajectories, packed.places, strict=True), start=1
  ):
    begins = {part.start: p for part, p in zip(trajectory.parts, places, strict=True)}
    row, start, stop, _ = places[-1]
    task = int(packed.batch.group_ids[row, start])
    succeeded = failed = last_failed = 0.0
    goes_on = [None] if packed.batch.bootstrap[row, stop - 1] else []
    for k, step in enumerate((*trajectory.steps, *goes_on)):
      if k in begins:
        row, start, _, prompt = begins[k]
        position = start + prompt - 1
      same = numbers.setdefault((task, k), len(numbers) + 1)
      known = (succeeded, failed, last_failed)
      entries[row].append((position, step is None, task, same, number, k, *known))
      if step is None:
        break
      position += len(step.tokens) + len(step.observation_tokens)
      if calls := len(calls_of(step.action)):
        last_failed = 1.0 - step.success_calling
        succeeded += calls * step.success_calling
        failed += calls * last_failed
  needed = max(map(len, entries), default=0)
  table = empty(rows, max(width, -(-needed // _WIDTH) * _WIDTH, _WIDTH))
  for row, of_row in enumerate(entries):
    for k, entry in enumerate(of_row):
      for field, value in zip(table, entry, strict=True):
        field[row, k] = value
  return table


def recorded_hidden(packed: Packed, table: StepTable) -> np.ndarray:
  """float32 [R, K, D], what the engine recorded at the entries of `packed`'s table, else 0."""
  size = packed.trajectories[0].steps[0].hidden.size
  hidden_BKD = np.zeros((*table.position.shape, size), np.float32)
  for at in zip(*np.nonzero(table.position >= 0), strict=True):
    trajectory = packed.trajectories[table.trajectory[at] - 1]
    hidden_BKD[at] = trajectory.steps[table.step[at]].hidden
  return hidden_BKD


def empty(rows: int, width: int) -> StepTable:
  """A table without entries (NumPy)."""
  shape = (rows, width)
  integers = [np.zeros(shape, np.int32) for _ in range(4)]
  floats = [np.zeros(shape, np.float32) for _ in range(3)]
  return StepTable(np.full(shape, -1, np.int32), np.zeros(shape, bool), *integers, *floats)


def gather(x_BT: jax.Array, table: StepTable) -> jax.Array:
  """x [B, T] or [B, T, D] at the table's entries, [B, K(, D)]; 0 where there is none."""
  at_BK = jnp.maximum(table.position, 0)
  there_BK = table.position >= 0
  if x_BT.ndim == 3:
    at_BK, there_BK = at_BK[..., None], there_BK[..., None]
  return jnp.where(there_BK, jnp.take_along_axis(x_BT, at_BK, axis=1), 0.0)


def scatter(values_BK: jax.Array, table: StepTable, batch: TokenBatch) -> jax.Array:
  """float32 [B, T]: each entry's value on all sampled tokens of its step, and where it was cut."""
  rows, length = batch.tokens.shape
  at_BK = jnp.where(table.position >= 0, table.position, length)
  row_BK = jnp.broadcast_to(jnp.arange(rows)[:, None], at_BK.shape)
  start_BT = jnp.zeros((rows, length), jnp.float32).at[row_BK, at_BK].set(values_BK, mode="drop")
  from_BT = segments.step_starts(batch) | batch.bootstrap
  return segments.spread(start_BT, from_BT, batch.action_mask | batch.bootstrap)
