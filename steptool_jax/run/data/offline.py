"""Stored trajectories in the place of rollouts: what --mode=train reads with data.path.

The paper's set-up: trajectories that were annotated once, trained on for several passes. Rewards
are those of the file. (--mode=annotate put rewards.alpha and rewards.shaping into them;
official rows come with theirs.) An algorithm with outcome rewards sees IsSolved alone; one that
compares samples of a task gets all its trajectories in one batch; sft imitates every step, of
official SFT and RFT instances ("dialogues") the last one.

A trajectory that does not fit is left out whole, counted and named in summary.json; so is one that
the files hold already: the same sample of the same task, equal to the last bit.

What is known of all trajectories at once is a few numbers of each. With data.format = "tfds" the
trajectories themselves stay in their array_record file and are read by random access when a batch
needs them, log-probs from behaviour.npz; so memory does not grow with the data.
"""

import array
import dataclasses
import glob
import hashlib
import os
import pathlib
from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np
from absl import logging

from steptool_jax.config import Config
from steptool_jax.data import annotated_trajectories, trajectories
from steptool_jax.data.trajectories import AnnotatedTrajectory
from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.learning.algorithms import get_algorithm
from steptool_jax.policy.model import ModelConfig
from steptool_jax.rewards import shaping
from steptool_jax.run.data.order import permutation
from steptool_jax.toolbench.formats import conversations, training_rows
from steptool_jax.types import Status, Trajectory

