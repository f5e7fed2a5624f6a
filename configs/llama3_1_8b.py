"""Llama-3.1-8B-Instruct.

    python -m steptool_jax.main --config=configs/llama3_1_8b.py --workdir=/data/run \
      --config.model.path=/models/Llama-3.1-8B-Instruct

Hyper-parameters: configs/_release.py.
"""

import pathlib
import runpy

_RELEASE = runpy.run_path(str(pathlib.Path(__file__).with_name("_release.py")))


def get_config(arg=""):
  return _RELEASE["online"](
    arg or "steptool",
    "Llama-3.1-8B-Instruct",
    "llama31",
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=500000.0,
    tie_embeddings=False,
  )
