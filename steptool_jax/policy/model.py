"""The Flax orchestrator: a Llama-like decoder with a value head, as pure functions.

Shapes: B rows, T tokens, N slots, C tokens of a chunk, S cache positions, D hidden, H query heads,
K key-value heads, G = H / K, h head dimension, V vocabulary. Parameters are a plain nested dict;
everything below `layers` is stacked, leading axis = layer.

    embed/embedding [V, D]            final_norm/scale [D]
    lm_head/kernel [D, V] (untied)    value_head/{kernel [D, 1], bias [1]} float32
    layers/{attn_norm, mlp_norm}/scale          layers/{q, k, v, o, gate, up, down}/kernel [in, out]
    layers/{q, k, v}/bias (qkv_bias), o/bias    layers/{q_norm, k_norm}/scale (qk_norm)
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from steptool_jax.policy import caches, headcache
from steptool_jax.policy.attention import ATTENTION, Positions, attend, cache_blocks
from steptool_jax.policy.caches import Cache
from steptool_jax.policy.embedding import look_up
from steptool_jax.policy.families import FAMILIES
from steptool_jax.policy.headcache import HeadCache
from steptool_jax.policy.sharding import (
  constrain_features,
  constrain_heads,
  constrain_rows,
  path_string,
)

ROPE_TYPES = ("llama3", "linear")
DTYPES = ("float32", "bfloat16")
REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
}


# Bounds of the sizes: some times those of the largest published models. What lies beyond is a
# broken file, whose tensors would take hours to list.
BOUNDS = {
  "vocab_size": (1, 2**24),
  "hidden_size": (1, 2**18),
  "intermediate_size": (1, 2**20),
  "num_layers": (1, 2048),
  "num_heads": (1, 4096),
  "num_kv_heads": (1, 4096),
  "head_dim": (2, 4096),
  "max_position_embeddings": (1, 2**30),
}


def check_number(name: str, value: Any, above: float, most: float) -> None:
  """ValueError unless `value` is a number (no bool, no NaN) in (above, most]."""
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if not (number and above < value <= most):
    raise ValueError(f"{name}: must be a number above {above:g}, at most {most:g}, found {value!r}")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched; the last three fields belong to `llama3` only."""

  type: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192

  def __post_init__(self):
    if self.type not in ROPE_TYPES:
      raise ValueError(f"rope_scaling.type: {self.type!r} is not one of {', '.join(ROPE_TYPES)}")
    check_number("rope_scaling.factor", self.factor, 0, 1e6)
    check_number("rope_scaling.low_freq_factor", self.low_freq_factor, 0, 1e6)
    # Between the two the scalings are blended: they must differ.
    low = self.low_freq_factor
    check_number("rope_scaling.high_freq_factor", self.high_freq_factor, low, 1e6)
    places = self.original_max_position_embeddings
    check_number("rope_scaling.original_max_position_embeddings", places, 0, 2**30)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Hashable, so that it can be a static argument of jit."""

  family: str
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  rms_norm_eps: float = 1e-6
  qkv_bias: bool = False
  output_bias: bool = False  # Llama's attention_bias puts one on o_proj too
  qk_norm: bool = False
  tie_embeddings: bool = False
  max_position_embeddings: int = 4096
  dtype: str = "float32"  # compute
  param_dtype: str = "float32"  # storage; the value head is always float32
  remat: str = "none"
  lora_scale: float | None = None  # alpha / rank; set by lora.with_lora

  def __post_init__(self):
    for field, valid in (
      ("family", tuple(FAMILIES)),
      ("dtype", DTYPES),
      ("param_dtype", DTYPES),
      ("remat", tuple(REMAT)),
    ):
      if getattr(self, field) not in valid:
        raise ValueError(f"{field}: {getattr(self, field)!r} is not one of {', '.join(valid)}")
    for field, (least, most) in BOUNDS.items():
      value = getattr(self, field)
      if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{field}: must be an integer of {least} to {most}, found {value!r}")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_kv_heads: {self.num_kv_heads} does not divide num_heads = {self.num_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim: {self.head_dim} must be even (rotary pairs)")
    check_number("rope_theta", self.rope_theta, 0, 1e12)
    check_number("rms_norm_eps", self.rms_norm_eps, 0, 0.1)


def init_cache(config: ModelConfig, slots: int, size: int) -> Cache:
  """An empty cache of `size` positions (or a few more) for each of `slots` conversations."""
  heads, width = config.num_kv_heads, config.head_dim
  return caches.init(config.num_layers, slots, heads, size, width, config.dtype)


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
  """float32[h / 2], radians a position; as transformers computes them, scaling included."""
  half = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
  freq = (1.0 / np.float32(config.rope_theta) ** half).astype(np.float32)
  scaling = config.rope_scaling
  if scaling is None:
    return freq
  if scaling.type == "linear":
    return freq / np.float32(scaling.factor)
  wavelen = 2 * math.pi / freq
  low = scaling.original_max_position_embeddings / scaling.low_freq_factor
  high = scaling.original_max_position_embeddings / scaling.high_freq_factor
  smooth = (scaling.original_max_position_embeddings / wavelen - scaling.low_freq_factor) / (
    scaling.high_freq_factor - scaling.low_freq_factor
  )
  blended = (1 - smooth) * freq / scaling.factor + smooth * freq
  out = np.where(wavelen > low, freq / scaling.factor, np.where(wavelen < high, freq, blended))
  return out.astype(np.float32)


def _rope_tables(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """cos, sin float32[B, T, 1, h / 2]: once for all layers."""
  angles = positions_BT[..., None, None].astype(jnp.float32) * inverse_frequencies(config)
  return jnp.cos(angles), jnp.sin(angles)


def _rotate(x_BTHh: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  cos, sin = rope
  first, second = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
  out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return out.astype(x_BTHh.dtype)


def _cheap(function, *static):
  """Computed again in the backward pass: keeping the intermediates costs more than they do."""
  return jax.checkpoint(functools.partial(function, *static), prevent_cse=False)


def _rms_norm(eps: float, x: jax.Array, scale: jax.Array) -> jax.Array:
  y = x.astype(jnp.float32)
  y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
  return y * scale.astype(jnp.float32)


def _silu_gate(gate: jax.Array, up: jax.Array) -> jax.Array:
  return jax.nn.silu(gate) * up


@jax.custom_vjp
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) * up, computed again in the backward pass.

  Its gradients are written to memory: a TPU would compute them anew for every tile of both products
  that read them.
  """
  return _silu_gate(gate, up)


