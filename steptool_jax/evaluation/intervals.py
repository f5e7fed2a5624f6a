"""How sure a figure is: intervals, tests of paired differences, and where its variance comes from.

Over a few seeds an interval is Student's t: a percentile bootstrap of 3 or 5 values that is called
95 % covers 76 or 83 %. Over the tasks of one run, of which there are dozens, it is a bootstrap.

A score y[t, r, j] of task t, rollout r and judge run j is modelled as

    y[t, r, j] = mean + task[t] + rollout[t, r] + judge[t, r, j]

with independent terms of variance task, rollout, judge (a balanced nested design, as in an analysis
of variance). Their estimates come from the mean squares between tasks, between the rollouts of a
task, and between the judge runs of a rollout:

    judge = MS_judge    rollout = (MS_rollout - MS_judge) / J    task = (MS_task - MS_rollout) / RJ

What a table prints as ± over judge runs of one rollout estimates sqrt(judge / T) only. An estimate
below 0 is reported as 0. A component that the data cannot tell is NaN: rollout and task with one
rollout a task, judge and rollout with one judge run.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import special

MOST_EXACT = 20  # paired differences whose sign flips are all looked at: a million


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean and its interval."""

  mean: float
  low: float
  high: float
  confidence: float


@dataclasses.dataclass(frozen=True)
class Components:
  """Variances of one score (not of a mean), and standard errors of the mean over all scores."""

  judge: float
  rollout: float
  task: float
  within_task: float  # rollout + judge of one rollout judged once; known where rollouts > 1
  judge_error: float  # of the mean, from judge runs alone: sqrt(judge / TRJ)
  rollout_error: float  # of the mean on these tasks, from rollouts and judge runs
  task_error: float  # of the mean as a figure for tasks like these: everything


def bootstrap(
  scores: np.ndarray, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
  """Interval of the mean over tasks; scores [T] or [T, …], whose further axes are averaged first.

  Tasks are drawn with replacement, all scores of a task together. ValueError for no task, a score
  that is not finite, or a confidence outside (0, 1).
  """
  values = _task_means(scores)
  if not (0 < confidence < 1 and resamples >= 1):
    raise ValueError(
      f"confidence {confidence} must be between 0 and 1, resamples {resamples} at least 1"
    )
  rng = np.random.default_rng(seed)
  tail = 100 * (1 - confidence) / 2
  means = np.empty(resamples)
  # In blocks, so that tens of thousands of resamples of thousands of tasks need little memory.
  block = max(1, 4_000_000 // len(values))
  for start in range(0, resamples, block):
    size = min(block, resamples - start)
    drawn = rng.integers(0, len(values), (size, len(values)), dtype=np.int32)
    means[start : start + size] = values[drawn].mean(axis=1)
  low, high = np.percentile(means, [tail, 100 - tail])
  return Interval(float(values.mean()), float(low), float(high), confidence)


def t_bounds(values: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
  """Bounds of the mean over axis 0 of [N, …]: mean -/+ t(N - 1) s / sqrt(N).

  Exact for normal values, and close to it for others that have no long tail (Student 1908). NaN for
  a single one.
  """
  values = np.asarray(values, np.float64)
  number = len(values)
  if number < 2:
    nothing = np.full(values.shape[1:], np.nan)
    return nothing, nothing
  quantile = special.stdtrit(number - 1, (1 + confidence) / 2)
  half = quantile * values.std(axis=0, ddof=1) / np.sqrt(number)
  return values.mean(axis=0) - half, values.mean(axis=0) + half


def sign_flip(differences: Sequence[float]) -> float:
  """Two-sided p that paired differences have mean 0: the exact sign-flip test (Fisher 1935).

  If neither side is better, a difference is as likely to have the other sign. p is the share of all
  2^N ways to choose the signs whose sum is at least as far from 0; the smallest that N pairs can
  give is 2 / 2^N. Of more than MOST_EXACT pairs 100,000 drawn ways, and the one that was seen.
  ValueError for no difference, or one that is not finite.
  """
  d = np.asarray(differences, np.float64)
  if d.ndim != 1 or not d.size or not np.isfinite(d).all():
    raise ValueError("differences: at least one pair is needed, and all must be finite")
  if d.size <= MOST_EXACT:
    sums = np.zeros(1)
    for value in d:
      sums = np.concatenate([sums + value, sums - value])
  else:
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (100_000, d.size))
    sums = np.append(signs @ d, d.sum())
  # Sums of the same numbers in another order may differ in their last bits.
  return float(np.mean(np.abs(sums) >= abs(d.sum()) - 1e-9 * np.abs(d).sum()))


def holm(pvalues: Sequence[float]) -> list[float]:
  """p of each of a family of comparisons, adjusted for their number (Holm 1979), in their order.

  The k-th smallest of m (from 0) is multiplied by m - k, never below those before it, at most 1:
  with all below .05 called clear, the chance of one wrong call or more is at most 5 %.
  """
  p = np.asarray(pvalues, np.float64)
  order = np.argsort(p, kind="stable")
  steps = np.minimum(p[order] * np.arange(len(p), 0, -1), 1.0)
  out = np.empty(len(p))
  out[order] = np.maximum.accumulate(steps)
  return out.tolist()


def components(scores: np.ndarray) -> Components:
  """Where the variance of float[T, R, J] (tasks, rollouts, judge runs) comes from.

  ValueError for another shape and for fewer than two tasks.
  """
  scores = np.asarray(scores, np.float64)
  if scores.ndim != 3 or 0 in scores.shape or len(scores) < 2:
    raise ValueError(
      f"scores must be [tasks, rollouts, judge runs] with at least two tasks, found {scores.shape}"
    )
  if not np.isfinite(scores).all():
    raise ValueError("scores: all must be finite; leave tasks with infrastructure errors out")
  tasks, rollouts, runs = scores.shape
  nan = float("nan")
  rollout_means = scores.mean(axis=2)
  task_means = rollout_means.mean(axis=1)
  ms_judge = float(scores.var(axis=2, ddof=1).mean()) if runs > 1 else nan
  ms_rollout = runs * float(rollout_means.var(axis=1, ddof=1).mean()) if rollouts > 1 else nan
  ms_task = rollouts * runs * float(task_means.var(ddof=1))

  judge = ms_judge
  rollout = _not_negative((ms_rollout - ms_judge) / runs)
  # With one judge run, what varies between rollouts is rollout and judge in one.
  within = rollout + judge if runs > 1 else ms_rollout
  number = tasks * rollouts * runs
  return Components(
    judge=judge,
    rollout=rollout,
    task=_not_negative((ms_task - ms_rollout) / (rollouts * runs)),
    within_task=within,
    judge_error=float(np.sqrt(judge / number)),
    rollout_error=float(np.sqrt(ms_rollout / number)),
    task_error=float(np.sqrt(ms_task / number)),
  )


def _task_means(scores: np.ndarray) -> np.ndarray:
  scores = np.asarray(scores, np.float64)
  if scores.ndim == 0 or scores.size == 0:
    raise ValueError(f"scores: must hold at least one task, found shape {scores.shape}")
  if not np.isfinite(scores).all():
    raise ValueError("scores: all must be finite; leave tasks with infrastructure errors out")
  return scores.reshape(len(scores), -1).mean(axis=1)


def _not_negative(value: float) -> float:
  return value if np.isnan(value) else max(0.0, value)
