"""Curves by hand: every expected number can be worked out on paper."""

import math

import numpy as np
import pytest

from steptool_jax.evaluation import analysis


def test_a_band_on_points_that_differ():
  """Runs at 0, 10, 20 and at 5, 15, 25: shared are 5, 10, 15, 20."""
  found = analysis.band([([0, 10, 20], [0.0, 0.2, 0.2]), ([5, 15, 25], [0.3, 0.5, 0.7])])
  np.testing.assert_array_equal(found.x, [5, 10, 15, 20])
  # First run: .1 .2 .2 .2; second: .3 .4 .5 .6.
  np.testing.assert_allclose(found.mean, [0.2, 0.3, 0.35, 0.4])
  # Of two runs a quarter of the resamples is the first alone, a quarter the second alone.
  np.testing.assert_allclose(found.low, [0.1, 0.2, 0.2, 0.2])
  np.testing.assert_allclose(found.high, [0.3, 0.4, 0.5, 0.6])
  assert found.runs == 2


def test_the_interval_is_that_of_the_mean_over_runs():
  """Five runs at 0 and 1 with mean .4: a mean of 5 draws is binomial(5, .4) / 5."""
  _, low, high = analysis.mean_interval([0, 0, 0, 1, 1])
  # P(0 of 5) = .078 > .025, P(5 of 5) = .0102 < .025 < P(>= 4 of 5) = .087.
  assert (low, high) == (0.0, 0.8)


def test_one_run_has_no_interval():
  found = analysis.band([([0, 1], [0.0, 1.0])])
  assert np.isnan(found.low).all()
  assert np.isnan(found.high).all()
  assert math.isnan(analysis.mean_interval([0.5])[1])


def test_bands_refuse_what_they_cannot_join():
  with pytest.raises(ValueError, match="at least one curve"):
    analysis.band([])
  with pytest.raises(ValueError, match="no x is covered by all"):
    analysis.band([([0, 1], [0, 0]), ([2, 3], [0, 0])])
  with pytest.raises(ValueError, match="increases"):
    analysis.band([([0, 1, 1], [0, 0, 0])])


def test_the_area_is_the_mean_height():
  curve = ([0, 10, 20], [0.0, 1.0, 1.0])
  assert analysis.area(curve) == pytest.approx((0.5 * 10 + 1.0 * 10) / 20)
  assert analysis.area(curve, until=15) == pytest.approx((0.5 * 10 + 1.0 * 5) / 15)
  # A curve that does not start at 0 is not diluted by what lies before it.
  assert analysis.area(([10, 20], [0.4, 0.6])) == pytest.approx(0.5)
  with pytest.raises(ValueError, match="no area up to 30"):
    analysis.area(curve, until=30)


def test_steps_to_a_level():
  curve = ([0, 10, 20, 30], [0.0, 0.4, 0.3, 0.8])
  assert analysis.steps_to(curve, 0.2) == pytest.approx(5.0)
  assert analysis.steps_to(curve, 0.4) == pytest.approx(10.0)
  assert analysis.steps_to(curve, 0.55) == pytest.approx(25.0)
  assert analysis.steps_to(curve, 0.0) == 0.0
  assert analysis.steps_to(curve, 0.9) is None


def test_where_the_mean_curve_crosses_a_level():
  """Means of the two runs: 0, .3, .6; the runs alone cross .3 at 5 and never."""
  runs = [([0, 10, 20], [0.0, 0.6, 1.0]), ([0, 10, 20], [0.0, 0.0, 0.2])]
  assert analysis.crossing(runs, 0.3) == (10.0, 5.0, math.inf)
  x, low, high = analysis.crossing(runs[:1], 0.3)
  assert (x, math.isnan(low), math.isnan(high)) == (5.0, True, True)


def test_a_plateau_is_seen_in_the_last_third():
  x = np.arange(10.0)  # the last third: 6, 7, 8, 9
  flat = (x, np.minimum(x / 6, 1.0) * 0.5)
  rising = (x, x / 18)
  found = analysis.plateau([flat, flat])
  assert found.reached is True
  assert found.rise == pytest.approx(0.0, abs=1e-12)
  found = analysis.plateau([rising])
  assert found.reached is False
  assert found.rise == pytest.approx(3 / 18)
  # The mean over runs counts: (0 + 3/18) / 2.
  assert analysis.plateau([flat, rising]).rise == pytest.approx(1.5 / 18)
  # Conversations that get longer: four evaluations of ten all the same.
  assert analysis.plateau([(x**2, x / 18)]).rise == pytest.approx(3 / 18, rel=0.02)
  # A fall is no rise.
  assert analysis.plateau([(x, 1 - x / 18)]).reached is True


def test_too_few_points_say_nothing_of_a_plateau():
  assert analysis.plateau([([0, 10, 20, 30], [0.0, 0.1, 0.2, 0.2])]).reached is None
  # The study's seven say something, wherever its conversations end.
  curve = [0, 708, 1387, 2070, 2810, 3538, 4234], [0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6]
  assert analysis.plateau([curve]).reached is True
