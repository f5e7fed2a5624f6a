"""Our update and rollout beside TRL's, transformers' and tunix's, as ratios; writes peers.json.

    python -m venv /tmp/peers_trl && /tmp/peers_trl/bin/pip install torch==2.13.0
    /tmp/peers_trl/bin/pip install trl==0.10.1 transformers==4.45.2 rich
    python -m venv /tmp/peers_grpo && /tmp/peers_grpo/bin/pip install torch==2.13.0 trl==1.16.0
    python -m venv /tmp/peers_tunix
    /tmp/peers_tunix/bin/pip install google-tunix==0.1.7 jax==0.10.2
    python results/peers.py --trl=/tmp/peers_trl/bin/python --tunix=/tmp/peers_tunix/bin/python \
      --grpo=/tmp/peers_grpo/bin/python

Benchmarks (--only=NAME,NAME): update (PPO, 8 trajectories), rollout, groups (GRPO, 8 samples a
task), groups_ppo (PPO on the same) and answers (GRPO where all that was not sampled comes first,
and is the prompt). An interpreter that is not given is left out; the others'
figures in peers.json stay, and the section on groups of peers.md is written anew.

The token counts of the trajectories are those in peers.json; --data=STEPTOOL_FOLDER and
--tokenizer=tokenizer.json count them anew from the released rows. --hf=PYTHON: a newer
transformers. --before=CHECKOUT: our update on groups at another commit, too. peers.md says what is
equal and what is not.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import numpy as np
import peers_report

HERE = pathlib.Path(__file__).parent
LAYERS, HIDDEN, VOCAB = 4, 256, 4096
BATCH, SAMPLES = 8, 8
EPOCHS = 4  # the release: one optimizer step each
SLOTS, TURNS, PROMPT, OBSERVATION, ANSWER = 8, 6, 256, (17, 60), (16, 32)


def count_tokens(data: str, tokenizer: str) -> list[dict[str, Any]]:
  """The texts of all released step-grained rows: prompts[k] and responses[k] take turns."""
  from tokenizers import Tokenizer

  from steptool_jax.toolbench.formats.training_rows import read_step_rows

  encoder = Tokenizer.from_file(tokenizer)
  files = sorted(pathlib.Path(data).glob("data_train/*/step_grained_for_ppo_example.csv"))
  return [
    {
      "file": file.parent.name,
      "forced": [len(encoder.encode(text).ids) for text in row.prompts],
      "sampled": [len(encoder.encode(text).ids) for text in row.responses],
      "rewards": list(row.rewards),
    }
    for file in files
    for row in read_step_rows(file)
  ]


def make_workload(rows: list[dict[str, Any]], tasks: int, epochs: int) -> dict[str, Any]:
  """Random ids in the rows' lengths for each benchmark.

  Groups: the prompt of a row, followed by what comes after the prompts of SAMPLES rows; the
  reward is a row's last. Answers: a row's prompt and observations, followed by what was sampled in
  SAMPLES rows.
  """
  rng = np.random.default_rng(0)

  def ids(length: int) -> list[int]:
    return rng.integers(2, VOCAB, length).tolist()

  def trajectory(task: int, row: dict[str, Any], rewards: list, prompt=()) -> dict[str, Any]:
    observed = [*map(ids, row["forced"][1:]), []]
    steps = [
      {"sampled": ids(n), "observed": seen, "reward": float(reward)}
      for n, seen, reward in zip(row["sampled"], observed, rewards, strict=True)
    ]
    return {"task": task, "prompt": prompt or ids(row["forced"][0]), "steps": steps}

  def outcome(row: dict[str, Any]) -> list[float]:
    return [0.0] * (len(row["rewards"]) - 1) + [row["rewards"][-1]]

  def at_once(row: dict[str, Any]) -> dict[str, Any]:
    return {"forced": [0], "sampled": [sum(row["sampled"])]}

  drawn = [rows[n] for n in rng.permutation(len(rows))[:BATCH]]
  alone = [trajectory(n, row, row["rewards"]) for n, row in enumerate(drawn)]
  prompts = [ids(PROMPT) for _ in range(SLOTS)]
  later = [
    [ids(int(rng.integers(OBSERVATION[0], OBSERVATION[1] + 1))) for _ in range(SLOTS)]
    for _ in range(TURNS - 1)
  ]
  answers = rng.integers(ANSWER[0], ANSWER[1] + 1, TURNS).tolist()
  longest = max(sum(len(turn[slot]) for turn in later) for slot in range(SLOTS))
  groups, answers_only = [], []
  for task in range(tasks):
    prompt = ids(rows[rng.integers(len(rows))]["forced"][0])
    samples = rng.permutation(len(rows))[:SAMPLES]
    groups += [trajectory(task, rows[n], outcome(rows[n]), prompt) for n in samples]
    prompt = ids(sum(rows[rng.integers(len(rows))]["forced"]))
    answers_only += [
      trajectory(task, at_once(rows[n]), rows[n]["rewards"][-1:], prompt) for n in samples
    ]
  grouped = {"trajectories": groups, "epochs": epochs}
  return {
    "update": {"trajectories": alone, "epochs": EPOCHS},
    "groups": grouped,
    "groups_ppo": grouped,
    "answers": grouped | {"trajectories": answers_only},
    "rollout": {
      "prompts": prompts,
      "turns": [prompts, *later],
      "answers": answers,
      "size": PROMPT + longest + sum(answers),
    },
  }


def shorten(row: dict[str, Any], by: int) -> dict[str, Any]:
  """The row with lengths divided; none is 0."""
  return row | {kind: [-(-n // by) for n in row[kind]] for kind in ("forced", "sampled")}


def work_of(trajectories: list[dict[str, Any]]) -> dict[str, int]:
  """Tokens in all, of which so many are sampled and so many stand there for a sample again."""
  sampled = sum(len(s["sampled"]) for t in trajectories for s in t["steps"])
  observed = sum(len(s["observed"]) for t in trajectories for s in t["steps"])
  prompts = [len(t["prompt"]) for t in trajectories]
  once = sum({t["task"]: len(t["prompt"]) for t in trajectories}.values())
  return {
    "tasks": len({t["task"] for t in trajectories}),
    "trajectories": len(trajectories),
    "tokens": sum(prompts) + sampled + observed,
    "sampled": sampled,
    "repeated": sum(prompts) - once,
  }


def export_model(folder: pathlib.Path) -> int:
  """Random weights for everybody; returns their number."""
  import jax

  from steptool_jax.policy import model
  from steptool_jax.policy.formats import hub

  config = model.ModelConfig(
    family="qwen2",  # tunix's PPO cannot run its own Llama 3
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=HIDDEN * 8 // 3 // 64 * 64 + 64,
    num_layers=LAYERS,
    num_heads=HIDDEN // 64,
    num_kv_heads=HIDDEN // 128,
    head_dim=64,
    rope_theta=1e6,
    qkv_bias=True,
  )
  params = model.init_params(config, jax.random.key(0))
  hub.save_params(folder, config, params)
  return sum(x.size for x in jax.tree.leaves(params))


class Worker:
  """A process of peers_workers that does a repetition when asked."""

  def __init__(self, run: "Run", benchmark: str, folder: pathlib.Path):
    paths = [str(run.root), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu"}
    self.log = folder / f"{run.name}_{benchmark}.log"
    command = [run.python, str(HERE / "peers_workers"), run.worker, benchmark, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with self.log.open("w") as log:
      self.process = subprocess.Popen(command, env=os.environ | environment, stderr=log, **pipes)

  def answer(self) -> dict[str, Any]:
    line = self.process.stdout.readline()
    if not line:
      raise RuntimeError(f"worker ended: {self.log.read_text()[-2000:]}")
    return json.loads(line)

  def ask(self) -> None:
    self.process.stdin.write("go\n")
    self.process.stdin.flush()

  def repeat(self) -> dict[str, Any]:
    self.ask()
    return self.answer() | {"load": os.getloadavg()[0]}

  def close(self) -> None:
    self.process.stdin.close()
    self.process.wait(60)


class Run(NamedTuple):
  """A row of a table: what it is called there, and what runs it."""

  name: str
  python: str
  worker: str
  root: pathlib.Path = HERE.parent


def compare(benchmark: str, runs: list[Run], folder: pathlib.Path, repeats: int) -> dict[str, Any]:
  """Rounds in which everybody takes a turn, ours first: raw figures, and the median of each peer's
  seconds over ours of the same round. Before them all do it once at the same time, which compiles.
  """
  workers = {run.name: Worker(run, benchmark, folder) for run in runs}
  for worker in workers.values():
    worker.answer()  # ready
  for worker in workers.values():
    worker.ask()
  first = {name: worker.answer() for name, worker in workers.items()}
  rounds: list[dict[str, dict[str, Any]]] = []
  for number in range(repeats):
    rounds.append({name: worker.repeat() for name, worker in workers.items()})
    seconds = {name: round(figures["seconds"], 2) for name, figures in rounds[-1].items()}
    print(benchmark, number + 1, seconds, flush=True)
  for worker in workers.values():
    worker.close()
  ratios = {
    run.name: [r[run.name]["seconds"] / r["ours"]["seconds"] for r in rounds]
    for run in runs
    if run.name != "ours"
  }
  return {
    "commit": commit(HERE.parent),
    "median_ratio": {name: statistics.median(r) for name, r in ratios.items()},
    "ratios": ratios,
    "first": first,
    "repetitions": {run.name: [r[run.name] for r in rounds] for run in runs},
  }


def commit(root: pathlib.Path) -> str:
  command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
  return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def runs_of(args: argparse.Namespace) -> dict[str, list[Run]]:
  """Benchmark -> who takes part, as far as there are interpreters."""
  ours = Run("ours", sys.executable, "ours")
  grouped = [
    Run("apart", sys.executable, "apart"),
    Run("before", sys.executable if args.before else "", "apart", args.before),
    Run("grpo", args.grpo, "grpo"),
    Run("tunix", args.tunix, "tunix"),
  ]
  peers = {
    "update": [Run("trl", args.trl, "trl"), Run("tunix", args.tunix, "tunix")],
    "rollout": [
      Run("transformers", args.trl, "transformers"),
      Run("newer", args.hf, "transformers"),
      Run("tunix", args.tunix, "tunix"),
    ],
    "groups": grouped,
    "answers": grouped,
    "groups_ppo": [Run("trl", args.trl, "trl")],
  }
  return {name: [ours, *(run for run in of if run.python)] for name, of in peers.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--trl", default="", help="interpreter with TRL 0.10.1")
  parser.add_argument("--grpo", default="", help="interpreter with the newest TRL")
  parser.add_argument("--tunix", default="", help="interpreter with tunix")
  parser.add_argument("--hf", default="", help="interpreter with another transformers and torch")
  parser.add_argument("--before", type=pathlib.Path, help="checkout of an older commit of ours")
  parser.add_argument(
    "--only", default="rollout,update,groups,groups_ppo,answers", help="benchmarks"
  )
  parser.add_argument("--data", help="the release's data folder, to count tokens anew")
  parser.add_argument("--tokenizer", help="tokenizer.json that counts them")
  parser.add_argument("--tasks", type=int, default=4, help="groups of 8 in a grouped update")
  parser.add_argument("--epochs", type=int, default=1, help="optimizer steps on them")
  parser.add_argument("--shorten", type=int, default=1, help="divides lengths, for a trial")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--out", type=pathlib.Path, default=HERE / "peers.json")
  parser.add_argument("--report", type=pathlib.Path, default=HERE / "peers.md")
  args = parser.parse_args()
  results = json.loads((HERE / "peers.json").read_text())
  if args.data:
    results["rows"] = count_tokens(args.data, args.tokenizer)
  rows = [shorten(row, args.shorten) for row in results["rows"]]
  work = make_workload(rows, args.tasks, args.epochs)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    (folder / "workload.json").write_text(json.dumps(work))
    results["parameters"] = export_model(folder / "model")
    results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    runs = runs_of(args)
    for benchmark in args.only.split(","):
      results[benchmark] = compare(benchmark, runs[benchmark], folder, args.repeats)
      print(benchmark, results[benchmark]["median_ratio"], flush=True)
      if benchmark in peers_report.BENCHMARKS:
        more = {"epochs": args.epochs, "work": work_of(work[benchmark]["trajectories"])}
        results[benchmark] |= more | ({"before": commit(args.before)} if args.before else {})
      args.out.write_text(json.dumps(results) + "\n")
  peers_report.write(results, args.report)


if __name__ == "__main__":
  main()
