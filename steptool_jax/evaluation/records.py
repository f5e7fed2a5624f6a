"""What a workdir holds, read as far as it can be read: a report shows what there is.

    config.json  summary.json  metrics.jsonl  moments/*.jsonl  trajectories.jsonl  error.txt

A file that is missing or damaged costs its own part only, and is named in `problems`.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from steptool_jax.data import trajectories
from steptool_jax.data.trajectories import AnnotatedTrajectory
from steptool_jax.evaluation.analysis import Curve
from steptool_jax.files import read_json

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


def read_run(folder: pathlib.Path, most: int = 0) -> Run:
  """Reads a workdir; never raises for what stands in it. most: trajectories a file, 0 = all."""
  problems: list[str] = []
  config = _read_object(folder / "config.json", problems)
  summary = _read_object(folder / "summary.json", problems)
  metrics = tuple(_read_lines(folder / "metrics.jsonl", problems))
  files = sorted((folder / "moments").glob("*.jsonl"))
  if (folder / "trajectories.jsonl").exists():
    files.append(folder / "trajectories.jsonl")
  if not files:
    problems.append("no trajectories (moments/*.jsonl, trajectories.jsonl): nothing to look at")
  moments = {path.stem: _read_moment(path, most, problems) for path in files}
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


def _read_lines(path: pathlib.Path, problems: list[str]) -> list[Mapping[str, Any]]:
  """The records in front of the first damaged one."""
  records: list[Mapping[str, Any]] = []
  try:
    text = path.read_text(encoding="utf-8", errors="replace")
  except FileNotFoundError:
    problems.append(f"{path.name} is missing: no learning curves")
    return records
  except OSError as error:
    problems.append(f"{path.name} cannot be read ({error})")
    return records
  lines = text.splitlines()
  for number, line in enumerate(lines, start=1):
    try:
      record = json.loads(line)
      if not isinstance(record, dict):
        raise ValueError("no JSON object")
    except (ValueError, RecursionError):
      problems.append(
        f"{path.name}: damaged from line {number} of {len(lines)} on; what stands before is shown"
      )
      break
    records.append(record)
  return records


def _read_moment(
  path: pathlib.Path, most: int, problems: list[str]
) -> tuple[AnnotatedTrajectory, ...]:
  """All trajectories that can be read; the damaged lines are counted."""
  found: list[AnnotatedTrajectory] = []
  damaged: list[int] = []
  try:
    with path.open(encoding="utf-8", errors="replace") as file:
      for number, line in enumerate(file, start=1):
        if most and len(found) == most:
          break
        try:
          found.append(trajectories.load(line))
        except (ValueError, RecursionError):
          damaged.append(number)
  except OSError as error:
    problems.append(f"{path.name} cannot be read ({error})")
  if damaged:
    problems.append(
      f"{path.name}: {len(damaged)} damaged lines are left out, the first is line {damaged[0]}"
    )
  return tuple(found)
