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
  # Of two values the standard error is half their difference, and t(1) at .975 is 12.7062.
  half = 12.7062 * np.array([0.2, 0.2, 0.3, 0.4]) / 2
  np.testing.assert_allclose(found.low, found.mean - half, rtol=1e-5)
  np.testing.assert_allclose(found.high, found.mean + half, rtol=1e-5)
  assert found.runs == 2


def test_the_interval_is_that_of_the_mean_over_runs():
  """Five runs at 0 and 1 with mean .4: variance .3, t(4) at .975 is 2.77645."""
  mean, low, high = analysis.mean_interval([0, 0, 0, 1, 1])
  half = 2.77645 * math.sqrt(0.3 / 5)
  assert (mean, low, high) == pytest.approx((0.4, 0.4 - half, 0.4 + half), rel=1e-5)


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
  """Three runs whose mean rises by .1 in 10 and which lie .01 apart: the half of the band is
  4.30265 * .01 / sqrt(3) = .02484, which the mean covers in 2.484."""
  x = [0, 10, 20]
  runs = [(x, [0.0 + d, 0.1 + d, 0.2 + d]) for d in (-0.01, 0.0, 0.01)]
  assert analysis.crossing(runs, 0.1) == pytest.approx((10, 10 - 2.484, 10 + 2.484), abs=1e-3)
  # The mean gets there, and the lower bound never does; or neither.
  found, low, high = analysis.crossing(runs, 0.19)
  assert (found, low, high) == (pytest.approx(19), pytest.approx(19 - 2.484, abs=1e-3), math.inf)
  assert analysis.crossing(runs, 0.5) == (math.inf, math.inf, math.inf)
  found, low, high = analysis.crossing(runs[:1], 0.1)
  assert (found, math.isnan(low), math.isnan(high)) == (pytest.approx(11), True, True)


def test_a_band_that_falls_back_has_not_left_the_level():
  """The lower bound crosses 10 % twice; only behind the last time is the level left behind."""
  x = [0, 10, 20, 30]
  runs = [(x, [0.0 + d, 0.2 + d, 0.1 + d, 0.3 + d]) for d in (-0.01, 0.0, 0.01)]
  _, low, high = analysis.crossing(runs, 0.1)
  assert low == pytest.approx(5 - 0.02484 / 0.02, abs=1e-3)
  assert high == pytest.approx(20 + 0.02484 / 0.02, abs=1e-3)


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
