"""--mode=study: methods x environments x seeds under equal budgets, and what came out.

Every cell is a training run in a workdir and a process of its own. The same command goes on where
the study stopped: cells that are done are left alone, others go on from their checkpoints. A cell
that fails is tried again, then marked, and is in no mean; to try it once more, delete its folder.

    WORKDIR/study.json             all cells
    WORKDIR/cells/<name>/          a cell's workdir; log.txt has what it printed
    WORKDIR/results/               to keep: curves.csv, cells.csv, table.json, report.html
    WORKDIR/summary.json           how many cells are done, failed, left
"""

import dataclasses
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import logging

from steptool_jax import validation
from steptool_jax.config import Config
from steptool_jax.evaluation.comparison import DONE, FAILED, STARTED, WAITING
from steptool_jax.files import write_text
from steptool_jax.run.hosts import hosts
from steptool_jax.run.parts import opening
from steptool_jax.run.studies import grid, results
from steptool_jax.run.studies.grid import Planned, State
from steptool_jax.run.training import restore
from steptool_jax.run.workdir import outputs

_ENDED = (DONE, FAILED)
COMMAND = (sys.executable, "-m", "steptool_jax.run.cell")
_CHANGES_NO_BITS = ("compilation_cache", "checkpoint.", "report.", "hang_after")
_GRACE_S = 600.0  # for a cell to reach its next safe point and save


@dataclasses.dataclass
class _Running:
  cell: Planned
  folder: pathlib.Path
  process: subprocess.Popen
  cores: tuple[int, ...]


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Runs the chosen cells until they are done or config.study.hours are over.

  ValueError, before any work, for cells that cannot be run.
  """
  started = time.monotonic()
  cells = grid.plan(config.study)
  chosen = grid.chosen(config.study, cells)
  configs = grid.configs(config, chosen)
  slots = _cores(config)
  for cell in chosen:
    _refuse_other_config(grid.folder(workdir, cell.name), configs[cell.name])
  grid.write_plan(workdir, cells)
  write_text(workdir / "config.json", validation.to_json(config))
  for name, cell_config in configs.items():
    path = grid.folder(workdir, name) / "cell_config.json"
    write_text(path, validation.to_json(cell_config))
  with opening.Stop().listening() as stop:
    _run_cells(config, workdir, chosen, slots, stop, started)
  return _finish(config, workdir, cells, chosen, time.monotonic() - started)


def _refuse_other_config(folder: pathlib.Path, config: Config) -> None:
  """ValueError where the cell was begun with another one: it could not be compared any more."""
  names = restore.other_fields(config, folder / "cell_config.json", _CHANGES_NO_BITS)
  if names:
    raise ValueError(
      f"{folder} was begun with another config; different: {', '.join(names)}; use another "
      "--workdir, the values of its cell_config.json, or delete this folder"
    )


def _cores(config: Config) -> list[tuple[int, ...]]:
  """Cores of every place where a cell may run; empty tuples: all of them."""
  study = config.study
  if not study.cores:
    return [()] * study.parallel
  # Other systems than Linux keep no process to some cores.
  pinned = hasattr(os, "sched_getaffinity")
  found = sorted(os.sched_getaffinity(0)) if pinned else list(range(os.cpu_count() or 1))
  if study.parallel * study.cores > len(found):
    raise ValueError(
      f"config.study.parallel: {study.parallel} cells of {study.cores} cores need more than the "
      f"{len(found)} there are, and would slow each other down; lower one of the two"
    )
  return [tuple(found[k * study.cores : (k + 1) * study.cores]) for k in range(study.parallel)]


def _run_cells(
  config: Config,
  workdir: pathlib.Path,
  chosen: Sequence[Planned],
  slots: Sequence[tuple[int, ...]],
  stop: opening.Stop,
  started: float,
) -> None:
  """Runs the chosen cells until all have ended, or until it is time to stop."""
  waiting = [c for c in chosen if _state(workdir, c).status not in _ENDED]
  free, running = list(slots), []
  budget = config.study.hours * 3600
  with hosts.bar(total=len(chosen), initial=len(chosen) - len(waiting), desc="cells") as bar:
    while waiting or running:
      if stop() or (budget and time.monotonic() - started > budget):
        _stop_all(running)
        return
      while waiting and free:
        running.append(_start(workdir, waiting.pop(0), free.pop(0)))
      time.sleep(0.2)
      for job in [job for job in running if job.process.poll() is not None]:
        running.remove(job)
        free.append(job.cores)
        state = _note_end(job, config.study.attempts)
        if state.status in _ENDED:
          bar.update()
          hosts.say(f"{job.cell.name}: {state.status} {state.note}")
        else:
          logging.warning("%s: %s; it is tried again", job.cell.name, state.note)
          waiting.insert(0, job.cell)


def _state(workdir: pathlib.Path, cell: Planned) -> State:
  return grid.read_state(grid.folder(workdir, cell.name))


def _start(workdir: pathlib.Path, cell: Planned, cores: tuple[int, ...]) -> _Running:
  folder = grid.folder(workdir, cell.name)
  state = grid.read_state(folder)
  grid.write_state(folder, dataclasses.replace(state, status=STARTED))
  (folder / "error.txt").unlink(missing_ok=True)  # of an earlier attempt
  with (folder / "log.txt").open("a") as log:
    process = subprocess.Popen(
      [*COMMAND, str(folder), *map(str, cores)],
      stdout=log,
      stderr=log,
      stdin=subprocess.DEVNULL,
      start_new_session=True,  # Ctrl-C reaches the study alone, which stops its cells in order
    )
  return _Running(cell, folder, process, cores)


def _note_end(job: _Running, attempts: int) -> State:
  """What became of a cell whose process has ended, written down."""
  state = grid.read_state(job.folder)
  code = job.process.returncode
  if code == 0:
    status = STARTED if results.interrupted(job.folder) else DONE
    state = State(status, "stopped; goes on with the same command" if status == STARTED else "")
  else:
    count = state.attempts + 1
    status = FAILED if count >= attempts else STARTED
    state = State(status, f"{results.last_error(job.folder, code)} (attempt {count})", count)
  grid.write_state(job.folder, state)
  return state


def _stop_all(running: Sequence[_Running]) -> None:
  """Lets all cells save, and writes down how far they are."""
  for job in running:
    job.process.terminate()
  limit = time.monotonic() + _GRACE_S
  for job in running:
    try:
      job.process.wait(max(limit - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
      job.process.kill()
      job.process.wait()
    state = grid.read_state(job.folder)
    ended = job.process.returncode == 0 and not results.interrupted(job.folder)
    note = "" if ended else "stopped; goes on with the same command"
    grid.write_state(job.folder, State(DONE if ended else STARTED, note, state.attempts))


def _finish(
  config: Config,
  workdir: pathlib.Path,
  cells: Sequence[Planned],
  chosen: Sequence[Planned],
  seconds: float,
) -> dict[str, Any]:
  found = results.write(workdir, cells, config.report.trajectories)
  states = {cell.name: _state(workdir, cell).status for cell in cells}
  mine = [states[cell.name] for cell in chosen]
  summary = {
    "cells": len(cells),
    "done": sum(status == DONE for status in states.values()),
    "failed": [name for name, status in states.items() if status == FAILED],
    "left": sum(status in (STARTED, WAITING) for status in states.values()),
    "interrupted": any(status not in _ENDED for status in mine),
    "seconds_of_this_start": seconds,
    "results": str(workdir / "results"),
    "table": found,
  }
  summary = outputs.write_summary(workdir, "study", summary)
  return {key: value for key, value in summary.items() if key != "table"}
