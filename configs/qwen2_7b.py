"""Qwen2-7B-Instruct.

    python -m steptool_jax.main --config=configs/qwen2_7b.py --workdir=/data/run \
      --config.model.path=/models/Qwen2-7B-Instruct

Hyper-parameters: configs/_release.py.
"""

import pathlib
import runpy

_RELEASE = runpy.run_path(str(pathlib.Path(__file__).with_name("_release.py")))


def get_config(arg=""):
  return _RELEASE["online"](
    arg or "steptool",
    "Qwen2-7B-Instruct",
    "chatml_react",
    family="qwen2",
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    rope_theta=1000000.0,
    tie_embeddings=False,
  )
