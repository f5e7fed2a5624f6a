"""Parts of the report that show many runs at once: charts, heat maps of tool use, reactions to
errors; each as plain data for the page."""

import collections
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from steptool_jax.evaluation import analysis, behaviour, comparison, records
from steptool_jax.evaluation.behaviour import ANSWER, CUT, GIVE_UP, MALFORMED, START, UNKNOWN
from steptool_jax.evaluation.comparison import DONE, Cell, Facts

_MOST_TOOLS = 14  # rows of a heat map; rarer tools are left out
# Of a cell: where its trajectories stand in training.
MOMENTS = {"before": "before training", "after": "after training", "only": "evaluated"}
FIGURES = {  # of the charts' menu, in its order; a single run offers all others, too
  "pass_rate": "pass rate",
  "reward": "reward of a conversation",
  "calls_per_task": "calls per task",
  "invalid_call_rate": "share of invalid calls",
  "invocation_success": "share of calls answered OK",
  "kl": "KL to the reference (nats)",
  "entropy": "entropy (nats per token)",
}


# --- charts --------------------------------------------------------------------------------------


def charts(cells: Sequence[Cell]) -> list[dict[str, Any]]:
  """One chart for every (group, environment): figure -> axis -> series."""
  single = len(cells) == 1
  return [c for panel in comparison.by_environment(cells) if (c := _chart(panel, single))]


def _chart(panel: Sequence[Cell], single: bool) -> dict[str, Any] | None:
  names = [name for cell in panel for name in records.figures(cell.run)]
  found = dict.fromkeys(name.partition("/")[2] for name in names)
  wanted = [n for n in FIGURES if n in found]
  if single:
    wanted += [n for n in found if n not in FIGURES]
  data = {
    name: {axis: series for axis in records.AXES if (series := _series(panel, axis, name, single))}
    for name in wanted
  }
  data = {name: by_axis for name, by_axis in data.items() if by_axis}
  if not data:
    return None
  levels = []
  if single:
    s = panel[0].run.summary
    levels = [
      {"label": label, "value": s[key]}
      for key, label in (("pass_rate_base", "start"), ("pass_rate_sft", "after SFT"))
      if isinstance(s.get(key), float)
    ]
  return {
    "title": title(panel[0].group, panel[0].environment) or "learning curve",
    "figures": {name: FIGURES.get(name, name.replace("_", " ")) for name in data},
    "axes": records.AXES,
    "data": data,
    "levels": levels,
  }


def _series(panel: Sequence[Cell], axis: str, name: str, single: bool) -> list[dict[str, Any]]:
  out = []
  for method, cells in comparison.by_method(panel).items():
    parts = ("heldout", "train") if single else ("heldout",)
    drawn = [(part, comparison.curves(cells, axis, f"{part}/{name}", not single)) for part in parts]
    if not any(curves for _, curves in drawn):
      drawn = [("train", comparison.curves(cells, axis, f"train/{name}", not single))]
    for part, curves in drawn:
      if not curves:
        continue
      try:
        band = analysis.band(curves)
      except ValueError:  # seeds that share no stretch of x
        continue
      label = {"heldout": "held-out tasks", "train": "training tasks, sampled"}[part]
      out.append(
        {
          "name": label if single else method,
          "thin": part == "train",
          "runs": band.runs,
          "x": _rounded(band.x),
          "mean": _rounded(band.mean),
          "low": _rounded(band.low),
          "high": _rounded(band.high),
        }
      )
  return out


def _rounded(values: np.ndarray) -> list[float | None]:
  return [float(f"{v:.5g}") if math.isfinite(v) else None for v in values]


# --- tool use ------------------------------------------------------------------------------------


def tool_use(cells: Sequence[Cell]) -> list[dict[str, Any]]:
  """Transition matrices of each method on each environment, before and after, over its seeds."""
  out = []
  for place, members in _by_method(cells).items():
    found = {which: [f.transitions for f in _facts(members, which)] for which in MOMENTS}
    names = _common_names([t for part in found.values() for t in part])
    maps = [
      {"title": moment, "rows": _heat(sum(found[which], collections.Counter()), names)}
      for which, moment in MOMENTS.items()
      if found[which]
    ]
    if maps:
      out.append({"title": place, "names": names, "maps": maps})
  return out


