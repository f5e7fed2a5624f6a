"""Our update and rollout beside TRL's, transformers' and tunix's, as ratios; writes peers.json.

    python -m venv /tmp/peers_trl && /tmp/peers_trl/bin/pip install torch==2.13.0
    /tmp/peers_trl/bin/pip install trl==0.10.1 transformers==4.45.2 rich
    python -m venv /tmp/peers_tunix
    /tmp/peers_tunix/bin/pip install google-tunix==0.1.7 jax==0.10.2
    python results/peers.py --trl=/tmp/peers_trl/bin/python --tunix=/tmp/peers_tunix/bin/python

The token counts of the trajectories are those in peers.json; --data=STEPTOOL_FOLDER and
--tokenizer=tokenizer.json count them anew from the released rows. --hf=PYTHON: a newer
transformers. peers.md says what is equal and what is not.
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
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).parent
LAYERS, HIDDEN, VOCAB = 4, 256, 4096
BATCH, BATCHES = 8, 1
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


def make_workload(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Random ids in the rows' lengths, and the conversations of the rollout."""
  rng = np.random.default_rng(0)

  def ids(length: int) -> list[int]:
    return rng.integers(2, VOCAB, length).tolist()

  def trajectory(row: dict[str, Any]) -> dict[str, Any]:
    observed = [*map(ids, row["forced"][1:]), []]
    steps = [
      {"sampled": ids(n), "observed": seen, "reward": float(reward)}
      for n, seen, reward in zip(row["sampled"], observed, row["rewards"], strict=True)
    ]
    return {"prompt": ids(row["forced"][0]), "steps": steps}

  order = rng.permutation(len(rows))[: BATCH * BATCHES].reshape(BATCHES, BATCH)
  batches = [[trajectory(rows[n]) for n in batch] for batch in order]
  prompts = [ids(PROMPT) for _ in range(SLOTS)]
  later = [
    [ids(int(rng.integers(OBSERVATION[0], OBSERVATION[1] + 1))) for _ in range(SLOTS)]
    for _ in range(TURNS - 1)
  ]
  answers = rng.integers(ANSWER[0], ANSWER[1] + 1, TURNS).tolist()
  longest = max(sum(len(turn[slot]) for turn in later) for slot in range(SLOTS))
  return {
    "batches": batches,
    "prompts": prompts,
    "turns": [prompts, *later],
    "answers": answers,
    "size": PROMPT + longest + sum(answers),
  }


def export_model(folder: pathlib.Path) -> int:
  """Random weights for everybody; returns their number."""
  import jax

  from steptool_jax.policy import hub, model

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
  """A process of peers_workers.py that does a repetition when asked."""

  def __init__(self, python: str, library: str, benchmark: str, folder: pathlib.Path):
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu"}
    log = (folder / f"{pathlib.Path(python).parts[-3]}_{library}_{benchmark}.log").open("w")
    command = [python, str(HERE / "peers_workers.py"), library, benchmark, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
    self.process = subprocess.Popen(command, env=os.environ | environment, **pipes)
    self.log = log.name
    self._answer()

  def _answer(self) -> dict[str, Any]:
    line = self.process.stdout.readline()
    if not line:
      raise RuntimeError(f"worker ended: {pathlib.Path(self.log).read_text()[-2000:]}")
    return json.loads(line)

  def repeat(self) -> dict[str, Any]:
    self.process.stdin.write("go\n")
    self.process.stdin.flush()
    return self._answer()

  def close(self) -> None:
    self.process.stdin.close()
    self.process.wait(60)


def compare(
  benchmark: str, pythons: dict[str, tuple[str, str]], folder: pathlib.Path, repeats: int
) -> dict[str, Any]:
  """ours, peer, ours, peer ...: raw figures, and the median of each peer's seconds over ours.

  pythons: name -> (interpreter, worker). The first round compiles and is kept apart.
  """
  workers = {n: Worker(python, w, benchmark, folder) for n, (python, w) in pythons.items()}
  peers = [name for name in workers if name != "ours"]
  raw: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
  ratios: dict[str, list[float]] = {name: [] for name in peers}
  first = {name: worker.repeat() for name, worker in workers.items()}
  print(benchmark, "first", {name: f["seconds"] for name, f in first.items()}, flush=True)
  for _ in range(repeats):
    for name in peers:
      pair = [workers[n].repeat() | {"load": os.getloadavg()[0]} for n in ("ours", name)]
      raw["ours"].append(pair[0])
      raw[name].append(pair[1])
      ratios[name].append(pair[1]["seconds"] / pair[0]["seconds"])
      print(benchmark, name, *(f"{figures['seconds']:.2f}" for figures in pair), flush=True)
  for worker in workers.values():
    worker.close()
  medians = {name: statistics.median(r) for name, r in ratios.items()}
  return {"median_ratio": medians, "ratios": ratios, "first": first, "repetitions": raw}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--trl", required=True, help="interpreter with TRL and transformers")
  parser.add_argument("--tunix", required=True, help="interpreter with tunix")
  parser.add_argument("--hf", help="interpreter with another transformers and torch")
  parser.add_argument("--data", help="the release's data folder, to count tokens anew")
  parser.add_argument("--tokenizer", help="tokenizer.json that counts them")
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--out", type=pathlib.Path, default=HERE / "peers.json")
  args = parser.parse_args()
  if args.data:
    rows = count_tokens(args.data, args.tokenizer)
  else:
    rows = json.loads((HERE / "peers.json").read_text())["rows"]
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    work = make_workload(rows)
    (folder / "workload.json").write_text(json.dumps(work))
    parameters = export_model(folder / "model")
    ours, tunix = {"ours": (sys.executable, "ours")}, {"tunix": (args.tunix, "tunix")}
    hf = {"transformers": (args.trl, "hf")} | ({"newer": (args.hf, "hf")} if args.hf else {})
    results = {
      "machine": f"{platform.machine()}, {os.cpu_count()} cores",
      "parameters": parameters,
      "rows": rows,
    }
    benchmarks = {"rollout": ours | hf | tunix, "update": ours | {"trl": (args.trl, "trl")} | tunix}
    for benchmark, pythons in benchmarks.items():
      results[benchmark] = compare(benchmark, pythons, folder, args.repeats)
      print(benchmark, results[benchmark]["median_ratio"], flush=True)
      args.out.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
  main()
