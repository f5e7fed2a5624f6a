"""config.json and tensor names of Hugging Face models <-> ModelConfig and parameter paths."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from steptool_jax.files import read_json
from steptool_jax.policy.families import FAMILIES
from steptool_jax.policy.model import ROPE_TYPES, ModelConfig, RopeScaling, check_number

PROJECTIONS = {
  "q": "self_attn.q_proj",
  "k": "self_attn.k_proj",
  "v": "self_attn.v_proj",
  "o": "self_attn.o_proj",
  "gate": "mlp.gate_proj",
  "up": "mlp.up_proj",
  "down": "mlp.down_proj",
}
NORMS = {
  "attn_norm": "input_layernorm",
  "mlp_norm": "post_attention_layernorm",
  "q_norm": "self_attn.q_norm",
  "k_norm": "self_attn.k_norm",
}
# What a config.json can switch on that model.py does not compute.
REFUSED = {
  "mlp_bias": False,
  "use_sliding_window": False,
  "quantization_config": None,
  "hidden_act": "silu",
}
# Fields that belong to a run and not to a model.
RUN_FIELDS = ("dtype", "param_dtype", "remat", "lora_scale")


@dataclasses.dataclass(frozen=True)
class Name:
  """One Hugging Face tensor and where it lives: params[path] (or [path][layer])."""

  hub: str
  path: tuple[str, ...]
  layer: int | None
  transpose: bool


def tensor_names(config: ModelConfig) -> Iterator[Name]:
  """Every tensor of the model but the value head, in file order."""
  yield Name("model.embed_tokens.weight", ("embed", "embedding"), None, False)
  for layer in range(config.num_layers):
    prefix = f"model.layers.{layer}"
    for ours, theirs in NORMS.items():
      if config.qk_norm or ours not in ("q_norm", "k_norm"):
        yield Name(f"{prefix}.{theirs}.weight", ("layers", ours, "scale"), layer, False)
    for ours, theirs in PROJECTIONS.items():
      yield Name(f"{prefix}.{theirs}.weight", ("layers", ours, "kernel"), layer, True)
      if (ours in ("q", "k", "v") and config.qkv_bias) or (ours == "o" and config.output_bias):
        yield Name(f"{prefix}.{theirs}.bias", ("layers", ours, "bias"), layer, False)
  yield Name("model.norm.weight", ("final_norm", "scale"), None, False)
  if not config.tie_embeddings:
    yield Name("lm_head.weight", ("lm_head", "kernel"), None, True)


def load_config(directory: str | pathlib.Path, **run_fields: Any) -> tuple[ModelConfig, dict]:
  """(ModelConfig, raw config.json) of a model directory.

  `run_fields` (dtype, param_dtype, remat) are the run's choice and override the defaults.
  """
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise FileNotFoundError(f"{directory}: no such model directory")
  path = directory / "config.json"
  if not path.is_file():
    raise FileNotFoundError(f"{path}: not a Hugging Face model directory (no config.json)")
  raw = read_json(path)
  try:
    return dataclasses.replace(config_from_raw(raw), **run_fields), raw
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None


def config_from_raw(raw: Mapping[str, Any]) -> ModelConfig:
  """ValueError names the field that is missing, unknown or not implemented."""
  name = raw.get("model_type")
  if name not in list(FAMILIES):
    raise ValueError(f"model_type: {name!r} is not supported; known: {', '.join(FAMILIES)}")
  family = FAMILIES[name]
  for field, valid in REFUSED.items():
    if raw.get(field, valid) != valid:
      raise ValueError(f"{field}: {raw[field]!r} is not implemented (only {valid!r})")
  kinds = raw.get("layer_types") or []
  if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
    raise ValueError("layer_types: only 'full_attention' is implemented")

  def integer(field: str, default: Any = None) -> int:
    value = default if raw.get(field) is None else raw[field]
    if isinstance(value, bool) or not isinstance(value, int):
      raise ValueError(f"{field}: expected an integer, got {value!r}")
    return value

  def switch(field: str) -> bool:
    value = raw.get(field, False)
    if not isinstance(value, bool):
      raise ValueError(f"{field}: expected true or false, got {value!r}")
    return value

  heads = integer("num_attention_heads")
  hidden = integer("hidden_size")
  if not 0 < heads <= hidden:
    raise ValueError(f"num_attention_heads: must be of 1 to hidden_size = {hidden}, found {heads}")
  bias = switch("attention_bias")
  theta, scaling = _rope(raw)
  return ModelConfig(
    family=name,
    vocab_size=integer("vocab_size"),
    hidden_size=hidden,
    intermediate_size=integer("intermediate_size"),
    num_layers=integer("num_hidden_layers"),
    num_heads=heads,
    num_kv_heads=integer("num_key_value_heads", heads),
    head_dim=integer("head_dim", family.head_dim or hidden // heads),
    rope_theta=theta,
    rope_scaling=scaling,
    rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
    qkv_bias=family.qkv_bias or bias,
    output_bias=bias and not family.qkv_bias,
    qk_norm=family.qk_norm,
    tie_embeddings=switch("tie_word_embeddings"),
    max_position_embeddings=integer("max_position_embeddings", 2048),
  )


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
  """Both layouts: rope_theta with rope_scaling, and transformers 5's rope_parameters."""
  field = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
  rope = raw.get(field) or {}
  if not isinstance(rope, dict):
    raise ValueError(f"{field}: expected an object, got {rope!r}")
  named = (rope.get("rope_theta"), raw.get("rope_theta"), 10000.0)
  theta = next(value for value in named if value is not None)
  check_number("rope_theta", theta, 0, 1e12)
  part = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
  if part not in (None, 1.0):
    raise ValueError(f"partial_rotary_factor: {part!r} is not implemented (only 1.0)")
  kind = rope.get("rope_type") or rope.get("type") or "default"
  if kind == "default":
    return float(theta), None
  if kind not in ROPE_TYPES:
    raise ValueError(
      f"{field}.rope_type: {kind!r} is not supported; known: default, {', '.join(ROPE_TYPES)}"
    )
  fields = ["factor"]
  if kind == "llama3":
    fields += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
  for name in fields:
    check_number(f"{field}.{name}", rope.get(name), 0, 2**30)
  return float(theta), RopeScaling(kind, **{name: rope[name] for name in fields})