def _facts(members: Sequence[Cell], which: str) -> list[Facts]:
  """What the cells that have this moment (see MOMENTS) say of it."""
  out = []
  for cell in members:
    name = {"before": cell.run.before, "after": cell.run.after, "only": "trajectories"}[which]
    out += [cell.facts[name]] if name in cell.facts else []
  return out


def _common_names(found: Sequence[behaviour.Transitions]) -> list[str]:
  """Names of all, the tools by their use and at most _MOST_TOOLS of them, the others around."""
  total: collections.Counter[str] = collections.Counter()
  for pairs in found:
    for (_, name), count in pairs.items():
      total[name] += count
  tools = sorted((n for n in total if n[0] != "("), key=lambda n: (-total[n], n))[:_MOST_TOOLS]
  ends = (UNKNOWN, MALFORMED, ANSWER, GIVE_UP, CUT)
  return [START, *tools, *(n for n in ends if total[n])] if found else []


def _heat(pairs: behaviour.Transitions, names: Sequence[str]) -> list[dict[str, Any]]:
  """Rows of shares of what follows; the level 0 to 9 is the colour."""
  rows = []
  for name in names:
    row = np.array([pairs[name, other] for other in names])
    total = sum(count for (first, _), count in pairs.items() if first == name)  # also of tools cut
    if total:
      shares = row / total
      cells = [
        {
          "text": f"{100 * s:.0f}" if s else "",
          "level": min(int(np.ceil(9 * s)), 9),
          "label": f"{names[j]} after {name}: {int(row[j])} of {total}",
        }
        for j, s in enumerate(shares)
        if j  # nothing leads back to the start, which is names[0]
      ]
      rows.append({"name": name, "total": total, "cells": cells})
  return rows


def _by_method(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
  """The finished cells (or a single run) by group, environment and method, as a title."""
  out: dict[str, list[Cell]] = {}
  for cell in cells:
    if cell.status == DONE or len(cells) == 1:
      out.setdefault(title(cell.group, cell.environment, cell.method), []).append(cell)
  return out


def recoveries(cells: Sequence[Cell]) -> list[dict[str, Any]]:
  """What follows errors: for every method, sort of error and moment, over its seeds."""
  out = []
  sorts = {"injected": "injected error", "own": "error of its own"}
  for place, members in _by_method(cells).items():
    for sort, which in itertools.product(sorts, MOMENTS):
      found = [r for f in _facts(members, which) if (r := getattr(f, sort)).errors]
      errors = sum(r.errors for r in found)
      if not errors:
        continue

      def mean(values: Iterable[float], found=found, errors=errors) -> float:
        weights = np.array([r.errors for r in found]) / errors
        return float(sum(w * v for w, v in zip(weights, values, strict=True)))

      out.append(
        {
          "place": place,
          "sort": sorts[sort],
          "moment": MOMENTS[which].removesuffix(" training"),
          "errors": errors,
          "recovered": percent(mean(r.recovered for r in found)),
          "solved": percent(_solved(found)),
          "bars": _bars({n: mean(r.reactions[n] for r in found) for n in behaviour.REACTIONS}),
        }
      )
  return out


def _solved(found: Sequence[behaviour.Recovery]) -> float:
  tasks = sum(r.tasks for r in found)
  return sum(r.solved * r.tasks for r in found if r.tasks) / tasks


def _bars(shares: Mapping[str, float]) -> list[dict[str, Any]]:
  """Segments of one stacked bar of width 100."""
  start, out = 0.0, []
  for number, (name, share) in enumerate(shares.items()):
    if share:
      out.append({"name": name, "number": number, "start": start, "width": 100 * share})
    start += 100 * share
  return out


# --- formats --------------------------------------------------------------------------------------


def title(*parts: str) -> str:
  return " · ".join(part for part in parts if part)


def percent(value: float) -> str:
  return f"{100 * value:.1f} %"


def plain(value: float) -> str:
  return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
