"""pass@k and new ways of solving, by hand."""

import itertools
import math

import numpy as np
import pytest
from handmade import call, finish, trajectory

from steptool_jax.evaluation import comparison, tries
from steptool_jax.evaluation.comparison import DONE, Cell
from steptool_jax.evaluation.records import Run
from steptool_jax.types import Code, Status


def test_pass_at_k_by_hand():
  """Of 4 tries 1 solved: two tries miss it in C(3, 2) / C(4, 2) = 3 / 6 cases; a task with 4 of 4
  solved never fails, one with 0 always."""
  assert tries.pass_at([(4, 1)], 1) == 1 / 4
  assert tries.pass_at([(4, 1)], 2) == 1 / 2
  assert tries.pass_at([(4, 1)], 4) == 1.0
  assert tries.pass_at([(4, 1), (4, 4), (4, 0)], 2) == pytest.approx((1 / 2 + 1 + 0) / 3)
  assert tries.pass_at([(4, 1), (2, 2)], 3) == 3 / 4, "a task with two tries knows no pass@3"
  assert math.isnan(tries.pass_at([(2, 1)], 3))


def test_pass_at_k_counts_all_choices():
  """1 - (1 - c / n)^k, the estimate that one would write down first, is another number."""
  tried = [1, 0, 0, 1, 0, 0, 0]
  for k in range(1, 8):
    chosen = [max(c) for c in itertools.combinations(tried, k)]
    assert tries.pass_at([(7, 2)], k) == pytest.approx(np.mean(chosen))


def test_pass_at_is_unbiased():
  """Tasks solved with chance .2, 8 tries each: the mean is 1 - .8^4 = .5904."""
  solved = np.random.default_rng(0).binomial(8, 0.2, 20_000)
  assert tries.pass_at([(8, int(c)) for c in solved], 4) == pytest.approx(0.5904, abs=0.008)


def way(*names, task="t", sample=0, solved=0.0):
  return trajectory(*map(call, names), finish(), task=task, sample=sample, solved=solved)


BROKEN = trajectory(call("a", Code.INFRASTRUCTURE), task="t", status=Status.INFRASTRUCTURE_ERROR)


def test_what_is_kept_of_the_tries():
  """Each sequence once; half solved is not solved; arguments and answers do not matter."""
  found = tries.document(
    [way("a", "b"), way("a", "b", solved=1.0), way("b", solved=0.5), way(task="u"), BROKEN]
  )
  assert found == {
    "t": {"tries": 3, "solved": 1, "sequences": [["a", "b"], ["b"]], "solving": [["a", "b"]]},
    "u": {"tries": 1, "solved": 0, "sequences": [[]], "solving": []},
  }
  # pass@2 and pass@3 of t alone: u has one try.
  assert tries.pass_at_all(found) == {1: pytest.approx(1 / 6), 2: pytest.approx(2 / 3), 3: 1.0}
  assert tries.pass_at_all({}) == {}


def test_no_more_than_pass_at_16():
  found = tries.document([way("a", sample=k, solved=1.0) for k in range(20)])
  assert list(tries.pass_at_all(found)) == list(range(1, 17))


def test_new_ways_are_those_that_the_start_never_tried():
  """old: solved as it was tried, without success, before. new: in another order only. both: one of
  its two ways is known. lost: not solved any more. Only tries of the same task count."""
  known = [way("a", "b", task=task) for task in ("old", "new", "both", "lost")]
  before = tries.document([*known, way("b", "a", task="x")])
  after = tries.document(
    [
      way("a", "b", task="old", solved=1.0),
      way("b", "a", task="new", solved=1.0),
      way("b", "a", task="both", solved=1.0),
      way("a", "b", task="both", solved=1.0),
      way("c", task="lost"),
      way("c", task="unknown", solved=1.0),
    ]
  )
  assert tries.new_sequences(before, after) == 1 / 3
  assert math.isnan(tries.new_sequences(before, tries.document([way("c", task="lost")])))


def cell(most):
  """A cell whose training curve goes straight from .2 at 100 calls to .1 + most / 1000 at `most`,
  and which was evaluated at both ends only."""
  middle = (100.0 + most) / 2
  records = (
    {"heldout/pass_rate": 0.1, "heldout/llm_calls": 0.0},
    {"train/pass_rate": 0.2, "train/llm_calls": 100.0, "train/entropy": 0.9},
    {"train/pass_rate": 0.1 + middle / 1000, "train/llm_calls": middle, "train/entropy": 0.6},
    {"train/pass_rate": 0.1 + most / 1000, "train/llm_calls": most, "train/entropy": 0.4},
    {"heldout/pass_rate": 0.5, "heldout/llm_calls": most},
  )
  summary = {"pass_at_16_end": 0.75, "new_sequences": 0.125, "pass_rate_rl": 0.5}
  run = Run(None, {}, summary, records, {}, ())
  return Cell(f"ppo/{most}", "core", "shop", "ppo", int(most), DONE, "", run, {})


def test_a_cell_has_the_figures_of_its_tries_and_curves():
  found = comparison.cell_figures(cell(300.0))
  assert (found["pass_at_16_end"], found["new_sequences"], found["entropy"]) == (0.75, 0.125, 0.4)
  # Over the 200 calls that both have spent, both curves rise from .2 to .3.
  (row,) = comparison.rows([cell(300.0), cell(200.0)])
  assert row.figures["train_area"][0] == pytest.approx(0.25)
  assert "area" not in row.figures, "a start and an end are no curve"
  assert row.plateau is None
  # One that begins where another one ends has no area, and breaks no page.
  (row,) = comparison.rows([cell(300.0), cell(100.5)])
  assert row.figures["train_area"][0] == pytest.approx(0.2, abs=1e-3)
