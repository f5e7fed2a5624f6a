"""Adapters <-> PEFT directories (adapter_config.json, adapter_model.safetensors)."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steptool_jax.policy import sharding
from steptool_jax.policy.hfconfig import PROJECTIONS
from steptool_jax.policy.lora import LoraConfig, init_lora
from steptool_jax.policy.model import ModelConfig
from steptool_jax.policy.tensorfile import (
  TensorFiles,
  load_json,
  output_directory,
  write_file,
  write_json,
)

PEFT_NAMES = {ours: name.split(".")[-1] for ours, name in PROJECTIONS.items()}
PEFT_NAMES["lm_head"] = "lm_head"
# Variants of LoRA that change the formula or train more than adapters.
REFUSED = {
  "use_rslora": False,
  "use_dora": False,
  "lora_bias": False,
  "fan_in_fan_out": False,
  "bias": "none",
  "rank_pattern": {},
  "alpha_pattern": {},
  "modules_to_save": None,
  "layers_to_transform": None,
}


def _tensors(config: ModelConfig, lora: LoraConfig):
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
  lora: LoraConfig,
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


def load_adapter(
  directory: str | pathlib.Path, config: ModelConfig
) -> tuple[dict[str, Any], LoraConfig]:
  """(adapters float32, LoraConfig) from a PEFT directory; ValueError names what does not fit."""
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise FileNotFoundError(f"{directory}: no such adapter directory")
  path = directory / "adapter_config.json"
  raw = load_json(path)
  if raw.get("peft_type") != "LORA":
    raise ValueError(f"{path}: peft_type {raw.get('peft_type')!r} is not supported; known: LORA")
  for field, valid in REFUSED.items():
    if (raw.get(field) or valid) != valid:
      raise ValueError(f"{path}: {field} = {raw[field]!r} is not implemented (only {valid!r})")
  modules = raw.get("target_modules")
  ours = {theirs: target for target, theirs in PEFT_NAMES.items()}
  if not isinstance(modules, list) or not all(module in ours for module in modules):
    raise ValueError(f"{path}: target_modules {modules!r} must be a list out of {', '.join(ours)}")
  for field in ("r", "lora_alpha"):
    if not isinstance(raw.get(field), int | float):
      raise ValueError(f"{path}: {field}: expected a number, got {raw.get(field)!r}")
  targets = tuple(target for target, theirs in PEFT_NAMES.items() if theirs in modules)
  lora = LoraConfig(int(raw["r"]), float(raw["lora_alpha"]), targets)

  files = TensorFiles(directory, "adapter_model")
  template = jax.eval_shape(lambda key: init_lora(config, lora, key), jax.random.key(0))
  expected = {}
  for name, target, part, layer in _tensors(config, lora):
    shape = (template if layer is None else template["layers"])[target][part].shape
    expected[name] = (target, part, layer, tuple(reversed(shape if layer is None else shape[1:])))
  missing, unknown = sorted(expected.keys() - files.shapes), sorted(files.shapes.keys() - expected)
  if missing or unknown:
    raise ValueError(f"{directory}: missing tensors {missing[:4]}, unknown tensors {unknown[:4]}")
  adapters: dict[str, Any] = {}
  for name, (target, part, layer, shape) in expected.items():
    if files.shapes[name] != shape:
      raise ValueError(
        f"{directory}: {name} has shape {files.shapes[name]}, rank and model expect {shape}"
      )
    tensor = np.asarray(files.read(name), np.float32).T
    home = adapters if layer is None else adapters.setdefault("layers", {})
    parts = home.setdefault(target, {})
    if layer is None:
      parts[part] = jnp.asarray(tensor)
    else:
      parts.setdefault(part, []).append(tensor)
  for parts in adapters.get("layers", {}).values():
    for part, stack in parts.items():
      parts[part] = jnp.asarray(np.stack(stack))
  return adapters, lora
