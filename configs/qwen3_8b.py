"""Qwen3-8B, the base of ToolOrchestra's Orchestrator-8B; not in the paper.

    python -m steptool_jax.main --config=configs/qwen3_8b.py --workdir=/data/run \
      --config.model.path=/models/Qwen3-8B

Hyper-parameters: configs/_release.py.
"""

import pathlib
import runpy

_RELEASE = runpy.run_path(str(pathlib.Path(__file__).with_name("_release.py")))


def get_config(arg=""):
  return _RELEASE["online"](
    arg or "steptool",
    "Qwen3-8B",
    "hermes",
    family="qwen3",
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1000000.0,
    tie_embeddings=False,
  )
