"""Cells of a study (method x environment x seed) compared: one row a method, and its curves.

A cell that failed is counted and named in its row, and no figure of it enters a mean.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from steptool_jax.evaluation import analysis, behaviour, records
from steptool_jax.evaluation.behaviour import Recovery, Transitions
from steptool_jax.evaluation.records import Run
from steptool_jax.types import Trajectory

DONE, FAILED, STARTED, WAITING = "done", "failed", "unfinished", "not started"
LEVELS = (0.5, 0.7, 0.9)  # of the best final pass rate
COMPARED = ("final", "greedy", "area")

Triple = tuple[float, float, float]  # mean, low, high


@dataclasses.dataclass(frozen=True, eq=False)
class Facts:
  """What one moment's trajectories say of a policy."""

  count: int
  solved: float
  transitions: Transitions
  injected: Recovery
  own: Recovery
  repeated_after_ok: float
  spent: Mapping[str, float]  # see behaviour.spent_per_solved


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


@dataclasses.dataclass(frozen=True, eq=False)
class Difference:
  """What a method has more than another one on the same environment, seed by seed."""

  environment: str
  method: str
  against: str
  seeds: int  # done by both
  figures: Mapping[str, Triple]  # of COMPARED, those that all have


def facts_of(trajectories: Sequence[Trajectory]) -> Facts:
  return Facts(
    count=len(trajectories),
    solved=float(np.mean([t.solved for t in trajectories])) if trajectories else math.nan,
    transitions=behaviour.transitions(trajectories),
    injected=behaviour.recovery(trajectories, injected=True),
    own=behaviour.recovery(trajectories, injected=False),
    repeated_after_ok=behaviour.repeated_after_ok(trajectories),
    spent=behaviour.spent_per_solved(trajectories),
  )


def rows(cells: Iterable[Cell]) -> list[Row]:
  """One row for every (group, environment, method), in the order of the cells."""
  return [row for panel in by_environment(cells) for row in _rows(panel)]


def differences(cells: Iterable[Cell]) -> list[Difference]:
  """Each method against the environment's first one, and against the one whose name it extends.

  So steptool_no_step_rewards is compared with steptool, and grpo_step with grpo. Seeds are paired,
  since both start at the same weights and see the same tasks.
  """
  out = []
  environments: dict[str, list[Cell]] = {}
  for cell in cells:
    environments.setdefault(cell.environment, []).append(cell)
  for environment, panel in environments.items():
    found = _measured(panel)
    first = next(iter(found))
    for method in found:
      others = [other for other in found if other == first or method.startswith(f"{other}_")]
      for other in others:
        pairs = [(found[method][s], found[other][s]) for s in found[method] if s in found[other]]
        if other == method or not pairs:
          continue
        figures = {
          key: analysis.mean_interval([mine[key] - theirs[key] for mine, theirs in pairs])
          for key in COMPARED
          if all(key in mine and key in theirs for mine, theirs in pairs)
        }
        out.append(Difference(environment, method, other, len(pairs), figures))
  return out


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
  """Those of figures.CELLS, and a few of ROLLOUTS, that one finished cell has."""
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
      "recovered_from_fault": facts.injected.recovered,
      "solved_after_fault": facts.injected.solved,
      "repeated_after_ok": facts.repeated_after_ok,
      **facts.spent,
    }
  return {k: float(v) for k, v in found.items() if known(v)}


def _measured(panel: Sequence[Cell]) -> dict[str, dict[int, dict[str, float]]]:
  """{method: {seed: figures}} of what is done; area: up to the budget that all have spent."""
  ends = [curve[0][-1] for curve in _learning_curves(panel)]
  out: dict[str, dict[int, dict[str, float]]] = {}
  for cell in panel:
    seeds = out.setdefault(cell.method, {})
    if cell.status == DONE:
      seeds[cell.seed] = cell_figures(cell)
      for curve in _learning_curves([cell]):
        seeds[cell.seed]["area"] = analysis.area(curve, min(ends))
  return out


def _learning_curves(cells: Iterable[Cell]) -> list[analysis.Curve]:
  return [curve for curve in curves(cells, "llm_calls") if len(curve[0]) > 1]


def _rows(panel: Sequence[Cell]) -> list[Row]:
  """The rows of one environment of one group, which share levels and budget."""
  measured = _measured(panel)
  best = max(
    np.mean([f.get("final", 0.0) for f in seeds.values()] or [0.0]) for seeds in measured.values()
  )
  out = []
  for name, cells in by_method(panel).items():
    figures = list(measured[name].values())
    learnt = _learning_curves(cells)
    out.append(
      Row(
        group=cells[0].group,
        environment=cells[0].environment,
        method=name,
        cells=len(cells),
        done=len(figures),
        missing=_missing(cells),
        figures={
          key: analysis.mean_interval([f[key] for f in figures if key in f])
          for key in dict.fromkeys(key for f in figures for key in f)
        },
        plateau=analysis.plateau(learnt) if learnt else None,
        crossings={
          share: analysis.crossing(learnt, share * best) for share in LEVELS if learnt and best > 0
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


def known(value: Any) -> bool:
  """Whether a summary's entry is a finite number."""
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
