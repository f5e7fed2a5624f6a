"""Figures of scores of steps, by hand and against slow oracles."""

import numpy as np
import pytest

from steptool_jax.evaluation import figures, scoring
from steptool_jax.types import Finish, Status, Step, ToolCall, Trajectory


def trajectory(marks, solved, task="t", sample=0):
  """marks: (SC, Con) of each call; a Finish after them."""
  ids = np.array([1, 2], np.int32)
  calls = [
    Step(ids, np.zeros(2, np.float32), ToolCall("f", {}), None, ids, float(sc), float(con))
    for sc, con in marks
  ]
  end = Step(ids, np.zeros(2, np.float32), Finish("x"))
  return Trajectory(task, sample, ids, (*calls, end), Status.ANSWERED, solved)


def test_auc_by_hand():
  """Of the 6 pairs of a positive and a negative, 4 are in order and 1 is a tie: 4.5 / 6."""
  scores, positive = [0.9, 0.5, 0.4, 0.5, 0.1], [True, True, True, False, False]
  # .9 > .5, .1; .5 = .5, > .1; .4 < .5, > .1: 2 + 1.5 + 1 = 4.5
  assert scoring.auc(np.array(scores), np.array(positive)) == pytest.approx(4.5 / 6)


@pytest.mark.parametrize("seed", range(5))
def test_auc_counts_pairs(seed):
  """Ranks with ties are easily off by a half, which a count of all pairs shows."""
  rng = np.random.default_rng(seed)
  scores, positive = rng.integers(0, 6, 40) / 5, rng.integers(0, 2, 40) > 0
  pairs = [
    1.0 if a > b else 0.5 if a == b else 0.0 for a in scores[positive] for b in scores[~positive]
  ]
  assert scoring.auc(scores, positive) == pytest.approx(np.mean(pairs))


def test_auc_of_one_class_is_nothing():
  """A number would be read as a figure, though there is nothing to tell apart."""
  assert scoring.auc(np.array([0.1, 0.2]), np.array([True, True])) is None


def test_calibration_by_hand():
  """Bins [.1, .2) and [.9, 1]: |.3 - 1| / 2 * 2/4 and |1.9 - 1.5| / 2 * 2/4; 1.0 is no 11th bin."""
  found = scoring.calibration_error(np.array([0.15, 0.15, 0.9, 1.0]), np.array([1, 0, 1, 0.5]))
  assert found == pytest.approx((0.7 + 0.4) / 4)


def test_pair_accuracy_by_hand():
  """Task a: (1, 0) in order, (1, .5) a tie, (.5, 0) in order; b: equal outcomes are no pair; c:
  alone. 2.5 of 3; a pair of two tasks does not count."""
  found = scoring.pair_accuracy(
    [0.9, 0.2, 0.9, 0.1, 0.8, 0.0], [1, 0, 0.5, 1, 1, 1], ["a", "a", "a", "b", "b", "c"]
  )
  assert found == pytest.approx(2.5 / 3)
  assert scoring.pair_accuracy([0.1, 0.2], [1, 0], ["a", "b"]) is None


def test_first_error_f1_by_hand():
  """Erroneous: first errors 1, 0, 2 found as 1, 1, 2: 2/3. Clean: found clean, not: 1/2."""
  found = scoring.first_error_f1([1, 1, 2, -1, 0], [1, 0, 2, -1, -1])
  assert found == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
  assert scoring.first_error_f1([-1], [-1]) is None
  assert scoring.first_below([0.5, 0.4, 0.1]) == 1


def test_figures_read_calls_and_last_steps_only():
  """A Finish has no SC, and IsSolved of a step in the middle is no prediction of the outcome."""
  trajectories = [trajectory([(1, 1), (0, 0)], 1.0), trajectory([(1, 0)], 0.0, sample=1)]
  scores = [
    np.array([[0.9, 0.8, 0.0], [0.2, 0.1, 0.0], [0.0, 0.9, 0.7]], np.float32),
    np.array([[0.6, 0.6, 1.0], [0.0, 0.9, 0.3]], np.float32),
  ]
  found = scoring.figures(trajectories, scores)
  assert set(found) <= set(figures.REWARD_MODEL)
  assert found["success_calling_auc"] == 1.0
  assert found["contribution_auc"] == 1.0  # .8 above .1 and .6
  assert found["solved_auc"] == found["outcome_pairs"] == 1.0
  assert found["success_calling_ece"] == pytest.approx((0.1 + 0.4 + 0.2) / 3, abs=1e-6)
  assert found["solved_ece"] == pytest.approx(0.3, abs=1e-6)
  assert found["first_error_f1"] == 1.0  # found at 1; none in the second
  assert "first_unhelpful_f1" not in found  # both trajectories have an unhelpful step


def test_drift_by_hand():
  found = scoring.drift([0.9, 0.7, 0.2], [1.0, 0.0, 0.0])
  assert found == pytest.approx(
    {"model_outcome": 0.6, "model_drift": 0.6 - 1 / 3, "model_auc": 1.0}
  )
  assert "model_auc" not in scoring.drift([0.5], [1.0])


def test_hacking_by_hand():
  """Lines over 3 points: the model's rises from .5 to .7, the truth's falls from .6 to .4."""
  model, truth = [0.1, 0.5, 0.6, 0.7], [0.1, 0.6, 0.5, 0.4]
  said = scoring.hacked(model, truth, last=3, apart=0.39)
  assert "rose by 0.200" in said
  assert "fell by 0.200" in said
  assert scoring.hacked(model, truth, last=3, apart=0.41) == ""  # not that far apart
  assert scoring.hacked(model, truth, last=5, apart=0.0) == ""  # too few iterations
  assert scoring.hacked(model, truth, last=0, apart=0.0) == ""  # off
  assert scoring.hacked(model, model, last=3, apart=0.0) == ""  # both rise
  assert scoring.hacked(truth, truth, last=3, apart=0.0) == ""  # both fall


def test_noise_is_no_hacking():
  """Pass rates of 96 conversations scatter by .05: that must not end a run of a good model."""
  rng = np.random.default_rng(0)
  ended = 0
  for _ in range(200):
    truth = rng.normal(0.6, 0.05, 24)
    model = truth + rng.normal(0.02, 0.03, 24)
    ended += any(scoring.hacked(model[:n], truth[:n], 10, 0.1) for n in range(25))
  assert ended <= 2
