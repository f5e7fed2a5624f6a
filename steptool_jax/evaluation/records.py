"""What a workdir holds, read as far as it can be read: a report shows what there is.

    config.json  summary_train.json (else summary.json)  metrics.jsonl  moments/*.jsonl
    trajectories.jsonl  error.txt

A file that is missing or damaged costs its own part only, and is named in `problems`.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from steptool_jax.data import trajectories
from steptool_jax.data.trajectories import AnnotatedTrajectory
from steptool_jax.evaluation.analysis import Curve
from steptool_jax.files import read_json, read_lines

AXES = {
  "llm_calls": "LLM calls (environment steps)",
  "conversations": "conversations rolled out",
  "tokens": "tokens rolled out",
  "rl_seconds": "seconds of RL (wall-clock)",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """One workdir. moments: file name without ending -> its trajectories."""

  folder: pathlib.Path
  config: Mapping[str, Any]
  summary: Mapping[str, Any]
  metrics: tuple[Mapping[str, Any], ...]
  moments: Mapping[str, tuple[AnnotatedTrajectory, ...]]
  problems: tuple[str, ...]

  @property
  def before(self) -> str | None:
    """Name of the earliest held-out moment."""
    return next((m for m in ("heldout_base", "heldout_sft") if self.moments.get(m)), None)

  @property
  def after(self) -> str | None:
    """Name of the latest held-out moment; None where it is the only one."""
    names = ("heldout_rl", "heldout_sft")
    found = next((m for m in names if self.moments.get(m)), None)
    return found if found != self.before else None


def summary_path(folder: pathlib.Path) -> pathlib.Path:
  """The summary of a training where there is one, else of what came first to the folder."""
  path = folder / "summary_train.json"
  return path if path.exists() else folder / "summary.json"


def json_object(line: str) -> dict[str, Any]:
  """The JSON object of a line; ValueError for anything else."""
  value = json.loads(line)
  if not isinstance(value, dict):
    raise ValueError("no JSON object")
  return value


def read_run(folder: pathlib.Path, most: int = 0) -> Run:
  """Reads a workdir; never raises for what stands in it. most: trajectories a file, 0 = all."""
  problems: list[str] = []
  config = _read_object(folder / "config.json", problems)
  summary = _read_object(summary_path(folder), problems)
  metrics = _read_lines(folder / "metrics.jsonl", json_object, None, problems)
  files = sorted((folder / "moments").glob("*.jsonl"))
  if (folder / "trajectories.jsonl").exists():
    files.append(folder / "trajectories.jsonl")
  if not files:
    problems.append("no trajectories (moments/*.jsonl, trajectories.jsonl): nothing to look at")
  moments = {
    path.stem: _read_lines(path, trajectories.load, most or None, problems) for path in files
  }
  if summary.get("interrupted"):
    problems.append("the run was interrupted; the same command goes on")
  elif (folder / "error.txt").exists() and not summary:
    last = (folder / "error.txt").read_text(errors="replace").strip().splitlines()
    problems.append(f"the run ended in an error: {last[-1] if last else 'unknown'}")
  return Run(folder, config, summary, metrics, moments, tuple(problems))


def curve(run: Run, axis: str, figure: str = "heldout/pass_rate") -> Curve | None:
  """(spent, figure) over RL: from the policy after SFT on, which has spent nothing.

  None where the run has no such records.
  """
  prefix = figure.partition("/")[0]
  points: dict[float, float] = {}
  for record in run.metrics:
    x, y = record.get(f"{prefix}/{axis}"), record.get(figure)
    if all(isinstance(v, int | float) and math.isfinite(v) for v in (x, y)):
      points[float(x)] = float(y)  # the later of two: base and SFT both stand at 0
  return (sorted(points), [points[x] for x in sorted(points)]) if points else None


def figures(run: Run) -> tuple[str, ...]:
  """Names of all figures in metrics.jsonl that have a curve, in their order there."""
  names = dict.fromkeys(name for record in run.metrics for name in record if name != "step")
  spent = {f"{part}/{axis}" for part in ("train", "heldout") for axis in AXES}
  return tuple(
    name for name in names if name.startswith(("train/", "heldout/")) and name not in spent
  )


def _read_object(path: pathlib.Path, problems: list[str]) -> Mapping[str, Any]:
  try:
    return read_json(path, finite=False)
  except FileNotFoundError:
    problems.append(f"{path.name} is missing: the run has not ended, or is not one of training")
  except (OSError, ValueError) as error:
    problems.append(f"{path.name} cannot be read ({error})")
  return {}


def _read_lines(
  path: pathlib.Path, parse: Callable[[str], Any], most: int | None, problems: list[str]
) -> tuple[Any, ...]:
  """What can be read; the damaged lines are counted."""
  try:
    found, damaged, _ = read_lines(path, parse, most)
  except FileNotFoundError:
    problems.append(f"{path.name} is missing: no learning curves")
    return ()
  except OSError as error:
    problems.append(f"{path.name} cannot be read ({error})")
    return ()
  if damaged:
    problems.append(
      f"{path.name}: {len(damaged)} damaged lines are left out, the first is line {damaged[0]}"
    )
  return tuple(found)
