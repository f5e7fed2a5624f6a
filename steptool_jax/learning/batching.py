"""Trajectories -> packed TokenBatch: first-fit-decreasing rows, static shapes, host side only."""

from collections.abc import Container, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from steptool_jax.types import TokenBatch, Trajectory


def packed_length(
  trajectory: Trajectory, whole_actions: bool = False, bootstrap: Container[str] = ()
) -> int:
  """Positions that a trajectory takes in a row.

  One that ends there ends with its last sampled token, which is a target but never an input, unless
  `whole_actions` asks for it: Q(s, a) reads the state after all of a. One whose status is in
  `bootstrap` keeps all: after its last token comes the state whose value it bootstraps from.
  """
  if trajectory.status in bootstrap:
    return trajectory.num_tokens
  length = trajectory.num_tokens - len(trajectory.steps[-1].observation_tokens)
  return length if whole_actions else length - 1


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
  """Bins of indices whose lengths add up to at most `capacity`; long ones are placed first.

  Raises:
    ValueError: an item is longer than a row.
  """
  bins: list[list[int]] = []
  room = np.zeros(0, np.int64)
  for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
    length = lengths[index]
    if length > capacity:
      raise ValueError(
        f"trajectory {index} has {length} tokens but train.row_tokens is {capacity}; raise it, "
        "or lower rollout.max_tokens"
      )
    fits = np.flatnonzero(room >= length)
    if fits.size:
      bins[fits[0]].append(index)
      room[fits[0]] -= length
    else:
      bins.append([index])
      room = np.append(room, capacity - length)
  return bins


def empty_batch(num_rows: int, row_tokens: int) -> TokenBatch:
  """A batch of padding only (NumPy arrays)."""
  shape = (num_rows, row_tokens)
  return TokenBatch(
    tokens=np.zeros(shape, np.int32),
    targets=np.zeros(shape, np.int32),
    segment_ids=np.zeros(shape, np.int32),
    positions=np.zeros(shape, np.int32),
    action_mask=np.zeros(shape, bool),
    step_ids=np.full(shape, -1, np.int32),
    step_end=np.zeros(shape, bool),
    bootstrap=np.zeros(shape, bool),
    rewards=np.zeros(shape, np.float32),
    behaviour_logprobs=np.zeros(shape, np.float32),
    group_ids=np.zeros(shape, np.int32),
    anchor_ids=np.zeros(shape, np.int32),
  )


class Place(NamedTuple):
  """Where a trajectory lies in a batch: positions [start, stop) of a row."""

  row: int
  start: int
  stop: int


class Packed(NamedTuple):
  """A packed batch, and where each of its trajectories lies (replayed ones left out)."""

  batch: TokenBatch
  trajectories: tuple[Trajectory, ...]
  places: tuple[Place, ...]


def pack(
  trajectories: Sequence[Trajectory], row_tokens: int, bootstrap: Container[str] = ()
) -> Packed:
  """Packs into as few rows of `row_tokens` as first-fit-decreasing finds.

  bootstrap: the statuses whose trajectories go on beyond their last token (see `pack_units`).

  Raises:
    ValueError: a trajectory without steps, or one longer than a row.
  """
  return pack_units([(t,) for t in trajectories], row_tokens, bootstrap=bootstrap)


def pack_units(
  units: Sequence[tuple[Trajectory, ...]],
  row_tokens: int,
  *,
  replayed: Sequence[Trajectory] = (),
  whole_actions: bool = False,
  bootstrap: Container[str] = (),
) -> Packed:
  """Packs trajectories that belong together into neighbouring rows.

  Args:
    units: each of W trajectories, member m of which goes to a row W n + m, as segment s of all
      these W rows. W = 1: every trajectory by itself; W = 2: pairs.
    row_tokens: length of a row.
    replayed: further trajectories, for a critic only (W = 1).
    whole_actions: see `packed_length`.
    bootstrap: statuses (config.advantage.bootstrap) whose trajectories are worth V of the state
      after them; all others are worth 0 there.

  Raises:
    ValueError: as `pack`.
  """
  width, fresh = len(units[0]) if units else 1, len(units)
  units = [*units, *((t,) for t in replayed)]
  for trajectory in (t for unit in units for t in unit):
    if not trajectory.steps:
      raise ValueError(f"trajectory of task {trajectory.task_id!r} has no steps: nothing to train")
  lengths = [[packed_length(t, whole_actions, bootstrap) for t in unit] for unit in units]
  bins = first_fit_decreasing([max(unit) for unit in lengths], row_tokens)
  batch = empty_batch(max(len(bins), 1) * width, row_tokens)
  tasks, anchors = _Numbers(), _Numbers()
  places: dict[tuple[int, int], Place] = {}
  for number, indices in enumerate(bins):
    for member in range(width):
      row, start = width * number + member, 0
      for segment, index in enumerate(indices, start=1):
        place = Place(row, start, start + lengths[index][member])
        here = slice(start, place.stop)
        _write(batch, units[index][member], place, anchors, bootstrap)
        batch.group_ids[row, here] = tasks[units[index][member].task_id]
        batch.segment_ids[row, here] = segment
        if index < fresh:
          places[index, member] = place
        else:
          batch.action_mask[row, here] = False
        start = place.stop
  trajectories = tuple(t for unit in units[:fresh] for t in unit)
  return Packed(batch, trajectories, tuple(places[key] for key in sorted(places)))


class _Numbers(dict):
  """Numbers from 1 for things in the order in which they come up."""

  def __missing__(self, key: Hashable) -> int:
    self[key] = len(self) + 1
    return self[key]


def _write(
  batch: TokenBatch,
  trajectory: Trajectory,
  place: Place,
  anchors: _Numbers,
  bootstrap: Container[str],
) -> None:
  row, start, stop = place
  ids = np.concatenate(
    [trajectory.prompt_tokens]
    + [part for step in trajectory.steps for part in (step.tokens, step.observation_tokens)]
  ).astype(np.int32)
  length = stop - start
  batch.tokens[row, start:stop] = ids[:length]
  targets = ids[1 : length + 1]
  batch.targets[row, start : start + len(targets)] = targets
  batch.positions[row, start:stop] = np.arange(length)
  # targets[t] is ids[t + 1]: a step whose first token is ids[first] is aligned at first - 1.
  first = start + len(trajectory.prompt_tokens) - 1
  seen = trajectory.prompt_tokens
  for index, step in enumerate(trajectory.steps):
    end = first + len(step.tokens)
    batch.action_mask[row, first:end] = True
    batch.step_ids[row, first:end] = index
    batch.step_end[row, end - 1] = True
    batch.rewards[row, end - 1] = step.reward
    batch.behaviour_logprobs[row, first:end] = step.logprobs
    batch.anchor_ids[row, first:end] = anchors[trajectory.task_id, seen.tobytes()]
    first, seen = end + len(step.observation_tokens), step.observation_tokens
  if trajectory.status in bootstrap:
    batch.bootstrap[row, stop - 1] = True


def unpack(packed: Packed, values_BT: np.ndarray) -> list[np.ndarray]:
  """Values [B, T] on a packed batch -> those of each trajectory's sampled tokens, in order."""
  mask_BT = packed.batch.action_mask
  return [
    values_BT[row, start:stop][mask_BT[row, start:stop]] for row, start, stop in packed.places
  ]


def padding_share(batch: TokenBatch) -> float:
  """Share of positions that hold no trajectory, rows that are empty altogether left out."""
  used = batch.segment_ids.any(axis=1)
  return float((batch.segment_ids[used] == 0).mean()) if used.any() else 0.0
