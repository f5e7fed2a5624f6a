"""Trajectories -> packed TokenBatch: first-fit-decreasing rows, static shapes, host side only."""

from collections.abc import Container, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from steptool_jax.types import Part, TokenBatch, Trajectory


def packed_length(
  trajectory: Trajectory, whole_actions: bool = False, bootstrap: Container[str] = ()
) -> int:
  """Positions that a trajectory takes in rows: its segments, each as follows.

  One that ends there ends with its last sampled token, which is a target but never an input, unless
  `whole_actions` asks for it: Q(s, a) reads the state after all of a. One whose status is in
  `bootstrap` keeps all: after its last token comes the state whose value it bootstraps from.
  """
  return sum(_part_length(trajectory, p, whole_actions, bootstrap) for p in trajectory.parts)


def _part_length(
  trajectory: Trajectory, part: Part, whole_actions: bool, bootstrap: Container[str]
) -> int:
  length = trajectory.part_tokens(part)
  if part.stop == len(trajectory.steps):
    if trajectory.status in bootstrap:
      return length
    length -= len(trajectory.steps[-1].observation_tokens)
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


def empty_batch(num_rows: int, row_tokens: int, segmented: bool = False) -> TokenBatch:
  """A batch of padding only (NumPy arrays); segmented: for trajectories of several segments."""
  shape = (num_rows, row_tokens)
  more = ("part_ids", "trajectory_ids", "trajectory_tokens") if segmented else ()
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
    **{name: np.zeros(shape, np.int32) for name in more},
  )


class Place(NamedTuple):
  """Where a segment lies in a batch: positions [start, stop) of a row, the first `prompt` of
  which hold its prompt: all of it, or its last token where it shares the rest."""

  row: int
  start: int
  stop: int
  prompt: int


class Packed(NamedTuple):
  """A packed batch, and where the segments of its trajectories lie (replayed ones left out)."""

  batch: TokenBatch
  trajectories: tuple[Trajectory, ...]
  places: tuple[tuple[Place, ...], ...]


def pack(
  trajectories: Sequence[Trajectory],
  row_tokens: int,
  bootstrap: Container[str] = (),
  share: bool = False,
  segmented: bool = False,
) -> Packed:
  """Packs into as few rows of `row_tokens` as first-fit-decreasing finds.

  share: samples of a task stand together, behind their prompt, which is computed once. What
  follows from it (log-probs, values, gradients) is what separate rows give.
  bootstrap, segmented: see `pack_units`.

  Raises:
    ValueError: a trajectory without steps, or one longer than a row.
  """
  units = [(t,) for t in trajectories]
  return pack_units(units, row_tokens, share=share, bootstrap=bootstrap, segmented=segmented)


