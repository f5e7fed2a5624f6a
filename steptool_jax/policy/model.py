"""The Flax orchestrator: a Llama-like decoder with a value head, as pure functions.

Shapes: B rows, T tokens, N slots, C tokens of a chunk, S cache positions, D hidden, H query heads,
K key-value heads, G = H / K, h head dimension, V vocabulary. Parameters are a plain nested dict;
everything below `layers` is stacked, leading axis = layer.

    embed/embedding [V, D]            final_norm/scale [D]
    lm_head/kernel [D, V] (untied)    value_head/{kernel [D, 1], bias [1]} float32
    layers/{attn_norm, mlp_norm}/scale          layers/{q, k, v, o, gate, up, down}/kernel [in, out]
    layers/{q, k, v}/bias (qkv_bias), o/bias    layers/{q_norm, k_norm}/scale (qk_norm)
    layers/{post_attn_norm, post_mlp_norm}/scale (post_norms)
    layers/router/kernel [D, E] float32         layers/expert_{gate, up, down}/kernel [E, in, out]
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from steptool_jax.policy import attention, caches, experts, headcache
from steptool_jax.policy.attention import (
  ATTENTION,
  Positions,
  Tree,
  Window,
  attend,
  cache_blocks,
)
from steptool_jax.policy.caches import Cache
from steptool_jax.policy.embedding import look_up
from steptool_jax.policy.families import REMATS, ModelConfig, inverse_frequencies
from steptool_jax.policy.headcache import HeadCache
from steptool_jax.policy.sharding import (
  constrain_features,
  constrain_heads,
  constrain_rows,
  path_string,
)

REMAT = dict(
  zip(
    REMATS,
    (
      None,
      jax.checkpoint_policies.nothing_saveable,
      jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
      jax.checkpoint_policies.save_only_these_names(ATTENTION),
    ),
    strict=True,
  )
)


def tiled(config: ModelConfig) -> bool:
  """Whether its live cache is the kernels' (headcache), which see everything: no windows."""
  return headcache.suits(config.head_dim) and not config.sliding_layers


def init_cache(config: ModelConfig, slots: int, size: int, dtype: str = "auto") -> Cache:
  """An empty cache of `size` positions (or a few more) for each of `slots` conversations.

  dtype: "auto" = the compute dtype, or "int8".
  """
  init = headcache.init if tiled(config) else attention.init_cache
  heads, width = config.num_kv_heads, config.head_dim
  dtype = config.dtype if dtype == "auto" else dtype
  return init(config.num_layers, slots, heads, size, width, dtype)


def _rope_tables(config: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, ...]:
  """cos, sin float32[B, T, 1, h / 2]: once for all layers; then those of layers with a window."""
  tables = []
  for local in (False, True)[: 1 + bool(config.sliding_layers)]:
    frequencies = inverse_frequencies(config, local)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    tables += [jnp.cos(angles), jnp.sin(angles)]
  return tuple(tables)


