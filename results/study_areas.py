"""The study's training rollouts by conversations: mean pass rate of all iterations, and of the last
quarter of them, what a method has more than another one, paired by seed, with 95 % t intervals.

    python results/study_areas.py [--curves=FILE] [--method=steptool] [--against=outcome]

differences.csv has the same area over LLM calls, up to the budget that all methods and seeds of an
environment have spent; here every iteration counts the same, whatever its conversations have cost.
The last lines have one mean a seed over the environments with the most seeds, by either axis.
"""

import argparse
import collections
import csv
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def curves(path: pathlib.Path) -> dict[tuple[str, str], dict[int, np.ndarray]]:
  """{(environment, method): {seed: pass rates of training rollouts}} of what is done."""
  found: dict = collections.defaultdict(lambda: collections.defaultdict(dict))
  with path.open() as file:
    for row in csv.DictReader(file):
      if row["figure"] == "train/pass_rate" and row["status"] == "done":
        _, environment, method, seed = row["cell"].split("/")
        found[environment, method][int(seed)][int(row["step"])] = float(row["value"])
  return {
    key: {seed: np.array([v[k] for k in sorted(v)]) for seed, v in seeds.items()}
    for key, seeds in found.items()
  }


def over_calls(path: pathlib.Path) -> dict[tuple[str, str], dict[int, float]]:
  """{(environment, method): {seed: mean height over LLM calls}}, as differences.csv has it."""
  from steptool_jax.evaluation import analysis

  found: dict = collections.defaultdict(lambda: collections.defaultdict(list))
  with path.open() as file:
    for row in csv.DictReader(file):
      if row["figure"] == "train/pass_rate" and row["status"] == "done":
        _, environment, method, seed = row["cell"].split("/")
        point = float(row["llm_calls"]), float(row["value"])
        found[environment, method][int(seed)].append(point)
  ends: dict[str, float] = {}
  for (environment, _), seeds in found.items():
    last = min(max(x for x, _ in curve) for curve in seeds.values())
    ends[environment] = min(ends.get(environment, last), last)
  return {
    key: {
      seed: analysis.area(tuple(zip(*sorted(curve), strict=True)), ends[key[0]])
      for seed, curve in seeds.items()
      if min(curve)[0] < ends[key[0]]
    }
    for key, seeds in found.items()
  }


def main() -> None:
  from steptool_jax.evaluation import analysis, intervals

  arguments = argparse.ArgumentParser()
  arguments.add_argument("--curves", type=pathlib.Path, default=ROOT / "results/study/curves.csv")
  arguments.add_argument("--method", default="steptool")
  arguments.add_argument("--against", default="outcome")
  given = arguments.parse_args()
  found, calls = curves(given.curves), over_calls(given.curves)
  areas: list[list[float]] = []  # of an environment's seeds
  by_calls: list[list[float]] = []
  print(f"points of {given.method} - {given.against}: mean (95 % t interval), p by sign flips")
  for environment in dict.fromkeys(e for e, _ in found):
    mine, theirs = (found.get((environment, m), {}) for m in (given.method, given.against))
    seeds = sorted(mine.keys() & theirs.keys())
    if len(seeds) < 2:
      continue
    said = []
    for name, last in (("all iterations", 1.0), ("last quarter", 0.25)):
      count = round(last * len(mine[seeds[0]]))
      more = [100 * float(np.mean(mine[s][-count:]) - np.mean(theirs[s][-count:])) for s in seeds]
      mean, low, high = analysis.mean_interval(more)
      p = intervals.sign_flip(more)
      said.append(f"{name} {mean:+.1f} ({low:.1f} to {high:.1f}), p {p:.3f}")
      if last == 1.0:
        areas.append(more)
        one, other = (calls[environment, m] for m in (given.method, given.against))
        by_calls.append([100 * (one[s] - other[s]) for s in seeds])
    print(f"{environment:22} {len(seeds)} seeds: {'; '.join(said)}")
  # Those with the most seeds: a mean over some settings for one seed and others for the next
  # would be of nothing.
  most = max(map(len, areas), default=0)
  for axis, each in (("conversations", areas), ("LLM calls", by_calls)):
    whole = [more for more in each if len(more) == most]
    if most:
      mean, low, high = analysis.mean_interval(list(np.mean(whole, axis=0)))
      print(
        f"{len(whole)} environments with {most} seeds, a mean a seed, over {axis}: "
        f"{mean:+.1f} ({low:.1f} to {high:.1f})"
      )


if __name__ == "__main__":
  main()
