"""Sources and schemes are rows of tables; `pay` puts them together."""

import dataclasses

import pytest
from replays import step, trajectory

from steptool_jax.config import Orchestra, Rewards
from steptool_jax.rewards import assembly
from steptool_jax.types import Status, Task

TASK = Task("t", "toy", "q", (), {})
OPTIONS = Rewards(alpha=1.0, normalization="none", orchestra=Orchestra(1.0, 0.0, 0.0))


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
  monkeypatch.setitem(assembly.SOURCES, "toy", mark)
  monkeypatch.setitem(assembly.SCHEMES, "toy", lambda *_: [{"gold": 2.0, "tax": -0.5}])
  (paid,) = assembly.pay([TASK], [made()], OPTIONS, source="toy", scheme="toy")
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
  monkeypatch.setitem(assembly.SOURCES, "toy", mark)
  found = assembly.pay(
    [TASK] * 2,
    [made(1.0), made(0.0)],
    OPTIONS,
    source="toy",
    scheme=scheme,
    outcome_only=outcome_only,
  )
  assert rewards(found) == expected