def _gated_forward(gate, up):
  return _silu_gate(gate, up), (gate, up)


def _gated_backward(kept, d_out):
  _, pull_back = jax.vjp(_silu_gate, *kept)
  return lax.optimization_barrier(pull_back(d_out))


_gated.defvjp(_gated_forward, _gated_backward)


class _Norm(nn.Module):
  """RMSNorm in float32, back in the compute dtype."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.config.param_dtype)
    return _cheap(_rms_norm, self.config.rms_norm_eps)(x, scale).astype(self.config.dtype)


def _adapt(config: ModelConfig, a: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
  if config.lora_scale is None:
    raise ValueError(
      "lora_scale: None, but the variables hold adapters; use lora.with_lora(config, lora)"
    )
  return config.lora_scale * ((x @ a.astype(config.dtype)) @ b.astype(config.dtype))


class _Embed(nn.Module):
  config: ModelConfig

  @nn.compact
  def __call__(self, tokens):
    config = self.config
    shape = (config.vocab_size, config.hidden_size)
    init = nn.initializers.normal(config.hidden_size**-0.5)
    table = self.param("embedding", init, shape, config.param_dtype)
    return look_up(table, tokens, config.dtype)


class _Linear(nn.Module):
  """y = x W + b, plus scale (x A) B where the `lora` collection has adapters for this module."""

  config: ModelConfig
  features: int
  use_bias: bool = False
  init_scale: float = 1.0

  @nn.compact
  def __call__(self, x):
    config = self.config
    init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "normal")
    shape = (x.shape[-1], self.features)
    # Two-dimensional products: XLA on CPU runs their backward passes half as fast again.
    lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
    kernel = self.param("kernel", init, shape, config.param_dtype).astype(config.dtype)
    y = x @ kernel
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,), config.param_dtype)
      y = y + bias.astype(config.dtype)
    if self.has_variable("lora", "a"):
      a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
      y = y + _adapt(config, a, b, x)
    return y.reshape(*lead, self.features)


class _Block(nn.Module):
  """One layer. carry = (x, layer index, cache or None); the rest is the same for all layers."""

  config: ModelConfig

  @nn.compact
  def __call__(self, carry, rope, segments, cached):
    config = self.config
    x, layer, cache = carry
    rows, length = x.shape[:2]
    residual_scale = 1.0 / (2 * config.num_layers)
    linear = functools.partial(_Linear, config)
    alone = _one_token(x, cache)
    spread = functools.partial(constrain_features, axis="tensor") if alone else lambda x: x

    y = _Norm(config, name="attn_norm")(x)
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    q = linear(q_size, config.qkv_bias, name="q")(y).reshape(rows, length, -1, config.head_dim)
    k = linear(kv_size, config.qkv_bias, name="k")(y).reshape(rows, length, -1, config.head_dim)
    v = linear(kv_size, config.qkv_bias, name="v")(y).reshape(rows, length, -1, config.head_dim)
    if config.qk_norm:
      q = _Norm(config, name="q_norm")(q)
      k = _Norm(config, name="k_norm")(k)
    q, k = _rotate(q, rope), _rotate(k, rope)
    if alone:
      q, k, v = map(constrain_heads, (q, k, v))
    if cache is None:
      out = attend(q, k, v, *segments)
    else:
      out, cache = cached.step(q, k, v, layer, cache)
    out = spread(out.reshape(rows, length, q_size))
    x = x + linear(config.hidden_size, config.output_bias, residual_scale, name="o")(out)

    y = _Norm(config, name="mlp_norm")(x)
    gate = linear(config.intermediate_size, name="gate")(y)
    up = linear(config.intermediate_size, name="up")(y)
    down = linear(config.hidden_size, init_scale=residual_scale, name="down")
    x = _hidden(x + down(spread(_gated(gate, up))), cache)
    return (x, layer + 1, cache), None


def _one_token(x: jax.Array, cache: Cache | None) -> bool:
  """Whether x [B, T, D] is one token a slot: then the weights stay where they are."""
  return cache is not None and x.shape[1] == 1


def _hidden(x: jax.Array, cache: Cache | None) -> jax.Array:
  """Hidden states [B, T, D] laid out for training, for a prompt, or for one token a slot."""
  if _one_token(x, cache):
    return constrain_features(x, "fsdp")
  return constrain_rows(x, sequence=cache is None)


class _Policy(nn.Module):
  config: ModelConfig

  def setup(self):
    config = self.config
    block = _Block
    if REMAT[config.remat] is not None:
      block = nn.remat(_Block, policy=REMAT[config.remat], prevent_cse=False)
    self.embed = _Embed(config)
    # The cache travels in the carry: as scanned input and output it would be copied every token.
    self.layers = nn.scan(
      block,
      variable_axes={"params": 0, "lora": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=config.num_layers,
      check_constancy_invariants=False,  # would trace every layer twice
    )(config)
    self.final_norm = _Norm(config)
    if not config.tie_embeddings:
      self.lm_head = _Linear(config, config.vocab_size)
    self.value_head = nn.Dense(
      1, dtype="float32", param_dtype="float32", kernel_init=nn.initializers.zeros
    )

  def trunk(self, tokens, positions, segments, cached, cache):
    x = _hidden(self.embed(tokens), cache)
    carry = (x, jnp.int32(0), cache)
    (x, _, cache), _ = self.layers(carry, _rope_tables(self.config, positions), segments, cached)
    return self.final_norm(x), cache

  def everything(self, tokens):
    """Touches every parameter; for init only."""
    hidden, _ = self.trunk(tokens, tokens, (tokens,), None, None)
    if not self.config.tie_embeddings:
      self.lm_head(hidden)
    return self.value_head(hidden)


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
  """Random parameters in `param_dtype`; the value head is float32 and zero."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  init = jax.jit(functools.partial(_Policy(config).init, method=_Policy.everything))
  return init(key, tokens)["params"]


