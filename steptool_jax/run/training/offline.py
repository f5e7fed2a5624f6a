"""Stored trajectories in the place of rollouts: what --mode=train reads with data.path.

The paper's set-up: trajectories that were annotated once, trained on for several passes. Rewards
are those of the file. (--mode=annotate put rewards.alpha and rewards.normalization into them;
official rows come with theirs.) An algorithm with outcome rewards sees IsSolved alone; one that
compares samples of a task gets all its trajectories in one batch; sft imitates every step, of
official SFT and RFT instances ("dialogues") the last one.

Old log-probs, the denominator of PPO's ratio, are those of the policy that sampled the data: as
recorded in rollouts, and where nobody recorded them (official rows, trajectories of other models)
those of the policy before its first update. Either way they stay the same through all passes, so
that the ratio corrects for how far the policy has moved from the data's, and its clip keeps it near
them. The release takes the policy's own log-probs anew at every batch: the ratio is then 1 at the
start of each, the data count as if today's policy had sampled them, and nothing bounds the drift
over a run; data.behaviour = "current" does that, for comparison. The KL penalty always compares
today's policy with the one before training.

A trajectory that does not fit is left out whole, counted and named in summary.json.
"""

import dataclasses
import glob
import hashlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from steptool_jax.config import Config
from steptool_jax.data import trajectories
from steptool_jax.data.trajectories import AnnotatedTrajectory
from steptool_jax.dialogue.template import ChatFormat
from steptool_jax.files import replacing
from steptool_jax.learning import batching
from steptool_jax.learning.algorithms import get_algorithm
from steptool_jax.policy.model import ModelConfig
from steptool_jax.rewards import shaping
from steptool_jax.run.hosts import hosts
from steptool_jax.run.training.order import permutation
from steptool_jax.toolbench.formats import conversations, training_rows
from steptool_jax.types import Status, TokenBatch, Trajectory

_NAMED = 20  # of each kind that was left out, the report names this many
_FILE = "behaviour.npz"


