"""Methods compared seed by seed: what is called clear, and what is not."""

import pathlib

import pytest

from steptool_jax.evaluation import comparison
from steptool_jax.evaluation.comparison import DONE, Cell
from steptool_jax.evaluation.records import Run


def cells(environment="shop", **finals):
  """Cells of each method whose final pass rates, seed by seed, are given."""
  return [
    Cell(
      name=f"{method}/{seed}",
      group="core",
      environment=environment,
      method=method,
      seed=seed,
      status=DONE,
      note="",
      run=Run(pathlib.Path(), {}, {"pass_rate_rl": final}, (), {}, ()),
      facts={},
    )
    for method, values in finals.items()
    for seed, final in enumerate(values)
  ]


def contrasts(found, figure="final"):
  return {(d.method, d.against): d.figures[figure] for d in comparison.differences(found)}


BASE = [0.50, 0.52, 0.48, 0.51, 0.49, 0.50, 0.53, 0.47]
ABOVE = [0.02, 0.03, 0.05, 0.04, 0.03, 0.02, 0.06, 0.03]  # all of one sign


def plus(values, more):
  return [a + b for a, b in zip(values, more, strict=False)]


def test_eight_seeds_that_agree_are_clear():
  """The mean is .035, s = .01414, t(7) = 2.3646; all have one sign: p = 2 / 256."""
  found = contrasts(cells(ppo=BASE, new=plus(BASE, ABOVE)))["new", "ppo"]
  half = 2.3646 * 0.0141421 / 8**0.5
  assert (found.mean, found.low, found.high) == pytest.approx(
    (0.035, 0.035 - half, 0.035 + half), rel=1e-4
  )
  assert (found.seeds, found.p, found.adjusted, found.clear) == (8, 2 / 256, 2 / 256, True)


def test_fewer_seeds_are_never_clear():
  """Seven that agree have p = .016 and an interval far from 0, and would do with another rule."""
  found = contrasts(cells(ppo=BASE[:7], new=plus(BASE, ABOVE[:7])))["new", "ppo"]
  assert found.low > 0
  assert (found.seeds, found.p) == (7, 2 / 128)
  assert (found.adjusted, found.clear) == (None, False)


def test_an_interval_with_zero_is_not_clear():
  """One seed makes the whole difference: all have one sign, but the mean is not known well."""
  uneven = [0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.3, 0.001]
  found = contrasts(cells(ppo=BASE, new=plus(BASE, uneven)))["new", "ppo"]
  assert found.low < 0 < found.high
  assert found.adjusted == 2 / 256
  assert not found.clear


def test_more_comparisons_make_a_claim_harder():
  """Seven comparisons with p = 2 / 256 each: 7 x .0078 = .055 is not below .05; six are."""
  methods = {f"m{k}": plus(BASE, ABOVE) for k in range(7)}
  found = contrasts(cells(ppo=BASE, **methods))
  assert {c.adjusted for c in found.values()} == {7 * 2 / 256}
  assert not any(c.clear for c in found.values())
  methods.pop("m6")
  assert all(c.clear for c in contrasts(cells(ppo=BASE, **methods)).values())
  # Those without enough seeds, and those of another environment, are not of the family.
  more = {f"few{k}": plus(BASE, ABOVE[:4]) for k in range(3)}
  both = cells(ppo=BASE, **methods, **more) + cells("pipeline", ppo=BASE, new=plus(BASE, ABOVE))
  found = contrasts(both)
  assert {c.adjusted for c in found.values() if c.seeds == 8} == {6 * 2 / 256, 2 / 256}
