"""Pallas TPU kernels over a live cache: flash attention that pays for what is filled, and writes.

Shapes: L layers, N slots, K key-value heads, S cache positions, h head dimension; R rows of work, T
tokens a row, X = G * T the queries of a row that share a key-value head (of group g and token t at
g * T + t). The cache is [L, N, K, S, h]: positions lie along the tile's rows, so that one head a
chip is read as quickly as eight.

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

MASKED = -1e30
LANES = 128
ROUNDING = 512  # a cache's positions are a multiple of it, or of LANES where there are fewer
STEP_BYTES = 2**18  # of keys and of values that one step of the grid reads, about
STEP_SECONDS = 0.35e-6  # what a step costs beside its bytes (Pallas documentation)
LINE = 16  # positions that a write of one token reads and writes: a row of tiles of 16-bit numbers
VMEM = 64 * 2**20
DECODE, ATTEND, WRITE = "flash_decode", "flash_append", "write_cache"


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
  k: jax.Array,
  v: jax.Array,
  layer: jax.Array,
  position_R: jax.Array,
  active_R: jax.Array,
  work: tuple[jax.Array, jax.Array, jax.Array],
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """One token a slot, at position[r] of slot r: (out [R, K, G, h], k, v with the token written).

  work: `steps_of(position_R, …)`, the same for all layers. A slot that is not active writes
  nothing, and its output means nothing but is finite. k and v are updated in place.
  """
  R, K, G, h = q_RKGh.shape
  block = block_of(k.shape[3], K, h, k.dtype.itemsize)
  q, X = _rows_of_tiles(q_RKGh)
  row = pl.BlockSpec((1, K, X, h), lambda i, row, *_: (row[i], 0, 0, 0))
  new = pl.BlockSpec((1, K, 1, h), lambda i, row, *_: (row[i], 0, 0, 0))
  cached = pl.BlockSpec(
    (1, 1, K, block, h), lambda i, row, at, layer, *_: (layer[0], row[i], 0, at[i], 0)
  )
  whole = pl.BlockSpec(memory_space=pl.ANY)
  line = pltpu.VMEM((2, K, LINE, h), k.dtype)
  out, k, v = pl.pallas_call(
    functools.partial(_decode_kernel, block=block, rows=R),
    out_shape=(_like(q), _like(k), _like(v)),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=6,
      grid=(_grid(work, interpret),),
      in_specs=[row, new, new, cached, cached],
      out_specs=(row, whole, whole),
      scratch_shapes=[*_softmax(K, X, h), line, line, pltpu.SemaphoreType.DMA((2, 2))],
    ),
    input_output_aliases={9: 1, 10: 2},
    compiler_params=_in_order(1),
    interpret=_interpreted(interpret),
    name=DECODE,
  )(
    work[0],
    work[1],
    layer.reshape(1),
    position_R.astype(jnp.int32),
    active_R.astype(jnp.int32),
    work[2].reshape(1),
    q,
    new_k_RKh[:, :, None].astype(k.dtype),
    new_v_RKh[:, :, None].astype(v.dtype),
    k,
    v,
  )
  return out[:, :, :G], k, v


def _decode_kernel(
  row_ref, at_ref, layer_ref, position_ref, active_ref, count_ref,
  q_ref, new_k_ref, new_v_ref, k_ref, v_ref,
  out_ref, k_out, v_out,
  top_ref, total_ref, acc_ref, k_line, v_line, sem,
  *, block, rows,
):  # fmt: skip
  step = pl.program_id(0)
  n, b = row_ref[step], at_ref[step]
  position, layer = position_ref[n], layer_ref[0]
  last = jnp.maximum(position - 1, 0) // block

  # The new token comes first: it need not be in the cache to be seen.
  @pl.when(b == 0)
  def _():
    q, new_k = q_ref[0].astype(jnp.float32), new_k_ref[0].astype(jnp.float32)
    top_ref[...] = jnp.broadcast_to((q * new_k).sum(axis=-1, keepdims=True), top_ref.shape)
    total_ref[...] = jnp.ones_like(total_ref)
    acc_ref[...] = jnp.broadcast_to(new_v_ref[0].astype(jnp.float32), acc_ref.shape)

  @pl.when(b * block < position)
  def _():
    shape = (q_ref.shape[2], block)
    seen = b * block + lax.broadcasted_iota(jnp.int32, shape, 1) < position
    _attend_block(q_ref, k_ref, v_ref, seen, top_ref, total_ref, acc_ref)

  def copies(slot, n):
    base = pl.multiple_of(position_ref[n] // LINE * LINE, LINE)
    for part, (line, out) in enumerate(((k_line, k_out), (v_line, v_out))):
      target = out.at[layer, n, :, pl.ds(base, LINE), :]
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
      # Of the block that lies here, which is the one before where the token opens a new one.
      start = pl.multiple_of(position // LINE * LINE % block, LINE)
      at = lax.broadcasted_iota(jnp.int32, (1, LINE, 1), 1) - position % LINE
      for line, cached, new in ((k_line, k_ref, new_k_ref), (v_line, v_ref, new_v_ref)):
        old = cached[0, 0, :, pl.ds(start, LINE), :]
        line[n % 2] = jnp.where(at == 0, new[0], jnp.where(at < 0, old, jnp.zeros_like(old)))
      for copy in copies(n % 2, n):
        copy.start()

    @pl.when(n == rows - 1)
    def _():
      wait_for(n - 1)
      wait_for(n)


def _attend_block(q_ref, k_ref, v_ref, seen, top_ref, total_ref, acc_ref):
  """Goes on with the running softmax of every head over one block of the cache."""
  for head in range(k_ref.shape[2]):
    k, v = k_ref[0, 0, head], v_ref[0, 0, head]
    scores = lax.dot_general(
      q_ref[0, head], k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    scores = jnp.where(seen, scores, MASKED)
    top = top_ref[head][:, :1]
    new_top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
    probs = jnp.exp(scores - new_top)
    decay = jnp.exp(top - new_top)
    total = total_ref[head][:, :1] * decay + probs.sum(axis=-1, keepdims=True)
    part = jnp.dot(probs.astype(v.dtype), v, preferred_element_type=jnp.float32)
    acc_ref[head] = acc_ref[head] * decay + part
    top_ref[head] = jnp.broadcast_to(new_top, top_ref.shape[1:])
    total_ref[head] = jnp.broadcast_to(total, total_ref.shape[1:])


def attend(
  q_RKXh: jax.Array,
  k: jax.Array,
  v: jax.Array,
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
  block = block_of(k.shape[3], K, h, k.dtype.itemsize)
  q, X_ = _rows_of_tiles(q_RKXh)
  row = pl.BlockSpec((1, K, X_, h), lambda i, row, *_: (row[i], 0, 0, 0))
  cached = pl.BlockSpec(
    (1, 1, K, block, h),
    lambda i, row, at, layer, slot, *_: (layer[0], slot[row[i]], 0, at[i], 0),
  )
  out = pl.pallas_call(
    functools.partial(_attend_kernel, block=block, tokens=tokens),
    out_shape=_like(q),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=6,
      grid=(_grid(work, interpret),),
      in_specs=[row, cached, cached],
      out_specs=row,
      scratch_shapes=_softmax(K, X_, h),
    ),
    compiler_params=_in_order(1),
    interpret=_interpreted(interpret),
    name=ATTEND,
  )(
    work[0],
    work[1],
    layer.reshape(1),
    slot_R.astype(jnp.int32),
    base_R.astype(jnp.int32),
    _last_steps(work),
    q,
    k,
    v,
  )
  return out[:, :, :X]


def _attend_kernel(
  row_ref, at_ref, layer_ref, slot_ref, base_ref, last_ref,
  q_ref, k_ref, v_ref, out_ref, top_ref, total_ref, acc_ref,
  *, block, tokens,
):  # fmt: skip
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
  _attend_block(q_ref, k_ref, v_ref, seen, top_ref, total_ref, acc_ref)

  @pl.when(step == last_ref[n])
  def _():
    out_ref[0] = (acc_ref[...] / total_ref[...][:, :, :1]).astype(out_ref.dtype)


def _last_steps(work) -> jax.Array:
  """int32[W], the last step of each row; behind the rows are zeros."""
  row_W, _, count = work
  index_W = jnp.arange(len(row_W), dtype=jnp.int32)
  return jnp.zeros_like(row_W).at[row_W].max(jnp.where(index_W < count, index_W, 0))


def write(
  new_k_RKTh: jax.Array,
  new_v_RKTh: jax.Array,
  k: jax.Array,
  v: jax.Array,
  layer: jax.Array,
  slot_R: jax.Array,
  base_R: jax.Array,
  first_R: jax.Array,
  end_R: jax.Array,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """k and v with the tokens first[r]..end[r] - 1 of T at base[r] + t of slot[r], in place.

  base: multiples of T. Rows without tokens are the last ones, and name the same place as the last
  row that has some.
  """
  R, K, T, h = new_k_RKTh.shape
  new = pl.BlockSpec((1, K, T, h), lambda r, *_: (r, 0, 0, 0))
  cached = pl.BlockSpec(
    (1, 1, K, T, h), lambda r, layer, slot, base, *_: (layer[0], slot[r], 0, base[r] // T, 0)
  )
  return pl.pallas_call(
    _write_kernel,
    out_shape=(_like(k), _like(v)),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      grid=(R,),
      in_specs=[new, new, cached, cached],
      out_specs=(cached, cached),
    ),
    input_output_aliases={7: 0, 8: 1},
    compiler_params=_in_order(1),
    interpret=_interpreted(interpret),
    name=WRITE,
  )(
    layer.reshape(1),
    *(x.astype(jnp.int32) for x in (slot_R, base_R, first_R, end_R)),
    new_k_RKTh.astype(k.dtype),
    new_v_RKTh.astype(v.dtype),
    k,
    v,
  )


def _write_kernel(
  layer_ref, slot_ref, base_ref, first_ref, end_ref,
  new_k_ref, new_v_ref, k_ref, v_ref, k_out, v_out,
):  # fmt: skip
  del layer_ref, slot_ref, base_ref
  r = pl.program_id(0)
  first, end = first_ref[r], end_ref[r]

  # A row without tokens leaves the block of the row before it as it is; the first has none before.
  @pl.when((first < end) | (r == 0))
  def _():
    at = lax.broadcasted_iota(jnp.int32, (1, new_k_ref.shape[2], 1), 1)
    fresh = (at >= first) & (at < end)
    k_out[0, 0] = jnp.where(fresh, new_k_ref[0], k_ref[0, 0])
    v_out[0, 0] = jnp.where(fresh, new_v_ref[0], v_ref[0, 0])


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


def _like(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _grid(work, interpret):
  """Steps to run: as many as there is work; interpreted, which knows no such bound, all."""
  return len(work[0]) if interpret else work[2]


def _in_order(axes):
  return pltpu.CompilerParams(dimension_semantics=("arbitrary",) * axes, vmem_limit_bytes=VMEM)


def _interpreted(interpret):
  return pltpu.InterpretParams() if interpret else False


def cost(name: str, shapes: tuple[tuple[int, ...], ...], itemsize: float) -> tuple[float, ...]:
  """(FLOPs, HBM bytes, seconds of steps) of one run by a kernel's name and its operands' shapes.

  Every slot counts as full, every row as reading all of its slot. Zeros for other kernels.
  """
  cache = next((s for s in shapes if len(s) == 5), None)
  rows = next((s for s in shapes if len(s) == 4), None)
  if cache is None or rows is None:
    return 0.0, 0.0, 0.0
  (*_, K, S, h), (R, _, X, _) = cache, rows
  own = 2.0 * math.prod(rows) * itemsize  # queries and outputs, or new keys and values
  if name.startswith(WRITE):
    return 0.0, own + 4.0 * math.prod(rows) * itemsize, 0.0
  if not name.startswith((DECODE, ATTEND)):
    return 0.0, 0.0, 0.0
  steps = R * S / block_of(S, K, h, int(itemsize))
  return 4.0 * R * K * X * S * h, 2.0 * R * K * S * h * itemsize + own, steps * STEP_SECONDS
