"""Grouped-query attention: over a packed row (training) and over a live cache (engine).

Shapes: B rows, T tokens, N slots, C tokens of a chunk, S cache positions, H query heads, K
key-value heads, G = H / K, h head dimension. Scores and softmax are float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from steptool_jax.policy.kernels import int8
from steptool_jax.policy.sharding import platform

CACHE_BLOCK = 64  # cache positions that one pass of the cached attention reads, on CPU
GPU_CACHE_BLOCK, TPU_CACHE_BLOCK = 128, 512  # the same elsewhere
TILE = 128  # numbers in a row of a TPU's tile
CPU_BLOCK = 128  # tokens of a packed row that are worked on together, at most
BLOCK = 512  # the same on a GPU, which wants few large products
ATTENTION = "attention"  # name, for remat policies, of what attention's backward pass reads
MASKED = -1e30  # finite, so that a fully masked block stays free of NaN


class KVCache(NamedTuple):
  """k, v: [layers, slots, kv_heads, S, head_dim] in the compute dtype or int8; on a TPU [layers,
  slots, S, *cache_row(kv_heads, head_dim)].

  k_scale, v_scale: of int8, float32 [layers, slots, kv_heads, 1, S].
  """

  k: jax.Array
  v: jax.Array
  k_scale: jax.Array | None = None
  v_scale: jax.Array | None = None


class Window(NamedTuple):
  """Sliding-window attention: a token sees itself and the size - 1 tokens before it."""

  size: int
  here: jax.Array  # bool[], whether this layer has it; the others see everything


class Tree(NamedTuple):
  """Rows that hold trees: token q sees token k if k <= q < until[k].

  So a prompt stands in a row once, and what was sampled after it follows as branches that do not
  see each other; trees of any depth are written in this way.
  """

  until: jax.Array  # int32 [B, T], the end of each token's subtree in its row
  positions: jax.Array  # int32 [B, T], along the path


class Positions(NamedTuple):
  """Where C tokens a slot read and write a KVCache; the same for all layers."""

  reads: jax.Array  # int32[N, C], positions
  writes: jax.Array  # the same, and S where nothing may be written
  blocks: jax.Array  # int32[], cache_blocks
  lowest: jax.Array  # int32[], the least position that counts

  def step(
    self,
    q_NCHh: jax.Array,
    k_NCKh: jax.Array,
    v_NCKh: jax.Array,
    layer: jax.Array,
    cache: KVCache,
    window: Window | None = None,
  ) -> tuple[jax.Array, KVCache]:
    """(attention [N, C, H, h], the cache with the tokens), of one layer."""
    scales = cache[2:]
    if cache.k_scale is not None:
      (k_NCKh, k_NCK), (v_NCKh, v_NCK) = int8.quantise(k_NCKh), int8.quantise(v_NCKh)
      scales = (
        write_scales(cache.k_scale, k_NCK, layer, self.writes),
        write_scales(cache.v_scale, v_NCK, layer, self.writes),
      )
    cache = KVCache(
      write_cache(cache.k, k_NCKh, layer, self.writes),
      write_cache(cache.v, v_NCKh, layer, self.writes),
      *scales,
    )
    inputs = (q_NCHh, cache, k_NCKh.shape[2], layer, self.reads, self.blocks)
    return attend_cache(*inputs, window, self.lowest), cache


def attend(
  q_BTHh: jax.Array,
  k_BTKh: jax.Array,
  v_BTKh: jax.Array,
  segment_ids_BT: jax.Array,
  tree: Tree | None = None,
  window: Window | None = None,
) -> jax.Array:
  """[B, T, H, h]: a token sees itself and what stands before it on its path.

  tree: of the rows; None: every segment is a path of its own.
  window: how far back along its path a token sees; None: to the start.

  On a TPU by the splash kernel, which takes segments for less than trees. Elsewhere by XLA, in
  blocks with a backward pass of their own.
  """
  B, T, H, h = q_BTHh.shape
  if platform() == "tpu":
    from steptool_jax.policy import splash  # Pallas takes a second to import

    run = functools.partial(splash.attend, name=ATTENTION)
    inputs = (q_BTHh, k_BTKh, v_BTKh, segment_ids_BT)
    if tree is not None:
      reach = None if window is None else jnp.where(window.here, window.size, T)
      return run(*inputs, tree, window=reach)
    if window is None:
      return run(*inputs)
    # A kernel's mask is static: both are compiled, and each layer runs one of them.
    return lax.cond(window.here, functools.partial(run, window=window.size), run, *inputs)
  K = k_BTKh.shape[2]
  blocks = -(-T // (CPU_BLOCK if platform() == "cpu" else BLOCK))
  size = -(-T // blocks)

  def in_blocks(x_BTXh):
    """[blocks, B, K, X / K * size, h]; nothing sees the padding, whose subtrees end at 0."""
    x = jnp.pad(x_BTXh, ((0, 0), (0, blocks * size - T), (0, 0), (0, 0)))
    x = x.reshape(B, blocks, size, K, -1, h).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(blocks, B, K, -1, h)

  # Folded into the products, the transposes cost more than the products (XLA on CPU).
  q, k, v = lax.optimization_barrier(tuple(map(in_blocks, (q_BTHh * (h**-0.5), k_BTKh, v_BTKh))))
  where = (jnp.arange(T) + jnp.zeros_like(segment_ids_BT)) if tree is None else tree.positions
  until_BT = _ends(segment_ids_BT) if tree is None else tree.until
  until, at = (
    jnp.pad(x, ((0, 0), (0, blocks * size - T))).reshape(B, blocks, size).swapaxes(0, 1)
    for x in (until_BT, where)
  )
  reach = None if window is None else jnp.where(window.here, window.size, T)
  out = _attend(q, k, v, (until, at), reach)
  out = lax.optimization_barrier(out).reshape(blocks, B, K, H // K, size, h)
  return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, blocks * size, H, h)[:, :T]


# In blocks: n blocks of s tokens; R = G * s, the queries of a block that share a key-value head.
# A block of queries works on the blocks of keys that one of them sees, so that packed trajectories
# do not pay for each other, and what it works on stays in a core's cache. rows: (until, positions)
# [n, B, s]; reach: int32[], how many tokens of its path one sees, itself included; None = all.


def _ends(segment_ids_BT):
  """int32 [B, T], the end of each token's segment."""
  T = segment_ids_BT.shape[1]
  next_BT = jnp.pad(segment_ids_BT[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
  ends_BT = jnp.where(segment_ids_BT == next_BT, T, jnp.arange(1, T + 1))
  return lax.cummin(ends_BT, axis=1, reverse=True)


def _blocks_seen(rows, reach=None):
  """bool[n, n]: some row's queries of block i may see a key of block j <= i."""
  until_nBs, at_nBs = rows
  blocks, _, size = until_nBs.shape
  seen_nn = until_nBs.max(axis=(1, 2)) > jnp.arange(blocks)[:, None] * size
  if reach is not None:
    nearest_nB, furthest_nB = at_nBs.min(axis=2), at_nBs.max(axis=2)
    seen_nn &= (nearest_nB[:, None] - furthest_nB < reach).any(axis=-1)
  # The block of keys itself is always worked on: every query sees its own key.
  return seen_nn | jnp.eye(blocks, dtype=bool)


def _product(a, b):
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _scores(q_BKRh, k_BKsh, rows, reach, i, j):
  """float32[B, K, R, s] of the queries of block i and the keys of block j, masked."""
  until_nBs, at_nBs = rows
  size = k_BKsh.shape[2]
  query_s1, key_s = i * size + jnp.arange(size)[:, None], j * size + jnp.arange(size)
  # A query sees itself whatever `until` says: padding stays finite.
  seen = (query_s1 >= key_s) & ((query_s1 < until_nBs[j][:, None, :]) | (query_s1 == key_s))
  if reach is not None:
    seen &= at_nBs[i][:, :, None] - at_nBs[j][:, None, :] < reach
  # Added, and made once for all heads: a select inside of the softmax triples its time on CPU.
  bias_Bss = lax.optimization_barrier(jnp.where(seen, 0.0, MASKED))
  scores = _product(q_BKRh, k_BKsh.swapaxes(2, 3))
  parted = (*scores.shape[:2], -1, size, size)
  return (scores.reshape(parted) + bias_Bss[:, None, None]).reshape(scores.shape)


@jax.custom_vjp
def _attend(q_nBKRh, k_nBKsh, v_nBKsh, rows, reach):
  return _attend_forward(q_nBKRh, k_nBKsh, v_nBKsh, rows, reach)[0]


def _attend_forward(q, k, v, rows, reach):
  """Attends with a running softmax; also returns the log of its sum, for the backward pass."""
  blocks, *lead, h = q.shape

  def queries(block):
    i, seen_n, q_i = block

    def keys(j, carry):
      top, total, out = carry
      scores = _scores(q_i, k[j], rows, reach, i, j)
      new_top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
      probs = jnp.exp(scores - new_top)
      decay = jnp.exp(top - new_top)
      part = _product(probs.astype(v.dtype), v[j])
      return new_top, total * decay + probs.sum(axis=-1, keepdims=True), out * decay + part

    start = (jnp.full((*lead, 1), MASKED), jnp.zeros((*lead, 1)), jnp.zeros((*lead, h)))
    top, total, out = _over_seen(seen_n, i, keys, start)
    return (out / total).astype(q.dtype), top + jnp.log(total)

  out, log_total = lax.map(queries, (jnp.arange(blocks), _blocks_seen(rows, reach), q))
  out, log_total = checkpoint_name(out, ATTENTION), checkpoint_name(log_total, ATTENTION)
  return out, (q, k, v, rows, reach, out, log_total)


def _over_seen(seen_n, last, body, start):
  """body(j, carry) for the blocks j <= last that are seen, in order."""
  first = jnp.argmax(seen_n)

  def step(j, carry):
    return lax.cond(seen_n[j], body, lambda j, carry: carry, j, carry)

  return lax.fori_loop(first, last + 1, step, start)


def _attend_backward(residuals, d_out):
  """Probabilities are computed again: kept, they would be most of the memory of a step."""
  q, k, v, rows, reach, out, log_total = residuals
  d_total = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)

  def queries(carry, block):
    i, seen_n, q_i, d_out_i, log_total_i, d_total_i = block

    def keys(j, carry):
      d_q, d_k, d_v = carry
      probs = jnp.exp(_scores(q_i, k[j], rows, reach, i, j) - log_total_i)
      d_scores = probs * (_product(d_out_i, v[j].swapaxes(2, 3)) - d_total_i)
      probs, d_scores = probs.astype(q.dtype), d_scores.astype(q.dtype)
      d_k = d_k.at[j].add(_product(d_scores.swapaxes(2, 3), q_i))
      d_v = d_v.at[j].add(_product(probs.swapaxes(2, 3), d_out_i))
      return d_q + _product(d_scores, k[j]), d_k, d_v

    start = (jnp.zeros(q_i.shape, jnp.float32), *carry)
    d_q, *carry = _over_seen(seen_n, i, keys, start)
    return tuple(carry), d_q.astype(q.dtype)

  start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
  seen = _blocks_seen(rows, reach)
  blocks = (jnp.arange(len(q)), seen, q, d_out, log_total, d_total)
  (d_k, d_v), d_q = lax.scan(queries, start, blocks)
  return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def init_cache(
  layers: int, slots: int, kv_heads: int, size: int, head_dim: int, dtype: str
) -> KVCache:
  """An empty cache of `size` positions for each of `slots` conversations."""
  if positions_axis() == 3:
    shape = (layers, slots, kv_heads, size, head_dim)
  else:
    shape = (layers, slots, size, *cache_row(kv_heads, head_dim))
  scales = int8.empty_scales(dtype, layers, slots, kv_heads, size)
  return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales)


