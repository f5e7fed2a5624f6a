"""Trajectories -> packed TokenBatch: first-fit-decreasing rows, static shapes, host side only."""

from collections.abc import Hashable, Sequence

import numpy as np

from steptool_jax.types import TokenBatch, Trajectory


def packed_length(trajectory: Trajectory, whole_actions: bool = False) -> int:
  """Positions that a trajectory takes in a row.

  A terminated one ends with its last sampled token, which is a target but never an input, unless
  `whole_actions` asks for it: Q(s, a) reads the state behind all of a. A truncated one keeps all:
  behind its last token stands the state whose value it bootstraps from.
  """
  if trajectory.truncated:
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


def pack(trajectories: Sequence[Trajectory], row_tokens: int, row_multiple: int = 1) -> TokenBatch:
  """Packs into as few rows of `row_tokens` as first-fit-decreasing finds.

  The number of rows is rounded up to `row_multiple` with empty rows, for static shapes.

  Raises:
    ValueError: a trajectory without steps, or one longer than a row.
  """
  return pack_units([(t,) for t in trajectories], row_tokens, row_multiple)


def pack_units(
  units: Sequence[tuple[Trajectory, ...]],
  row_tokens: int,
  row_multiple: int = 1,
  *,
  replayed: Sequence[Trajectory] = (),
  whole_actions: bool = False,
) -> TokenBatch:
  """Packs trajectories that belong together into neighbouring rows.

  Args:
    units: each of W trajectories, member m of which goes to a row W n + m, as segment s of all
      these W rows. W = 1: every trajectory by itself; W = 2: pairs.
    row_tokens, row_multiple: as `pack`; row_multiple is a multiple of W.
    replayed: further trajectories, for a critic only (W = 1).
    whole_actions: see `packed_length`.

  Raises:
    ValueError: as `pack`.
  """
  width = len(units[0]) if units else 1
  units = [*units, *((t,) for t in replayed)]
  for trajectory in (t for unit in units for t in unit):
    if not trajectory.steps:
      raise ValueError(f"trajectory of task {trajectory.task_id!r} has no steps: nothing to train")
  lengths = [max(packed_length(t, whole_actions) for t in unit) for unit in units]
  bins = first_fit_decreasing(lengths, row_tokens)
  num_rows = max(-(-len(bins) * width // row_multiple), 1) * row_multiple
  batch = empty_batch(num_rows, row_tokens)
  tasks, anchors = _Numbers(), _Numbers()
  for number, indices in enumerate(bins):
    for member in range(width):
      row, start = width * number + member, 0
      for segment, index in enumerate(indices, start=1):
        trajectory = units[index][member]
        here = slice(start, start + packed_length(trajectory, whole_actions))
        _write(batch, trajectory, row, here, anchors)
        batch.group_ids[row, here] = tasks[trajectory.task_id]
        batch.segment_ids[row, here] = segment
        if index >= len(units) - len(replayed):
          batch.action_mask[row, here] = False
        start = here.stop
  return batch


class _Numbers(dict):
  """Numbers from 1 for things in the order in which they come up."""

  def __missing__(self, key: Hashable) -> int:
    self[key] = len(self) + 1
    return self[key]


def _write(
  batch: TokenBatch, trajectory: Trajectory, row: int, here: slice, anchors: _Numbers
) -> None:
  """Writes one trajectory at [row, here]."""
  ids = np.concatenate(
    [trajectory.prompt_tokens]
    + [part for step in trajectory.steps for part in (step.tokens, step.observation_tokens)]
  ).astype(np.int32)
  start, length = here.start, here.stop - here.start
  batch.tokens[row, here] = ids[:length]
  targets = ids[1 : length + 1]
  batch.targets[row, start : start + len(targets)] = targets
  batch.positions[row, here] = np.arange(length)
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
  if trajectory.truncated:
    batch.bootstrap[row, here.stop - 1] = True


def unpack(
  trajectories: Sequence[Trajectory], batch: TokenBatch, values_BT: np.ndarray
) -> list[np.ndarray | None]:
  """Values [B, T] on a packed batch -> those of each trajectory's sampled tokens, in order.

  A trajectory is found by its ids and rewards, so that it does not matter how the batch was
  packed; None for one that it does not hold (replayed ones count as not held).
  """
  found = {}
  for row, segments in enumerate(batch.segment_ids):
    for segment in range(1, segments.max(initial=0) + 1):
      here = np.flatnonzero(segments == segment)
      sampled = here[batch.action_mask[row, here]]
      if sampled.size:
        # targets[t] follows tokens[t]: the last sampled token is never an input of its own.
        last = sampled[-1]
        ids = [*batch.tokens[row, here[0] : last + 1], batch.targets[row, last]]
        found[_key(ids, batch.rewards[row, sampled])] = values_BT[row, sampled]
  return [found.get(_key_of(trajectory)) for trajectory in trajectories]


def _key_of(trajectory: Trajectory) -> tuple[bytes, bytes]:
  parts, rewards = [trajectory.prompt_tokens], []
  for step in trajectory.steps:
    parts += [step.tokens, step.observation_tokens]
    rewards += [0.0] * (len(step.tokens) - 1) + [step.reward]
  return _key(np.concatenate(parts[:-1]), rewards)


def _key(ids: Sequence[int], rewards: Sequence[float]) -> tuple[bytes, bytes]:
  return np.asarray(ids, np.int32).tobytes(), np.asarray(rewards, np.float32).tobytes()


def padding_share(batch: TokenBatch) -> float:
  """Share of positions that hold no trajectory, rows that are empty altogether left out."""
  used = batch.segment_ids.any(axis=1)
  return float((batch.segment_ids[used] == 0).mean()) if used.any() else 0.0
