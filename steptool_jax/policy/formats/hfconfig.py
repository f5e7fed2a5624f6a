"""config.json and tensor names of Hugging Face models <-> ModelConfig and parameter paths."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from steptool_jax.files import read_json
from steptool_jax.policy.families import (
  FAMILIES,
  ROPE_TYPES,
  Family,
  ModelConfig,
  RopeScaling,
  check_number,
)

PROJECTIONS = {
  "q": "self_attn.q_proj",
  "k": "self_attn.k_proj",
  "v": "self_attn.v_proj",
  "o": "self_attn.o_proj",
  "gate": "mlp.gate_proj",
  "up": "mlp.up_proj",
  "down": "mlp.down_proj",
}
NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
POST_NORMS = {
  "attn_norm": "input_layernorm",
  "post_attn_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "post_mlp_norm": "post_feedforward_layernorm",
}
HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
EXPERT_PROJECTIONS = ("gate", "up", "down")
# What a config.json can switch on that model.py does not compute.
REFUSED = {
  "mlp_bias": False,
  "use_sliding_window": False,
  "use_bidirectional_attention": False,
  "attn_logit_softcapping": None,
  "quantization_config": None,
  "decoder_sparse_step": 1,
  "mlp_only_layers": [],
}
# Fields that belong to a run and not to a model.
RUN_FIELDS = ("dtype", "param_dtype", "remat", "lora_scale")


@dataclasses.dataclass(frozen=True)
class Name:
  """One Hugging Face tensor and where it lives: params[path], [path][layer] or [layer][expert]."""

  hub: str
  path: tuple[str, ...]
  layer: int | None
  transpose: bool
  expert: int | None = None

  @property
  def stacked(self) -> int:
    """How many leading axes of params[path] are left out in the file."""
    return (self.layer is not None) + (self.expert is not None)


def tensor_names(config: ModelConfig) -> Iterator[Name]:
  """Every tensor of the model but the value head, in file order."""
  yield Name("model.embed_tokens.weight", ("embed", "embedding"), None, False)
  for layer in range(config.num_layers):
    prefix = f"model.layers.{layer}"
    norms = POST_NORMS if config.kind.post_norms else NORMS
    for ours, theirs in (norms | (HEAD_NORMS if config.qk_norm else {})).items():
      yield Name(f"{prefix}.{theirs}.weight", ("layers", ours, "scale"), layer, False)
    if config.kind.experts:
      yield Name(f"{prefix}.mlp.gate.weight", ("layers", "router", "kernel"), layer, True)
      for expert in range(config.num_experts):
        for ours in EXPERT_PROJECTIONS:
          path = ("layers", f"expert_{ours}", "kernel")
          hub = f"{prefix}.mlp.experts.{expert}.{ours}_proj.weight"
          yield Name(hub, path, layer, True, expert)
    for ours, theirs in PROJECTIONS.items():
      if config.kind.experts and ours in EXPERT_PROJECTIONS:
        continue
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
  activation = "hidden_activation" if "hidden_activation" in raw else "hidden_act"
  for field, valid in (*REFUSED.items(), (activation, family.activation)):
    # None is what transformers writes where a switch has no say.
    if raw.get(field, valid) != valid and (raw[field] is not None or field == activation):
      raise ValueError(f"{field}: {raw[field]!r} is not implemented (only {valid!r})")

  def integer(field: str, default: Any = None) -> int:
    value = default if raw.get(field) is None else raw[field]
    if isinstance(value, bool) or not isinstance(value, int):
      raise ValueError(f"{field}: expected an integer, got {value!r}")
    return value

  def switch(field: str, default: bool = False) -> bool:
    value = raw.get(field, default)
    if not isinstance(value, bool):
      raise ValueError(f"{field}: expected true or false, got {value!r}")
    return value

  heads = integer("num_attention_heads")
  hidden = integer("hidden_size")
  if not 0 < heads <= hidden:
    raise ValueError(f"num_attention_heads: must be of 1 to hidden_size = {hidden}, found {heads}")
  bias = switch("attention_bias")
  layers = integer("num_hidden_layers")
  sliding = _sliding_layers(raw, family, layers)
  if family.full_every:
    theta, scaling, local_theta = _two_ropes(raw)
  else:
    (theta, scaling), local_theta = _rope(raw), None
  mixture = {}
  if family.experts:
    # transformers' own name for the number is the second one.
    number = "num_experts" if "num_experts" in raw else "num_local_experts"
    mixture = {
      "num_experts": integer(number),
      "experts_per_token": integer("num_experts_per_tok"),
      "norm_topk": switch("norm_topk_prob"),
    }
  return ModelConfig(
    family=name,
    vocab_size=integer("vocab_size"),
    hidden_size=hidden,
    intermediate_size=integer("moe_intermediate_size" if family.experts else "intermediate_size"),
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=integer("num_key_value_heads", heads),
    head_dim=integer("head_dim", family.head_dim or hidden // heads),
    rope_theta=theta,
    rope_scaling=scaling,
    rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
    qkv_bias=family.qkv_bias or bias,
    output_bias=bias and not family.qkv_bias,
    qk_norm=family.qk_norm,
    tie_embeddings=switch("tie_word_embeddings", family.tied),
    max_position_embeddings=integer("max_position_embeddings", 2048),
    sliding_window=integer("sliding_window") if any(sliding) else None,
    sliding_layers=sliding,
    rope_local_theta=local_theta if any(sliding) else None,
    query_scalar=raw.get("query_pre_attn_scalar", 256) if family.full_every else None,
    final_logit_cap=raw.get("final_logit_softcapping"),
    **mixture,
  )


def _sliding_layers(raw: Mapping[str, Any], family: Family, layers: int) -> tuple[bool, ...]:
  """Which layers see a window only; empty where none does."""
  kinds = raw.get("layer_types")
  known = ["full_attention", *(["sliding_attention"] if family.full_every else [])]
  if kinds is None:
    every = raw.get("sliding_window_pattern")
    if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
      raise ValueError(f"sliding_window_pattern: expected an integer above 0, got {every!r}")
    return family.sliding_layers(layers, every)
  if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
    raise ValueError(f"layer_types: only {' and '.join(map(repr, known))} is implemented")
  if family.full_every and len(kinds) != layers:
    raise ValueError(f"layer_types: {len(kinds)} for num_hidden_layers = {layers}")
  sliding = tuple(kind == "sliding_attention" for kind in kinds)
  return sliding if any(sliding) else ()


def _two_ropes(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None, float]:
  """(base and scaling of the layers that see everything, base of the others), both layouts."""
  nested = raw.get("rope_parameters") or {}
  if not isinstance(nested, dict):
    raise ValueError(f"rope_parameters: expected an object, got {nested!r}")
  far, near = ({**raw, "rope_parameters": None, "rope_scaling": None} for _ in range(2))
  if nested:
    old = {"rope_scaling": raw.get("rope_scaling")}
    far |= {"rope_theta": 1e6, "rope_parameters": nested.get("full_attention"), **old}
    near |= {"rope_theta": 1e4, "rope_parameters": nested.get("sliding_attention")}
  else:
    far |= {"rope_theta": raw.get("rope_theta", 1e6), "rope_scaling": raw.get("rope_scaling")}
    near |= {"rope_theta": raw.get("rope_local_base_freq", 1e4)}
  local, stretched = _rope(near)
  if stretched is not None:
    raise ValueError("rope_parameters.sliding_attention: only rope_type 'default' is implemented")
  return *_rope(far), local


def _rope(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
  """Both layouts: rope_theta with rope_scaling, and transformers 5's rope_parameters.

  ValueError where both are there and differ: transformers would take the first, without its base.
  """
  old, new = raw.get("rope_scaling"), raw.get("rope_parameters")
  if old and new and _kind(old) != _kind(new):
    raise ValueError(
      f"rope_scaling: {old!r} stands beside rope_parameters {new!r}; put what it says into "
      "rope_parameters, and leave it out"
    )
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
  kind, _ = _kind(rope)
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


def _kind(rope: Any) -> Any:
  """(name, factor) of a scaling; what is no object as it is."""
  if not isinstance(rope, dict):
    return rope
  return rope.get("rope_type") or rope.get("type") or "default", rope.get("factor")


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
    "hidden_act": family.activation,
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
  if family.full_every:
    raw |= _raw_windows(config, rope)
  if family.experts:
    raw |= {
      "moe_intermediate_size": config.intermediate_size,
      "num_experts": config.num_experts,
      "num_experts_per_tok": config.experts_per_token,
      "norm_topk_prob": config.norm_topk,
      "decoder_sparse_step": 1,
      "mlp_only_layers": [],
    }
  return {**raw, **{name: value for name, value in token_ids.items() if value is not None}}


def _raw_windows(config: ModelConfig, rope: Mapping[str, Any]) -> dict[str, Any]:
  """What Gemma's config.json has besides."""
  sliding = config.sliding_layers or (False,) * config.num_layers
  local = config.rope_local_theta or config.kind.local_theta
  scalar = config.query_scalar or config.head_dim
  raw: dict[str, Any] = {
    "hidden_activation": config.kind.activation,
    "layer_types": ["sliding_attention" if near else "full_attention" for near in sliding],
    "sliding_window": config.sliding_window,
    "rope_local_base_freq": local,
    "rope_parameters": {
      "full_attention": {**rope, "rope_theta": config.rope_theta},
      "sliding_attention": {"rope_type": "default", "rope_theta": local},
    },
    # transformers refuses a float for an int, and published models have some of each.
    "query_pre_attn_scalar": int(scalar) if float(scalar).is_integer() else scalar,
    "final_logit_softcapping": config.final_logit_cap,
    "attn_logit_softcapping": None,
  }
  return raw


def check_same_model(config: ModelConfig, raw: Mapping[str, Any]) -> None:
  """ValueError naming the first field in which `raw` describes another model than `config`."""
  ours, theirs = dataclasses.asdict(config), dataclasses.asdict(config_from_raw(raw))
  for field, value in ours.items():
    if field not in RUN_FIELDS and value != theirs[field]:
      raise ValueError(f"raw config: {field} is {theirs[field]!r}, the model has {value!r}")
