"""Counts on trajectories written by hand."""

import dataclasses
import math

import pytest
from handmade import call, finish, give_up, malformed, trajectory

from steptool_jax.evaluation import behaviour
from steptool_jax.types import Code, Status

RATE, MISSING, UNKNOWN = Code.RATE_LIMIT, Code.NOT_FOUND, Code.UNKNOWN_TOOL
BROKEN = trajectory(call("a", Code.INFRASTRUCTURE), status=Status.INFRASTRUCTURE_ERROR)


def test_transitions_between_tools():
  found = behaviour.transitions(
    [
      trajectory(call("a", x=1), call("b"), finish()),
      trajectory(call("a"), call("a"), call("ghost", UNKNOWN)),  # cut by the budget
      trajectory(malformed(), give_up()),
      BROKEN,
    ]
  )
  assert found == {
    ("(start)", "a"): 2,
    ("(start)", "(malformed)"): 1,
    ("a", "b"): 1,
    ("a", "a"): 1,
    ("a", "(unknown tool)"): 1,
    ("b", "(answer)"): 1,
    ("(unknown tool)", "(out of budget)"): 1,
    ("(malformed)", "(give up)"): 1,
  }


def test_recovery_after_injected_errors():
  fault = call("a", RATE, injected=True, x=1)
  found = behaviour.recovery(
    [
      # Two errors in a row, the third call gets through: 2 and 1 calls more.
      trajectory(fault, fault, call("a", x=1), finish(), solved=1.0),
      trajectory(fault, call("b"), finish(), task="u"),  # another tool: not recovered
      trajectory(fault, task="v", status=Status.STEP_BUDGET),
      trajectory(call("a", MISSING), give_up(), task="w"),  # not injected
      BROKEN,
    ]
  )
  assert (found.errors, found.tasks) == (4, 3)
  assert found.recovered == pytest.approx(2 / 4)
  assert found.solved == pytest.approx(1 / 3)
  assert found.extra_calls == pytest.approx((2 + 1) / 2)
  assert {k: v for k, v in found.reactions.items() if v} == {
    behaviour.RETRIED: 0.5,
    behaviour.OTHER: 0.25,
    behaviour.ENDED: 0.25,
  }


def test_recovery_after_errors_of_its_own():
  wrong = call("a", Code.BAD_ARGUMENTS, x=1)
  found = behaviour.recovery(
    [
      trajectory(wrong, call("a", x=2), finish(), solved=1.0),
      trajectory(malformed(), malformed(), call("b"), give_up()),
      trajectory(wrong, finish()),
      trajectory(call("a", RATE, injected=True), call("a"), finish()),
    ],
    injected=False,
  )
  assert found.errors == 4
  assert found.recovered == pytest.approx(3 / 4)
  assert found.reactions[behaviour.CHANGED] == 0.25
  assert found.reactions[behaviour.BROKEN] == 0.25
  assert found.reactions[behaviour.OTHER] == 0.25
  assert found.reactions[behaviour.ANSWERED] == 0.25


def test_no_errors_no_recovery():
  found = behaviour.recovery([trajectory(finish())])
  assert found.errors == 0
  assert math.isnan(found.recovered)


def test_repeats_are_calls_that_had_been_answered():
  ask = call("a", x=1)
  assert behaviour.repeated_after_ok([trajectory(ask, ask, call("a", x=2), finish())]) == 1 / 3
  # A retry after an error is none, nor is asking again after a change of the state.
  failed = call("a", RATE, x=1)
  assert behaviour.repeated_after_ok([trajectory(failed, ask, finish())]) == 0.0
  change = call("set", changed=True)
  assert behaviour.repeated_after_ok([trajectory(ask, change, ask, finish())]) == 0.0
  assert behaviour.repeated_after_ok([trajectory(finish())]) == 0.0


def test_what_a_solved_task_costs_counts_the_failed_ones():
  priced = call("a")
  seen = dataclasses.replace(priced.observation, cost=0.3, latency=6.0)
  priced = dataclasses.replace(priced, observation=seen)
  good, bad = trajectory(priced, finish(), solved=1.0), trajectory(priced, give_up())
  half = trajectory(finish(), solved=0.5)
  found = behaviour.spent_per_solved([good, bad, half, BROKEN])
  totals = {"llm_calls": 5, "tokens": 10, "cost": 0.6, "latency": 12}
  assert found == {f"{k}_per_solved": pytest.approx(v / 1.5) for k, v in totals.items()}
  assert math.isnan(behaviour.spent_per_solved([bad])["llm_calls_per_solved"])


def test_tasks_that_turned_and_the_first_step_that_changed():
  """The paper's case: a wrong tool is chosen again and again, and after training another one."""
  wrong = call("search", MISSING, q="x")
  before = [
    trajectory(call("find"), wrong, wrong, give_up(), task="d"),
    trajectory(call("find"), call("open", id=1), finish("7"), task="a"),
    trajectory(call("open"), call("find"), call("find"), finish("7"), task="b"),
    trajectory(wrong, wrong, finish("7"), task="0"),
    trajectory(call("find"), finish("8"), task="c"),
    trajectory(call("find"), finish("1"), task="solved", solved=1.0),
    trajectory(call("find"), finish("2"), task="stays"),
  ]
  after = [
    trajectory(call("find"), call("look", id=3), finish("9"), task="d", solved=1.0),
    trajectory(call("find"), call("open", id=2), finish("9"), task="a", solved=1.0),
    trajectory(call("look"), call("find"), finish("9"), task="b", solved=1.0),
    trajectory(finish("9"), task="0", solved=1.0),
    trajectory(call("find"), call("open"), finish("9"), task="c", solved=1.0),
    trajectory(call("look"), finish("1"), task="solved", solved=1.0),
    trajectory(call("look"), finish("3"), task="stays"),
    trajectory(finish("9"), task="new", solved=1.0),
  ]
  cases = behaviour.turned_cases(before, after)
  assert [(c.task_id, c.step, c.change, c.again) for c in cases] == [
    ("d", 1, "look instead of search", "search"),
    ("0", 0, "answer instead of search", "search"),
    ("b", 0, "look instead of open", "find"),
    ("c", 1, "open instead of answer", ""),
    ("a", 1, "open with other arguments", ""),
  ]


def test_the_first_change_knows_thoughts_from_actions():
  one = call("a", x=1)
  thought = dataclasses.replace(one, action=dataclasses.replace(one.action, thought="hm"))
  assert behaviour.first_change(trajectory(one), trajectory(thought, finish())) == 1
  assert behaviour.first_change(trajectory(finish("1")), trajectory(finish("2"))) == 0
