"""ToolLLaMA-2-7b-v2, the paper's main backbone.

    python -m steptool_jax.main --config=configs/toolllama2_7b.py --workdir=/data/run \
      --config.model.path=/models/ToolLLaMA-2-7b-v2

Hyper-parameters: configs/_release.py.
"""

import pathlib
import runpy

_RELEASE = runpy.run_path(str(pathlib.Path(__file__).with_name("_release.py")))


def get_config(arg=""):
  config = _RELEASE["online"](
    arg or "steptool",
    "ToolLLaMA-2-7b-v2",
    "toolllama",
    family="llama",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rope_theta=10000.0,
    tie_embeddings=False,
  )
  config.lora.rank = 8
  config.rollout.slots = 32
  config.rollout.max_tokens = config.train.row_tokens = 4096  # the model's context
  return config
