"""Learning curves of several seeds: bands, area, steps to a level, plateau. Host side, NumPy.

A curve is (x, y): x what was spent (LLM calls, conversations, seconds), increasing; y a pass rate.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from steptool_jax.evaluation import intervals

Curve = tuple[Sequence[float], Sequence[float]]

TOLERANCE = 0.02  # of a pass rate: less rise over a curve's last third is a plateau


@dataclasses.dataclass(frozen=True, eq=False)
class Band:
  """Mean over runs and its 95 % t interval, point by point; every field float64[X].

  With one run there is no spread to see: low and high are NaN.
  """

  x: np.ndarray
  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray
  runs: int


@dataclasses.dataclass(frozen=True)
class Plateau:
  """Rise of y over the last third of the points, mean over runs with its interval.

  reached: the mean rise is at most TOLERANCE. None where a curve has fewer than three points there:
  nothing can be said.
  """

  reached: bool | None
  rise: float
  low: float
  high: float


def band(curves: Sequence[Curve]) -> Band:
  """The band of several runs, on the union of their points that all runs cover.

  Between its points a curve is a straight line; nothing is extrapolated. ValueError without a
  curve, for an x that does not increase, or when no x is covered by all.
  """
  checked = [_checked(curve) for curve in curves]
  if not checked:
    raise ValueError("a band needs at least one curve")
  first, last = max(x[0] for x, _ in checked), min(x[-1] for x, _ in checked)
  if first > last:
    raise ValueError(f"no x is covered by all: one curve starts at {first:g}, one ends at {last:g}")
  grid = np.unique(np.concatenate([x for x, _ in checked]))
  grid = grid[(grid >= first) & (grid <= last)]
  values = np.stack([np.interp(grid, x, y) for x, y in checked])  # [runs, X]
  low, high = intervals.t_bounds(values)
  return Band(grid, values.mean(axis=0), low, high, len(checked))


def area(curve: Curve, until: float | None = None) -> float:
  """Mean height of the curve: its trapezoid area up to `until`, divided by that length of x.

  ValueError for a curve of one point, or one that ends before `until`.
  """
  x, y = _checked(curve)
  end = x[-1] if until is None else until
  if len(x) < 2 or not x[0] < end <= x[-1]:
    raise ValueError(f"a curve from {x[0]:g} to {x[-1]:g} has no area up to {end:g}")
  inside = x < end
  x, y = np.append(x[inside], end), np.append(y[inside], np.interp(end, x, y))
  return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def steps_to(curve: Curve, level: float) -> float | None:
  """The first x at which the curve is at `level` or above; None where it never is."""
  x, y = _checked(curve)
  reached = np.flatnonzero(y >= level)
  if not reached.size:
    return None
  k = int(reached[0])
  if k == 0:
    return float(x[0])
  share = (level - y[k - 1]) / (y[k] - y[k - 1])
  return float(x[k - 1] + share * (x[k] - x[k - 1]))


def crossing(curves: Sequence[Curve], level: float) -> tuple[float, float, float]:
  """(x, low, high) at which the mean curve of several runs is first at `level`; inf for never.

  low and high: from the first x at which the band reaches the level to the last at which it has not
  left it behind. Where the true mean curve crosses, the band holds the level in 95 % of studies, so
  this holds the crossing at least as often. NaN for one run.
  """
  found = band(curves)
  x = _or_never(steps_to((found.x, found.mean), level))
  if found.runs == 1:
    return x, float("nan"), float("nan")
  return x, _or_never(steps_to((found.x, found.high), level)), _last_below(found, level)


def _or_never(x: float | None) -> float:
  return float("inf") if x is None else x


def _last_below(found: Band, level: float) -> float:
  """The x from which on the band's lower bound stays at `level` or above; inf for none."""
  below = np.flatnonzero(found.low < level)
  if not below.size:
    return float(found.x[0])
  k = int(below[-1])
  return _or_never(steps_to((found.x[k:], found.low[k:]), level))


def plateau(curves: Sequence[Curve]) -> Plateau:
  """Whether the curves of one method have stopped rising (least squares over the last third).

  A third of the evaluations: they are even in updates, not in what conversations have cost.
  """
  rises = []
  for curve in curves:
    x, y = _checked(curve)
    start = 2 * (x.size - 1) // 3
    if x.size - start < 3:
      return Plateau(None, float("nan"), float("nan"), float("nan"))
    x, y = x[start:] - x[start], y[start:]
    rises.append(np.polyfit(x, y, 1)[0] * x[-1])
  if not rises:
    raise ValueError("a plateau needs at least one curve")
  mean, low, high = mean_interval(rises)
  return Plateau(mean <= TOLERANCE, mean, low, high)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
  """(mean, low, high) of one figure over runs: the 95 % t interval, NaN for a single run."""
  array = np.asarray(values, np.float64)
  if array.ndim != 1 or not array.size:
    raise ValueError("the figure of at least one run is needed")
  low, high = intervals.t_bounds(array)
  return float(array.mean()), float(low), float(high)


def _checked(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
  x, y = (np.asarray(part, np.float64) for part in curve)
  if x.ndim != 1 or x.shape != y.shape or not x.size:
    raise ValueError(f"a curve is x[N] and y[N] with N >= 1, found {x.shape} and {y.shape}")
  if not (np.isfinite(x).all() and np.isfinite(y).all() and (np.diff(x) > 0).all()):
    raise ValueError("a curve needs finite numbers, and an x that increases")
  return x, y