def pack_units(
  units: Sequence[tuple[Trajectory, ...]],
  row_tokens: int,
  *,
  replayed: Sequence[Trajectory] = (),
  whole_actions: bool = False,
  share: bool = False,
  bootstrap: Container[str] = (),
  spread: bool = False,
  segmented: bool = False,
) -> Packed:
  """Packs trajectories that belong together into neighbouring rows.

  The segments of a trajectory lie wherever there is room, each as a row's segment of its own.

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
    segmented: fill part_ids and its like also where no trajectory has several segments.

  Raises:
    ValueError: as `pack`; pairs of trajectories of several segments.
  """
  width, fresh = len(units[0]) if units else 1, len(units)
  units = [*units, *((t,) for t in replayed)]
  for trajectory in (t for unit in units for t in unit):
    if not trajectory.steps:
      raise ValueError(f"trajectory of task {trajectory.task_id!r} has no steps: nothing to train")
  pieces = [_pieces(unit, number) for number, unit in enumerate(units)]
  segmented = segmented or any(len(of_unit) > 1 for of_unit in pieces)
  first = np.cumsum([1, *map(len, pieces)])  # number of each unit's first part
  pieces = [piece for of_unit in pieces for piece in of_unit]
  lengths = [
    [_part_length(t, part, whole_actions, bootstrap) for t, part in piece.members]
    for piece in pieces
  ]
  for piece, longest in zip(pieces, map(max, lengths), strict=True):
    if longest > row_tokens:
      raise ValueError(
        f"trajectory {piece.unit} has {longest} tokens but train.row_tokens is {row_tokens}; raise "
        "it, or lower rollout.max_tokens"
      )
  if share:
    together = _same_prompts(pieces, [length for (length,) in lengths], row_tokens)
  else:
    together = [[index] for index in range(len(pieces))]
  bins = first_fit_decreasing([_room(pieces, lengths, group) for group in together], row_tokens)
  batch = empty_batch(max(len(bins), 1) * width, row_tokens, segmented)
  tasks, anchors = _Numbers(), _Numbers()
  places: dict[tuple[int, int], dict[int, Place]] = {}
  for number, groups in enumerate(bins):
    for member in range(width):
      row, start, segment = width * number + member, 0, 0
      for group in (together[g] for g in groups):
        if shared := _shared(pieces, group):
          segment += 1
          stop = start + _room(pieces, lengths, group)
          prompt = pieces[group[0]].members[0][1].prompt
          _write_prompt(batch, prompt, Place(row, start, start + shared, shared))
          batch.segment_ids[row, start : start + shared] = segment
          batch.until[row, start : start + shared] = stop
          start += shared
        for index in group:
          unit, number_of_part, members = pieces[index]
          (trajectory, part), segment = members[member], segment + 1
          stop = start + lengths[index][member] - shared
          place = Place(row, start, stop, len(part.prompt) - shared)
          here = slice(start, stop)
          _write(batch, trajectory, part, place, anchors, bootstrap, spread)
          batch.group_ids[row, here] = tasks[trajectory.task_id]
          batch.segment_ids[row, here] = segment
          batch.until[row, here] = stop
          if segmented:
            batch.part_ids[row, here] = first[unit] + number_of_part
            batch.trajectory_ids[row, here] = unit + 1
            batch.trajectory_tokens[row, here] = sum(len(s.tokens) for s in trajectory.steps)
          if unit < fresh:
            places.setdefault((unit, member), {})[number_of_part] = place
          else:
            batch.action_mask[row, here] = False
          start = stop
  trajectories = tuple(t for unit in units[:fresh] for t in unit)
  in_order = (tuple(of[n] for n in sorted(of)) for _, of in sorted(places.items()))
  return Packed(batch, trajectories, tuple(in_order))


class _Piece(NamedTuple):
  """A segment of a unit's trajectories: of one, or the only one of each of a pair."""

  unit: int
  number: int  # of the segment in its trajectory
  members: tuple[tuple[Trajectory, Part], ...]


def _pieces(unit: tuple[Trajectory, ...], number: int) -> list[_Piece]:
  if len(unit) == 1:
    (t,) = unit
    return [_Piece(number, k, ((t, part),)) for k, part in enumerate(t.parts)]
  for t in unit:
    if len(t.parts) > 1:
      raise ValueError(
        f"trajectory of task {t.task_id!r} has {len(t.parts)} segments, since its history was "
        "changed, and a pair is compared within two rows; use algorithm rft or grpo"
      )
  return [_Piece(number, 0, tuple((t, t.parts[0]) for t in unit))]


def _same_prompts(
  pieces: Sequence[_Piece], lengths: Sequence[int], row_tokens: int
) -> list[list[int]]:
  """Indices of segments with the same task and prompt, in groups that fit a row."""
  groups: dict[tuple[str, bytes], list[list[int]]] = {}
  room: dict[tuple[str, bytes], int] = {}
  for index, (piece, length) in enumerate(zip(pieces, lengths, strict=True)):
    ((t, part),) = piece.members
    key, shared = (t.task_id, part.prompt.tobytes()), len(part.prompt) - 1
    if key in groups and length - shared <= room[key]:
      groups[key][-1].append(index)
      room[key] -= length - shared
    else:
      groups.setdefault(key, []).append([index])
      room[key] = row_tokens - length
  return [group for of_key in groups.values() for group in of_key]


