import random
import threading

import numpy as np
import pytest

from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.toolbench import passrate
from steptool_jax.toolbench.formats.judged import Verdict
from steptool_jax.toolbench.passrate import Outcome, call_metrics, outcome_of, pass_rate, win_rate
from steptool_jax.types import (
  Code,
  Finish,
  Malformed,
  Observation,
  Status,
  Step,
  ToolCall,
  Trajectory,
)

SOLVED, UNSURE, UNSOLVED = Verdict.SOLVED, Verdict.UNSURE, Verdict.UNSOLVED


def outcome(task_id, answer="a", **rest):
  return Outcome(task_id, f"query {task_id}", answer, f"calls {task_id}", **rest)


def table(looks):
  """A judge that reads {(task, run): verdict, (first, second) or an error}; it notes its calls."""
  lock, calls = threading.Lock(), []

  def judge(query, answer, trajectory, run):
    task = query.removeprefix("query ")
    with lock:
      calls.append((task, run, answer, trajectory))
    look = looks[task, run]
    if isinstance(look, tuple):
      look = look[trajectory is not None]
    if isinstance(look, Exception):
      raise look
    return look

  judge.calls = calls
  return judge


def test_by_hand():
  looks = {
    ("a", 0): SOLVED,
    ("a", 1): UNSOLVED,
    ("b", 0): (UNSURE, SOLVED),
    ("b", 1): (UNSURE, UNSURE),
  }
  judge = table(looks)
  outcomes = [outcome("a"), outcome("n", answer=""), outcome("b", answer="x")]
  rate = pass_rate(outcomes, judge, runs=2)
  assert rate.task_ids == ("a", "n", "b")
  assert rate.verdicts == ((SOLVED, UNSOLVED), (UNSOLVED, UNSOLVED), (SOLVED, UNSURE))
  means = [2 / 3, 0.5 / 3]
  assert rate.scores.mean(axis=0) == pytest.approx(means)
  # Nobody is asked about an empty answer; the whole trajectory is shown at the second look only.
  assert sorted(judge.calls, key=str) == sorted(
    [
      *(("a", run, "a", None) for run in (0, 1)),
      *(("b", run, "x", seen) for run in (0, 1) for seen in (None, "calls b")),
    ],
    key=str,
  )


def test_infrastructure_is_left_out_and_named():
  looks = {
    ("a", 0): SOLVED,
    ("a", 1): SOLVED,
    ("b", 0): UNSOLVED,
    ("b", 1): InfrastructureError("x"),
  }
  outcomes = [outcome("a"), outcome("b"), outcome("c", infrastructure=True)]
  rate = pass_rate(outcomes, table(looks), runs=2)
  assert (rate.task_ids, rate.unjudged) == (("a",), ("b",))
  assert rate.scores.tolist() == [[1, 1]]
  second = {("b", 0): (UNSURE, InfrastructureError("x"))}
  assert pass_rate([outcome("b")], table(second), runs=1).unjudged == ("b",)
  nothing = pass_rate([outcome("c", infrastructure=True)], table({}), runs=2)
  assert (nothing.task_ids, nothing.unjudged) == ((), ())


def test_a_bug_in_a_judge_is_not_hidden():
  with pytest.raises(KeyError):
    pass_rate([outcome("a")], table({}), runs=1)


@pytest.mark.parametrize(
  ("outcomes", "options", "match"),
  [
    (["a", "a"], {}, "2 outcomes of 1 tasks"),
    (["a"], {"runs": 0}, "runs is 0"),
    (["a"], {"max_in_flight": 0}, "max_in_flight is 0"),
  ],
)
def test_bad_settings(outcomes, options, match):
  with pytest.raises(ValueError, match=match):
    pass_rate([outcome(t) for t in outcomes], table({("a", 0): SOLVED}), **options)


def test_judges_run_at_the_same_time():
  together = threading.Barrier(4, timeout=20)

  def judge(*_):
    together.wait()  # breaks unless four are in flight at once
    return SOLVED

  assert pass_rate([outcome("a"), outcome("b")], judge, runs=2, max_in_flight=4).scores.mean() == 1


def rated(*rows):
  return passrate.PassRate(tuple("abcdefgh"[: len(rows)]), rows, ())


def sides(count):
  ids = "abcdefgh"[:count]
  return [outcome(t, answer="ours") for t in ids], [outcome(t, answer="theirs") for t in ids]


