"""What results/peers.py starts, a process for each library and benchmark: serves timed repetitions.

    python results/peers_workers WORKER BENCHMARK FOLDER

FOLDER holds workload.json and model/ (Hugging Face). A line on stdin asks for one repetition, a
JSON line on stdout answers: seconds, what was compiled, and what proves that the work is the same.
No interpreter has all libraries: each file imports its own late.
"""

import functools
import json
import pathlib
import sys

import google_tunix
import hugging_face
import ours

# (worker, benchmark) -> what serves it. "apart": ours, every sample with a prompt of its own.
WORKERS = {
  ("ours", "rollout"): ours.rollout,
  ("transformers", "rollout"): hugging_face.rollout,
  ("tunix", "rollout"): google_tunix.rollout,
  ("ours", "update"): functools.partial(ours.update, algorithm="steptool", share=False),
  ("trl", "update"): hugging_face.ppo,
  ("tunix", "update"): google_tunix.ppo,
  ("ours", "groups"): functools.partial(ours.update, algorithm="grpo", share=True),
  ("apart", "groups"): functools.partial(ours.update, algorithm="grpo", share=False),
  ("grpo", "groups"): hugging_face.grpo,
  ("tunix", "groups"): google_tunix.grpo,
  ("ours", "groups_ppo"): functools.partial(ours.update, algorithm="steptool", share=True),
  ("trl", "groups_ppo"): hugging_face.ppo,
}

if __name__ == "__main__":
  worker, benchmark, path = sys.argv[1:]
  workload = json.loads((pathlib.Path(path) / "workload.json").read_text())
  WORKERS[worker, benchmark](workload[benchmark], pathlib.Path(path))