def abstract_params(config: ModelConfig) -> dict[str, Any]:
  """The parameter tree as jax.ShapeDtypeStruct: shapes and dtypes without memory."""
  return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def in_compute_dtype(config: ModelConfig, variables: Any) -> Any:
  """Matrices in the compute dtype, which they are only ever read in: no log-prob changes by it."""

  def cast(path, x):
    name = path_string(path)
    matrix = name.endswith(("/kernel", "/embedding"))
    float32 = "value_head/" in name or "critic/" in name
    return x.astype(config.dtype) if matrix and not float32 else x

  return jax.tree_util.tree_map_with_path(cast, variables)


def forward(
  config: ModelConfig,
  variables: dict[str, Any],
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  segment_ids_BT: jax.Array,
  until_BT: jax.Array | None = None,
) -> jax.Array:
  """Hidden states [B, T, D] after the final norm, in the compute dtype.

  A token sees what stands before it in its own segment, or with `until_BT` on its path through a
  tree (attention.attend). Nothing else sees padding (segment 0), and it stays finite.
  """
  hidden, _ = _Policy(config).apply(
    variables,
    tokens_BT,
    positions_BT,
    (segment_ids_BT, until_BT),
    None,
    None,
    method=_Policy.trunk,
  )
  return hidden


def forward_cached(
  config: ModelConfig,
  variables: dict[str, Any],
  tokens_NC: jax.Array,
  positions_NC: jax.Array,
  valid_NC: jax.Array,
  cache: Cache,
) -> tuple[jax.Array, Cache]:
  """Feeds C tokens to each of N slots: hidden [N, C, D] (compute dtype) and the new cache.

  Keys and values of valid tokens are written at their position of their slot; invalid tokens (and
  positions outside the cache) write nothing, and their hidden states mean nothing but are finite. A
  token at position p sees the positions 0..p of its slot. C = 1 where the kernels' cache is used,
  which takes more tokens as tiles.
  """
  size = cache.k.shape[caches.positions_axis(cache)]
  inside = valid_NC & (positions_NC >= 0) & (positions_NC < size)
  writes = jnp.where(inside, positions_NC, size)
  reads = jnp.where(inside, positions_NC, 0)
  if isinstance(cache, HeadCache):
    plan = headcache.one_token(reads[:, 0], inside[:, 0], cache)
  else:
    plan = Positions(reads, writes, cache_blocks(reads, size))
  return _feed(config, variables, tokens_NC, reads, plan, cache)


