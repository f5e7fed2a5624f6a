"""What a tabular policy learns from each way to pay steps (results/incentives.py), to convergence.

A reward that can be collected by calls without use is collected: by the time it is seen in a run,
the run is lost.
"""

import functools
import pathlib
import runpy

import pytest

from steptool_jax.config import Rewards
from steptool_jax.rewards.shaping import SHAPINGS
from steptool_jax.types import Status

SCRIPT = runpy.run_path(
  str(pathlib.Path(__file__).parents[2] / "results/incentives.py"), run_name="incentives"
)
MOST = 0.1  # useless calls a conversation
OFTEN, SELDOM = 0.7, 0.4  # the calls that are needed succeed
SAFE = [name for name, row in SHAPINGS.items() if row.safe]


@functools.cache
def learnt(chance, outcome_only=False, **options):
  return SCRIPT["train"](Rewards(**options), chance, outcome_only=outcome_only)


@pytest.mark.parametrize("chance", [OFTEN, SELDOM])
@pytest.mark.parametrize("name", SAFE)
def test_no_safe_row_pays_for_calls_without_use(name, chance):
  got, outcome = learnt(chance, shaping=name), learnt(chance, outcome_only=True)
  assert got.useless <= MOST
  assert got.solved > outcome.solved - 0.02
  if chance == OFTEN:
    assert got.early < 0.02
    assert got.cut < 0.02
    assert got.solved > 0.97


@pytest.mark.parametrize(
  ("name", "chance"), [("sum", OFTEN), ("episode_mean", OFTEN), ("prefix_mean", SELDOM)]
)
def test_what_is_marked_unsafe_is(name, chance):
  """Else the mark, and the warning that goes with it, would be mere opinion."""
  assert learnt(chance, shaping=name).useless > 5 * MOST


def test_every_row_is_looked_at():
  assert {*SAFE, "sum", "episode_mean", "prefix_mean"} == set(SHAPINGS)


def test_the_defaults_optimum_answers_rightly():
  """And tries on where calls fail: it answers early less often than the outcome alone would."""
  default = Rewards()
  got = learnt(SELDOM, source=default.source, shaping=default.shaping, weight=default.weight)
  outcome = learnt(SELDOM, outcome_only=True)
  assert got.useless <= MOST
  assert got.early <= outcome.early
  assert got.solved > outcome.solved - 0.01


def test_the_toys_trajectories_are_what_they_say():
  """Marks by the product's rules: a call that is needed earns both, a failed one neither."""
  gold, failed, spare, end = (SCRIPT[n] for n in ("_GOLD", "_FAILED", "_SPARE", "_END"))
  annotate, make = SCRIPT["assembly"].rules.annotate, SCRIPT["trajectory"]
  found = make((spare, failed, gold, spare, gold, gold, end), Status.ANSWERED)
  marks = [(s.success_calling, s.contribution) for s in annotate(SCRIPT["TASK"], found, True).steps]
  assert marks == [(1, 0), (0, 0), (1, 1), (1, 0), (1, 1), (0, 0), (0, 0)]
  assert found.solved == 1
  assert make((gold, end), Status.ANSWERED).solved == 0
