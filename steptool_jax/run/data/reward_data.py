"""Annotated trajectories for --mode=reward_model, split by task: no task is on both sides."""

import dataclasses
import hashlib
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
from absl import logging

from steptool_jax.config import Config
from steptool_jax.data import trajectories as stored
from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.rewards.model import labels
from steptool_jax.run.data.offline import files, token_arrays, unfit
from steptool_jax.run.data.order import permutation
from steptool_jax.run.parts.build import Policy
from steptool_jax.types import HEADS, Trajectory, calls_of

_LEAST = 2  # tasks on each side
_LOOKED_AT = 50  # calls that must be spelled as the chat format says


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """What is learnt from and what is measured on."""

  train: Sequence[Trajectory]
  heldout: Sequence[Trajectory]
  digest: str  # of everything that is learnt from
  report: dict[str, Any]  # JSON data
  batch: int
  seed: int

  @property
  def steps_per_pass(self) -> int:
    return -(-len(self.train) // self.batch)

  def at(self, step: int) -> list[Trajectory]:
    """The batch of an optimizer step: a seeded permutation a pass; its last one may be short."""
    number, place = divmod(step, self.steps_per_pass)
    order = permutation(len(self.train), self.seed, number)
    return [self.train[i] for i in order[place * self.batch : (place + 1) * self.batch]]


def load(config: Config, policy: Policy, held_out: Container[str] = frozenset()) -> Split:
  """Reads and checks reward_model.data; tasks in `held_out` (ids) are left out.

  Raises:
    OSError, ValueError: a missing or broken file, ids of another tokenizer, trajectories that were
      not annotated, a label that never differs, too few tasks to split.
  """
  c, where = config.reward_model, "config.reward_model.data"
  if not c.data:
    raise ValueError(f"{where}: empty; name the annotated.jsonl that --mode=annotate wrote")
  limit = min(config.train.row_tokens, policy.model.max_position_embeddings)
  kept: list[Trajectory] = []
  left_out = dict.fromkeys(("too_long", "infrastructure_error", "no_steps", "held_out"), 0)
  for path in files(c.data, "reward_model.data"):
    for record in stored.read_trajectories(path):
      t = record.trajectory
      if "annotation" not in record.metadata:
        raise ValueError(
          f"{where}: {path} holds trajectories without annotation (task {t.task_id}, sample "
          f"{t.sample}): their {', '.join(HEADS)} mean nothing yet; run --mode=annotate with "
          f"annotate.input={path}, and name its annotated.jsonl here"
        )
      reason = unfit(t, limit, held_out)
      if reason:
        left_out[reason] += 1
        continue
      kept.append(t)
  if not kept:
    raise ValueError(
      f"{where}: none of the trajectories of {c.data} can be used (left out: {left_out}); one may "
      f"have {limit} tokens, set by train.row_tokens and the model"
    )
  if any(left_out.values()):
    logging.warning("reward model: %d trajectories are used, left out: %s", len(kept), left_out)
  _refuse_other_tokenizer(kept, policy, where)
  tasks = sorted({t.task_id for t in kept})
  heldout = _heldout(tasks, c.heldout, config.seed, where)
  train = [t for t in kept if t.task_id not in heldout]
  _refuse_constant(train, where)
  measured = [t for t in kept if t.task_id in heldout]
  report = {
    "tasks": len(tasks) - len(heldout),
    "trajectories": len(train),
    "heldout_tasks": len(heldout),
    "heldout_trajectories": len(measured),
    "left_out": left_out,
  }
  return Split(train, measured, _digest(train), report, c.batch, config.seed)


def _heldout(tasks: Sequence[str], share: float, seed: int, where: str) -> set[str]:
  count = round(share * len(tasks))
  if _LEAST <= count <= len(tasks) - _LEAST:
    return {tasks[i] for i in permutation(len(tasks), seed, 0)[:count]}
  remedy = "annotate trajectories of more tasks"
  if len(tasks) >= 2 * _LEAST:
    near = _LEAST if count < _LEAST else len(tasks) - _LEAST
    remedy += f", or set reward_model.heldout to {near / len(tasks):.4g}"
  raise ValueError(
    f"{where}: {len(tasks)} tasks, of which reward_model.heldout = {share:g} keeps {count} to "
    f"measure on and {len(tasks) - count} to learn from; there must be {_LEAST} on each side: "
    f"{remedy}"
  )


def _refuse_constant(train: Sequence[Trajectory], where: str) -> None:
  known = [labels(t) for t in train]
  values = np.concatenate([v for v, _ in known])
  there = np.concatenate([mask for _, mask in known])
  for head, name in enumerate(HEADS):
    found = values[there[:, head], head]
    if not len(found) or found.min() == found.max():
      what = f"is {found[0]:g} on all {len(found)}" if len(found) else "is on none"
      raise ValueError(
        f"{where}: {name} {what} steps that could have it, so there is nothing to learn; annotate "
        "with a source that tells steps apart (annotate.source, annotate.rule), or add "
        "trajectories of another policy"
      )


def _refuse_other_tokenizer(kept: Sequence[Trajectory], policy: Policy, where: str) -> None:
  """By ids that the model lacks, and by calls that the ids do not spell."""
  size = policy.model.vocab_size
  for t in kept:
    top = max(int(ids.max()) for ids in token_arrays(t) if len(ids))
    if top >= size:
      raise ValueError(
        f"{where}: task {t.task_id} holds the token id {top}, but the model of model.path has "
        f"{size}; name the trunk (and the tokenizer) of the policy that sampled these trajectories"
      )
  calls = [s for t in kept for s in t.steps if calls_of(s.action)][:_LOOKED_AT]
  if calls and not any(_spells(policy.chat_format, s) for s in calls):
    raise ValueError(
      f"{where}: the ids of none of {len(calls)} calls spell the call with the tokenizer "
      f"{policy.tokenizer} and chat format {policy.chat_format.name!r}: they are of another one; "
      "name the trunk (and the tokenizer) of the policy that sampled these trajectories"
    )


def _spells(chat_format: ChatFormat, step: Any) -> bool:
  action = chat_format.parse(step.tokens)
  return [c.name for c in calls_of(action)] == [c.name for c in calls_of(step.action)]


def _digest(train: Sequence[Trajectory]) -> str:
  found = hashlib.sha256()
  for t in train:
    for part in (*token_arrays(t), *labels(t)):
      found.update(f" {part.shape} ".encode() + np.ascontiguousarray(part).tobytes())
  return found.hexdigest()
