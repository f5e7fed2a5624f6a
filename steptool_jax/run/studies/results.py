"""WORKDIR/results of a study: the small files that are kept, from whatever cells there are."""

import csv
import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from steptool_jax.evaluation import comparison, records
from steptool_jax.evaluation.comparison import Cell
from steptool_jax.files import read_json, write_text
from steptool_jax.run.studies import pages
from steptool_jax.run.studies.grid import Planned

_CURVES = ("heldout/pass_rate", "heldout/reward", "heldout/calls_per_task", "train/pass_rate")


def write(workdir: pathlib.Path, plan: Sequence[Planned], most: int) -> list[dict[str, Any]]:
  """Writes report.html, curves, cells and differences.csv, and table.json; returns its rows.

  table.json: {"rows": one a method and environment, "differences": one a comparison, "clear": the
  rule by which one is called so}.
  """
  page = pages.write_study(workdir, plan, most)
  cells, folder = page.cells, page.path.parent
  write_text(folder / "curves.csv", _curves(cells))
  write_text(folder / "cells.csv", _cells(cells))
  differences = comparison.differences(cells)
  write_text(folder / "differences.csv", _differences(differences))
  rows = [_json(dataclasses.asdict(row)) for row in comparison.rows(cells)]
  table = {
    "rows": rows,
    "differences": [_json(dataclasses.asdict(d)) for d in differences],
    "clear": {"fewest_seeds": comparison.FEWEST_SEEDS, "largest_p": comparison.LARGEST_P},
  }
  write_text(folder / "table.json", json.dumps(table, indent=1) + "\n")
  return rows


def interrupted(cell_folder: pathlib.Path) -> bool:
  """Whether a cell's run was stopped: its summary says so, or there is none."""
  try:
    return bool(read_json(records.summary_path(cell_folder), finite=False).get("interrupted", True))
  except (OSError, ValueError):
    return True


def last_error(cell_folder: pathlib.Path, code: int) -> str:
  """The last line of error.txt; what the process ended with where there is none."""
  try:
    lines = (cell_folder / "error.txt").read_text(errors="replace").strip().splitlines()
  except OSError:
    lines = []
  return lines[-1] if lines else f"the process ended with {code}; see log.txt"


def _curves(cells: Sequence[Cell]) -> str:
  """One line a point: the raw curves, unfinished cells included and marked."""
  axes = tuple(records.AXES)
  lines = [("cell", "seed", "status", "figure", "step", *axes, "value")]
  for cell in cells:
    for record in cell.run.metrics:
      for figure in _CURVES:
        part = figure.partition("/")[0]
        if figure in record:
          spent = [record.get(f"{part}/{axis}", "") for axis in axes]
          own = (cell.name, cell.seed, cell.status, figure, record.get("step", ""))
          lines.append((*own, *spent, record[figure]))
  return _csv(lines)


def _cells(cells: Sequence[Cell]) -> str:
  """One line a cell with its figures."""
  figures = [comparison.cell_figures(cell) for cell in cells]
  names = list(dict.fromkeys(name for found in figures for name in found))
  lines = [("cell", "group", "environment", "method", "seed", "status", "note", *names)]
  for cell, found in zip(cells, figures, strict=True):
    own = (cell.name, cell.group, cell.environment, cell.method, cell.seed, cell.status, cell.note)
    lines.append((*own, *(found.get(name, "") for name in names)))
  return _csv(lines)


def _differences(differences: Sequence[comparison.Difference]) -> str:
  """One line a pair of methods; low and high: the 95 % t interval, empty for one seed."""
  parts = {"": "mean", "_low": "low", "_high": "high", "_p": "p", "_holm": "adjusted"}
  parts |= {"_clear": "clear"}
  names = [f"{key}{end}" for key in comparison.COMPARED for end in parts]
  lines = [("environment", "method", "against", "seeds", *names)]
  for d in differences:
    found = [
      getattr(d.figures[key], part) if key in d.figures else None
      for key in comparison.COMPARED
      for part in parts.values()
    ]
    known = ["" if x is None or math.isnan(x) else x for x in found]
    lines.append((d.environment, d.method, d.against, d.seeds, *known))
  return _csv(lines)


def _csv(lines: Sequence[Sequence[Any]]) -> str:
  out = io.StringIO()
  csv.writer(out, lineterminator="\n").writerows(lines)
  return out.getvalue()


def _json(value: Any) -> Any:
  """The value without NaN; infinity, of a level that the mean curve never reaches, is "never"."""
  if isinstance(value, dict):
    return {str(key): _json(entry) for key, entry in value.items()}
  if isinstance(value, list | tuple):
    return [_json(entry) for entry in value]
  if isinstance(value, float) and not math.isfinite(value):
    return "never" if value == math.inf else None
  return value
