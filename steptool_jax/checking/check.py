"""The check of an environment: its tools, its tasks, a sample of demonstrations and wrong answers.

Everything runs through the tool runner, so nothing that hangs stops it; with a deadline, what is
not begun by then is left out and counted.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from steptool_jax.checking import answers, replays, sets
from steptool_jax.checking.findings import ERROR, LEVELS, WARNING, Finding, count
from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.environments import checkers
from steptool_jax.environments.base import KIND, SPLITS, Environment
from steptool_jax.rewards import rules
from steptool_jax.rollout.conversation import Limits
from steptool_jax.simulators.runner import ToolRunner, TooManyStuck
from steptool_jax.types import Code, Task


@dataclasses.dataclass(frozen=True)
class Extent:
  """How much is checked. tasks: of each split, spread over it, 0 = all. seconds: None = no end."""

  tasks: int = 0
  seconds: float | None = None
  workers: int = 8  # tasks at the same time


@dataclasses.dataclass(frozen=True)
class Asked:
  """What a run asks of its environment. chat_format: None = the model is not there."""

  limits: Limits
  chat_format: ChatFormat | None = None
  system: str | None = None
  sft: bool = False  # it learns from demonstrations
  progress: bool = False  # steps are paid for the progress that they make, and for nothing else
  checkers: bool = True  # the sessions' own checkers decide, and no judge
  splits: tuple[str, ...] = SPLITS  # those that it needs


@dataclasses.dataclass(frozen=True)
class Report:
  """rows: one of every task that was looked at (JSON data)."""

  findings: tuple[Finding, ...]
  figures: Mapping[str, Any]
  rows: tuple[Mapping[str, Any], ...] = ()

  @property
  def errors(self) -> int:
    return count(self.findings, ERROR)

  def summary(self) -> dict[str, Any]:
    """Figures, and findings counted by level and kind."""
    found = collections.Counter(f"{f.level}: {f.kind}" for f in self.findings)
    counts = {f"{level}s": count(self.findings, level) for level in LEVELS}
    return {**counts, **self.figures, "found": dict(sorted(found.items()))}


@dataclasses.dataclass(frozen=True)
class _Job:
  split: str
  task: Task
  others: Sequence[str]  # answers of other tasks


@dataclasses.dataclass(frozen=True)
class _Outcome:
  findings: list[Finding]
  row: dict[str, Any]
  room: bool  # its prompt leaves room for one step


def check(
  environment: Environment,
  asked: Asked,
  runner: ToolRunner,
  extent: Extent,
  on_done: Callable[[], None] = lambda: None,
  should_stop: Callable[[], bool] = lambda: False,
) -> Report:
  """Looks at all tasks and replays a sample of them.

  on_done: called with every task of the sample that is done (progress bars). should_stop: asked in
  front of each; what is under way is finished.
  """
  splits = {split: environment.tasks(split) for split in SPLITS}
  needed = {split: tasks for split, tasks in splits.items() if tasks or split in asked.splits}
  findings = [*sets.check_tasks(needed), *sets.check_tools(splits)]
  findings += _without_demonstrations(splits["train"], asked)
  findings += _untaught_kinds(splits, asked)
  findings += _unpaid(splits["train"], asked)
  jobs = [
    _Job(split, task, _answers_of(tasks, task))
    for split, tasks in splits.items()
    for task in sample(tasks, extent.tasks)
  ]
  outcomes, stopped = _all(environment, asked, runner, extent, jobs, on_done, should_stop)
  findings += [finding for outcome in outcomes for finding in outcome.findings]
  findings += [*_together(outcomes, asked), *_always_failing(outcomes)]
  if stopped:
    findings.append(
      Finding(*(ERROR, "hanging", ""), stopped, "give the tools that hang a time-out of their own")
    )
  rows = tuple(outcome.row for outcome in outcomes)
  return Report(tuple(findings), _figures(splits, jobs, outcomes, asked), rows)


def sample(tasks: Sequence[Task], most: int) -> list[Task]:
  """`most` tasks, spread evenly over all; 0 = all."""
  if not most or len(tasks) <= most:
    return list(tasks)
  return [tasks[n * len(tasks) // most] for n in range(most)]


def _answers_of(tasks: Sequence[Task], task: Task) -> list[str]:
  """Answers of tasks of the same kind of checker, which look alike."""
  kind = task.checker.get("type")
  alike = (other for other in tasks[:_POOL] if other.checker.get("type") == kind)
  return [a for other in alike if (a := answers.gold_answer(other)) is not None]


_POOL = 200  # tasks whose answers are tried on others


def _all(
  environment: Environment,
  asked: Asked,
  runner: ToolRunner,
  extent: Extent,
  jobs: Sequence[_Job],
  on_done: Callable[[], None],
  should_stop: Callable[[], bool],
) -> tuple[list[_Outcome], str]:
  """(outcomes in the order of the jobs, why the others were not begun)."""
  end = None if extent.seconds is None else time.monotonic() + extent.seconds
  stuck: list[str] = []

  def work(job: _Job) -> _Outcome | None:
    if stuck or should_stop() or (end is not None and time.monotonic() > end):
      return None
    try:
      outcome = _look(environment, asked, runner, job)
    except TooManyStuck as error:
      stuck.append(str(error))
      return None
    on_done()
    return outcome

  with ThreadPoolExecutor(extent.workers, thread_name_prefix="check") as pool:
    outcomes = list(pool.map(work, jobs))
  return [o for o in outcomes if o is not None], stuck[0] if stuck else ""


def _look(environment: Environment, asked: Asked, runner: ToolRunner, job: _Job) -> _Outcome:
  task, limits = job.task, asked.limits
  findings: list[Finding] = []
  row: dict[str, Any] = {"id": task.id, "split": job.split}
  prompt, trajectory = 0, None
  if asked.chat_format is not None:
    try:
      prompt = replays.prompt_tokens(task, asked.chat_format, asked.system)
    except ValueError as error:
      text = f"its prompt cannot be written: {error}"
      return _Outcome([Finding(ERROR, "prompt", task.id, text, "rename the tool")], row, False)
  room = prompt < limits.max_tokens
  if not room:
    text = f"its prompt of {prompt} tokens leaves no room for a step, rollout.max_tokens is "
    remedy = f"set rollout.max_tokens above {prompt}, or offer fewer tools"
    findings.append(Finding(ERROR, "room", task.id, f"{text}{limits.max_tokens}", remedy))
  if task.demonstration:
    found = replays.replay(environment, task, asked.chat_format, limits, runner, asked.system)
    findings += replays.findings_of(task, found, limits)
    row = replays.row_of(task, job.split, found, limits)
    trajectory = found.trajectory
  if asked.checkers and checkers.known(task.checker):
    wrong = answers.wrong_answers(task, job.others, trajectory)
    findings += answers.passing(environment, task, wrong, runner)
  row |= {"prompt_tokens": prompt, "findings": len(findings)}
  return _Outcome(findings, row, room)


def _without_demonstrations(tasks: Sequence[Task], asked: Asked) -> list[Finding]:
  if asked.sft and tasks and not any(task.demonstration for task in tasks):
    what = "sft.steps is above 0, but no training task has a demonstration"
    return [Finding(ERROR, "sft", "", what, "set sft.steps to 0, or add demonstrations")]
  return []


def _untaught_kinds(splits: Mapping[str, Sequence[Task]], asked: Asked) -> list[Finding]:
  """Kinds of tasks that are held out, and that training has none of, or no demonstration of."""
  kinds = {split: {t.metadata.get(KIND) for t in tasks} for split, tasks in splits.items()}
  shown = {task.metadata.get(KIND) for task in splits["train"] if task.demonstration}
  wanted = kinds["heldout"] - {None}
  missing = sorted(wanted - kinds["train"])
  unshown = sorted((wanted & kinds["train"]) - shown) if asked.sft and shown else []
  return [
    Finding(WARNING, "kind", "", f"held-out tasks of kind {kind!r} have no {what}", remedy)
    for found, what, remedy in (
      (missing, "training task of their kind", "give some of them split 'train'"),
      (unshown, "demonstration of their kind in training", "give some training tasks one"),
    )
    for kind in found
  ]


def _unpaid(tasks: Sequence[Task], asked: Asked) -> list[Finding]:
  """Step rewards that are 0 whatever is called."""
  silent = [task.id for task in tasks if asked.progress and not rules.knows_the_goal(task)]
  if not silent:
    return []
  return [
    Finding(
      *(WARNING, "reward", ""),
      f"no call can earn anything in {len(silent)} of {len(tasks)} training tasks ({silent[0]} is "
      "the first): without a demonstration only a checker's 'value' says what the goal needs",
      "add demonstrations, or train with algorithm steptool_no_step_rewards",
    )
  ]


def _always_failing(outcomes: Sequence[_Outcome]) -> list[Finding]:
  """Tools that raised in every one of their calls: one sentence for what many tasks say."""
  codes: collections.defaultdict[str, list[str]] = collections.defaultdict(list)
  for row in (o.row for o in outcomes if "calls" in o.row):
    for name, code in zip(row["calls"], row["codes"], strict=True):
      codes[name].append(code)
  return [
    Finding(
      *(ERROR, "tool", ""),
      f"{name} raised in all of its {len(found)} calls of these demonstrations",
      "mend the function: its exception stands in the findings of the single calls",
    )
    for name, found in codes.items()
    if len(found) >= _SEVERAL and set(found) == {Code.TOOL_ERROR}
  ]


_SEVERAL = 3  # calls of a tool, all of which fail by no accident


def _together(outcomes: Sequence[_Outcome], asked: Asked) -> list[Finding]:
  """What is wrong with many tasks at once."""
  findings = []
  rows = [o.row for o in outcomes if "fits" in o.row and o.row["split"] == "train"]
  if asked.sft and rows and not any(row["fits"] for row in rows):
    tokens, steps = max(r["tokens"] for r in rows), max(r["steps"] for r in rows)
    findings.append(
      Finding(
        *(ERROR, "sft", ""),
        f"none of {len(rows)} demonstrations fits; the longest has {tokens} tokens, {steps} steps",
        "raise rollout.max_tokens, max_steps and max_step_tokens",
      )
    )
  without = sum(not o.room for o in outcomes)
  if without:
    findings.append(
      Finding(
        *(WARNING, "room", ""),
        f"{without} of {len(outcomes)} prompts have no room for one step",
        "raise rollout.max_tokens, or offer fewer tools",
      )
    )
  return findings


def _figures(
  splits: Mapping[str, Sequence[Task]],
  jobs: Sequence[_Job],
  outcomes: Sequence[_Outcome],
  asked: Asked,
) -> dict[str, Any]:
  rows = [o.row for o in outcomes if "fits" in o.row]
  paid = [(sc, con) for r in rows for sc, con in _pairs(r)]
  figures: dict[str, Any] = {f"{split}_tasks": len(tasks) for split, tasks in splits.items()}
  figures |= {
    "checked_tasks": len(outcomes),
    "not_reached": len(jobs) - len(outcomes),
    "demonstrations": len(rows),
    "solved": sum(row["solved"] == 1 for row in rows),
    "fitting": sum(row["fits"] for row in rows) if asked.chat_format else "no tokenizer",
    "prompts_without_room": sum(not o.room for o in outcomes),
    "calls": len(paid),
    "success_calling": _mean([sc for sc, _ in paid]),
    "contribution": _mean([con for _, con in paid]),
    "longest_tokens": max((row["tokens"] for row in rows), default=0),
    "longest_steps": max((row["steps"] for row in rows), default=0),
  }
  return figures


def _pairs(row: Mapping[str, Any]) -> list[tuple[float, float]]:
  return list(zip(row["success_calling"], row["contribution"], strict=True))


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values) if values else 0.0