_NAMED = 20  # of each kind that was left out, the report names this many


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
  """The trajectories to train on, N in U units: data[i] reads one, with its log-probs.

  Log-probs that nobody recorded are NaN until behaviour.fill.
  """

  source: Sequence[AnnotatedTrajectory]  # in memory, or a file by random access
  ready: Callable[[Trajectory], Trajectory]  # a stored trajectory as the algorithm sees it
  places: np.ndarray  # int64[N], index of trajectory i in `source`
  recorded: np.ndarray  # bool[N], the log-probs of trajectory i were recorded when sampled
  ends: np.ndarray  # int64[N], sampled tokens of trajectories 0 to i
  units: np.ndarray  # int64[N], trajectories unit by unit: those of a unit are dealt together
  unit_ends: np.ndarray  # int64[U], where in `units` each one ends
  digest: str  # of everything that is trained on
  size: int  # units of one batch
  seed: int
  report: dict[str, Any]  # JSON data: what was read, what was left out
  logprobs: np.ndarray | None = None  # float32[ends[-1]], on disk: of the policy at the start

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, index: int) -> Trajectory:
    trajectory = self.ready(self.source[int(self.places[index])].trajectory)
    if self.logprobs is None:
      return trajectory
    counts = sum(len(step.tokens) for step in trajectory.steps)
    end = int(self.ends[index])
    return with_logprobs(trajectory, np.array(self.logprobs[end - counts : end]))

  @property
  def batches_per_pass(self) -> int:
    return -(-len(self.unit_ends) // self.size)

  @property
  def most(self) -> int:
    """Trajectories of the largest batch that may come up."""
    return int(np.sort(np.diff(self.unit_ends, prepend=0))[-self.size :].sum())

  def unit(self, number: int) -> list[Trajectory]:
    """The trajectories of one unit."""
    start = self.unit_ends[number - 1] if number else 0
    return [self[i] for i in self.units[start : self.unit_ends[number]]]

  def batch(self, number: int) -> list[Trajectory]:
    """Batch `number` of the run: a seeded permutation a pass, whose last batch may be short."""
    current, place = divmod(number, self.batches_per_pass)
    order = permutation(len(self.unit_ends), self.seed, current)
    chosen = order[place * self.size : (place + 1) * self.size]
    return [trajectory for unit in chosen for trajectory in self.unit(unit)]


def files(pattern: str, field: str) -> list[pathlib.Path]:
  """The files of a path or pattern, sorted; FileNotFoundError that names the field for none."""
  found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
  paths = [pathlib.Path(path) for path in found if os.path.isfile(path)]
  if not paths:
    raise FileNotFoundError(f"config.{field}: {pattern!r} is no file, and a pattern of none")
  return paths


def load(
  config: Config,
  chat_format: ChatFormat,
  model: ModelConfig,
  held_out: Container[str] = frozenset(),
) -> Data:
  """Reads and checks what config.data names, one trajectory after the other.

  held_out: ids of tasks that are not learnt from, since they are what the policy is measured on.

  Raises:
    OSError, ValueError: a missing or broken file (named, with its line or row), token ids of
      another tokenizer, no trajectory that can be trained on, nothing that the algorithm needs.
  """
  limit = min(config.train.row_tokens, model.max_position_embeddings)
  kinds = ("too_long", "infrastructure_error", "no_steps", "held_out", "duplicates")
  counts = dict.fromkeys(kinds, 0)
  names: dict[str, list[str]] = {kind: [] for kind in counts}
  total = 0

  def leave_out(kind: str, name: str) -> None:
    counts[kind] += 1
    if counts[kind] <= _NAMED:
      names[kind].append(name)

  if config.data.format == "tfds":
    paths = [pathlib.Path(config.data.path)]
    stored: Sequence[AnnotatedTrajectory] = _open(paths[0])
  else:
    paths = files(config.data.path, "data.path")
    stored = ()
  own: list[AnnotatedTrajectory] = []  # what is not in `stored`
  compares = get_algorithm(config.algorithm).compares
  index = Index(_ready(config), compares, config.rollout.temperature)
  for path in paths:
    if config.data.format in ("tsv", "dialogues"):
      result = _official(config.data.format, path, chat_format, limit)
      total += result.total
      for row, tokens in result.too_long:
        leave_out("too_long", f"{path}:{row} ({tokens} tokens)")
      for record in result.records:
        index.add(len(own), record)
        own.append(record)
      continue
    for number, record in enumerate(stored or trajectories.read_trajectories(path)):
      total += 1
      reason = unfit(record.trajectory, limit, held_out)
      if reason:
        leave_out(reason, _name(record.trajectory))
        continue
      _check_ids(record.trajectory, model.vocab_size, path)
      index.add(number if stored else len(own), record)
      if not stored:
        own.append(record)
  if not index.places:
    raise ValueError(
      f"config.data.path: none of the {total} trajectories of {config.data.path} can be trained on "
      f"(left out: {counts}); one may have {limit} tokens, set by train.row_tokens and the model"
    )
  for place in index.drop_twins():
    leave_out("duplicates", _name((stored or own)[place].trajectory))
  kept = len(index.places)
  if kept < total:
    logging.warning("data: %d of %d trajectories left out: %s", total - kept, total, counts)
  report = {
    "files": len(paths),
    "total": total,
    "kept": kept,
    "max_tokens": limit,
    "recorded_logprobs": sum(index.recorded),
    "left_out": counts,
    "left_out_names": {kind: found for kind, found in names.items() if found},
  }
  data = index.data(stored or own, config.data.batch, config.seed, report)
  _check_algorithm(config, data, index.between)
  return data


def _open(path: pathlib.Path) -> annotated_trajectories.Source:
  try:
    return annotated_trajectories.open_source(path, "train")
  except (FileNotFoundError, ValueError) as error:
    raise type(error)(f"config.data.path: {error}") from error


def _ready(config: Config) -> Callable[[Trajectory], Trajectory]:
  """What the algorithm makes of a stored trajectory."""
  rewards = get_algorithm(config.algorithm).rewards

  def ready(trajectory: Trajectory) -> Trajectory:
    if rewards == "outcome":
      return shaping.shape(trajectory, outcome_only=True)
    if rewards == "none":  # imitation reads no log-probs: zeros, as in demonstrations
      count = sum(len(step.tokens) for step in trajectory.steps)
      return with_logprobs(trajectory, np.zeros(count, np.float32))
    return trajectory

  return ready


class Index:
  """Collects what has to be known of all trajectories, some 40 bytes of each."""

  def __init__(
    self, ready: Callable[[Trajectory], Trajectory], by_task: bool, temperature: float = 1.0
  ):
    """temperature: of the log-probs that the update computes."""
    self._temperature = temperature
    self.between = False  # whether a step before the last one has a reward
    self.places = array.array("q")
    self.recorded = bytearray()
    self._ready, self._by_task = ready, by_task
    self._counts = array.array("q")  # sampled tokens
    self._units = array.array("q")  # number of its unit
    self._keys = array.array("Q")  # 64 bits of a digest of all that it is
    self._tasks: dict[str, int] = {}  # of algorithms that compare samples of a task
    self._digest = hashlib.sha256()

  def add(self, place: int, record: AnnotatedTrajectory) -> None:
    """Takes the next trajectory, which is at `place` of its source."""
    trajectory = self._ready(record.trajectory)
    rewards = [step.reward for step in trajectory.steps]
    self.between = self.between or any(rewards[:-1])
    unit = len(self.places)
    if self._by_task:
      unit = self._tasks.setdefault(trajectory.task_id, len(self._tasks))
    self._units.append(unit)
    self.places.append(place)
    self.recorded.append(self._comparable(record))
    self._counts.append(sum(len(step.tokens) for step in trajectory.steps))
    # A digest of everything that is trained on: order, tokens, rewards and endings.
    parts = [f"{trajectory.status} {trajectory.solved} {rewards}".encode()]
    parts += [f" {len(ids)} ".encode() + ids.tobytes() for ids in token_arrays(trajectory)]
    self._digest.update(b"".join(parts))
    parts.append(f"{trajectory.task_id} {trajectory.sample} {record.logprobs_known}".encode())
    parts += [step.logprobs.tobytes() for step in record.trajectory.steps]
    key = hashlib.blake2b(b"".join(parts), digest_size=8)
    self._keys.append(int.from_bytes(key.digest(), "little"))

  def _comparable(self, record: AnnotatedTrajectory) -> bool:
    """Whether the recorded log-probs may stand beside the update's: of a greedy conversation they
    are all 0, and of another temperature they are of another policy."""
    sampled_at = record.metadata.get("temperature", self._temperature)
    chosen_freely = any(step.logprobs.any() for step in record.trajectory.steps)
    return record.logprobs_known and sampled_at == self._temperature and chosen_freely

  def drop_twins(self) -> list[int]:
    """Leaves out every trajectory that equals an earlier one to the last bit; their places."""
    first = np.sort(np.unique(np.array(self._keys), return_index=True)[1])
    gone = np.delete(np.array(self.places), first).tolist()
    if gone:
      self._digest.update(f" without {gone}".encode())
      units = np.unique(np.array(self._units)[first], return_inverse=True)[1]
      self._units = array.array("q", units.tolist())
      self.places = array.array("q", (self.places[i] for i in first))
      self._counts = array.array("q", (self._counts[i] for i in first))
      self.recorded = bytearray(self.recorded[i] for i in first)
    return gone

  def data(
    self, source: Sequence[AnnotatedTrajectory], size: int, seed: int, report: dict[str, Any]
  ) -> Data:
    """The finished index over `source`."""
    units = np.array(self._units)
    return Data(
      source=source,
      ready=self._ready,
      places=np.array(self.places),
      recorded=np.array(self.recorded, bool),
      ends=np.cumsum(self._counts),
      units=np.argsort(units, kind="stable"),
      unit_ends=np.cumsum(np.bincount(units)),
      digest=self._digest.hexdigest(),
      size=size,
      seed=seed,
      report=report,
    )


def _check_algorithm(config: Config, data: Data, between: bool) -> None:
  """between: whether a step before the last one has a reward."""
  algorithm = get_algorithm(config.algorithm)
  where = f"config.data.path: algorithm {config.algorithm!r}"
  if algorithm.compares and len(data.unit_ends) == len(data):
    raise ValueError(
      f"{where} compares samples of a task, but no two of the {len(data)} trajectories have the "
      "same task_id; use 'reinforce' or 'steptool', or store several samples of a task"
    )
  # Unit by unit: no selection joins what may lie in different batches.
  if not any(algorithm.select.pick(data.unit(u)) for u in range(len(data.unit_ends))):
    raise ValueError(
      f"{where} learns from {algorithm.select.needs}, and the {len(data)} trajectories give none; "
      "use 'steptool' or 'ppo', which learn from every trajectory, or store what is missing"
    )
  if algorithm.rewards == "step" and not between:
    raise ValueError(
      f"{where} learns from step rewards, but only last steps have one; use 'ppo' (final rewards), "
      "or annotate the trajectories with --mode=annotate"
    )


def _official(
  kind: str, path: pathlib.Path, chat_format: ChatFormat, limit: int
) -> conversations.Conversion:
  if kind == "dialogues":
    return conversations.from_dialogues(training_rows.read_dialogues(path), chat_format, limit)
  return conversations.from_step_rows(
    training_rows.read_step_rows(path), chat_format, limit, str(path)
  )


def unfit(trajectory: Trajectory, limit: int, held_out: Container[str] = frozenset()) -> str:
  """Why a stored trajectory is not trained on; "" where it is."""
  if trajectory.status is Status.INFRASTRUCTURE_ERROR:
    return "infrastructure_error"
  if not trajectory.steps:
    return "no_steps"
  if trajectory.task_id in held_out:
    return "held_out"
  return "too_long" if trajectory.longest > limit else ""


def _name(trajectory: Trajectory) -> str:
  return f"{trajectory.task_id}, sample {trajectory.sample} ({trajectory.longest} tokens)"


def _check_ids(trajectory: Trajectory, vocab_size: int, path: pathlib.Path) -> None:
  ids = np.concatenate(list(token_arrays(trajectory)))
  wrong = ids[(ids < 0) | (ids >= vocab_size)]
  if len(wrong):
    raise ValueError(
      f"{path}, {_name(trajectory)}: holds the token id {wrong[0]}, but the model has "
      f"{vocab_size}; these trajectories were recorded with another tokenizer"
    )


def token_arrays(trajectory: Trajectory):
  yield trajectory.prompt_tokens
  for step in trajectory.steps:
    yield step.tokens
    yield step.observation_tokens
    if step.prompt_tokens is not None:
      yield step.prompt_tokens


def with_logprobs(trajectory: Trajectory, values: np.ndarray) -> Trajectory:
  """values: float32, of all sampled tokens one after the other."""
  ends = np.cumsum([len(step.tokens) for step in trajectory.steps])[:-1]
  steps = tuple(
    dataclasses.replace(step, logprobs=part)
    for step, part in zip(trajectory.steps, np.split(values, ends), strict=True)
  )
  return dataclasses.replace(trajectory, steps=steps)
