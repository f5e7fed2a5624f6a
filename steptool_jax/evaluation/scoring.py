"""How good scores of steps are, against labels in [0, 1] that they have not seen.

A soft label counts as positive from .5 on where a figure needs two classes.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from steptool_jax.rewards.model import CON, SC, SOLVED, labels
from steptool_jax.types import HEADS, Trajectory

BINS = 10


def auc(scores: np.ndarray, positive: np.ndarray) -> float | None:
  """Area under the ROC curve: the chance that a positive scores higher than a negative.

  Ties count half; None where one class is empty.
  """
  scores, positive = np.asarray(scores, np.float64), np.asarray(positive, bool)
  count = int(positive.sum())
  if count in (0, len(positive)):
    return None
  # Mann-Whitney: the ranks of the positives, tied ones at their mean.
  _, place, ties = np.unique(scores, return_inverse=True, return_counts=True)
  ranks = (np.cumsum(ties) - (ties - 1) / 2)[place]
  below = ranks[positive].sum() - count * (count + 1) / 2
  return float(below / (count * (len(positive) - count)))


def calibration_error(scores: np.ndarray, targets: np.ndarray, bins: int = BINS) -> float:
  """Expected calibration error (Naeini et al. 2015): mean |mean score - mean label| over `bins`
  equal parts of [0, 1], each weighted by how many scores fall into it. 0 for no score."""
  scores, targets = np.asarray(scores, np.float64), np.asarray(targets, np.float64)
  place = np.minimum((scores * bins).astype(int), bins - 1)
  gaps = [abs((scores[place == b] - targets[place == b]).sum()) for b in range(bins)]
  return float(sum(gaps) / max(len(scores), 1))


def pair_accuracy(
  scores: Sequence[float], targets: Sequence[float], tasks: Sequence[str]
) -> float | None:
  """Of two samples of one task with different IsSolved: the share whose better one scores higher.

  Ties count half; None where there is no such pair.
  """
  by_task: dict[str, list[tuple[float, float]]] = {}
  for score, target, task in zip(scores, targets, tasks, strict=True):
    by_task.setdefault(task, []).append((target, score))
  right = [
    0.5 if a[1] == b[1] else float((a[0] > b[0]) == (a[1] > b[1]))
    for group in by_task.values()
    for a, b in itertools.combinations(group, 2)
    if a[0] != b[0]
  ]
  return float(np.mean(right)) if right else None


def first_below(values: Sequence[float]) -> int:
  """Index of the first value below .5, -1 for none."""
  return next((k for k, value in enumerate(values) if value < 0.5), -1)


def first_error_f1(found: Sequence[int], wanted: Sequence[int]) -> float | None:
  """ProcessBench's F1 (Zheng et al. 2024): the harmonic mean of two accuracies, of trajectories
  with an error (its first step is found exactly) and of those without (none is found).

  -1 stands for no error; None where all trajectories are of one kind.
  """
  pairs = list(zip(found, wanted, strict=True))
  wrong = [f == w for f, w in pairs if w >= 0]
  clean = [f == w for f, w in pairs if w < 0]
  if not wrong or not clean:
    return None
  a, b = float(np.mean(wrong)), float(np.mean(clean))
  return 2 * a * b / (a + b) if a + b else 0.0


def figures(trajectories: Sequence[Trajectory], scores: Sequence[np.ndarray]) -> dict[str, float]:
  """Every figure of evaluation/figures.py's REWARD_MODEL that can be told of these trajectories.

  scores: float32[S, 3] each. The first error is the first call with SC below .5, the first
  unhelpful step the first call with Con below .5; predictions are cut at .5 as well.
  """
  known = [labels(t) for t in trajectories]
  targets = np.concatenate([values for values, _ in known])
  there = np.concatenate([mask for _, mask in known])
  given = np.concatenate(list(scores))
  out: dict[str, float | None] = {}
  for head, name in enumerate(HEADS):
    y, p = targets[there[:, head], head], given[there[:, head], head]
    out[f"{name}_auc"] = auc(p, y >= 0.5)
    out[f"{name}_ece"] = calibration_error(p, y)
  last = [p[-1, SOLVED] for p in scores]
  out["outcome_pairs"] = pair_accuracy(
    last, [t.solved for t in trajectories], [t.task_id for t in trajectories]
  )
  for head, name in ((SC, "first_error_f1"), (CON, "first_unhelpful_f1")):
    out[name] = first_error_f1(
      [first_below(p[mask[:, head], head]) for p, (_, mask) in zip(scores, known, strict=True)],
      [first_below(values[mask[:, head], head]) for values, mask in known],
    )
  return {name: value for name, value in out.items() if value is not None}


def drift(model_outcomes: Sequence[float], true_outcomes: Sequence[float]) -> Mapping[str, float]:
  """Figures of a reward model beside a checker; AUC where there are both outcomes."""
  mean = float(np.mean(model_outcomes))
  found = {"model_outcome": mean, "model_drift": mean - float(np.mean(true_outcomes))}
  ranked = auc(np.array(model_outcomes), np.array(true_outcomes) >= 0.5)
  return found if ranked is None else found | {"model_auc": ranked}


def hacked(model: Sequence[float], truth: Sequence[float], last: int, apart: float) -> str:
  """A sentence where the policy has learnt to please the reward model instead of solving tasks.

  Over the last `last` iterations the fitted line of the model's mean outcome rises, that of the
  true pass rate falls, and the two have moved apart by more than `apart`. "" where all is well,
  with fewer iterations and with last = 0. A line takes at least two points.
  """
  if last < 2 or len(model) < last:
    return ""
  x = np.arange(last) - (last - 1) / 2
  span = (last - 1) / (x @ x)
  rise, fall = (float(x @ np.array(curve[-last:])) * span for curve in (model, truth))
  if not (rise > 0 > fall and rise - fall > apart):
    return ""
  return (
    f"over the last {last} iterations the reward model's mean outcome rose by {rise:.3f} while the "
    f"true pass rate fell by {-fall:.3f}: the policy learns to please the model"
  )