def positions_axis() -> int:
  """Where positions are in k and v.

  Heads come first, as the products want them: else XLA on CPU turns every block over that they
  read, which took two thirds of a small model's decode step.
  """
  return 2 if platform() == "tpu" else 3


def cache_row(kv_heads: int, head_dim: int) -> tuple[int, ...]:
  """Shape of the keys of a position in a TPU's cache: (heads, head_dim).

  Heads that do not fill a tile are one axis, filled up to whole tiles. Else the compiler puts
  positions along the tile and turns the whole cache over for each layer that reads it.
  """
  if head_dim % TILE:
    return (-(-kv_heads * head_dim // TILE) * TILE,)
  return kv_heads, head_dim


def write_cache(
  cache: jax.Array, new_NCKh: jax.Array, layer: jax.Array, at_NC: jax.Array
) -> jax.Array:
  """Scatter in place; `at_NC` int32 holds the position, or S where nothing may be written."""
  new = new_NCKh.astype(cache.dtype)
  if cache.ndim == 4:
    new = new.reshape(*at_NC.shape, -1)
    new = jnp.pad(new, ((0, 0), (0, 0), (0, cache.shape[3] - new.shape[-1])))
  return _scatter(cache, new, layer, at_NC, axis=positions_axis())


def write_scales(
  scales: jax.Array, new_NCK: jax.Array, layer: jax.Array, at_NC: jax.Array
) -> jax.Array:
  """As `write_cache`, for the scales [layers, N, K, 1, S] of an int8 cache."""
  return _scatter(scales, new_NCK[..., None], layer, at_NC, axis=4)


def _scatter(x, new, layer, at_NC, axis):
  """x with `new` at a position (dimension `axis`) of a layer of each slot."""
  index = jnp.stack([jnp.full_like(at_NC, layer), at_NC], axis=-1)
  # Slots are a batch axis of the scatter, so that a cache sharded over slots needs no collective.
  dims = lax.ScatterDimensionNumbers(
    update_window_dims=tuple(range(2, new.ndim)),
    inserted_window_dims=(0, axis),
    scatter_dims_to_operand_dims=(0, axis),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
  )
  return lax.scatter(x, index, new, dims, mode=lax.GatherScatterMode.FILL_OR_DROP)


def cache_block(size: int) -> int:
  """Positions of a cache of `size` that are read in one pass."""
  blocks = {"cpu": CACHE_BLOCK, "tpu": TPU_CACHE_BLOCK}
  return min(blocks.get(platform(), GPU_CACHE_BLOCK), size)


def cache_blocks(positions_NC: jax.Array, size: int) -> jax.Array:
  """int32[]: how many blocks of a cache of `size` positions the tokens at `positions` can see."""
  return jnp.max(positions_NC) // cache_block(size) + 1


def attend_cache(
  q_NCHh: jax.Array,
  cache: KVCache,
  kv_heads: int,
  layer: jax.Array,
  positions_NC: jax.Array,
  blocks: jax.Array,
  window: Window | None = None,
  lowest: jax.Array | None = None,
) -> jax.Array:
  """Attention over the first `blocks` blocks of each slot, with a running softmax.

  The number of blocks is dynamic: a token costs what is filled, not what is reserved. With a window
  (and `lowest` int32[], the least position that counts) what no token sees is not read, either.
  """
  N, C, H, h = q_NCHh.shape
  axis, K = positions_axis(), kv_heads
  S, lie = cache.k.shape[axis], "nksh" if axis == 3 else "nskh"
  size = cache_block(S)
  q = (q_NCHh * (h**-0.5)).reshape(N, C, K, H // K, h)

  def read(x, start):
    """A block of this layer, with the axes `lie`."""
    first, shape = [layer, *(0,) * (x.ndim - 1)], [1, *x.shape[1:]]
    first[axis], shape[axis] = start, size
    block = lax.dynamic_slice(x, first, shape)[0]
    block = block if cache.k_scale is None else block.astype(q.dtype)
    return block[..., : K * h].reshape(N, size, K, h) if x.ndim == 4 else block

  def scaled(x_nkgcs, scales, start):
    """x times the scale of each position."""
    if scales is None:
      return x_nkgcs
    block = lax.dynamic_slice(scales, (layer, 0, 0, 0, start), (1, N, K, 1, size))[0]
    return x_nkgcs * block[..., None, :]

  def body(i, carry):
    top, total, out = carry
    start = jnp.minimum(i * size, S - size)  # the last block overlaps where size does not divide S
    at = start + jnp.arange(size)
    seen = (at <= positions_NC[..., None]) & (at >= i * size)
    if window is not None:
      seen &= at > positions_NC[..., None] - reach
    k, v = read(cache.k, start), read(cache.v, start)
    scores = jnp.einsum(f"nckgh,{lie}->nkgcs", q, k, preferred_element_type=jnp.float32)
    scores = scaled(scores, cache.k_scale, start)
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    new_top = jnp.maximum(top, scores.max(axis=-1))
    probs = jnp.exp(scores - new_top[..., None])
    decay = jnp.exp(top - new_top)
    weights = scaled(probs, cache.v_scale, start).astype(v.dtype)
    part = jnp.einsum(f"nkgcs,{lie}->nkgch", weights, v, preferred_element_type=jnp.float32)
    return new_top, total * decay + probs.sum(axis=-1), out * decay[..., None] + part

  shape = (N, K, H // K, C)
  start = (
    jnp.full(shape, MASKED, jnp.float32),
    jnp.zeros(shape, jnp.float32),
    jnp.zeros((*shape, h), jnp.float32),
  )
  first = 0
  if window is not None:
    reach = jnp.where(window.here, window.size, S)
    first = jnp.minimum(jnp.maximum(lowest - reach + 1, 0) // size, blocks - 1)
  _, total, out = lax.fori_loop(first, blocks, body, start)
  out = jnp.transpose(out / total[..., None], (0, 3, 1, 2, 4))
  return out.reshape(N, C, H, h).astype(q_NCHh.dtype)