def test_the_higher_score_wins_and_ties_are_compared():
  ours, theirs = sides(3)
  asked = []

  def compare(query, first, second, run):
    asked.append((query, run))
    if query == "query b":
      return "tie"
    return "first" if first.answer == "ours" else "second"

  win = win_rate(
    ours,
    theirs,
    rated((SOLVED, UNSURE), (SOLVED, UNSOLVED), (UNSURE, UNSURE)),
    rated((UNSURE, SOLVED), (SOLVED, UNSOLVED), (UNSURE, UNSURE)),
    compare,
    max_in_flight=1,
  )
  assert win.results.tolist() == [[1, 0], [0.5, 0.5], [1, 1]]
  assert asked == [("query b", 0), ("query b", 1), ("query c", 0), ("query c", 1)]
  assert win.wins == pytest.approx((0.5, np.std([2 / 3, 1 / 3])))
  assert win.ties == pytest.approx((1 / 3, 0))
  assert win.losses == pytest.approx((1 / 6, np.std([0, 1 / 3])))


def test_a_judge_that_prefers_a_place_gains_nothing():
  """The order is drawn; drawn alike again from the same seed, whatever the order of work."""
  count = 400
  ids = [str(n) for n in range(count)]
  ours, theirs = [outcome(t) for t in ids], [outcome(t) for t in ids]
  even = passrate.PassRate(tuple(ids), ((SOLVED, SOLVED),) * count, ())

  def play(seed, order=None):
    picked = order or list(range(count))
    win = win_rate(
      [ours[i] for i in picked], theirs, even, even, lambda *_: "first", seed, max_in_flight=2
    )
    return dict(zip(win.task_ids, win.results.tolist(), strict=True))

  first = play(3)
  shares = np.mean(list(first.values()), axis=0)
  assert np.all(abs(shares - 0.5) < 0.1)  # four standard errors
  assert play(4) != first
  shuffled = list(range(count))
  random.Random(0).shuffle(shuffled)
  assert play(3, shuffled) == first
  assert any(a != b for a, b in first.values())  # a draw for each run


def test_what_cannot_be_compared_is_left_out_and_named():
  ours, theirs = sides(3)
  partial = passrate.PassRate(("a", "c"), ((SOLVED,), (SOLVED,)), ("b",))
  full = rated((UNSOLVED,), (SOLVED,), (SOLVED,))

  def broken(*_):
    raise InfrastructureError("down")

  win = win_rate(ours, theirs, partial, full, broken)
  assert (win.task_ids, win.left_out) == (("a",), ("b", "c"))
  assert win.wins == (1, 0)
  with pytest.raises(ValueError, match=r"differ in 1 tasks, e\.g\. \['c'\]"):
    win_rate(ours, theirs[:2], partial, full, broken)
  with pytest.raises(ValueError, match=r"\[1, 2\] judge runs"):
    win_rate(ours, theirs, partial, rated(*[(SOLVED, SOLVED)] * 3), broken)


def trajectory(actions, status=Status.ANSWERED):
  steps = tuple(
    Step(np.zeros(1, np.int32), np.zeros(1, np.float32), action, observation)
    for action, observation in actions
  )
  return Trajectory("t", 0, np.zeros(1, np.int32), steps, status)


OK = Observation("sunny", Code.OK)


def test_outcomes_of_rollouts():
  call = (ToolCall("rain", {"p": "Ü"}), OK)
  good = outcome_of(trajectory([call, (Malformed("?"), None), (Finish(" Yes "), None)]), "q")
  assert (good.answer, good.codes) == ("Yes", (Code.OK, Code.MALFORMED))
  assert "sunny" in good.trajectory
  assert "Ü" in good.trajectory
  assert (
    outcome_of(trajectory([(Finish("x", gave_up=True), None)], Status.GAVE_UP), "q").answer == ""
  )
  assert outcome_of(trajectory([call], Status.STEP_BUDGET), "q").answer == ""
  broken = trajectory([(ToolCall("f", {}), Observation("", Code.INFRASTRUCTURE))])
  broken = trajectory([(broken.steps[0].action, OK)], Status.INFRASTRUCTURE_ERROR)
  assert outcome_of(broken, "q").infrastructure


def test_call_metrics():
  outcomes = [
    outcome("a", codes=(Code.OK, Code.MALFORMED, Code.OK)),
    outcome("b", codes=(Code.TIMEOUT, Code.INFRASTRUCTURE)),
    outcome("c", codes=(Code.OK,) * 9, infrastructure=True),
  ]
  assert call_metrics(outcomes) == {
    "invocation_success": 0.5,
    "calls_per_task": 2.5,
  }
  assert np.isnan(call_metrics([])["invocation_success"])
