"""Qwen3-30B-A3B, a mixture of 128 experts of which 8 work on a token, with LoRA; not in the paper.

    python -m steptool_jax.main --config=configs/qwen3_30b_a3b.py --workdir=/data/run \
      --config.model.path=/models/Qwen3-30B-A3B

Experts lie over mesh.fsdp, which has to divide their number. They and the router are frozen: the
adapters are those of attention. Hyper-parameters: configs/_release.py.
"""

import pathlib
import runpy

_RELEASE = runpy.run_path(str(pathlib.Path(__file__).with_name("_release.py")))


def get_config(arg=""):
  config = _RELEASE["online"](
    arg or "steptool",
    "Qwen3-30B-A3B",
    "hermes",
    family="qwen3_moe",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=768,
    num_experts=128,
    experts_per_token=8,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    rope_theta=1000000.0,
    tie_embeddings=False,
  )
  config.lora.targets = ("q", "k", "v", "o")
  # Split over heads alone, four ways, experts would take 14 GiB of a chip: they stay over fsdp.
  config.rollout.tensor = 0
  return config
