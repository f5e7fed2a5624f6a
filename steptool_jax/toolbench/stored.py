"""Published pass rates, once more, from stored verdicts.

The published aggregation: of every judge run the mean score of a subset, in percent; over the judge
runs their mean and population standard deviation, both rounded to one decimal; a group's figures
are those of its subsets, averaged by number of queries and rounded again. So the ± is the noise of
the judge on one rollout. It says nothing of other rollouts or other tasks (see intervals.py).
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from steptool_jax.toolbench.formats import judged

# Group -> subset -> number of solvable queries (StableToolBench, 765 in all).
GROUPS: Mapping[str, Mapping[str, int]] = {
  "I1": {"G1_instruction": 163, "G1_category": 153, "G1_tool": 158},
  "I2": {"G2_instruction": 106, "G2_category": 124},
  "I3": {"G3_instruction": 61},
}


def stored_summary(folder: str | pathlib.Path) -> dict[str, Any]:
  """Figures of a folder of run folders that hold `<subset>.json` or `.json.xz` files.

  (`<subset>_<run>.json` as well, which is how StableToolBench names them.) Returns JSON data, all
  figures in percent with one decimal:
    published_aggregation: {run: {group: [mean, std]}} of the groups that are complete,
    subsets: {run: {subset: [mean, std, number of queries]}},
    incomplete: [{run, group, why: […]}], one entry for every run and group left out above.

  OSError for a folder that is not there; ValueError when it holds no run, and for a broken file.
  """
  folder = pathlib.Path(folder)
  runs = sorted(path for path in folder.iterdir() if path.is_dir() and _files(path))
  if not runs:
    raise ValueError(
      f"{folder} holds no run: it must hold one folder a run, with files like "
      "G1_instruction.json or .json.xz in them"
    )
  aggregation: dict[str, dict[str, list[float]]] = {}
  subsets: dict[str, dict[str, list[float | int]]] = {}
  incomplete = []
  for run in runs:
    files, figures, flaws = _files(run), {}, {}
    for subset, path in files.items():
      scores = verdict_scores(judged.read_results(path))
      if isinstance(scores, str):
        flaws[subset] = f"{subset}: {scores}"
      else:
        figures[subset] = [*figures_of(scores), len(scores)]
    aggregation[run.name], subsets[run.name] = {}, figures
    for group, sizes in GROUPS.items():
      why = [
        flaws.get(subset, f"{subset} is missing")
        if subset not in figures
        else f"{subset} has {figures[subset][2]} of {size} queries"
        for subset, size in sizes.items()
        if subset not in figures or figures[subset][2] != size
      ]
      if why:
        incomplete.append({"run": run.name, "group": group, "why": why})
      else:
        aggregation[run.name][group] = _weighted([figures[subset] for subset in sizes])
  return {"published_aggregation": aggregation, "subsets": subsets, "incomplete": incomplete}


def verdict_scores(results: Mapping[str, judged.Result]) -> np.ndarray | str:
  """float64[tasks, judge runs] of IsSolved; a sentence where the tasks were not judged equally."""
  counts = sorted({len(result.verdicts) for result in results.values()})
  if len(counts) != 1:
    return f"its queries have {' or '.join(map(str, counts)) or 'no'} judge runs, must be equal"
  return np.array([[v.score for v in result.verdicts] for result in results.values()])


def figures_of(scores: np.ndarray) -> tuple[float, float]:
  """(mean, population standard deviation over judge runs) in percent, rounded to one decimal."""
  means = 100 * scores.mean(axis=0)
  return round(float(means.mean()), 1), round(float(means.std()), 1)


def _weighted(figures: list[list[float | int]]) -> list[float]:
  means, stds, counts = zip(*figures, strict=True)
  return [round(float(np.average(values, weights=counts)), 1) for values in (means, stds)]


def _files(run: pathlib.Path) -> dict[str, pathlib.Path]:
  """Subset -> file of one run folder; ValueError for two files of one subset."""
  names = [subset for sizes in GROUPS.values() for subset in sizes]
  found: dict[str, pathlib.Path] = {}
  for path in sorted(run.iterdir()):
    match = re.fullmatch(
      rf"({'|'.join(names)})(?:_{re.escape(run.name)})?\.json(?:\.xz)?", path.name
    )
    if match is None:
      continue
    if match[1] in found:
      raise ValueError(f"{path} and {found[match[1]].name} are of one subset: remove one")
    found[match[1]] = path
  return found