def raw_config_of(config: ModelConfig, **token_ids: Any) -> dict[str, Any]:
  """A config.json for a model that did not come from one.

  `token_ids`: bos_token_id, eos_token_id (int or list), pad_token_id.
  """
  family = FAMILIES[config.family]
  if config.qkv_bias != (family.qkv_bias or config.output_bias) or (
    family.qkv_bias and config.output_bias
  ):
    raise ValueError(f"qkv_bias / output_bias: {config.family} has no such combination to export")
  if config.qk_norm != family.qk_norm:
    raise ValueError(f"qk_norm: {config.qk_norm} cannot be exported as {config.family}")
  rope: dict[str, Any] = {"rope_type": "default"}
  if config.rope_scaling is not None:
    rope = dataclasses.asdict(config.rope_scaling)
    rope["rope_type"] = rope.pop("type")
    if rope["rope_type"] == "linear":
      rope = {"rope_type": "linear", "factor": rope["factor"]}
  raw: dict[str, Any] = {
    "architectures": [family.architecture],
    "model_type": config.family,
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": "silu",
    "max_position_embeddings": config.max_position_embeddings,
    "rms_norm_eps": config.rms_norm_eps,
    # Old readers look for rope_theta and rope_scaling, new ones for rope_parameters.
    "rope_theta": config.rope_theta,
    "rope_parameters": {**rope, "rope_theta": config.rope_theta},
    "rope_scaling": None if config.rope_scaling is None else rope,
    "tie_word_embeddings": config.tie_embeddings,
    "attention_dropout": 0.0,
  }
  if not family.qkv_bias:
    raw["attention_bias"] = config.qkv_bias
  return {**raw, **{name: value for name, value in token_ids.items() if value is not None}}


def check_same_model(config: ModelConfig, raw: Mapping[str, Any]) -> None:
  """ValueError naming the first field in which `raw` describes another model than `config`."""
  ours, theirs = dataclasses.asdict(config), dataclasses.asdict(config_from_raw(raw))
  for field, value in ours.items():
    if field not in RUN_FIELDS and value != theirs[field]:
      raise ValueError(f"raw config: {field} is {theirs[field]!r}, the model has {value!r}")
