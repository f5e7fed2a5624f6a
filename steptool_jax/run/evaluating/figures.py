"""The figures of an evaluation: of each repetition's judged attempts, and over all of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from steptool_jax.data.trajectories import AnnotatedTrajectory
from steptool_jax.environments.base import KIND
from steptool_jax.evaluation import intervals, tries
from steptool_jax.evaluation.metrics import rollout_metrics
from steptool_jax.run.evaluating import work
from steptool_jax.run.evaluating.attempts import Solution
from steptool_jax.run.parts import build, rollouts
from steptool_jax.run.parts.opening import Parts
from steptool_jax.toolbench.passrate import PassRate, call_metrics, outcome_of
from steptool_jax.toolbench.recall import mean_recall
from steptool_jax.types import Task, Trajectory


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
  """One repetition. trajectories[n] is the chosen one of task n, judged and rewarded."""

  solutions: list[Solution]
  trajectories: list[Trajectory]
  scores: dict[int, np.ndarray]  # task -> float64[judge runs]; not there without a verdict
  rate: PassRate | None  # where there is a judge
  work: work.Work


def figures(
  parts: Parts, method: str, tasks: Sequence[Task], runs: Sequence[Judged]
) -> dict[str, Any]:
  """All figures over the repetitions; prints those of the subsets.

  RuntimeError when no task has a score in every repetition.
  """
  everything = [t for run in runs for t in run.trajectories]
  common = [n for n in range(len(tasks)) if all(n in run.scores for run in runs)]
  if not common:
    raise RuntimeError(
      "evaluation: every task ended in an infrastructure error (tools or judge); look at the log"
    )
  rollouts.say_without_room(parts, method, everything)
  scores = np.array([[run.scores[n] for run in runs] for n in common])  # [T, R, J]
  out = rollout_metrics(everything) | {
    "method": method,
    "budget_llm_calls": build.build_budget(parts.config),
    "max_steps": parts.limits.max_steps,
    "rollouts": len(runs),
    "tasks": len(tasks),
    "scored_tasks": len(common),
    "left_out": sorted(tasks[n].id for n in set(range(len(tasks))) - set(common)),
    "llm_calls_per_task": float(np.mean([s.llm_calls for run in runs for s in run.solutions])),
    "most_llm_calls": max(s.llm_calls for run in runs for s in run.solutions),
    "work": work.document([run.work for run in runs]),
  }
  out |= _passed(scores)
  if kinds := _rows_by(KIND, tasks, common):
    out["kinds"] = {kind: float(scores[rows].mean()) for kind, rows in kinds.items()}
  judging = parts.services.judging
  if judging is None:
    return out
  by_subset = _rows_by("subset", tasks, common)
  subsets = {name: _passed(scores[rows]) for name, rows in by_subset.items()}
  for part in (out, *subsets.values()):
    part["figure"] = judging.beside(_text(part))
  for subset, part in subsets.items():
    tqdm.write(f"{subset}: {part['figure']}")
  outcomes = [
    outcome_of(t, task.query)
    for run in runs
    for task, t in zip(tasks, run.trajectories, strict=True)
  ]
  recall, recall_tasks = mean_recall(
    everything, {task.id: task.metadata["relevant"] for task in tasks}
  )
  return out | {
    "subsets": subsets,
    "recall": recall,
    "recall_tasks": recall_tasks,
    **call_metrics(outcomes),
    "judge": judging.report(),
  }


def _rows_by(field: str, tasks: Sequence[Task], chosen: Sequence[int]) -> dict[str, list[int]]:
  """What the tasks' metadata has there -> positions in `chosen`, which numbers tasks."""
  rows: dict[str, list[int]] = {}
  for position, n in enumerate(chosen):
    if field in tasks[n].metadata:
      rows.setdefault(tasks[n].metadata[field], []).append(position)
  return rows


def _passed(scores: np.ndarray) -> dict[str, Any]:
  """Pass rate of float64[T, R, J], its spread and where that comes from; all in [0, 1]."""
  interval = intervals.bootstrap(scores)
  most = min(scores.shape[1], tries.MOST_TRIES)
  # A repetition counts as a try that solved the task where most of its judge runs say so.
  solved = [(len(runs), int((runs.mean(axis=1) > 0.5).sum())) for runs in scores]
  out: dict[str, Any] = {
    "pass_rate": interval.mean,
    "pass_rate_interval": [interval.low, interval.high],
    # Over judge runs alone, as published tables have it; and over rollouts, judge runs averaged.
    "pass_rate_std_judge": float(scores.mean(axis=(0, 1)).std()),
    "pass_rate_std_rollouts": float(scores.mean(axis=(0, 2)).std()),
    "scored": len(scores),
    "pass_at": [tries.pass_at(solved, k) for k in range(1, most + 1)],
  }
  if len(scores) > 1 and scores[0].size > 1:
    parts = dataclasses.asdict(intervals.components(scores))
    out["variance"] = {key: value for key, value in parts.items() if not np.isnan(value)}
  return out


def _text(part: Mapping[str, Any]) -> str:
  low, high = part["pass_rate_interval"]
  return (
    f"solvable pass rate {100 * part['pass_rate']:.1f} % of {part['scored']} tasks, "
    f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
  )


def wins(
  parts: Parts, tasks: Sequence[Task], run: Judged, others: Sequence[AnnotatedTrajectory]
) -> dict[str, Any]:
  """Solvable win rate of the first rollout: [mean, std over judge runs], in [0, 1]."""
  ours = [solution.chosen for solution in run.solutions]
  theirs = [record.trajectory for record in others]
  found = parts.services.judging.win_rate(tasks, ours, theirs, run.rate)
  return {
    "wins": list(found.wins),
    "ties": list(found.ties),
    "losses": list(found.losses),
    "tasks": len(found.task_ids),
    "left_out": [tasks[int(n)].id for n in found.left_out],
    "against": parts.config.evaluation.against,
    "their_method": others[0].metadata.get("method"),
    "their_budget_llm_calls": others[0].metadata.get("budget_llm_calls"),
    "figure": parts.services.beside(f"win rate {100 * found.wins[0]:.1f} %"),
  }
