"""Solvable pass rate and win rate, invocation success, calls per task.

Pass: without Finish, with an empty answer or when given up a task is Unsolved, and nobody is asked.
Otherwise a judge sees query and answer; where it is Unsure it looks again, with all calls and their
results. Solved counts 1, Unsure .5, Unsolved 0; a judge run's figure is the mean over tasks, the
reported one its mean and population standard deviation over judge runs (noise of the judge alone).

Win: in every judge run the higher pass score wins a task; equal scores go to a pairwise judge, who
does not learn which side is whose.

An infrastructure error, of the rollout or of the judge, is nobody's score: such tasks are named and
left out of all runs.
"""

import dataclasses
import json
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Literal, Protocol

import numpy as np

from steptool_jax.dialogue.parser import FINISH
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.toolbench.formats.judged import Verdict
from steptool_jax.types import Code, Finish, Malformed, Status, ToolCall, Trajectory, by_call

Preference = Literal["first", "second", "tie"]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a judge may see of one finished task, and its calls."""

  task_id: str
  query: str
  answer: str  # "" where there is none, or it was given up
  trajectory: str  # calls and results as text
  codes: tuple[Code, ...] = ()  # of every call
  infrastructure: bool = False


class Judge(Protocol):
  def __call__(self, query: str, answer: str, trajectory: str | None, run: int) -> Verdict:
    """trajectory is None at the first look; InfrastructureError when there is no verdict."""


class Comparer(Protocol):
  def __call__(self, query: str, first: Outcome, second: Outcome, run: int) -> Preference:
    """Which answer is better; InfrastructureError when there is no verdict."""


@dataclasses.dataclass(frozen=True, eq=False)
class PassRate:
  """verdicts[i][j] of task task_ids[i] in judge run j."""

  task_ids: tuple[str, ...]
  verdicts: tuple[tuple[Verdict, ...], ...]
  unjudged: tuple[str, ...]  # ids left out: the judge failed

  @property
  def scores(self) -> np.ndarray:
    """float64[tasks, judge runs]."""
    return np.array([[v.score for v in row] for row in self.verdicts], np.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class WinRate:
  """results[i][j] of task task_ids[i] in judge run j: 1 a win, 0 a loss, .5 a tie."""

  task_ids: tuple[str, ...]
  results: np.ndarray  # float64[tasks, judge runs]
  left_out: tuple[str, ...]  # ids without a score on both sides, or not compared

  def share(self, result: float) -> tuple[float, float]:
    """(mean, population std over judge runs) of the share of tasks with this result."""
    if not self.task_ids:
      return float("nan"), float("nan")
    shares = (self.results == result).mean(axis=0)
    return float(shares.mean()), float(shares.std())

  @property
  def wins(self) -> tuple[float, float]:
    return self.share(1.0)

  @property
  def ties(self) -> tuple[float, float]:
    return self.share(0.5)

  @property
  def losses(self) -> tuple[float, float]:
    return self.share(0.0)


# --- outcomes --------------------------------------------------------------------------------


def outcome_of(trajectory: Trajectory, query: str) -> Outcome:
  """The outcome of a rollout; `query` is what the user asked."""
  answer, lines, codes = "", [], []
  for number, step in enumerate(by_call(trajectory.steps), start=1):
    action = step.action
    if isinstance(action, Finish):
      answer = "" if action.gave_up else action.answer.strip()
      name, arguments = FINISH, action.answer
    elif isinstance(action, ToolCall):
      name, arguments = action.name, json.dumps(dict(action.arguments), ensure_ascii=False)
    else:
      name, arguments = "", f"malformed: {action.reason}"
    response = "" if step.observation is None else step.observation.text
    lines.append(_line(number, name, arguments, response))
    if isinstance(action, (ToolCall, Malformed)):
      codes.append(Code.MALFORMED if step.observation is None else step.observation.code)
  return Outcome(
    trajectory.task_id,
    query,
    answer if trajectory.status is Status.ANSWERED else "",
    "\n".join(lines),
    tuple(codes),
    trajectory.status is Status.INFRASTRUCTURE_ERROR,
  )


def _line(number: int, name: str, arguments: str, response: str) -> str:
  step = {"step": number, "call": name, "arguments": arguments, "result": response}
  return json.dumps(step, ensure_ascii=False)


def calls_of(trajectory: str) -> tuple[tuple[str, str], ...]:
  """(name and arguments, result) of every call in an Outcome's trajectory text, Finish apart."""
  steps = [json.loads(line) for line in trajectory.split("\n") if line]
  return tuple(
    (f"{step['call']} {step['arguments']}", step["result"])
    for step in steps
    if step["call"] != FINISH
  )


# --- figures ---------------------------------------------------------------------------------


