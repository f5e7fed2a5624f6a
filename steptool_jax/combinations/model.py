"""The model's sizes, its adapters and the mesh."""

import dataclasses

from steptool_jax.config import Config
from steptool_jax.policy import lora


def check(config: Config) -> None:
  a = config.model.architecture
  where = "config.model.architecture"
  if a.num_heads % a.num_kv_heads:
    raise ValueError(
      f"{where}.num_kv_heads: {a.num_kv_heads} does not divide num_heads = {a.num_heads}"
    )
  if a.head_dim % 2:
    raise ValueError(f"{where}.head_dim: {a.head_dim} must be even (rotary pairs)")
  axes = dataclasses.asdict(config.mesh)
  for axis, size in axes.items():
    if not size or (size == -1 and list(axes.values()).count(-1) > 1):
      raise ValueError(
        f"config.mesh.{axis}: {size}; give a number of devices, or -1 (all that are left) for one "
        "axis"
      )
  if config.lora.rank and not config.lora.targets:
    raise ValueError(f"config.lora.targets: empty; choose from {', '.join(lora.TARGETS)}")