def forward_tiles(
  config: ModelConfig,
  variables: dict[str, Any],
  tokens_RT: jax.Array,
  plan: headcache.Tiles,
  cache: HeadCache,
) -> HeadCache:
  """The cache after an append's tiles, as `plan` places them."""
  positions_RT = plan.base[:, None] + jnp.arange(tokens_RT.shape[1])
  _, cache = _feed(config, variables, tokens_RT, positions_RT, plan, cache)
  return cache


def _feed(config, variables, tokens, positions, plan, cache):
  return _Policy(config).apply(
    variables, tokens, positions, None, plan, cache, method=_Policy.trunk
  )


def project_logits(config: ModelConfig, variables: dict[str, Any], hidden: jax.Array) -> jax.Array:
  """float32[..., V] from hidden [..., D]: compute-dtype factors, float32 accumulation."""
  params = variables["params"]
  if config.tie_embeddings:
    kernel, subscripts = params["embed"]["embedding"], "...d,vd->...v"
  else:
    kernel, subscripts = params["lm_head"]["kernel"], "...d,dv->...v"
  hidden = hidden.astype(config.dtype)
  kernel = kernel.astype(config.dtype)
  logits = jnp.einsum(subscripts, hidden, kernel, preferred_element_type=jnp.float32)
  adapter = variables.get("lora", {}).get("lm_head")
  return logits if adapter is None else logits + _adapt(config, adapter["a"], adapter["b"], hidden)


def project_values(variables: dict[str, Any], hidden: jax.Array) -> jax.Array:
  """float32[...] from hidden [..., D]."""
  head = variables["params"]["value_head"]
  return (hidden.astype(jnp.float32) @ head["kernel"])[..., 0] + head["bias"][0]


def useful_flops(config: ModelConfig, context: float = 0.0) -> float:
  """Matmul FLOPs of a forward pass for one token, LM head included; backward costs twice as much.

  `context`: mean number of tokens a token sees (T / 2 in an unpacked causal row); 0 leaves the
  attention products out.
  """
  q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  layer = config.hidden_size * (2 * q_size + 2 * kv_size + 3 * config.intermediate_size)
  weights = config.num_layers * layer + config.hidden_size * config.vocab_size
  return 2.0 * weights + 4.0 * config.num_layers * q_size * context
