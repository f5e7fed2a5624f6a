import numpy as np
import pytest

from steptool_jax.evaluation import intervals
from steptool_jax.evaluation.intervals import bootstrap, components, holm, sign_flip, t_bounds


def simulate(rng, tasks, rollouts, runs, task, rollout, judge):
  """Scores whose three standard deviations are known."""
  return (
    0.5
    + rng.normal(0, task, (tasks, 1, 1))
    + rng.normal(0, rollout, (tasks, rollouts, 1))
    + rng.normal(0, judge, (tasks, rollouts, runs))
  )


@pytest.mark.parametrize(
  ("task", "rollout", "judge"), [(0.3, 0.2, 0.1), (0.1, 0.0, 0.3), (0.0, 0.3, 0.0)]
)
def test_components_are_found(task, rollout, judge):
  rng = np.random.default_rng(0)
  got = components(simulate(rng, 4000, 4, 3, task, rollout, judge))
  truth = np.array([judge, rollout, task]) ** 2
  np.testing.assert_allclose([got.judge, got.rollout, got.task], truth, atol=0.004)
  assert got.within_task == pytest.approx(rollout**2 + judge**2, abs=0.004)


def test_the_estimates_are_unbiased():
  """Means over many small designs, without the cut at 0 (the truths are far from it)."""
  rng = np.random.default_rng(1)
  got = [components(simulate(rng, 8, 3, 3, 0.6, 0.5, 0.4)) for _ in range(1500)]
  np.testing.assert_allclose(np.mean([c.judge for c in got]), 0.16, rtol=0.02)
  np.testing.assert_allclose(np.mean([c.rollout for c in got]), 0.25, rtol=0.04)
  np.testing.assert_allclose(np.mean([c.task for c in got]), 0.36, rtol=0.06)


def test_standard_errors_are_those_of_repeated_experiments():
  rng = np.random.default_rng(2)
  tasks = rng.normal(0, 0.5, (20, 1, 1))

  def repeat(again_tasks, again_rollouts):
    rollouts = rng.normal(0, 0.4, (20, 2, 1))
    means = []
    for _ in range(3000):
      t = rng.normal(0, 0.5, (20, 1, 1)) if again_tasks else tasks
      r = rng.normal(0, 0.4, (20, 2, 1)) if again_rollouts else rollouts
      means.append((t + r + rng.normal(0, 0.3, (20, 2, 3))).mean())
    return np.std(means)

  truth = [repeat(False, False), repeat(False, True), repeat(True, True)]
  got = [components(simulate(rng, 20, 2, 3, 0.5, 0.4, 0.3)) for _ in range(1500)]
  found = [
    np.sqrt(np.mean([getattr(c, name) ** 2 for c in got]))
    for name in ("judge_error", "rollout_error", "task_error")
  ]
  np.testing.assert_allclose(found, truth, rtol=0.06)


def test_components_by_hand():
  scores = np.array([[[1, 0], [1, 1]], [[0, 0], [0, 1]]], float)
  got = components(scores)
  # Variances between judge runs .5, 0, 0, .5; between rollout means (.5, 1), (0, .5): .125 each;
  # between task means (.75, .25): .125.
  assert got.judge == pytest.approx(0.25)
  assert got.rollout == pytest.approx((2 * 0.125 - 0.25) / 2)
  assert got.task == pytest.approx((4 * 0.125 - 0.25) / 4)
  assert got.judge_error == pytest.approx(np.sqrt(0.25 / 8))
  assert got.rollout_error == pytest.approx(np.sqrt(0.25 / 8))
  assert got.task_error == pytest.approx(np.sqrt(0.5 / 8))


def test_what_the_data_cannot_tell_is_nan():
  rng = np.random.default_rng(3)
  one_rollout = components(simulate(rng, 500, 1, 3, 0.3, 0.2, 0.1))
  assert one_rollout.judge == pytest.approx(0.01, rel=0.2)
  assert np.isnan([one_rollout.rollout, one_rollout.task, one_rollout.within_task]).all()
  assert one_rollout.task_error == pytest.approx(np.sqrt((0.09 + 0.04 + 0.01 / 3) / 500), rel=0.15)
  one_run = components(simulate(rng, 4000, 3, 1, 0.3, 0.2, 0.1))
  assert np.isnan([one_run.judge, one_run.rollout, one_run.judge_error]).all()
  assert one_run.within_task == pytest.approx(0.05, rel=0.1)
  assert one_run.task == pytest.approx(0.09, rel=0.1)


def test_no_variance_is_below_zero():
  scores = np.array([[[1, 0], [0, 1]], [[0, 1], [1, 0]]], float)  # all rollout means are equal
  got = components(scores)
  assert (got.judge, got.rollout, got.task) == (0.5, 0, 0)


def test_the_interval_covers_the_truth_as_often_as_it_says():
  rng = np.random.default_rng(4)
  covered = []
  for seed in range(1000):
    interval = bootstrap(rng.beta(2, 3, 100), 0.9, resamples=300, seed=seed)
    covered.append(interval.low <= 0.4 <= interval.high)
  assert 0.87 <= np.mean(covered) <= 0.93  # three standard errors