@dataclasses.dataclass(frozen=True)
class Data:
  """The trajectories to train on. Log-probs that nobody recorded are NaN until `with_behaviour`."""

  trajectories: tuple[Trajectory, ...]
  recorded: tuple[bool, ...]  # [i]: the log-probs of trajectory i were recorded when sampled
  units: tuple[tuple[int, ...], ...]  # trajectories that are dealt together
  size: int  # units of one batch
  seed: int
  report: dict[str, Any]  # JSON data: what was read, what was left out

  @property
  def batches_per_pass(self) -> int:
    return -(-len(self.units) // self.size)

  @property
  def most(self) -> int:
    """Trajectories of the largest batch that may come up."""
    return sum(sorted(map(len, self.units))[-self.size :])

  def batch(self, number: int) -> list[Trajectory]:
    """Batch `number` of the run: a seeded permutation a pass, whose last batch may be short."""
    current, place = divmod(number, self.batches_per_pass)
    order = permutation(len(self.units), self.seed, current)
    chosen = order[place * self.size : (place + 1) * self.size]
    return [self.trajectories[i] for unit in chosen for i in self.units[unit]]


def files(pattern: str, field: str) -> list[pathlib.Path]:
  """The files of a path or pattern, sorted; FileNotFoundError that names the field for none."""
  found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
  paths = [pathlib.Path(path) for path in found if os.path.isfile(path)]
  if not paths:
    raise FileNotFoundError(f"config.{field}: {pattern!r} is no file, and a pattern of none")
  return paths


def load(config: Config, chat_format: ChatFormat, model: ModelConfig) -> Data:
  """Reads and checks what config.data names.

  Raises:
    OSError, ValueError: a missing or broken file (named, with its line or row), token ids of
      another tokenizer, no trajectory that can be trained on, nothing that the algorithm needs.
  """
  limit = min(config.train.row_tokens, model.max_position_embeddings)
  records: list[AnnotatedTrajectory] = []
  left_out: dict[str, list[str]] = {"too_long": [], "infrastructure_error": [], "no_steps": []}
  total = 0
  paths = files(config.data.path, "data.path")
  for path in paths:
    if config.data.format != "jsonl":
      result = _official(config.data.format, path, chat_format, limit)
      records += result.records
      total += result.total
      left_out["too_long"] += [f"{path}:{row} ({tokens} tokens)" for row, tokens in result.too_long]
    else:
      for record in trajectories.read_trajectories(path):
        total += 1
        reason = _unfit(record.trajectory, limit)
        if reason:
          left_out[reason].append(_name(record.trajectory))
        else:
          _check_ids(record.trajectory, model.vocab_size, path)
          records.append(record)
  counts = {kind: len(names) for kind, names in left_out.items()}
  if not records:
    raise ValueError(
      f"config.data.path: none of the {total} trajectories of {config.data.path} can be trained on "
      f"(left out: {counts}); one may have {limit} tokens, set by train.row_tokens and the model"
    )
  if len(records) < total:
    logging.warning("data: %d of %d trajectories left out: %s", total - len(records), total, counts)
  report = {
    "files": len(paths),
    "total": total,
    "kept": len(records),
    "max_tokens": limit,
    "recorded_logprobs": sum(record.logprobs_known for record in records),
    "left_out": counts,
    "left_out_names": {kind: names[:_NAMED] for kind, names in left_out.items() if names},
  }
  kept = [record.trajectory for record in records]
  algorithm = get_algorithm(config.algorithm)
  if algorithm.rewards == "outcome":
    kept = [shaping.shape(trajectory, outcome_only=True) for trajectory in kept]
  if algorithm.rewards == "none":  # imitation reads no log-probs: zeros, as in demonstrations
    kept = [
      _with_logprobs(t, np.zeros(sum(len(s.tokens) for s in t.steps), np.float32)) for t in kept
    ]
  _check_algorithm(config, kept)
  units: dict[Any, list[int]] = {}
  for i, trajectory in enumerate(kept):
    units.setdefault(trajectory.task_id if algorithm.compares else i, []).append(i)
  recorded = tuple(record.logprobs_known for record in records)
  return Data(
    tuple(kept),
    recorded,
    tuple(map(tuple, units.values())),
    config.data.batch,
    config.seed,
    report,
  )


def _check_algorithm(config: Config, kept: list[Trajectory]) -> None:
  algorithm = get_algorithm(config.algorithm)
  where = f"config.data.path: algorithm {config.algorithm!r}"
  if algorithm.compares and len({t.task_id for t in kept}) == len(kept):
    raise ValueError(
      f"{where} compares samples of a task, but no two of the {len(kept)} trajectories have the "
      "same task_id; use 'reinforce' or 'steptool', or store several samples of a task"
    )
  if not algorithm.select.pick(kept):
    raise ValueError(
      f"{where} learns from {algorithm.select.needs}, and the {len(kept)} trajectories give none; "
      "use 'steptool' or 'ppo', which learn from every trajectory, or store what is missing"
    )
  if algorithm.rewards == "step" and not any(s.reward for t in kept for s in t.steps[:-1]):
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


def _unfit(trajectory: Trajectory, limit: int) -> str:
  if trajectory.status is Status.INFRASTRUCTURE_ERROR:
    return "infrastructure_error"
  if not trajectory.steps:
    return "no_steps"
  return "too_long" if trajectory.num_tokens > limit else ""


def _name(trajectory: Trajectory) -> str:
  return f"{trajectory.task_id}, sample {trajectory.sample} ({trajectory.num_tokens} tokens)"


def _check_ids(trajectory: Trajectory, vocab_size: int, path: pathlib.Path) -> None:
  ids = np.concatenate(list(_token_arrays(trajectory)))
  if ids.min() < 0 or ids.max() >= vocab_size:
    raise ValueError(
      f"{path}, {_name(trajectory)}: holds the token id {ids.max()}, but the model has "
      f"{vocab_size}; these trajectories were recorded with another tokenizer"
    )


def _token_arrays(trajectory: Trajectory):
  yield trajectory.prompt_tokens
  for step in trajectory.steps:
    yield step.tokens
    yield step.observation_tokens


# --- behaviour log-probs ---------------------------------------------------------------------


def with_behaviour(
  data: Data,
  row_tokens: int,
  logprobs: Callable[[TokenBatch], np.ndarray],
  workdir: pathlib.Path,
) -> Data:
  """Fills log-probs that nobody recorded with those of the policy before its first update.

  Keeps all of them in WORKDIR/behaviour.npz, since that policy is gone when a run is resumed.

  Args:
    data: as `load` gave it.
    row_tokens: of a packed row.
    logprobs: packed batch [R, T] -> today's log-probs, float32 [R, T].
    workdir: of the run.
  """
  filled = list(data.trajectories)
  missing = [i for i, recorded in enumerate(data.recorded) if not recorded]
  for start in range(0, len(missing), data.size):
    chosen = missing[start : start + data.size]
    packed = batching.pack([data.trajectories[i] for i in chosen], row_tokens)
    computed = batching.unpack(packed, logprobs(packed.batch))
    for i, values in zip(chosen, computed, strict=True):
      filled[i] = _with_logprobs(filled[i], values)
  flat = np.concatenate([step.logprobs for t in filled for step in t.steps])
  if hosts.primary():
    with replacing(workdir / _FILE, "wb") as file:
      np.savez(file, digest=_digest(data), logprobs=flat)
  return dataclasses.replace(data, trajectories=tuple(filled))


def restore_behaviour(data: Data, workdir: pathlib.Path) -> Data:
  """The same from the file of an interrupted run.

  ValueError when the data are no longer those that the run began with; OSError without a file.
  """
  with np.load(workdir / _FILE) as file:
    digest, flat = str(file["digest"]), file["logprobs"]
  if digest != _digest(data):
    raise ValueError(
      f"config.data.path: the trajectories are not those that the run in {workdir} began with; "
      "put the old files back, or use another --workdir"
    )
  counts = [sum(len(step.tokens) for step in t.steps) for t in data.trajectories]
  parts = np.split(flat, np.cumsum(counts)[:-1])
  filled = tuple(map(_with_logprobs, data.trajectories, parts))
  return dataclasses.replace(data, trajectories=filled)


def _with_logprobs(trajectory: Trajectory, values: np.ndarray) -> Trajectory:
  """values: float32, of all sampled tokens one behind the other."""
  ends = np.cumsum([len(step.tokens) for step in trajectory.steps])[:-1]
  steps = tuple(
    dataclasses.replace(step, logprobs=part)
    for step, part in zip(trajectory.steps, np.split(values, ends), strict=True)
  )
  return dataclasses.replace(trajectory, steps=steps)


def _digest(data: Data) -> str:
  """Of everything that is trained on: order, tokens, rewards and endings."""
  digest = hashlib.sha256()
  for trajectory in data.trajectories:
    rewards = [step.reward for step in trajectory.steps]
    digest.update(f"{trajectory.status} {trajectory.solved} {rewards}".encode())
    for array in _token_arrays(trajectory):
      digest.update(f" {len(array)} ".encode() + array.tobytes())
  return digest.hexdigest()
