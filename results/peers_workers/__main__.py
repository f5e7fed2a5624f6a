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

_grouped = {
  "ours": functools.partial(ours.update, algorithm="grpo", share=True),
  "apart": functools.partial(ours.update, algorithm="grpo", share=False),
  "grpo": hugging_face.grpo,
  "tunix": google_tunix.grpo,
}
# benchmark -> worker -> what serves it. "apart": ours, every sample with a prompt of its own.
WORKERS = {
  "rollout": {
    "ours": ours.rollout,
    "transformers": hugging_face.rollout,
    "tunix": google_tunix.rollout,
  },
  "update": {
    "ours": functools.partial(ours.update, algorithm="steptool", share=False),
    "trl": hugging_face.ppo,
    "tunix": google_tunix.ppo,
  },
  "groups": _grouped,
  "answers": _grouped,
  "groups_ppo": {
    "ours": functools.partial(ours.update, algorithm="steptool", share=True),
    "trl": hugging_face.ppo,
  },
}

if __name__ == "__main__":
  worker, benchmark, path = sys.argv[1:]
  workload = json.loads((pathlib.Path(path) / "workload.json").read_text())
  WORKERS[benchmark][worker](workload[benchmark], pathlib.Path(path))
