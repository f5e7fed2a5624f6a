"""--mode=report: WORKDIR/report.html from a workdir of training or evaluation; from a study's,
WORKDIR/results/report.html.

Needs no model and changes nothing else. What is missing or damaged is named on the page.
"""

import pathlib
import time
from typing import Any

from steptool_jax.config import Config
from steptool_jax.evaluation.comparison import WAITING, Cell
from steptool_jax.run.studies import grid, pages


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Writes the page; returns what is in it.

  FileNotFoundError for a folder that holds nothing of a run.
  """
  started = time.monotonic()
  plan = grid.read_plan(workdir)
  if plan is not None:
    cells, notes = pages.read_cells(workdir, plan, config.report.trajectories)
    title = f"Study {workdir.name}"
  else:
    if not any((workdir / name).exists() for name in _TRACES):
      raise FileNotFoundError(
        f"{workdir} holds no run (none of {', '.join(_TRACES)}); give --workdir of a run or a study"
      )
    cells, notes = [pages.single_cell(workdir)], []
    title = _title(cells[0], workdir)
  path = workdir / ("report.html" if plan is None else "results/report.html")
  shown = pages.write(path, title, cells, config.report.trajectories, notes)
  return {
    "mode": "report",
    "report": str(path),
    "cells": len(cells),
    "trajectories": shown,
    "problems": sum(len(cell.run.problems) for cell in cells if cell.status != WAITING),
    "seconds": time.monotonic() - started,
  }


_TRACES = ("config.json", "summary.json", "metrics.jsonl", "moments", "trajectories.jsonl")


def _title(cell: Cell, workdir: pathlib.Path) -> str:
  parts = [cell.method, f"on {cell.environment}" if cell.environment else "", f"seed {cell.seed}"]
  return f"{workdir.name}: {' '.join(part for part in parts if part)}"
