"""Sources and schemes are rows of tables; `pay` puts them together."""

import dataclasses

import pytest
from replays import step, trajectory

from steptool_jax.config import Orchestra, Rewards
from steptool_jax.rewards import assembly
from steptool_jax.types import Status, Task, ToolCall

TASK = Task("t", "toy", "q", (), {})
OPTIONS = Rewards(source="toy", shaping="sum", orchestra=Orchestra(1.0, 0.0, 0.0))


def made(solved=1.0):
  return trajectory(TASK, [step(None), step(None)], solved, Status.ANSWERED)


def mark(task, found):
  """A source of one row: every step is a success."""
  assert task is TASK
  steps = tuple(dataclasses.replace(s, success_calling=1.0) for s in found.steps)
  return dataclasses.replace(found, steps=steps)


def rewards(found):
  return [[s.reward for s in t.steps] for t in found]


def test_a_source_and_a_scheme_are_one_row_each(monkeypatch):
  """A name that is spelt out anywhere else would make a row of its own useless."""
  monkeypatch.setitem(assembly.SOURCES, "toy", assembly.Source(mark, mark))
  monkeypatch.setitem(assembly.SCHEMES, "toy", lambda *_: [{"gold": 2.0, "tax": -0.5}])
  (paid,) = assembly.pay([TASK], [made()], OPTIONS, scheme="toy")
  assert rewards([paid]) == [[0.5, 1.5]]
  assert paid.reward_parts == {
    "success_calling": 0.5,
    "contribution": 0.0,
    "gold": 2.0,
    "tax": -0.5,
  }


@pytest.mark.parametrize(
  ("scheme", "outcome_only", "expected"),
  [
    ("steptool", False, [[0.5, 1.0], [0.5, 0.0]]),
    ("steptool", True, [[0.0, 1.0], [0.0, 0.0]]),
    ("orchestra_steps", False, [[0.5, 1.0], [0.5, 0.0]]),  # solved, min-max over the group
    ("orchestra", True, [[0.0, 1.0], [0.0, 0.0]]),
  ],
)
def test_schemes_pay_the_last_step_and_sources_those_before(
  scheme, outcome_only, expected, monkeypatch
):
  """A scheme that leaks into intermediate steps, or a source into the last one, changes a row."""
  monkeypatch.setitem(assembly.SOURCES, "toy", assembly.Source(mark, mark))
  found = assembly.pay(
    [TASK] * 2,
    [made(1.0), made(0.0)],
    OPTIONS,
    scheme=scheme,
    outcome_only=outcome_only,
  )
  assert rewards(found) == expected


def test_texts_are_marked_by_the_sources_own_rule(monkeypatch):
  """ToolBench has no demonstrations: there the rules of the other environments mark nothing."""
  monkeypatch.setitem(assembly.SOURCES, "toy", assembly.Source(lambda task, t: t, mark))
  paid = [assembly.pay([TASK], [made()], OPTIONS, texts=texts)[0] for texts in (False, True)]
  assert rewards(paid) == [[0.0, 1.0], [0.5, 1.0]]


def test_the_discount_and_the_cuts_reach_the_potential(monkeypatch):
  """With another gamma than the advantage's, or Phi = 0 at a cut that goes on, shaping would move
  the optimum."""
  task = dataclasses.replace(TASK, demonstration=(ToolCall("f", {}),) * 4)

  def con(task, found):
    steps = tuple(dataclasses.replace(s, contribution=1.0) for s in found.steps)
    return dataclasses.replace(found, steps=steps)

  monkeypatch.setitem(assembly.SOURCES, "toy", assembly.Source(con, con))
  options = dataclasses.replace(OPTIONS, shaping="potential")
  cut = dataclasses.replace(made(0.0), status=Status.TOKEN_BUDGET)
  for bootstrap, last in (((), -0.25), (("token_budget",), 0.8 * 0.5 - 0.25)):
    (paid,) = assembly.pay([task], [cut], options, gamma=0.8, bootstrap=bootstrap)
    assert rewards([paid])[0] == pytest.approx([0.8 * 0.25, last])


def test_safe_is_said_of_what_neither_reads_the_future_nor_pays_useless_calls():
  said = {
    (source, row): assembly.described(Rewards(source=source, shaping=row))["safe"]
    for source in assembly.SOURCES
    for row in ("progress", "potential", "failed_cost", "sum", "prefix_mean", "episode_mean")
  }
  assert {key for key, safe in said.items() if safe} == {
    ("progress", row) for row in ("progress", "potential", "failed_cost")
  }
