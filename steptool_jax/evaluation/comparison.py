"""Cells of a study (method x environment x seed) compared: one row a method, and its curves.

A cell that failed is counted and named in its row, and no figure of it enters a mean.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from steptool_jax.evaluation import analysis, behaviour, intervals, records
from steptool_jax.evaluation.behaviour import Recovery, Transitions
from steptool_jax.evaluation.records import Run
from steptool_jax.types import Trajectory

DONE, FAILED, STARTED, WAITING = "done", "failed", "unfinished", "not started"
LEVELS = (0.5, 0.7, 0.9)  # of the best final pass rate
COMPARED = ("final", "greedy", "area", "train_area")
_AREAS = {"heldout/pass_rate": "area", "train/pass_rate": "train_area"}  # under which curve
# Of a difference that is called clear. The smallest p of 8 pairs is 2 / 256, so that of at most six
# comparisons in a family; more of them need more seeds.
FEWEST_SEEDS = 8
LARGEST_P = 0.05  # adjusted for the number of comparisons

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


@dataclasses.dataclass(frozen=True)
class Contrast:
  """A mean difference over paired seeds. low and high: its 95 % t interval, NaN for one seed.

  p: of the exact sign-flip test. adjusted: Holm's p among the comparisons of this figure on this
  environment that have FEWEST_SEEDS; None with fewer, which can be no claim and cost none of the
  others anything. clear: FEWEST_SEEDS or more, the interval leaves 0 out, and adjusted is at most
  LARGEST_P.
  """

  mean: float
  low: float
  high: float
  seeds: int
  p: float
  adjusted: float | None = None
  clear: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Difference:
  """What a method has more than another one on the same environment, seed by seed."""

  environment: str
  method: str
  against: str
  seeds: int  # done by both
  figures: Mapping[str, Contrast]  # of COMPARED, those that all have


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
  since both start at the same weights and see the same tasks. Each environment is a family of
  comparisons of its own.
  """
  out = []
  environments: dict[str, list[Cell]] = {}
  for cell in cells:
    environments.setdefault(cell.environment, []).append(cell)
  for environment, panel in environments.items():
    found = _measured(panel)
    first = next(iter(found))
    family = []
    for method in found:
      others = [other for other in found if other == first or method.startswith(f"{other}_")]
      for other in others:
        pairs = [(found[method][s], found[other][s]) for s in found[method] if s in found[other]]
        if other == method or not pairs:
          continue
        figures = {
          key: _contrast([mine[key] - theirs[key] for mine, theirs in pairs])
          for key in COMPARED
          if all(key in mine and key in theirs for mine, theirs in pairs)
        }
        family.append(Difference(environment, method, other, len(pairs), figures))
    out += _adjusted(family)
  return out


def _contrast(differences_: Sequence[float]) -> Contrast:
  mean, low, high = analysis.mean_interval(differences_)
  return Contrast(mean, low, high, len(differences_), intervals.sign_flip(differences_))


def _adjusted(family: Sequence[Difference]) -> list[Difference]:
  """The same with Holm's p, and what is clear, for each figure."""
  figures = [dict(difference.figures) for difference in family]
  for key in COMPARED:
    members = [f for f in figures if key in f and f[key].seeds >= FEWEST_SEEDS]
    for f, adjusted in zip(members, intervals.holm([f[key].p for f in members]), strict=True):
      c = f[key]
      # Means of tenths leave 1e-17 where they should be 0.
      outside = c.low > 1e-9 or c.high < -1e-9
      clear = outside and adjusted <= LARGEST_P
      f[key] = dataclasses.replace(c, adjusted=adjusted, clear=clear)
  return [dataclasses.replace(d, figures=f) for d, f in zip(family, figures, strict=True)]


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
  for name in ("calls_per_task", "useless_calls", "invalid_call_rate", "invocation_success"):
    found[name] = last.get(f"heldout/{name}", s.get(name))
  for name in ("diversity", "entropy"):
    values = [r[f"train/{name}"] for r in cell.run.metrics if f"train/{name}" in r]
    found[name] = values[-1] if values else None
  found |= {name: s[name] for name in s if name.startswith("pass_at_") or name == "new_sequences"}
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
  ends = {
    figure: min((curve[0][-1] for curve in _learning_curves(panel, figure)), default=math.nan)
    for figure in _AREAS
  }
  out: dict[str, dict[int, dict[str, float]]] = {}
  for cell in panel:
    seeds = out.setdefault(cell.method, {})
    if cell.status == DONE:
      seeds[cell.seed] = cell_figures(cell)
      for figure, name in _AREAS.items():
        for curve in _learning_curves([cell], figure):
          if curve[0][0] < ends[figure]:  # a training curve begins after an iteration's calls
            seeds[cell.seed][name] = analysis.area(curve, ends[figure])
  return out


def _learning_curves(
  cells: Iterable[Cell], figure: str = "heldout/pass_rate"
) -> list[analysis.Curve]:
  """Those of more than a start and an end, which tell nothing of the way between them."""
  return [curve for curve in curves(cells, "llm_calls", figure) if len(curve[0]) > 2]


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