def test_width_against_the_normal_approximation():
  scores = (np.arange(400) % 2).astype(float)
  interval = bootstrap(scores, resamples=20_000)
  assert interval.mean == 0.5
  half = 1.96 * 0.5 / 20
  np.testing.assert_allclose([interval.low, interval.high], [0.5 - half, 0.5 + half], atol=0.003)
  assert interval.confidence == 0.95


def test_tasks_are_the_unit_not_their_scores():
  """Judge runs that repeat one another make no figure surer."""
  scores = (np.arange(100) % 2).astype(float)
  repeated = np.repeat(scores[:, None], 9, axis=1).reshape(100, 3, 3)
  assert bootstrap(repeated) == bootstrap(scores)


def test_seeded_and_independent_of_blocks(monkeypatch):
  scores = np.random.default_rng(5).random(50)
  assert bootstrap(scores, seed=1) == bootstrap(scores, seed=1)
  assert bootstrap(scores, seed=1) != bootstrap(scores, seed=2)
  many = np.tile(scores, 2000)  # 100,000 tasks: more than one block
  interval = bootstrap(many, resamples=100)
  expected = 1.96 * scores.std() / np.sqrt(len(many))
  assert (interval.high - interval.low) / 2 == pytest.approx(expected, rel=0.4)


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (lambda: bootstrap(np.zeros(0)), "at least one task"),
    (lambda: bootstrap(np.array([1, np.nan])), "must be finite"),
    (lambda: bootstrap(np.ones(3), confidence=95), "confidence 95"),
    (lambda: bootstrap(np.ones(3), resamples=0), "resamples 0"),
    (lambda: components(np.ones((3, 2))), r"found \(3, 2\)"),
    (lambda: components(np.ones((1, 2, 2))), "at least two tasks"),
    (lambda: components(np.full((2, 2, 2), np.nan)), "must be finite"),
  ],
)
def test_bad_scores(call, match):
  with pytest.raises(ValueError, match=match):
    call()


# Two-sided 95 % quantiles of t, from a printed table.
TABLE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 11: 2.228, 21: 2.086}


@pytest.mark.parametrize(("number", "quantile"), TABLE.items())
def test_the_bounds_are_those_of_the_table(number, quantile):
  """A quantile of another number of freedoms, or of one side, would be a few per cent off."""
  values = np.random.default_rng(number).random(number)
  low, high = t_bounds(values)
  half = quantile * values.std(ddof=1) / np.sqrt(number)
  np.testing.assert_allclose(
    [low, high], values.mean() + half * np.array([-1, 1]), rtol=0, atol=6e-4 * half
  )


@pytest.mark.parametrize("number", [3, 5, 8])
def test_95_percent_over_few_seeds_are_95_percent(number):
  """Percentile bootstraps in their place cover 76 % (3 seeds) and 83 % (5). Differences of normal
  figures, and of pass rates of 120 tasks with a spread between seeds."""
  rng, draws = np.random.default_rng(number), 20_000
  rates = np.clip(rng.normal(0.5, 0.04, (2, number, draws)), 0, 1)
  solved = rng.binomial(120, rates) / 120
  for differences in (rng.normal(0, 1, (number, draws)), solved[0] - solved[1]):
    low, high = t_bounds(differences)
    assert 0.93 < np.mean((low <= 0) & (high >= 0)) < 0.97


def test_signs_are_flipped_in_all_ways():
  """|1 + 2 + 3| = 6 is reached by two of eight choices, |1 + 1 - 1| = 1 by all."""
  assert sign_flip([1, 2, 3]) == 2 / 8
  assert sign_flip([1, 1, -1]) == 1.0
  assert sign_flip([0.0, 0.0]) == 1.0
  # 3 - 1 + 2 = 4: 6 and 4, of either sign.
  assert sign_flip([3, -1, 2]) == 4 / 8
  # Of numbers that binary fractions only come near to, and whose order rounds in its own way.
  rounded = [0.079, 0.097, 0.038, 0.068, 0.094, 0.064, 0.083, 0.068, 0.069]
  assert sign_flip(rounded) == 2 / 512


def test_more_pairs_than_can_be_looked_at_are_drawn(monkeypatch):
  d = np.random.default_rng(0).normal(0.3, 1, 14)
  exact = sign_flip(d)
  monkeypatch.setattr(intervals, "MOST_EXACT", 10)
  assert sign_flip(d) == pytest.approx(exact, abs=0.005)
  assert sign_flip(np.ones(40)) == 1 / 100_001, "what was seen is one of the ways"


def test_a_p_below_5_percent_is_as_rare_as_it_says():
  rng = np.random.default_rng(1)
  found = [sign_flip(rng.normal(size=8)) for _ in range(2000)]
  assert 0.03 < np.mean(np.array(found) <= 0.05) <= 0.06  # 12 of 256 ways: .047


def test_holm_by_hand():
  """.005 x 4, .01 x 3, .03 x 2, and .04 x 1, which is lifted to the .06 before it."""
  assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
  assert holm([0.6, 0.9]) == [1.0, 1.0]
  assert holm([]) == []


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_no_p_without_pairs(values):
  with pytest.raises(ValueError, match="at least one pair"):
    sign_flip(values)