def pass_rate(
  outcomes: Sequence[Outcome], judge: Judge, runs: int = 3, max_in_flight: int = 16
) -> PassRate:
  """Asks the judge `runs` times for every answer, at most max_in_flight at once.

  The order of the result is that of `outcomes`. ValueError for a task id that occurs twice (rate
  several samples of a task one by one) and for runs < 1.
  """
  _check_distinct(outcomes)
  if runs < 1:
    raise ValueError(f"runs is {runs}, must be at least 1")
  healthy = [outcome for outcome in outcomes if not outcome.infrastructure]

  def verdict(outcome: Outcome, run: int) -> Verdict | None:
    if not outcome.answer:
      return Verdict.UNSOLVED
    try:
      first = judge(outcome.query, outcome.answer, None, run)
      if first is not Verdict.UNSURE:
        return first
      return judge(outcome.query, outcome.answer, outcome.trajectory, run)
    except InfrastructureError:
      return None

  asked = _concurrently(verdict, healthy, runs, max_in_flight)
  judged = [(o, row) for o, row in zip(healthy, asked, strict=True) if None not in row]
  return PassRate(
    task_ids=tuple(outcome.task_id for outcome, _ in judged),
    verdicts=tuple(tuple(row) for _, row in judged),
    unjudged=tuple(o.task_id for o, row in zip(healthy, asked, strict=True) if None in row),
  )


def win_rate(
  ours: Sequence[Outcome],
  theirs: Sequence[Outcome],
  our_rate: PassRate,
  their_rate: PassRate,
  compare: Comparer,
  seed: int = 0,
  max_in_flight: int = 16,
) -> WinRate:
  """How often `ours` beats `theirs` on the tasks that have verdicts on both sides.

  Which side a pairwise judge sees first is drawn for each task and run from `seed`. ValueError when
  the two sides are not of the same tasks, or not of the same number of judge runs.
  """
  _check_distinct(ours)
  _check_distinct(theirs)
  mine, other = ({o.task_id: o for o in side} for side in (ours, theirs))
  if mine.keys() != other.keys():
    apart = sorted(mine.keys() ^ other.keys())
    raise ValueError(f"the two sides differ in {len(apart)} tasks, e.g. {apart[:5]}")
  scores = [dict(zip(rate.task_ids, rate.scores, strict=True)) for rate in (our_rate, their_rate)]
  both = [o for o in ours if o.task_id in scores[0] and o.task_id in scores[1]]
  widths = {len(side[o.task_id]) for side in scores for o in both}
  if len(widths) > 1:
    raise ValueError(f"the two sides have {sorted(widths)} judge runs, must be equal")

  def result(outcome: Outcome, run: int) -> float | None:
    a, b = (side[outcome.task_id][run] for side in scores)
    if a != b:
      return float(a > b)
    # A generator of its own, so that the draw does not depend on other tasks or on threads.
    swapped = random.Random(f"{seed}/{outcome.task_id}/{run}").random() < 0.5
    pair = (outcome, other[outcome.task_id])
    try:
      preference = compare(outcome.query, *(reversed(pair) if swapped else pair), run)
    except InfrastructureError:
      return None
    if preference == "tie":
      return 0.5
    return float((preference == "first") != swapped)

  asked = _concurrently(result, both, max(widths, default=0), max_in_flight)
  compared = [(o, row) for o, row in zip(both, asked, strict=True) if None not in row]
  ids = tuple(outcome.task_id for outcome, _ in compared)
  return WinRate(
    ids,
    np.array([row for _, row in compared], np.float64),
    tuple(o.task_id for o in ours if o.task_id not in set(ids)),
  )


def call_metrics(outcomes: Sequence[Outcome]) -> dict[str, float]:
  """Shares and means over healthy outcomes; NaN where there is nothing to count.

  invocation_success: share of calls that were executed without an error, malformed turns counted as
  failed ones and infrastructure failures not at all; calls_per_task: of tools, Finish apart.
  """
  healthy = [outcome for outcome in outcomes if not outcome.infrastructure]
  codes = [code for o in healthy for code in o.codes if code is not Code.INFRASTRUCTURE]
  return {
    "invocation_success": _mean([code is Code.OK for code in codes]),
    "calls_per_task": _mean([len(outcome.codes) for outcome in healthy]),
  }


def _concurrently(
  work: Callable, outcomes: Sequence[Outcome], runs: int, max_in_flight: int
) -> list[list]:
  """[[work(outcome, run) for every run] for every outcome], in threads."""
  if max_in_flight < 1:
    raise ValueError(f"max_in_flight is {max_in_flight}, must be at least 1")
  jobs = [(outcome, run) for outcome in outcomes for run in range(runs)]
  with futures.ThreadPoolExecutor(max_in_flight) as pool:
    done = list(pool.map(lambda job: work(*job), jobs))
  return [done[start : start + runs] for start in range(0, len(done), runs)] if runs else []


def _check_distinct(outcomes: Sequence[Outcome]) -> None:
  seen: Mapping[str, None] = dict.fromkeys(o.task_id for o in outcomes)
  if len(seen) != len(outcomes):
    raise ValueError(
      f"{len(outcomes)} outcomes of {len(seen)} tasks: rate the samples of a task one by one"
    )


def _mean(values: Sequence[float]) -> float:
  return float(np.mean(values)) if len(values) else float("nan")
