"""What --mode=evaluate makes of attempts: figures, and files in the official formats.

    WORKDIR/answers/rollout_<k>/<subset>/<query id>_<method>.json   official answers
    WORKDIR/converted/rollout_<k>/<subset>.json                     official converted answers
    WORKDIR/pass_rate/rollout_<k>/<subset>_rollout_<k>.json         official verdicts
    WORKDIR/trajectories.jsonl                                      ours (data/trajectories)

The folder rollout_<k> stands where official tools expect the name of a model. Tasks that ended in
an infrastructure error, of tools or judge, are named and have neither figure nor file. With
evaluation.stored=WORKDIR/pass_rate the verdicts give the figures once more.
"""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from steptool_jax.data.trajectories import (
  AnnotatedTrajectory,
  read_trajectories,
  write_trajectories,
)
from steptool_jax.evaluation import intervals
from steptool_jax.evaluation.metrics import rollout_metrics
from steptool_jax.run.evaluating import attempts
from steptool_jax.run.evaluating.attempts import Solution, Work
from steptool_jax.run.hosts import hosts
from steptool_jax.run.parts import build, rollouts
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.training import record
from steptool_jax.toolbench.formats import official
from steptool_jax.toolbench.formats.answers import cot_answer, dfs_answer, write_answer, write_json
from steptool_jax.toolbench.formats.conversion import convert_folder
from steptool_jax.toolbench.passrate import PassRate, call_metrics, outcome_of
from steptool_jax.toolbench.recall import macro_recall
from steptool_jax.types import Status, Task, Trajectory

_Json = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
  """One repetition. trajectories[n] is the chosen one of task n, judged and rewarded."""

  solutions: list[Solution]
  trajectories: list[Trajectory]
  scores: dict[int, np.ndarray]  # task -> float64[judge runs]; not there without a verdict
  rate: PassRate | None  # where there is a judge
  work: Work


def evaluate(parts: Parts, variables: dict) -> _Json:
  """Attempts the first evaluation.tasks held-out tasks, writes the files, returns the figures.

  All processes roll out; process 0 judges and writes.

  RuntimeError when every task ended in an infrastructure error; ValueError without tasks.
  """
  e = parts.config.evaluation
  tasks = parts.environment.tasks("heldout")[: e.tasks]
  if not tasks:
    raise ValueError("environment: there are no held-out tasks; evaluation needs at least one")
  name = attempts.method(parts)
  others = _read_others(e.against, tasks) if e.against else None
  hosts.lead(functools.partial(_clear, parts))
  runs: list[_Run] = []

  def finish(k: int, solutions: list[Solution], work: Work) -> None:
    runs.append(_judged(parts, tasks, solutions, work))
    if parts.services.judging is not None:
      _write_official(parts, runs[-1], f"rollout_{k}", name)

  for k in range(e.rollouts):
    label = f"{name}, rollout {k + 1} of {e.rollouts}"
    solutions, work = attempts.solve(parts, variables, tasks, k, label)
    hosts.lead(functools.partial(finish, k, solutions, work))
  return hosts.lead(lambda: _reported(parts, name, tasks, runs, others))


def _clear(parts: Parts) -> None:
  """Removes what an earlier evaluation, perhaps of other tasks, has written."""
  for name in ("answers", "converted", "pass_rate"):
    for old in (parts.workdir / name).glob("rollout_*"):
      shutil.rmtree(old)


def _reported(
  parts: Parts,
  name: str,
  tasks: Sequence[Task],
  runs: Sequence[_Run],
  others: Sequence[AnnotatedTrajectory] | None,
) -> _Json:
  """The figures; writes the trajectories."""
  codec = parts.policy.chat_format.codec
  records = [
    AnnotatedTrajectory(
      trajectory=trajectory,
      query=task.query,
      metadata={
        "method": name,
        "budget_llm_calls": build.build_budget(parts.config),
        "llm_calls": solution.llm_calls,
        "rollout": k,
      }
      | {key: task.metadata[key] for key in ("subset", "query_id") if key in task.metadata}
      | {"texts": record.token_texts(codec, trajectory)}
      | ({"search": record.search_document(solution.search)} if solution.search else {}),
    )
    for k, run in enumerate(runs)
    for task, solution, trajectory in zip(tasks, run.solutions, run.trajectories, strict=True)
  ]
  write_trajectories(parts.workdir / "trajectories.jsonl", records)
  figures = _figures(parts, name, tasks, runs)
  if others is not None:
    figures["win_rate"] = _wins(parts, tasks, runs[0], others)
  return figures


def _judged(parts: Parts, tasks: Sequence[Task], solutions: list[Solution], work: Work) -> _Run:
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
  return _Run(solutions, rollouts.reward(parts, tasks, trajectories), scores, rate, work)


# --- figures ---------------------------------------------------------------------------------


