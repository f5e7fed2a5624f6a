"""Adapters -> PEFT directories (adapter_config.json, adapter_model.safetensors)."""

import pathlib
from typing import Any

import jax
import numpy as np

from steptool_jax.policy import sharding
from steptool_jax.policy.formats.hfconfig import PROJECTIONS
from steptool_jax.policy.formats.tensorfile import output_directory, write_file, write_json
from steptool_jax.policy.lora import Lora
from steptool_jax.policy.model import ModelConfig

PEFT_NAMES = {ours: name.split(".")[-1] for ours, name in PROJECTIONS.items()}
PEFT_NAMES["lm_head"] = "lm_head"


def _tensors(config: ModelConfig, lora: Lora):
  """(PEFT name, target, 'a' or 'b', layer or None)."""
  for target in lora.targets:
    for ours, theirs in (("a", "lora_A"), ("b", "lora_B")):
      if target == "lm_head":
        yield f"base_model.model.lm_head.{theirs}.weight", target, ours, None
        continue
      for layer in range(config.num_layers):
        module = f"base_model.model.model.layers.{layer}.{PROJECTIONS[target]}"
        yield f"{module}.{theirs}.weight", target, ours, layer


def save_adapter(
  directory: str | pathlib.Path,
  config: ModelConfig,
  adapters: dict[str, Any],
  lora: Lora,
  base_model: str | None = None,
) -> None:
  """Writes a directory that peft.PeftModel.from_pretrained opens; all or nothing.

  `base_model`: name or path of the weights that the adapter belongs to.
  """
  tensors = {}
  for name, target, part, layer in _tensors(config, lora):
    stack = adapters if layer is None else adapters["layers"]
    array = stack[target][part]
    array = array if layer is None else sharding.layer_of(array, layer)
    tensors[name] = np.asarray(sharding.to_host(array), np.float32).T
  if jax.process_index():
    return
  sizes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
  with output_directory(directory) as out:
    write_file(out / "adapter_model.safetensors", sizes, tensors.__getitem__)
    write_json(
      out / "adapter_config.json",
      {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [PEFT_NAMES[target] for target in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
      },
    )
