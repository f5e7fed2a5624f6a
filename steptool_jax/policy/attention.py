"""Grouped-query attention: over a packed row (training) and over a live cache (engine).

Shapes: B rows, T tokens, N slots, C tokens of a chunk, S cache positions, H query heads, K
key-value heads, G = H / K, h head dimension. Scores and softmax are float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from steptool_jax.policy.sharding import platform

CACHE_BLOCK = 128  # cache positions that one pass of the cached attention reads
QUERY_BLOCK = 128  # at least so many queries a pass; at most MAX_PASSES passes a row
MAX_PASSES = 8
ATTENTION = "attention"  # name, for remat policies, of what attention's backward pass reads
MASKED = -1e30  # finite, so that a fully masked block stays free of NaN


class KVCache(NamedTuple):
  """k, v: [layers, slots, S, kv_heads, head_dim] in the compute dtype."""

  k: jax.Array
  v: jax.Array


def attend(
  q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
  """[B, T, H, h]: a token sees what stands before it in its own segment, itself included.

  On a TPU by the splash kernel; elsewhere by XLA, in blocks with a backward pass of their own.
  """
  if platform() == "tpu":
    from steptool_jax.policy import splash  # Pallas takes a second to import

    return splash.attend(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, name=ATTENTION)
  B, T, H, h = q_BTHh.shape
  K = k_BTKh.shape[2]
  q = (q_BTHh * (h**-0.5)).reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4)
  k, v = k_BTKh.swapaxes(1, 2), v_BTKh.swapaxes(1, 2)
  # Folded into the products, the transposes cost more than the products (XLA on CPU).
  q, k, v = lax.optimization_barrier((q, k, v))
  out = lax.optimization_barrier(_attend(q, k, v, segment_ids_BT))
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, h)


def _passes(length: int) -> list[tuple[int, int]]:
  """Query ranges. A range sees no key behind its end, which saves almost half of the work."""
  block = QUERY_BLOCK * max(1, -(-length // (MAX_PASSES * QUERY_BLOCK)))
  return [(start, min(start + block, length)) for start in range(0, length, block)]


def _scores(q_BKGth, k_BKsh, segments_BT, start):
  """float32[B, K, G, t, s] for queries from `start` on and keys from 0 on, masked."""
  B, K, G, t, h = q_BKGth.shape
  s = k_BKsh.shape[2]
  at_t, at_s = start + jnp.arange(t), jnp.arange(s)
  same = segments_BT[:, start : start + t, None] == segments_BT[:, None, :s]
  seen = same & (at_t[:, None] >= at_s)
  # Added, and made once for all heads: a select inside of the softmax triples its time on CPU.
  bias = lax.optimization_barrier(jnp.where(seen, 0.0, MASKED))
  scores = jnp.matmul(
    q_BKGth.reshape(B, K, G * t, h), k_BKsh.swapaxes(2, 3), preferred_element_type=jnp.float32
  )
  return scores.reshape(B, K, G, t, s) + bias[:, None, None]


@jax.custom_vjp
def _attend(q_BKGTh, k_BKTh, v_BKTh, segments_BT):
  return _attend_forward(q_BKGTh, k_BKTh, v_BKTh, segments_BT)[0]


def _attend_forward(q, k, v, segments):
  B, K, G, T, h = q.shape
  out, log_total = [], []
  for start, stop in _passes(T):
    scores = _scores(q[:, :, :, start:stop], k[:, :, :stop], segments, start)
    top = scores.max(axis=-1, keepdims=True)
    probs = jnp.exp(scores - top)
    total = probs.sum(axis=-1, keepdims=True)
    probs = probs.astype(v.dtype).reshape(B, K, -1, stop)
    part = jnp.matmul(probs, v[:, :, :stop], preferred_element_type=jnp.float32)
    out.append((part.reshape(B, K, G, stop - start, h) / total).astype(q.dtype))
    log_total.append(top + jnp.log(total))
  out = checkpoint_name(jnp.concatenate(out, axis=3), ATTENTION)
  log_total = checkpoint_name(jnp.concatenate(log_total, axis=3), ATTENTION)
  return out, (q, k, v, segments, out, log_total)


def _attend_backward(residuals, d_out):
  """Probabilities are computed again: kept, they would be most of the memory of a step."""
  q, k, v, segments, out, log_total = residuals
  B, K, _, T, h = q.shape
  d_total = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
  d_q = []
  d_k, d_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)

  def product(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)

  for start, stop in _passes(T):
    part = slice(start, stop)
    d_o = d_out[:, :, :, part].reshape(B, K, -1, h)
    scores = _scores(q[:, :, :, part], k[:, :, :stop], segments, start)
    probs = jnp.exp(scores - log_total[:, :, :, part])
    d_probs = product(d_o, v[:, :, :stop].swapaxes(2, 3)).reshape(probs.shape)
    d_scores = probs * (d_probs - d_total[:, :, :, part])
    probs = probs.astype(q.dtype).reshape(B, K, -1, stop)
    d_scores = d_scores.astype(q.dtype).reshape(B, K, -1, stop)
    d_q.append(product(d_scores, k[:, :, :stop]).reshape(B, K, -1, stop - start, h))
    queries = q[:, :, :, part].reshape(B, K, -1, h)
    d_k = d_k.at[:, :, :stop].add(product(d_scores.swapaxes(2, 3), queries))
    d_v = d_v.at[:, :, :stop].add(product(probs.swapaxes(2, 3), d_o))
  d_q = jnp.concatenate(d_q, axis=3)
  return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def write_cache(
  cache_LNSKh: jax.Array, new_NCKh: jax.Array, layer: jax.Array, at_NC: jax.Array
) -> jax.Array:
  """Scatter in place; `at_NC` int32 holds the position, or S where nothing may be written."""
  index = jnp.stack([jnp.full_like(at_NC, layer), at_NC], axis=-1)
  # Slots are a batch axis of the scatter, so that a cache sharded over slots needs no collective.
  dims = lax.ScatterDimensionNumbers(
    update_window_dims=(2, 3),
    inserted_window_dims=(0, 2),
    scatter_dims_to_operand_dims=(0, 2),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
  )
  new = new_NCKh.astype(cache_LNSKh.dtype)
  return lax.scatter(cache_LNSKh, index, new, dims, mode=lax.GatherScatterMode.FILL_OR_DROP)


def cache_blocks(positions_NC: jax.Array, size: int) -> jax.Array:
  """int32[]: how many blocks of a cache of `size` positions the tokens at `positions` can see."""
  return jnp.max(positions_NC) // min(CACHE_BLOCK, size) + 1


def attend_cache(
  q_NCHh: jax.Array,
  cache: KVCache,
  layer: jax.Array,
  positions_NC: jax.Array,
  blocks: jax.Array,
) -> jax.Array:
  """Attention over the first `blocks` blocks of each slot, with a running softmax.

  The number of blocks is dynamic: a token costs what is filled, not what is reserved.
  """
  N, C, H, h = q_NCHh.shape
  S, K = cache.k.shape[2:4]
  size = min(CACHE_BLOCK, S)
  q = (q_NCHh * (h**-0.5)).reshape(N, C, K, H // K, h)

  def read(x, start):
    return lax.dynamic_slice(x, (layer, 0, start, 0, 0), (1, N, size, K, h))[0]

  def body(i, carry):
    top, total, out = carry
    start = jnp.minimum(i * size, S - size)  # the last block overlaps where size does not divide S
    at = start + jnp.arange(size)
    seen = (at <= positions_NC[..., None]) & (at >= i * size)
    k, v = read(cache.k, start), read(cache.v, start)
    scores = jnp.einsum("nckgh,nskh->nkgcs", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    new_top = jnp.maximum(top, scores.max(axis=-1))
    probs = jnp.exp(scores - new_top[..., None])
    decay = jnp.exp(top - new_top)
    part = jnp.einsum(
      "nkgcs,nskh->nkgch", probs.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return new_top, total * decay + probs.sum(axis=-1), out * decay[..., None] + part

  shape = (N, K, H // K, C)
  start = (
    jnp.full(shape, MASKED, jnp.float32),
    jnp.zeros(shape, jnp.float32),
    jnp.zeros((*shape, h), jnp.float32),
  )
  _, total, out = lax.fori_loop(0, blocks, body, start)
  out = jnp.transpose(out / total[..., None], (0, 3, 1, 2, 4))
  return out.reshape(N, C, H, h).astype(q_NCHh.dtype)
