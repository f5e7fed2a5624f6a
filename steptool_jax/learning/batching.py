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

  None may be longer than that.
  """
  bins: list[list[int]] = []
  room = np.zeros(0, np.int64)
  for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
    length = lengths[index]
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
    until=np.broadcast_to(np.arange(1, row_tokens + 1, dtype=np.int32), shape).copy(),
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
  """Where a trajectory lies in a batch: positions [start, stop) of a row, the first `prompt` of
  which hold its prompt: all of it, or its last token where it shares the rest."""

  row: int
  start: int
  stop: int
  prompt: int


class Packed(NamedTuple):
  """A packed batch, and where each of its trajectories lies (replayed ones left out)."""

  batch: TokenBatch
  trajectories: tuple[Trajectory, ...]
  places: tuple[Place, ...]


def pack(
  trajectories: Sequence[Trajectory],
  row_tokens: int,
  bootstrap: Container[str] = (),
  share: bool = False,
) -> Packed:
  """Packs into as few rows of `row_tokens` as first-fit-decreasing finds.

  share: samples of a task stand together, behind their prompt, which is computed once. What
  follows from it (log-probs, values, gradients) is what separate rows give.
  bootstrap: the statuses whose trajectories go on beyond their last token (see `pack_units`).

  Raises:
    ValueError: a trajectory without steps, or one longer than a row.
  """
  return pack_units([(t,) for t in trajectories], row_tokens, share=share, bootstrap=bootstrap)


def pack_units(
  units: Sequence[tuple[Trajectory, ...]],
  row_tokens: int,
  *,
  replayed: Sequence[Trajectory] = (),
  whole_actions: bool = False,
  share: bool = False,
  bootstrap: Container[str] = (),
  spread: bool = False,
) -> Packed:
  """Packs trajectories that belong together into neighbouring rows.

  Args:
    units: each of W trajectories, member m of which goes to a row W n + m, as segment s of all
      these W rows. W = 1: every trajectory by itself; W = 2: pairs.
    row_tokens: length of a row.
    replayed: further trajectories, for a critic only (W = 1).
    whole_actions: see `packed_length`.
    share: see `pack` (W = 1, nothing replayed).
    bootstrap: statuses (config.advantage.bootstrap) whose trajectories are worth V of the state
      after them; all others are worth 0 there.
    spread: a step's reward stands in equal parts on its tokens, not on the last one.

  Raises:
    ValueError: as `pack`.
  """
  width, fresh = len(units[0]) if units else 1, len(units)
  units = [*units, *((t,) for t in replayed)]
  for trajectory in (t for unit in units for t in unit):
    if not trajectory.steps:
      raise ValueError(f"trajectory of task {trajectory.task_id!r} has no steps: nothing to train")
  lengths = [[packed_length(t, whole_actions, bootstrap) for t in unit] for unit in units]
  for index, longest in enumerate(map(max, lengths)):
    if longest > row_tokens:
      raise ValueError(
        f"trajectory {index} has {longest} tokens but train.row_tokens is {row_tokens}; raise it, "
        "or lower rollout.max_tokens"
      )
  if share:
    together = _same_prompts([t for (t,) in units], [length for (length,) in lengths], row_tokens)
  else:
    together = [[index] for index in range(len(units))]
  bins = first_fit_decreasing([_room(units, lengths, group) for group in together], row_tokens)
  batch = empty_batch(max(len(bins), 1) * width, row_tokens)
  tasks, anchors = _Numbers(), _Numbers()
  places: dict[tuple[int, int], Place] = {}
  for number, groups in enumerate(bins):
    for member in range(width):
      row, start, segment = width * number + member, 0, 0
      for group in (together[g] for g in groups):
        if shared := _shared(units, group):
          segment += 1
          stop = start + _room(units, lengths, group)
          _write_prompt(batch, units[group[0]][0], Place(row, start, start + shared, shared))
          batch.segment_ids[row, start : start + shared] = segment
          batch.until[row, start : start + shared] = stop
          start += shared
        for index in group:
          trajectory, segment = units[index][member], segment + 1
          stop = start + lengths[index][member] - shared
          place = Place(row, start, stop, len(trajectory.prompt_tokens) - shared)
          here = slice(start, stop)
          _write(batch, trajectory, place, anchors, bootstrap, spread)
          batch.group_ids[row, here] = tasks[trajectory.task_id]
          batch.segment_ids[row, here] = segment
          batch.until[row, here] = stop
          if index < fresh:
            places[index, member] = place
          else:
            batch.action_mask[row, here] = False
          start = stop
  trajectories = tuple(t for unit in units[:fresh] for t in unit)
  return Packed(batch, trajectories, tuple(places[key] for key in sorted(places)))


def _same_prompts(
  trajectories: Sequence[Trajectory], lengths: Sequence[int], row_tokens: int
) -> list[list[int]]:
  """Indices of samples with the same task and prompt, in groups that fit a row."""
  groups: dict[tuple[str, bytes], list[list[int]]] = {}
  room: dict[tuple[str, bytes], int] = {}
  for index, (t, length) in enumerate(zip(trajectories, lengths, strict=True)):
    key, shared = (t.task_id, t.prompt_tokens.tobytes()), len(t.prompt_tokens) - 1
    if key in groups and length - shared <= room[key]:
      groups[key][-1].append(index)
      room[key] -= length - shared
    else:
      groups.setdefault(key, []).append([index])
      room[key] = row_tokens - length
  return [group for of_key in groups.values() for group in of_key]


def _shared(units: Sequence[tuple[Trajectory, ...]], group: Sequence[int]) -> int:
  """Positions that the members have in common: the prompt but for its last token.

  That one is repeated, since every branch has logits of its own at its first sampled token.
  """
  return len(units[group[0]][0].prompt_tokens) - 1 if len(group) > 1 else 0


def _room(units, lengths, group: Sequence[int]) -> int:
  """Positions of a row that a group takes, in the widest of its rows."""
  shared = _shared(units, group)
  return shared + sum(max(lengths[index]) - shared for index in group)


class _Numbers(dict):
  """Numbers from 1 for things in the order in which they come up."""

  def __missing__(self, key: Hashable) -> int:
    self[key] = len(self) + 1
    return self[key]


def _write_prompt(batch: TokenBatch, trajectory: Trajectory, place: Place) -> None:
  here = slice(place.start, place.stop)
  batch.tokens[place.row, here] = trajectory.prompt_tokens[: place.prompt]
  batch.targets[place.row, here] = trajectory.prompt_tokens[1 : place.prompt + 1]
  batch.positions[place.row, here] = np.arange(place.prompt)


def _write(
  batch: TokenBatch,
  trajectory: Trajectory,
  place: Place,
  anchors: _Numbers,
  bootstrap: Container[str],
  spread: bool,
) -> None:
  row, start, stop, prompt = place
  before = len(trajectory.prompt_tokens) - prompt  # positions that stand in front, shared
  ids = np.concatenate(
    [trajectory.prompt_tokens[before:]]
    + [part for step in trajectory.steps for part in (step.tokens, step.observation_tokens)]
  ).astype(np.int32)
  length = stop - start
  batch.tokens[row, start:stop] = ids[:length]
  targets = ids[1 : length + 1]
  batch.targets[row, start : start + len(targets)] = targets
  batch.positions[row, start:stop] = before + np.arange(length)
  # targets[t] is ids[t + 1]: a step whose first token is ids[first] is aligned at first - 1.
  first = start + prompt - 1
  seen = trajectory.prompt_tokens
  for index, step in enumerate(trajectory.steps):
    end = first + len(step.tokens)
    batch.action_mask[row, first:end] = True
    batch.step_ids[row, first:end] = index
    batch.step_end[row, end - 1] = True
    if spread:
      batch.rewards[row, first:end] = step.reward / len(step.tokens)
    else:
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
    values_BT[row, start:stop][mask_BT[row, start:stop]] for row, start, stop, _ in packed.places
  ]


def padding_share(batch: TokenBatch) -> float:
  """Share of positions that hold no trajectory, rows that are empty altogether left out."""
  used = batch.segment_ids.any(axis=1)
  return float((batch.segment_ids[used] == 0).mean()) if used.any() else 0.0
