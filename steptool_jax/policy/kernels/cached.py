"""Pallas TPU kernels over a live cache: flash attention that pays for what is filled.

Shapes: L layers, N slots, K key-value heads, S cache positions, h head dimension; R rows of work, T
tokens a row, X = G * T the queries of a row that share a key-value head (of group g and token t at
g * T + t). The cache is k, v [L, N, K, S, h]: positions lie along the tile's rows, so that one head
a chip is read as quickly as eight. Of int8 it has two arrays more, the scales [L, N, K, 1, S].

Why not a library's: JAX's ragged paged attention (v2) fails in interpret mode and cannot be checked
here, its paged attention (v1) leaves writing to XLA, which copies the cache, and tokamax has none.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from steptool_jax.policy.kernels.shared import (
  LANES,
  as_kept,
  in_order,
  interpreted,
  like,
  selectable,
  twice,
)
from steptool_jax.policy.kernels.writing import WRITE

MASKED = -1e30
ROUNDING = 512  # a cache's positions are a multiple of it, or of LANES where there are fewer
STEP_BYTES = 2**18  # of keys and of values that one step of the grid reads, about
STEP_SECONDS = 0.35e-6  # what a step costs beside its bytes (Pallas documentation)
# Positions that a write of one token reads and writes, by bytes of a number: a row of tiles.
LINES = {1: 32, 2: 16, 4: 16}
DECODE, ATTEND = "flash_decode", "flash_append"


def rounded(size: int) -> int:
  """Positions that a cache for `size` tokens has."""
  unit = ROUNDING if size > ROUNDING else LANES
  return -(-size // unit) * unit


def block_of(size: int, heads: int, width: int, itemsize: int) -> int:
  """Positions of a cache of `size` that one step of the grid reads."""
  block = LANES
  while size % (2 * block) == 0 and 2 * block * heads * width * itemsize <= STEP_BYTES:
    block *= 2
  return block


def steps_of(seen_R: jax.Array, size: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The grid as a list of work: (row int32[W], block int32[W], number of steps int32[]).

  Row r reads the blocks that hold its first seen[r] positions, one at least; steps past the number
  repeat the last one. A row costs its own tokens, and not those of the longest.
  """
  rows = len(seen_R)
  blocks_R = jnp.maximum(-(-seen_R // block), 1)
  ends_R = jnp.cumsum(blocks_R)
  index_W = jnp.minimum(jnp.arange(rows * (size // block)), ends_R[-1] - 1)
  row_W = jnp.searchsorted(ends_R, index_W, side="right", method="compare_all").astype(jnp.int32)
  block_W = index_W - (ends_R - blocks_R)[row_W]
  return row_W, block_W.astype(jnp.int32), ends_R[-1].astype(jnp.int32)


def decode(
  q_RKGh: jax.Array,
  new_k_RKh: jax.Array,
  new_v_RKh: jax.Array,
  cache: tuple[jax.Array, ...],
  layer: jax.Array,
  position_R: jax.Array,
  active_R: jax.Array,
  work: tuple[jax.Array, jax.Array, jax.Array],
  *,
  interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """One token a slot, at position[r] of slot r: (out [R, K, G, h], the cache with the token).

  work: `steps_of(position_R, …)`, the same for all layers. A slot that is not active writes
  nothing, and its output means nothing but is finite. The cache is updated in place.
  """
  R, K, G, h = q_RKGh.shape
  k, parts = cache[0], len(cache)
  block, line = block_of(k.shape[3], K, h, k.dtype.itemsize), LINES[k.dtype.itemsize]
  q, X = _rows_of_tiles(q_RKGh)
  new = as_kept((new_k_RKh[:, :, None], new_v_RKh[:, :, None]), cache)

  def of_row(shape):
    return pl.BlockSpec((1, *shape[1:]), lambda i, row, *_: (row[i], 0, 0, 0))

  keys = pl.BlockSpec(
    (1, 1, K, block, h), lambda i, row, at, layer, *_: (layer[0], row[i], 0, at[i], 0)
  )
  scales = pl.BlockSpec(
    (1, 1, K, 1, block), lambda i, row, at, layer, *_: (layer[0], row[i], 0, 0, at[i])
  )
  lines = (pltpu.VMEM((2, K, line, h), k.dtype), pltpu.VMEM((2, K, 1, LANES), jnp.float32))
  out, *cache = pl.pallas_call(
    functools.partial(_decode_kernel, block=block, rows=R, parts=parts),
    out_shape=(like(q), *map(like, cache)),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=6,
      grid=(_grid(work, interpret),),
      in_specs=[*(of_row(x.shape) for x in (q, *new)), *twice(keys, scales, parts)],
      out_specs=(of_row(q.shape), *(pl.BlockSpec(memory_space=pl.ANY),) * parts),
      scratch_shapes=[
        *_softmax(K, X, h),
        *twice(*lines, parts),
        pltpu.SemaphoreType.DMA((parts, 2)),
      ],
    ),
    input_output_aliases={7 + parts + i: 1 + i for i in range(parts)},
    compiler_params=in_order(),
    interpret=interpreted(interpret),
    name=DECODE,
  )(
    work[0],
    work[1],
    layer.reshape(1),
    position_R.astype(jnp.int32),
    active_R.astype(jnp.int32),
    work[2].reshape(1),
    q,
    *new,
    *cache,
  )
  return out[:, :, :G], tuple(cache)


def _decode_kernel(
  row_ref, at_ref, layer_ref, position_ref, active_ref, count_ref, q_ref, *refs,
  block, rows, parts,
):  # fmt: skip
  new_refs, cached_refs, refs = refs[:parts], refs[parts : 2 * parts], refs[2 * parts :]
  out_ref, outs, refs = refs[0], refs[1 : 1 + parts], refs[1 + parts :]
  (top_ref, total_ref, acc_ref), line_refs, sem = refs[:3], refs[3:-1], refs[-1]
  step = pl.program_id(0)
  n, b = row_ref[step], at_ref[step]
  position, layer = position_ref[n], layer_ref[0]
  last = jnp.maximum(position - 1, 0) // block

  # The new token comes first: it need not be in the cache to be seen.
  @pl.when(b == 0)
  def _():
    q = q_ref[0].astype(jnp.float32)
    new_k, new_v = (new_ref[0].astype(jnp.float32) for new_ref in new_refs[:2])
    if parts == 4:
      new_k, new_v = new_k * new_refs[2][0][:, :, :1], new_v * new_refs[3][0][:, :, :1]
    top_ref[...] = jnp.broadcast_to((q * new_k).sum(axis=-1, keepdims=True), top_ref.shape)
    total_ref[...] = jnp.ones_like(total_ref)
    acc_ref[...] = jnp.broadcast_to(new_v, acc_ref.shape)

  @pl.when(b * block < position)
  def _():
    shape = (q_ref.shape[2], block)
    seen = b * block + lax.broadcasted_iota(jnp.int32, shape, 1) < position
    _attend_block(q_ref, cached_refs, seen, top_ref, total_ref, acc_ref)

  def line_of(part, position):
    """(its size, where it lies in a slot's array) of the line that holds a position."""
    everything, scales = slice(None), part > 1
    size = LANES if scales else line_refs[part].shape[2]
    line = pl.ds(pl.multiple_of(position // size * size, size), size)
    return size, (everything, everything, line) if scales else (everything, line, everything)

  def copies(slot, n):
    for part, (line, out) in enumerate(zip(line_refs, outs, strict=True)):
      _, where = line_of(part, position_ref[n])
      target = out.at[(layer, n, *where)]
      yield pltpu.make_async_copy(line.at[slot], target, sem.at[part, slot])

  def wait_for(n):
    @pl.when((n >= 0) & (active_ref[jnp.maximum(n, 0)] > 0))
    def _():
      for copy in copies(jnp.maximum(n, 0) % 2, jnp.maximum(n, 0)):
        copy.wait()

  @pl.when((b == last) & (step < count_ref[0]))
  def _():
    out_ref[0] = (acc_ref[...] / total_ref[...][:, :, :1]).astype(out_ref.dtype)
    wait_for(n - 2)  # the line that it was copied from is used again

    @pl.when(active_ref[n] > 0)
    def _():
      for part, (line, cached, new) in enumerate(
        zip(line_refs, cached_refs, new_refs, strict=True)
      ):
        # Of the block that lies here, which is the one before where the token opens a new one.
        size, where = line_of(part, position % block)
        shape, axis = ((1, 1, size), 2) if part > 1 else ((1, size, 1), 1)
        at = lax.broadcasted_iota(jnp.int32, shape, axis) - position % size
        old, fresh = selectable(cached[(0, 0, *where)]), selectable(new[0])
        kept = jnp.where(at == 0, fresh, jnp.where(at < 0, old, jnp.zeros_like(old)))
        line[n % 2] = kept.astype(line.dtype)
      for copy in copies(n % 2, n):
        copy.start()

    @pl.when(n == rows - 1)
    def _():
      wait_for(n - 1)
      wait_for(n)


def _attend_block(q_ref, cached_refs, seen, top_ref, total_ref, acc_ref):
  """Goes on with the running softmax of every head over one block of the cache.

  int8 is read as the integers that it holds. A position's scale is that of its whole row, so it is
  taken out of the products: of scores after one, of probabilities before the other.
  """
  for head in range(q_ref.shape[1]):
    k, v, *scales = (ref[0, 0, head] for ref in cached_refs)
    if scales:
      k, v = (x.astype(q_ref.dtype) for x in (k, v))
    scores = lax.dot_general(
      q_ref[0, head], k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    if scales:
      scores = scores * scales[0]
    scores = jnp.where(seen, scores, MASKED)
    top = top_ref[head][:, :1]
    new_top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
    probs = jnp.exp(scores - new_top)
    decay = jnp.exp(top - new_top)
    total = total_ref[head][:, :1] * decay + probs.sum(axis=-1, keepdims=True)
    weights = probs * scales[1] if scales else probs
    part = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    acc_ref[head] = acc_ref[head] * decay + part
    top_ref[head] = jnp.broadcast_to(new_top, top_ref.shape[1:])
    total_ref[head] = jnp.broadcast_to(total, total_ref.shape[1:])


def attend(
  q_RKXh: jax.Array,
  cache: tuple[jax.Array, ...],
  layer: jax.Array,
  slot_R: jax.Array,
  base_R: jax.Array,
  work: tuple[jax.Array, jax.Array, jax.Array],
  *,
  tokens: int,
  interpret: bool = False,
) -> jax.Array:
  """[R, K, X, h]: token t of row r sees the positions 0..base[r] + t of slot[r].

  tokens: T, a power of two, X = G * T. work: `steps_of(last position + 1, …)`, the same for all
  layers.
  """
  _, K, X, h = q_RKXh.shape
  block = block_of(cache[0].shape[3], K, h, cache[0].dtype.itemsize)
  q, X_ = _rows_of_tiles(q_RKXh)
  row = pl.BlockSpec((1, K, X_, h), lambda i, row, *_: (row[i], 0, 0, 0))
  keys = pl.BlockSpec(
    (1, 1, K, block, h),
    lambda i, row, at, layer, slot, *_: (layer[0], slot[row[i]], 0, at[i], 0),
  )
  scales = pl.BlockSpec(
    (1, 1, K, 1, block),
    lambda i, row, at, layer, slot, *_: (layer[0], slot[row[i]], 0, 0, at[i]),
  )
  out = pl.pallas_call(
    functools.partial(_attend_kernel, block=block, tokens=tokens),
    out_shape=like(q),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=6,
      grid=(_grid(work, interpret),),
      in_specs=[row, *twice(keys, scales, len(cache))],
      out_specs=row,
      scratch_shapes=_softmax(K, X_, h),
    ),
    compiler_params=in_order(),
    interpret=interpreted(interpret),
    name=ATTEND,
  )(
    work[0],
    work[1],
    layer.reshape(1),
    slot_R.astype(jnp.int32),
    base_R.astype(jnp.int32),
    _last_steps(work),
    q,
    *cache,
  )
  return out[:, :, :X]


def _attend_kernel(
  row_ref, at_ref, layer_ref, slot_ref, base_ref, last_ref, q_ref, *refs,
  block, tokens,
):  # fmt: skip
  *cached_refs, out_ref, top_ref, total_ref, acc_ref = refs
  step = pl.program_id(0)
  n, b = row_ref[step], at_ref[step]

  @pl.when(b == 0)
  def _():
    top_ref[...] = jnp.full_like(top_ref, MASKED)
    total_ref[...] = jnp.zeros_like(total_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

  shape = (q_ref.shape[2], block)
  token = lax.broadcasted_iota(jnp.int32, shape, 0) & (tokens - 1)
  seen = b * block + lax.broadcasted_iota(jnp.int32, shape, 1) <= base_ref[n] + token
  _attend_block(q_ref, cached_refs, seen, top_ref, total_ref, acc_ref)

  @pl.when(step == last_ref[n])
  def _():
    out_ref[0] = (acc_ref[...] / total_ref[...][:, :, :1]).astype(out_ref.dtype)


def _last_steps(work) -> jax.Array:
  """int32[W], the last step of each row; behind the rows are zeros."""
  row_W, _, count = work
  index_W = jnp.arange(len(row_W), dtype=jnp.int32)
  return jnp.zeros_like(row_W).at[row_W].max(jnp.where(index_W < count, index_W, 0))


def _rows_of_tiles(q_RKXh):
  """Scaled queries with X filled up to whole tiles, and the new X."""
  h = q_RKXh.shape[-1]
  pad = -q_RKXh.shape[2] % 8
  q = q_RKXh * jnp.asarray(h**-0.5, q_RKXh.dtype)
  return jnp.pad(q, ((0, 0), (0, 0), (0, pad), (0, 0))), q_RKXh.shape[2] + pad


def _softmax(heads, queries, width):
  """Scratch of the running softmax: top, total, sum of values."""
  row = pltpu.VMEM((heads, queries, LANES), jnp.float32)
  return [row, row, pltpu.VMEM((heads, queries, width), jnp.float32)]


def _grid(work, interpret):
  """Steps to run: as many as there is work; interpreted, which knows no such bound, all."""
  return len(work[0]) if interpret else work[2]


def cost(
  name: str, shapes: tuple[tuple[int, ...], ...], sizes: tuple[float, ...]
) -> tuple[float, ...]:
  """(FLOPs, HBM bytes, seconds of steps) of one run by a kernel's name and its operands.

  Args:
    name: as in the compiled program.
    shapes: of its operands that are no scalars.
    sizes: bytes of a number of each.

  Every slot counts as full, every row as reading all of its slot. Zeros for other kernels. What a
  chip's vector unit does is not priced: it is less than the bytes' time. (libtpu schedules a step
  of 2,048 int8 positions for v5e in 528 cycles, conversion included; its bytes take 990.)
  """
  operands = list(zip(shapes, sizes, strict=True))
  kept = [(s, size) for s, size in operands if len(s) == 5]
  rows = [(s, size) for s, size in operands if len(s) == 4]
  if not kept or not rows:
    return 0.0, 0.0, 0.0
  (shape, size), ((R, _, X, _), own) = kept[0], rows[0]
  *_, K, S, h = shape
  own *= 2.0 * math.prod(rows[0][0])  # queries and outputs, or new keys and values
  if name.startswith(WRITE):
    # Read and written: the tiles of k and v, and a row of scales for each head.
    tiles = 4.0 * math.prod(rows[0][0]) * size
    return 0.0, own + tiles + (len(kept) - 2) * 3.0 * R * K * LANES * 4, 0.0
  if not name.startswith((DECODE, ATTEND)):
    return 0.0, 0.0, 0.0
  of_slot = sum(math.prod(s[2:]) * size for s, size in kept)
  steps = R * S / block_of(S, K, h, int(size))
  return 4.0 * R * K * X * S * h, R * of_slot + own, steps * STEP_SECONDS
