"""--mode=report: WORKDIR/report.html from a workdir of training or evaluation; from a study's,
WORKDIR/results/report.html.

Needs no model and changes nothing else. What is missing or damaged is named on the page.
"""

import pathlib
import time
from typing import Any

from steptool_jax.config import Config
from steptool_jax.evaluation.comparison import WAITING
from steptool_jax.run.studies import grid, pages


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Writes the page; returns what is in it.

  FileNotFoundError for a folder that holds nothing of a run.
  """
  started = time.monotonic()
  plan, most = grid.read_plan(workdir), config.report.trajectories
  page = pages.write_study(workdir, plan, most) if plan else pages.write_run(workdir, most)
  return {
    "mode": "report",
    "report": str(page.path),
    "cells": len(page.cells),
    "trajectories": page.trajectories,
    "problems": sum(len(cell.run.problems) for cell in page.cells if cell.status != WAITING),
    "seconds": time.monotonic() - started,
  }
