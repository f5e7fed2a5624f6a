"""The held-out tasks attempted, judged and written down: what --mode=evaluate does.

    WORKDIR/trajectories.jsonl    the chosen attempts (data/trajectories)

and where there is a judge the official files, see files.py. Tasks that ended in an infrastructure
error, of tools or judge, are named and have neither figure nor file.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from steptool_jax.data.trajectories import (
  AnnotatedTrajectory,
  read_trajectories,
  write_trajectories,
)
from steptool_jax.environments import checkers
from steptool_jax.run.evaluating import attempts, figures, files
from steptool_jax.run.evaluating.attempts import Solution
from steptool_jax.run.evaluating.figures import Judged
from steptool_jax.run.evaluating.work import Work
from steptool_jax.run.hosts import hosts
from steptool_jax.run.parts import build, rollouts
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.parts.services import total
from steptool_jax.run.training import record
from steptool_jax.types import Status, Task


def evaluate(parts: Parts, variables: dict) -> dict[str, Any]:
  """Attempts the first evaluation.tasks held-out tasks, writes the files, returns the figures.

  All processes roll out; process 0 judges and writes.

  RuntimeError when every task ended in an infrastructure error; ValueError without tasks.
  """
  e = parts.config.evaluation
  tasks = parts.environment.tasks("heldout")[: e.tasks]
  if not tasks:
    raise ValueError("environment: there are no held-out tasks; evaluation needs at least one")
  unknown = checkers.unknown(tasks)
  if unknown and parts.services.judging is None:
    raise ValueError(
      f"config.evaluation.tasks: nobody knows whether {len(unknown)} of {len(tasks)} held-out "
      f"tasks are solved (checker none), e.g. {unknown[0]!r}: give them a checker"
    )
  if parts.services.judging is not None and parts.config.model.parallel_calls:
    raise ValueError(
      "config.model.parallel_calls: True, but the official files have one call a turn; set it to "
      "False"
    )
  method = attempts.method(parts)
  others = _read_others(e.against, tasks) if e.against else None
  hosts.lead(lambda: files.clear(parts.workdir))
  runs: list[Judged] = []

  def finish(k: int, solutions: list[Solution], work: Work) -> None:
    runs.append(_judge(parts, tasks, solutions, work))
    if parts.services.judging is not None:
      files.write(parts, runs[-1], f"rollout_{k}", method)

  def report() -> dict[str, Any]:
    write_trajectories(parts.workdir / "trajectories.jsonl", _records(parts, method, tasks, runs))
    found = figures.figures(parts, method, tasks, runs)
    if answered:
      found["simulator"] = total(answered)
    if others is not None:
      found["win_rate"] = figures.wins(parts, tasks, runs[0], others)
    return found

  for k in range(e.rollouts):
    label = f"{method}, rollout {k + 1} of {e.rollouts}"
    solutions, work = attempts.solve(parts, variables, tasks, k, label)
    hosts.lead(functools.partial(finish, k, solutions, work))
  answering = parts.services.answering
  # Each process has answered the calls of its own slots.
  answered = [] if answering is None else hosts.gather(answering.report())
  return hosts.lead(report)


def _judge(parts: Parts, tasks: Sequence[Task], solutions: list[Solution], work: Work) -> Judged:
  trajectories = [solution.chosen for solution in solutions]
  judging, rate = parts.services.judging, None
  if judging is not None:
    rate, trajectories = judging.judge(tasks, trajectories)
    scores = {int(n): row for n, row in zip(rate.task_ids, rate.scores, strict=True)}
  else:
    scores = {
      n: np.array([t.solved])
      for n, t in enumerate(trajectories)
      if t.status is not Status.INFRASTRUCTURE_ERROR
    }
  return Judged(solutions, rollouts.reward(parts, tasks, trajectories), scores, rate, work)


def _records(
  parts: Parts, method: str, tasks: Sequence[Task], runs: Sequence[Judged]
) -> list[AnnotatedTrajectory]:
  codec = parts.policy.chat_format.codec
  return [
    AnnotatedTrajectory(
      trajectory=trajectory,
      query=task.query,
      metadata={
        "method": method,
        "budget_llm_calls": build.build_budget(parts.config),
        "llm_calls": solution.llm_calls,
        "temperature": parts.config.evaluation.temperature,
        "rollout": k,
      }
      | {key: task.metadata[key] for key in ("subset", "query_id") if key in task.metadata}
      | {"texts": record.token_texts(codec, trajectory)}
      | ({"search": record.search_document(solution.search)} if solution.search else {}),
    )
    for k, run in enumerate(runs)
    for task, solution, trajectory in zip(tasks, run.solutions, run.trajectories, strict=True)
  ]


def _read_others(folder: str, tasks: Sequence[Task]) -> list[AnnotatedTrajectory]:
  """The first rollout of another evaluation, in the order of the tasks."""
  path = pathlib.Path(folder) / "trajectories.jsonl"
  if not path.is_file():
    raise FileNotFoundError(
      f"config.evaluation.against: {path} does not exist; give the WORKDIR of an evaluation"
    )
  found = {
    r.trajectory.task_id: r for r in read_trajectories(path) if not r.metadata.get("rollout")
  }
  missing = [task.id for task in tasks if task.id not in found]
  if missing:
    raise ValueError(
      f"config.evaluation.against: {path} lacks {len(missing)} of {len(tasks)} tasks, the first "
      f"is {missing[0]}; evaluate the same tasks"
    )
  return [found[task.id] for task in tasks]