def _figures(parts: Parts, name: str, tasks: Sequence[Task], runs: Sequence[_Run]) -> _Json:
  everything = [t for run in runs for t in run.trajectories]
  common = [n for n in range(len(tasks)) if all(n in run.scores for run in runs)]
  if not common:
    raise RuntimeError(
      "evaluation: every task ended in an infrastructure error (tools or judge); look at the log"
    )
  scores = np.array([[run.scores[n] for run in runs] for n in common])  # [T, R, J]
  figures: _Json = rollout_metrics(everything)
  figures |= {
    "method": name,
    "budget_llm_calls": build.build_budget(parts.config),
    "max_steps": parts.limits.max_steps,
    "rollouts": len(runs),
    "tasks": len(tasks),
    "scored_tasks": len(common),
    "left_out": sorted(tasks[n].id for n in set(range(len(tasks))) - set(common)),
    "prompts_without_room": sum(not len(t.prompt_tokens) for t in runs[0].trajectories),
    "llm_calls_per_task": float(np.mean([s.llm_calls for run in runs for s in run.solutions])),
    "most_llm_calls": max(s.llm_calls for run in runs for s in run.solutions),
    "work": _work(runs),
  }
  figures |= _passed(scores)
  judging = parts.services.judging
  if judging is None:
    return figures
  by_subset: dict[str, list[int]] = {}
  for position, n in enumerate(common):
    by_subset.setdefault(tasks[n].metadata["subset"], []).append(position)
  subsets = {name: _passed(scores[rows]) for name, rows in by_subset.items()}
  for part in (figures, *subsets.values()):
    part["figure"] = judging.beside(_text(part))
  for subset, part in subsets.items():
    tqdm.write(f"{subset}: {part['figure']}")
  outcomes = [
    outcome_of(t, task.query)
    for run in runs
    for task, t in zip(tasks, run.trajectories, strict=True)
  ]
  found = macro_recall(
    everything,
    # The environment knows them by function name already.
    {task.id: [("", function) for function in task.metadata["relevant"]] for task in tasks},
    lambda _, function: function,
  )
  calls = call_metrics(outcomes)
  return figures | {
    "subsets": subsets,
    "recall": found.mean,
    "recall_tasks": found.tasks,
    "invocation_success": calls["invocation_success"],
    "calls_per_task": calls["calls_per_task"],
    "judge": judging.report(),
    "simulator": parts.services.answering.report(),
  }


def _passed(scores: np.ndarray) -> _Json:
  """Pass rate of float64[T, R, J], its spread and where that comes from; all in [0, 1]."""
  interval = intervals.bootstrap(scores)
  out: _Json = {
    "pass_rate": interval.mean,
    "pass_rate_interval": [interval.low, interval.high],
    # Over judge runs alone, as published tables have it; and over rollouts, judge runs averaged.
    "pass_rate_std_judge": float(scores.mean(axis=(0, 1)).std()),
    "pass_rate_std_rollouts": float(scores.mean(axis=(0, 2)).std()),
    "scored": len(scores),
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


def _wins(
  parts: Parts, tasks: Sequence[Task], run: _Run, others: Sequence[AnnotatedTrajectory]
) -> _Json:
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


def _work(runs: Sequence[_Run]) -> _Json:
  fields = [field.name for field in dataclasses.fields(Work)]
  total = Work(**{name: sum(getattr(run.work, name) for run in runs) for name in fields})
  shares = ("device_share", "host_share", "prefilled_again_tokens")
  return dataclasses.asdict(total) | {name: getattr(total, name) for name in shares}


# --- official files --------------------------------------------------------------------------


def _write_official(parts: Parts, run: _Run, folder: str, name: str) -> None:
  codec = parts.policy.chat_format.codec
  strategy = build.build_search(parts.config)
  written: dict[str, pathlib.Path] = {}
  verdicts: dict[str, tuple[official.Verdict, ...]] = {}  # by query id
  judged = {int(n): row for n, row in zip(run.rate.task_ids, run.rate.verdicts, strict=True)}
  for n, (solution, final) in enumerate(zip(run.solutions, run.trajectories, strict=True)):
    if final.status is Status.INFRASTRUCTURE_ERROR:
      continue  # it would be scored as a failure of the model
    task = solution.task
    if solution.search is not None:
      answer = dfs_answer(task, solution.search, strategy, parts.limits, codec.decode)
    else:
      answer = cot_answer(task, solution.attempts, parts.limits, codec.decode)
      answer["forward_args"] |= {
        "max_llm_calls": build.build_budget(parts.config),
        "pass_at": parts.config.evaluation.attempts,
      }
    subset = task.metadata["subset"]
    written[subset] = parts.workdir / "answers" / folder / subset
    path = write_answer(written[subset], task, name, answer)
    verdicts[path.name.removesuffix(f"_{name}.json")] = judged[n]
  for subset, path in written.items():
    converted = parts.workdir / "converted" / folder / f"{subset}.json"
    write_json(converted, convert_folder(path, name))
    results = [
      official.result_of(answer, verdicts[query_id])
      for query_id, answer in official.read_converted(converted).items()
    ]
    official.write_results(
      parts.workdir / "pass_rate" / folder / f"{subset}_{folder}.json", results
    )