def _rotate(x_BTHh: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  cos, sin = rope
  first, second = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
  out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return out.astype(x_BTHh.dtype)


def _cheap(function, *static):
  """Computed again in the backward pass: keeping the intermediates costs more than they do."""
  return jax.checkpoint(functools.partial(function, *static), prevent_cse=False)


def _rms_norm(eps: float, offset: bool, x: jax.Array, scale: jax.Array) -> jax.Array:
  y = x.astype(jnp.float32)
  y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
  scale = scale.astype(jnp.float32)
  return y * (1.0 + scale if offset else scale)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": jax.nn.gelu}


def _gate(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
  return ACTIVATIONS[activation](gate) * up


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
  """activation(gate) * up, computed again in the backward pass.

  Its gradients are written to memory: a TPU would compute them anew for every tile of both products
  that read them.
  """
  return _gate(activation, gate, up)


def _gated_forward(activation, gate, up):
  return _gate(activation, gate, up), (gate, up)


def _gated_backward(activation, kept, d_out):
  _, pull_back = jax.vjp(functools.partial(_gate, activation), *kept)
  return lax.optimization_barrier(pull_back(d_out))


_gated.defvjp(_gated_forward, _gated_backward)


class _Norm(nn.Module):
  """RMSNorm in float32, back in the compute dtype."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x):
    config, offset = self.config, self.config.kind.norm_offset
    init = nn.initializers.zeros if offset else nn.initializers.ones
    scale = self.param("scale", init, (x.shape[-1],), config.param_dtype)
    return _cheap(_rms_norm, config.rms_norm_eps, offset)(x, scale).astype(config.dtype)


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
    x = look_up(table, tokens, config.dtype)
    if config.kind.scaled_embeddings:
      x = x * jnp.asarray(math.sqrt(config.hidden_size), config.dtype)
    return x


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


class _Stack(nn.Module):
  """The kernels of a layer's experts [E, in, out], in the compute dtype."""

  config: ModelConfig
  shape: tuple[int, ...]
  init_scale: float = 1.0

  @nn.compact
  def __call__(self):
    init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "normal", batch_axis=(0,))
    kernel = self.param("kernel", init, self.shape, self.config.param_dtype)
    return kernel.astype(self.config.dtype)


class _Router(nn.Module):
  """(weights, experts) of each token; float32 whatever the model is stored in."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x):
    config = self.config
    init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    shape = (config.hidden_size, config.num_experts)
    kernel = self.param("kernel", init, shape, jnp.float32)
    return experts.choose(x, kernel, config.experts_per_token, config.norm_topk)


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

    rope, window = self._reach(rope, layer)

    y = _Norm(config, name="attn_norm")(x)
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    q = linear(q_size, config.qkv_bias, name="q")(y).reshape(rows, length, -1, config.head_dim)
    k = linear(kv_size, config.qkv_bias, name="k")(y).reshape(rows, length, -1, config.head_dim)
    v = linear(kv_size, config.qkv_bias, name="v")(y).reshape(rows, length, -1, config.head_dim)
    if config.qk_norm:
      q = _Norm(config, name="q_norm")(q)
      k = _Norm(config, name="k_norm")(k)
    q, k = _rotate(q, rope), _rotate(k, rope)
    if config.query_scalar is not None and config.query_scalar != config.head_dim:
      q = q * math.sqrt(config.head_dim / config.query_scalar)  # attend divides by sqrt(head_dim)
    if alone:
      q, k, v = map(constrain_heads, (q, k, v))
    if cache is None:
      out = attend(q, k, v, *segments, window)
    else:
      out, cache = cached.step(q, k, v, layer, cache, window)
    out = spread(out.reshape(rows, length, q_size))
    out = linear(config.hidden_size, config.output_bias, residual_scale, name="o")(out)
    if config.kind.post_norms:
      out = _Norm(config, name="post_attn_norm")(out)
    x = x + out

    y = _Norm(config, name="mlp_norm")(x)
    gated = functools.partial(_gated, config.kind.activation)
    if config.kind.experts:
      out = self._mixture(y, gated, residual_scale)
    else:
      gate = linear(config.intermediate_size, name="gate")(y)
      up = linear(config.intermediate_size, name="up")(y)
      down = linear(config.hidden_size, init_scale=residual_scale, name="down")
      out = down(spread(gated(gate, up)))
    if config.kind.post_norms:
      out = _Norm(config, name="post_mlp_norm")(out)
    return (_hidden(x + out, cache), layer + 1, cache), None

  def _reach(self, rope, layer):
    """(cos and sin of this layer, its window or None)."""
    config = self.config
    if not config.sliding_layers:
      return rope, None
    here = jnp.asarray(config.sliding_layers)[layer]
    rope = jax.tree.map(lambda far, near: jnp.where(here, near, far), rope[:2], rope[2:])
    return rope, Window(config.sliding_window, here)

  def _mixture(self, y, gated, residual_scale):
    config = self.config
    weights, chosen = _Router(config, name="router")(y)
    wide = (config.num_experts, config.hidden_size, config.intermediate_size)
    kernels = experts.Kernels(
      _Stack(config, wide, name="expert_gate")(),
      _Stack(config, wide, name="expert_up")(),
      _Stack(config, (wide[0], *wide[:0:-1]), residual_scale, name="expert_down")(),
    )
    return experts.mix(y, weights, chosen, kernels, gated)


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
    hidden, _ = self.trunk(tokens, tokens, (tokens, None), None, None)
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
    float32 = any(part in name for part in ("value_head/", "critic/", "router/"))
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
  tree (attention.Tree). Nothing else sees padding (segment 0), and it stays finite.
  """
  tree = None if until_BT is None else Tree(until_BT, positions_BT)
  hidden, _ = _Policy(config).apply(
    variables,
    tokens_BT,
    positions_BT,
    (segment_ids_BT, tree),
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
    lowest = jnp.min(jnp.where(inside, positions_NC, size))
    plan = Positions(reads, writes, cache_blocks(reads, size), lowest)
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
  if adapter is not None:
    logits = logits + _adapt(config, adapter["a"], adapter["b"], hidden)
  return cap_logits(config, logits)


def cap_logits(config: ModelConfig, logits: jax.Array) -> jax.Array:
  """cap tanh(logits / cap) where the model has such a cap."""
  cap = config.final_logit_cap
  return logits if cap is None else cap * jnp.tanh(logits / cap)


def project_values(variables: dict[str, Any], hidden: jax.Array) -> jax.Array:
  """float32[...] from hidden [..., D]."""
  head = variables["params"]["value_head"]
  # Else a TPU multiplies in bfloat16, where a small step of the head is nothing.
  values = jnp.matmul(hidden.astype(jnp.float32), head["kernel"], precision="highest")
  return values[..., 0] + head["bias"][0]
