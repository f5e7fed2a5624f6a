"""What a naive reward teaches: the quickstart, once with it and once with ours; takes minutes.

    python results/naive_reward.py --reward=naive --workdir=/tmp/naive
    python results/naive_reward.py --reward=ours --workdir=/tmp/ours

The naive reward pays 1 for every call that was executed, whatever it was good for, and IsSolved at
the end. Prints means over the first and over the last iterations' rollouts: training tasks, each
met for the first time. --iterations shortens it.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from steptool_jax import validation  # noqa: E402
from steptool_jax.run import train  # noqa: E402
from steptool_jax.run.parts import opening, rollouts  # noqa: E402
from steptool_jax.run.workdir.outputs import read_jsonl  # noqa: E402
from steptool_jax.types import Code, Task, Trajectory  # noqa: E402

SHOWN = ("pass_rate", "calls_per_task", "repeated_calls", "truncated", "reward")
WINDOW = 3  # iterations, of 96 conversations each


def naive(
  parts: opening.Parts,
  tasks: Sequence[Task],
  trajectories: Sequence[Trajectory],
  scheme: str = "steptool",
) -> list[Trajectory]:
  """Stands in for rollouts.reward."""
  del parts, tasks, scheme
  out = []
  for trajectory in trajectories:
    paid = [
      float(s.observation is not None and s.observation.code is Code.OK) for s in trajectory.steps
    ]
    if paid and not trajectory.truncated:
      paid[-1] = trajectory.solved
    steps = [dataclasses.replace(s, reward=r) for s, r in zip(trajectory.steps, paid, strict=True)]
    out.append(dataclasses.replace(trajectory, steps=tuple(steps)))
  return out


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--reward", choices=("naive", "ours"), required=True)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--iterations", type=int, default=24)
  parser.add_argument("--seed", type=int, default=0)
  flags = parser.parse_args()
  spec = importlib.util.spec_from_file_location("quickstart", ROOT / "configs/quickstart.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.seed, config.train.iterations, config.train.export = flags.seed, flags.iterations, False
  config.evaluation.tasks = config.evaluation.every = 0
  if flags.reward == "naive":
    rollouts.reward = naive
  flags.workdir.mkdir(parents=True, exist_ok=True)
  train.run(validation.validate(config), flags.workdir)
  records = [r for r in read_jsonl(flags.workdir / "metrics.jsonl") if "train/reward" in r]
  for label, part in (("first", records[:WINDOW]), ("last", records[-WINDOW:])):
    figures = {n: round(float(np.mean([r[f"train/{n}"] for r in part])), 3) for n in SHOWN}
    print(f"{flags.reward}, {label} {len(part)} of {len(records)}: {json.dumps(figures)}")


if __name__ == "__main__":
  main()
