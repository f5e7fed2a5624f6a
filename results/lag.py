"""Learning curves of rollout.lag: 0, 1 with importance weights, and 1 without, on the quickstart.

    python results/lag.py --workdir=/tmp/lag

Fifteen runs (three ways, seeds 0 to 4), each a process of its own with the same start and tasks,
about three core minutes; after each results/lag.md is written anew. A run that is stopped goes on
where it was, one that is done is not run again. --seeds=1 runs fewer; --write-only only writes.
"""

import argparse
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from steptool_jax.evaluation.intervals import t_bounds  # noqa: E402
from steptool_jax.run.workdir.outputs import read_jsonl  # noqa: E402

WAYS = {
  "lag 0": ("rollout.lag=0",),
  "lag 1, corrected": ("rollout.lag=1", "rollout.correction=token"),
  "lag 1, not corrected": ("rollout.lag=1", "rollout.correction=none"),
}
SEEDS = 5
PASS_RATE = "heldout/pass_rate"
DONE = "summary_train.json"


def folder(workdir: pathlib.Path, way: str, seed: int) -> pathlib.Path:
  return workdir / f"{way.replace(', ', '_').replace(' ', '_')}_{seed}"


def run(home: pathlib.Path, way: str, seed: int) -> None:
  """One run, to its end; the same command goes on with a run that was stopped."""
  home.mkdir(parents=True, exist_ok=True)
  fields = (*WAYS[way], f"seed={seed}", "train.export=False", "evaluation.every=4")
  command = [sys.executable, "-m", "steptool_jax.main", f"--workdir={home}"]
  command += [f"--config={ROOT}/configs/quickstart.py", *(f"--config.{f}" for f in fields)]
  with (home / "log.txt").open("a") as log:
    subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)


def curve(home: pathlib.Path) -> dict[int, float]:
  """{iteration: held-out pass rate}, empty where the run is not done."""
  if not (home / DONE).exists():
    return {}
  records = read_jsonl(home / "metrics.jsonl")
  return {r["step"]: r[PASS_RATE] for r in records if PASS_RATE in r}


def write(workdir: pathlib.Path) -> None:
  curves = {
    way: {seed: c for seed in range(SEEDS) if (c := curve(folder(workdir, way, seed)))}
    for way in WAYS
  }
  steps = sorted({step for found in curves.values() for c in found.values() for step in c})
  if not steps:
    (ROOT / "results" / "lag.md").write_text(HEAD + "Not run yet.\n")
    return
  plain, *lagged = WAYS
  rows = {way: list(found.values()) for way, found in curves.items()}
  for way in lagged:
    both = curves[plain].keys() & curves[way].keys()
    pairs = ((curves[way][seed], curves[plain][seed]) for seed in sorted(both))
    rows[f"{way}, less {plain}"] = [{step: a[step] - b[step] for step in a} for a, b in pairs]
  lines = [f"| | seeds | {' | '.join(map(str, steps))} |", "| --- " * (len(steps) + 2) + "|"]
  for name, found in rows.items():
    cells = (_cell([c[step] for c in found if step in c]) for step in steps)
    lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
  (ROOT / "results" / "lag.md").write_text(HEAD + "\n".join(lines) + "\n")


def _cell(values: list[float]) -> str:
  """Mean and its 95 % interval over seeds, in percent."""
  if len(values) < 2:
    return f"{100 * values[0]:.1f}" if values else ""
  low, high = t_bounds(np.array(values))
  return f"{100 * np.mean(values):.1f} ({100 * low:.1f} to {100 * high:.1f})"


HEAD = """# Sampling one update behind: what it costs in learning

    python results/lag.py --workdir=/tmp/lag

The quickstart with `rollout.lag` 0, 1 with importance weights (a token's, cut at
`rollout.correction_bound`) and 1 without (`rollout.correction=none`): the same start, tasks and
seeds. Held-out pass rate in percent by step, sampled as in training: the mean over the seeds that
are done and its 95 % interval (Student's t); then the difference from lag 0, seed by seed. Step 0
is the start, the next one follows SFT; first, second and last are of all held-out tasks, the others
of the curve's.

"""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--seeds", type=int, default=SEEDS)
  parser.add_argument("--write-only", action="store_true")
  args = parser.parse_args()
  for seed in range(args.seeds):
    for way in WAYS:
      home = folder(args.workdir, way, seed)
      if not args.write_only and not (home / DONE).exists():
        run(home, way, seed)
      write(args.workdir)


if __name__ == "__main__":
  main()
