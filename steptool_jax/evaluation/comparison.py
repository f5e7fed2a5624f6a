"""Cells of a study (method x environment x seed) compared: one row a method, and its curves.

A cell that failed is counted and named in its row, and no figure of it enters a mean.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from steptool_jax.evaluation import analysis, behaviour, records
from steptool_jax.evaluation.behaviour import Recovery, Spent, Transitions
from steptool_jax.evaluation.records import Run
from steptool_jax.types import Trajectory

DONE, FAILED, STARTED, WAITING = "done", "failed", "unfinished", "not started"
LEVELS = (0.5, 0.7, 0.9)  # of the best final pass rate

Triple = tuple[float, float, float]  # mean, low, high


@dataclasses.dataclass(frozen=True, eq=False)
class Facts:
  """What one moment's trajectories say of a policy."""

  count: int
  solved: float
  transitions: Transitions
  injected: Recovery
  own: Recovery
  repeated: float
  spent: Spent


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
  name: str
  group: str
  environment: str
  method: str
  seed: int
  status: str  # DONE, FAILED, STARTED or WAITING
  note: str  # why, where it is not done
  run: Run
  facts: Mapping[str, Facts]  # moment -> facts, of all its trajectories


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
  """One method on one environment; None for what no finished cell tells."""

  group: str
  environment: str
  method: str
  cells: int
  done: int
  missing: tuple[str, ...]  # "seed 3 failed: …", "seeds 0 1 2 not started"
  figures: Mapping[str, Triple]  # over the seeds that are done
  plateau: analysis.Plateau | None
  crossings: Mapping[float, Triple]  # share of the best final pass rate -> LLM calls, inf = never


def facts_of(trajectories: Sequence[Trajectory]) -> Facts:
  return Facts(
    count=len(trajectories),
    solved=float(np.mean([t.solved for t in trajectories])) if trajectories else math.nan,
    transitions=behaviour.transitions(trajectories),
    injected=behaviour.recovery(trajectories, injected=True),
    own=behaviour.recovery(trajectories, injected=False),
    repeated=behaviour.repeated_calls(trajectories),
    spent=behaviour.spent_per_solved(trajectories),
  )


def rows(cells: Iterable[Cell]) -> list[Row]:
  """One row for every (group, environment, method), in the order of the cells."""
  return [row for panel in by_environment(cells) for row in _rows(panel)]


def by_environment(cells: Iterable[Cell]) -> list[list[Cell]]:
  """The cells of each (group, environment), which are compared with each other."""
  panels: dict[tuple[str, str], list[Cell]] = {}
  for cell in cells:
    panels.setdefault((cell.group, cell.environment), []).append(cell)
  return list(panels.values())


def by_method(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
  methods: dict[str, list[Cell]] = {}
  for cell in cells:
    methods.setdefault(cell.method, []).append(cell)
  return methods


def curves(
  cells: Iterable[Cell], axis: str, figure: str = "heldout/pass_rate", finished: bool = True
) -> list[analysis.Curve]:
  """Learning curves of the cells that are done (or of all that have one)."""
  found = [
    records.curve(cell.run, axis, figure) for cell in cells if cell.status == DONE or not finished
  ]
  return [curve for curve in found if curve is not None]


def cell_figures(cell: Cell) -> dict[str, float]:
  """The figures of one finished cell, those that it has."""
  s = cell.run.summary
  found = {
    "start": s.get("pass_rate_sft", s.get("pass_rate_base")),
    "final": s.get("pass_rate_rl", s.get("pass_rate_sft", s.get("pass_rate"))),
    "greedy": s.get("pass_rate_greedy"),
    "seconds": s.get("seconds"),
  }
  last = next((r for r in reversed(cell.run.metrics) if "heldout/pass_rate" in r), {})
  for name in ("calls_per_task", "invalid_call_rate", "invocation_success"):
    found[name] = last.get(f"heldout/{name}", s.get(name))
  diverse = [r["train/diversity"] for r in cell.run.metrics if "train/diversity" in r]
  found["diversity"] = diverse[-1] if diverse else None
  moment = cell.run.after or cell.run.before or "trajectories"
  if moment in cell.facts:
    facts = cell.facts[moment]
    found |= {
      "recovered": facts.injected.recovered,
      "solved_after_error": facts.injected.solved,
      "repeated": facts.repeated,
      "llm_calls_per_solved": facts.spent.llm_calls,
      "tokens_per_solved": facts.spent.tokens,
      "cost_per_solved": facts.spent.cost,
      "latency_per_solved": facts.spent.latency,
    }
  return {k: float(v) for k, v in found.items() if _known(v)}


def _rows(panel: Sequence[Cell]) -> list[Row]:
  """The rows of one environment of one group, which share levels and budget."""
  methods = by_method(panel)
  figures = {
    name: [cell_figures(cell) for cell in cells if cell.status == DONE]
    for name, cells in methods.items()
  }
  learnt = {
    name: [c for c in curves(cells, "llm_calls") if len(c[0]) > 1]
    for name, cells in methods.items()
  }
  best = max(np.mean([f.get("final", 0.0) for f in fs] or [0.0]) for fs in figures.values())
  ends = [curve[0][-1] for found in learnt.values() for curve in found]
  out = []
  for name, cells in methods.items():
    found = {
      key: analysis.mean_interval([f[key] for f in figures[name] if key in f])
      for key in dict.fromkeys(key for f in figures[name] for key in f)
    }
    if learnt[name]:
      heights = [analysis.area(curve, min(ends)) for curve in learnt[name]]
      found["area"] = analysis.mean_interval(heights)
    out.append(
      Row(
        group=cells[0].group,
        environment=cells[0].environment,
        method=name,
        cells=len(cells),
        done=len(figures[name]),
        missing=_missing(cells),
        figures=found,
        plateau=analysis.plateau(learnt[name]) if learnt[name] else None,
        crossings={
          share: analysis.crossing(learnt[name], share * best)
          for share in LEVELS
          if learnt[name] and best > 0
        },
      )
    )
  return out


def _missing(cells: Sequence[Cell]) -> tuple[str, ...]:
  seeds: dict[str, list[str]] = {}
  for cell in cells:
    if cell.status != DONE:
      why = f"{cell.status}: {cell.note}" if cell.note else cell.status
      seeds.setdefault(why, []).append(str(cell.seed))
  return tuple(f"seed{'s' * (len(n) > 1)} {' '.join(n)} {why}" for why, n in seeds.items())


def _known(value: Any) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)
