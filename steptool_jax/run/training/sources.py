"""Scores that a model gives to the trajectories of an iteration, in the place of rules.

rewards.source = model: a frozen reward model reads them all in one forward pass and gives SC, Con
and IsSolved. Where a checker knows the true outcome it is shown beside the model's, and the run
ends when the policy learns to please the model alone. rewards.source = info_gain: the policy itself
says how much each step told it about the gold answer (rewards/information.py).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from steptool_jax.config import Config
from steptool_jax.environments import checkers
from steptool_jax.evaluation import scoring
from steptool_jax.learning import batching
from steptool_jax.learning.algorithms import get_algorithm
from steptool_jax.rewards import assembly, information
from steptool_jax.rewards import model as scores_of
from steptool_jax.run.parts import reward_models
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.parts.reward_models import RewardModel
from steptool_jax.run.training.phase import Phase
from steptool_jax.run.training.progress import Progress
from steptool_jax.types import Status, Task, Trajectory


def prepare(parts: Parts) -> RewardModel | None:
  """The reward model of source 'model'; None for the others.

  FileNotFoundError, ValueError for a model or tasks that the source cannot work with.
  """
  config = parts.config
  _refuse_unknown(parts)
  if config.rewards.source == "info_gain":
    information.refuse_without_gold(
      parts.environment.tasks("train"),
      parts.policy.chat_format,
      config.train.row_tokens,
      config.rollout.max_tokens,
    )
  if config.rewards.source != "model":
    return None
  return reward_models.load(config, parts.policy, parts.mesh)


def mark(
  parts: Parts, phase: Phase, tasks: Sequence[Task], trajectories: Sequence[Trajectory]
) -> tuple[list[Trajectory], dict[str, float]]:
  """(the same trajectories with the scores of a source that is a model, figures about it).

  Those of the other sources come back as they are, to be scored one by one.
  """
  usable = [t for t in trajectories if t.steps and t.status is not Status.INFRASTRUCTURE_ERROR]
  if phase.scorer is not None:
    marked = _by_model(parts.config, phase, usable)
    found = _drift(tasks, usable, marked)
  elif parts.config.rewards.source == "info_gain":
    marked, found = _by_information(parts, phase, tasks, usable), {}
  else:
    return list(trajectories), {}
  new = {id(old): t for old, t in zip(usable, marked, strict=True)}
  return [new.get(id(t), t) for t in trajectories], dict(found)


def _drift(
  tasks: Sequence[Task], usable: Sequence[Trajectory], marked: Sequence[Trajectory]
) -> dict[str, float]:
  """Figures of the model's outcomes, beside the true ones where a checker knows them."""
  by_id = {task.id: task for task in tasks}
  both = [
    (m.solved, t.solved)
    for m, t in zip(marked, usable, strict=True)
    if checkers.known(by_id[t.task_id].checker)
  ]
  if both:
    return dict(scoring.drift(*zip(*both, strict=True)))
  return {"model_outcome": float(np.mean([m.solved for m in marked]))} if marked else {}


def _refuse_unknown(parts: Parts) -> None:
  """ValueError where outcomes that nobody knows would pay, or be reported."""
  config = parts.config
  pays = get_algorithm(config.algorithm).rewards != "none" and not config.data.path
  if pays and config.rewards.source != "model":
    without = checkers.unknown(parts.environment.tasks("train"))
    if without:
      raise ValueError(
        f"config.rewards.source: {config.rewards.source!r}, but nobody knows whether "
        f"{len(without)} training tasks are solved (checker none), e.g. {without[0]!r}; use "
        "'model' (--mode=reward_model makes one), or give them a checker"
      )
  heldout = parts.environment.tasks("heldout") if config.evaluation.tasks else ()
  without = checkers.unknown(heldout)
  if without:
    raise ValueError(
      f"config.evaluation.tasks: {config.evaluation.tasks}, but nobody knows whether "
      f"{len(without)} held-out tasks are solved (checker none), e.g. {without[0]!r}: set it to 0, "
      "or give them a checker"
    )


def with_outcomes(paid: Sequence[Trajectory], true: Sequence[Trajectory]) -> list[Trajectory]:
  """The paid trajectories with IsSolved as the environment graded it, for figures."""
  return [
    p if p.solved == t.solved else dataclasses.replace(p, solved=t.solved)
    for p, t in zip(paid, true, strict=True)
  ]


def refuse_hacking(config: Config, progress: Progress) -> None:
  """RuntimeError where the reward model's mean outcome rises and the true pass rate falls."""
  m = config.rewards.model
  model, truth = ([y for _, y in c] for c in (progress.model_curve, progress.train_curve))
  said = scoring.hacked(model, truth, m.watch, m.apart) if model else ""
  if said:
    raise RuntimeError(
      f"{said}. Annotate trajectories of the present policy, train the reward model on them too, "
      "and start again from an earlier checkpoint; to go on all the same, set "
      "rewards.model.watch=0"
    )


def _by_model(config: Config, phase: Phase, usable: Sequence[Trajectory]) -> list[Trajectory]:
  scorer = phase.scorer
  found = reward_models.score(
    scorer.config,
    scorer.variables,
    scorer.heads,
    usable,
    row_tokens=config.train.row_tokens,
    micro_rows=config.train.micro_rows,
    most=phase.conversations,
    mesh=phase.mesh,
  )
  return [scores_of.apply(t, scores) for t, scores in zip(usable, found, strict=True)]


def _by_information(
  parts: Parts, phase: Phase, tasks: Sequence[Task], usable: Sequence[Trajectory]
) -> list[Trajectory]:
  by_id, rules = {task.id: task for task in tasks}, assembly.SOURCES["progress"]
  rule = rules.mark if parts.services.judging is None else rules.texts
  marked = [rule(by_id[t.task_id], t) for t in usable]
  golds = [information.gold(by_id[t.task_id], parts.policy.chat_format) for t in usable]
  asked = [
    [] if gold is None else information.questions(t, gold)
    for t, gold in zip(usable, golds, strict=True)
  ]
  flat = [question for questions in asked for question in questions]
  logprobs: list[np.ndarray] = []
  for start in range(0, len(flat), phase.conversations):
    packed = batching.pack(flat[start : start + phase.conversations], parts.config.train.row_tokens)
    logprobs += batching.unpack(packed, phase.logprobs(packed.batch))
  ends = np.cumsum([len(questions) for questions in asked])
  return [
    information.gains(t, logprobs[end - len(questions) : end]) if questions else t
    for t, questions, end in zip(marked, asked, ends, strict=True)
  ]
