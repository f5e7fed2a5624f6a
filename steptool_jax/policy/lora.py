"""Low-rank adapters as a second pytree, next to the parameters.

y = x W + (alpha / rank) (x A) B with A [in, rank] random and B [rank, out] zero: a fresh adapter
changes nothing, and the policy without adapters is the reference policy. Hu et al., 2021.

    {layers: {q: {a [L, in, r], b [L, r, out]}, …}, lm_head: {a, b}}     float32
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from steptool_jax.config import Lora
from steptool_jax.policy.model import ModelConfig, abstract_params

TARGETS = ("q", "k", "v", "o", "gate", "up", "down", "lm_head")


def scale(lora: Lora) -> float:
  """What a product with an adapter is multiplied by."""
  return lora.alpha / lora.rank


def with_lora(config: ModelConfig, lora: Lora) -> ModelConfig:
  """The model configuration that applies adapters of `lora`; ValueError where it has no place."""
  wide = [target for target in lora.targets if target in ("gate", "up", "down")]
  if config.kind.experts and wide:
    raise ValueError(
      f"lora.targets: {', '.join(wide)} are experts in {config.family}, which take no adapters; "
      "use q, k, v, o"
    )
  return dataclasses.replace(config, lora_scale=scale(lora))


def init_lora(config: ModelConfig, lora: Lora, key: jax.Array) -> dict[str, Any]:
  """Adapters float32: A uniform in ±1 / sqrt(in) (PEFT's default), B zero."""
  if "lm_head" in lora.targets and config.tie_embeddings:
    raise ValueError("lora.targets: 'lm_head' needs untied embeddings; leave it out")
  params = abstract_params(config)
  adapters: dict[str, Any] = {"layers": {}}
  for target, target_key in zip(
    lora.targets, jax.random.split(key, len(lora.targets)), strict=True
  ):
    home, tree = (
      (params, adapters) if target == "lm_head" else (params["layers"], adapters["layers"])
    )
    *stack, inputs, outputs = home[target]["kernel"].shape
    bound = 1.0 / math.sqrt(inputs)
    shape = (*stack, inputs, lora.rank)
    tree[target] = {
      "a": jax.random.uniform(target_key, shape, jnp.float32, -bound, bound),
      "b": jnp.zeros((*stack, lora.rank, outputs), jnp.float32),
    }
  return {name: tree for name, tree in adapters.items() if tree}


def merge_lora(params: dict[str, Any], adapters: dict[str, Any], lora: Lora) -> dict[str, Any]:
  """Parameters with the adapters added to their kernels (sum in float32, dtype kept)."""

  def merge(module, adapter):
    return {**module, "kernel": _merge(module["kernel"], adapter, scale(lora))}

  out = dict(params)
  out["layers"] = dict(params["layers"])
  for target, adapter in adapters.get("layers", {}).items():
    out["layers"][target] = merge(params["layers"][target], adapter)
  if "lm_head" in adapters:
    out["lm_head"] = merge(params["lm_head"], adapters["lm_head"])
  return out


@jax.jit
def _merge(kernel: jax.Array, adapter: dict[str, jax.Array], scale: float) -> jax.Array:
  if kernel.ndim == 2:
    return add_delta(kernel, adapter, scale)
  # Layer by layer: the float32 sums of a whole stack are several times its size.
  return jax.lax.map(lambda layer: add_delta(*layer, scale), (kernel, adapter))


def add_delta(kernel: jax.Array, adapter: dict[str, jax.Array], scale: float) -> jax.Array:
  """One kernel [in, out] + scale A B, summed in float32, in the kernel's dtype."""
  delta = scale * jnp.matmul(
    adapter["a"].astype(jnp.float32), adapter["b"].astype(jnp.float32), precision="highest"
  )
  return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)


def adapters_off(variables: dict[str, Any]) -> dict[str, Any]:
  """The reference policy of a LoRA run: the same parameters without adapters."""
  return {"params": variables["params"]}


def split_variables(
  variables: dict[str, Any], train_values: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
  """(trainable, frozen). Full fine-tuning trains all; LoRA trains adapters and the value head.

  train_values: False freezes the value head, for algorithms that do not read it.
  """
  params = dict(variables["params"])
  value_head = {"value_head": params.pop("value_head")}
  if "lora" in variables:
    trainable, frozen = {"lora": variables["lora"]}, {"params": params}
  else:
    trainable, frozen = {"params": params}, {}
  return (trainable | value_head, frozen) if train_values else (trainable, frozen | value_head)


def join_variables(trainable: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
  """The inverse of split_variables; what else is trained (a critic) is no part of the policy."""
  parts = frozen | trainable
  params = parts["params"]
  if "value_head" in parts:
    params = params | {"value_head": parts["value_head"]}
  return {"params": params, "lora": parts["lora"]} if "lora" in parts else {"params": params}