def _shared(pieces: Sequence[_Piece], group: Sequence[int]) -> int:
  """Positions that the members have in common: the prompt but for its last token.

  That one is repeated, since every branch has logits of its own at its first sampled token.
  """
  return len(pieces[group[0]].members[0][1].prompt) - 1 if len(group) > 1 else 0


def _room(pieces, lengths, group: Sequence[int]) -> int:
  """Positions of a row that a group takes, in the widest of its rows."""
  shared = _shared(pieces, group)
  return shared + sum(max(lengths[index]) - shared for index in group)


class _Numbers(dict):
  """Numbers from 1 for things in the order in which they come up."""

  def __missing__(self, key: Hashable) -> int:
    self[key] = len(self) + 1
    return self[key]


def _write_prompt(batch: TokenBatch, prompt: np.ndarray, place: Place) -> None:
  here = slice(place.start, place.stop)
  batch.tokens[place.row, here] = prompt[: place.prompt]
  batch.targets[place.row, here] = prompt[1 : place.prompt + 1]
  batch.positions[place.row, here] = np.arange(place.prompt)


def _write(
  batch: TokenBatch,
  trajectory: Trajectory,
  part: Part,
  place: Place,
  anchors: _Numbers,
  bootstrap: Container[str],
  spread: bool,
) -> None:
  row, start, stop, prompt = place
  before = len(part.prompt) - prompt  # positions that stand in front, shared
  steps = trajectory.steps[part.start : part.stop]
  ids = np.concatenate(
    [part.prompt[before:]]
    + [ids for step in steps for ids in (step.tokens, step.observation_tokens)]
  ).astype(np.int32)
  length = stop - start
  batch.tokens[row, start:stop] = ids[:length]
  targets = ids[1 : length + 1]
  batch.targets[row, start : start + len(targets)] = targets
  batch.positions[row, start:stop] = before + np.arange(length)
  # targets[t] is ids[t + 1]: a step whose first token is ids[first] is aligned at first - 1.
  first = start + prompt - 1
  seen = trajectory.prompt_tokens
  if part.start:  # the last observation, which the new prompt shows; else the prompt itself
    shown = trajectory.steps[part.start - 1].observation_tokens
    seen = shown if len(shown) else part.prompt
  for index, step in enumerate(steps, start=part.start):
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
  if part.stop == len(trajectory.steps) and trajectory.status in bootstrap:
    batch.bootstrap[row, stop - 1] = True


def unpack(packed: Packed, values_BT: np.ndarray) -> list[np.ndarray]:
  """Values [B, T] on a packed batch -> those of each trajectory's sampled tokens, in order."""
  mask_BT = packed.batch.action_mask

  def of_part(place: Place) -> np.ndarray:
    here = place.row, slice(place.start, place.stop)
    return values_BT[here][mask_BT[here]]

  return [np.concatenate([of_part(place) for place in places]) for places in packed.places]


def lay_out(packed: Packed, values: Sequence[np.ndarray]) -> np.ndarray:
  """Inverts `unpack`: float32 [R, T], 0 where nothing of these trajectories was sampled."""
  values_BT = np.zeros(packed.batch.tokens.shape, np.float32)
  for places, of_one in zip(packed.places, values, strict=True):
    for row, start, stop, _ in places:
      mask = packed.batch.action_mask[row, start:stop]
      now, of_one = np.split(of_one, [mask.sum()])
      values_BT[row, start:stop][mask] = now
  return values_BT


def padding_share(batch: TokenBatch) -> float:
  """Share of positions that hold no trajectory, rows that are empty altogether left out."""
  used = batch.segment_ids.any(axis=1)
  return float((batch.segment_ids[used] == 0).mean()) if used.any() else 0.0
