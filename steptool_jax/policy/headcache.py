"""The cache as a TPU's kernels read it, [layers, slots, heads, positions, head_dim], on a mesh.

Slots lie over (data, fsdp) and heads over `tensor`, so a kernel sees its own slots and heads and
nothing travels. One token a slot (decode) and any number of tokens in some slots (append) are two
plans, made once for all layers. An append is cut into tiles of TILE tokens: an observation costs
its own tiles and not those of the longest one, nor of slots that take none.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from steptool_jax.policy.kernels import int8
from steptool_jax.policy.sharding import ROWS, mesh_of_rows, platform

TILE = 64  # tokens of a row of an append; a power of two
NO_WINDOW = "the kernels see everything; a model with sliding layers takes attention.KVCache"
MOST_TILES = 128  # of one append program on one shard; what is longer takes several calls


class HeadCache(NamedTuple):
  """k, v: [layers, slots, kv_heads, positions, head_dim] in the compute dtype or int8.

  k_scale, v_scale: of int8, float32 [layers, slots, kv_heads, 1, positions].
  """

  k: jax.Array
  v: jax.Array
  k_scale: jax.Array | None = None
  v_scale: jax.Array | None = None

  @property
  def arrays(self) -> tuple[jax.Array, ...]:
    """Those that there are, as the kernels take them."""
    return tuple(x for x in self if x is not None)


def suits(head_dim: int) -> bool:
  """Whether the kernels take such heads: on a TPU, where they fill whole tiles."""
  return platform() == "tpu" and head_dim % 128 == 0


def init(layers: int, slots: int, kv_heads: int, size: int, head_dim: int, dtype: str) -> HeadCache:
  """An empty cache for `size` tokens a slot; its positions are rounded up to whole blocks."""
  shape = (layers, slots, kv_heads, _kernels().rounded(size), head_dim)
  scales = int8.empty_scales(dtype, layers, slots, kv_heads, shape[3])
  return HeadCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales)


def cache_spec(kv_heads: int, mesh: Any) -> P:
  """Of all arrays; heads that the tensor axis does not divide are whole on every chip."""
  return P(None, ROWS, _heads(kv_heads, mesh))


class OneToken(NamedTuple):
  """The plan of a decode step: slot n takes one token at position[n] where active[n]."""

  position: jax.Array  # int32[N]
  active: jax.Array  # bool[N]
  work: tuple[jax.Array, jax.Array, jax.Array]  # of each shard, kernels/cached.py steps_of

  def step(
    self,
    q_N1Hh: jax.Array,
    k_N1Kh: jax.Array,
    v_N1Kh: jax.Array,
    layer: jax.Array,
    cache: HeadCache,
    window: None = None,
  ) -> tuple[jax.Array, HeadCache]:
    """(attention [N, 1, H, h], the cache with the tokens), of one layer."""
    assert window is None, NO_WINDOW
    N, _, H, h = q_N1Hh.shape
    K = k_N1Kh.shape[2]
    kernels = _kernels()

    def local(q, k, v, cache, layer, position, active, row, block, count):
      work = (row, block, count[0])
      return kernels.decode(q, k, v, cache, layer, position, active, work, interpret=_interpret())

    heads = P(ROWS, _heads(K, mesh_of_rows(N)))
    spec = cache_spec(K, mesh_of_rows(N))
    rows = (P(ROWS),) * 5
    run = _over(N, local, (heads, heads, heads, spec, P(), *rows), (heads, spec))
    q = q_N1Hh.reshape(N, K, H // K, h)
    out, new = run(q, k_N1Kh[:, 0], v_N1Kh[:, 0], cache.arrays, layer, *self[:2], *self.work)
    return out.reshape(N, 1, H, h), HeadCache(*new)


def one_token(position_N: jax.Array, active_N: jax.Array, cache: HeadCache) -> OneToken:
  """The plan; what slots that are not active would read is left out."""
  N = len(position_N)
  seen_N = jnp.where(active_N, position_N, 0)
  return OneToken(seen_N, active_N, _work(seen_N, N, cache))


class Tiles(NamedTuple):
  """The plan of an append: row r of R feeds the tokens first[r]..end[r] - 1 of TILE at base[r] + t.

  slot: as its shard counts. Rows without tokens follow those that have some.
  """

  slot: jax.Array  # int32[R]
  base: jax.Array  # int32[R], multiples of TILE
  first: jax.Array  # int32[R]
  end: jax.Array  # int32[R]
  work: tuple[jax.Array, jax.Array, jax.Array]

  def step(
    self,
    q_RTHh: jax.Array,
    k_RTKh: jax.Array,
    v_RTKh: jax.Array,
    layer: jax.Array,
    cache: HeadCache,
    window: None = None,
  ) -> tuple[jax.Array, HeadCache]:
    """(attention [R, T, H, h], the cache with the tokens), of one layer."""
    assert window is None, NO_WINDOW
    from steptool_jax.policy.kernels import writing  # as cached

    R, T, H, h = q_RTHh.shape
    K = k_RTKh.shape[2]
    kernels = _kernels()

    def local(q, k, v, cache, layer, slot, base, first, end, row, block, count):
      cache = writing.write(k, v, cache, layer, slot, base, first, end, interpret=_interpret())
      work = (row, block, count[0])
      out = kernels.attend(q, cache, layer, slot, base, work, tokens=T, interpret=_interpret())
      return out, cache

    heads = P(ROWS, _heads(K, mesh_of_rows(R)))
    spec = cache_spec(K, mesh_of_rows(R))
    rows = (P(ROWS),) * 7
    run = _over(R, local, (heads, heads, heads, spec, P(), *rows), (heads, spec))
    q = q_RTHh.reshape(R, T, K, H // K, h).transpose(0, 2, 3, 1, 4).reshape(R, K, -1, h)
    k, v = k_RTKh.swapaxes(1, 2), v_RTKh.swapaxes(1, 2)
    out, new = run(q, k, v, cache.arrays, layer, *self[:4], *self.work)
    out = out.reshape(R, K, H // K, T, h).transpose(0, 3, 1, 2, 4).reshape(R, T, H, h)
    return out, HeadCache(*new)


def place(
  tokens_P: jax.Array, count_N: jax.Array, history_NS: jax.Array, length_N: jax.Array, rows: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """Where an append's tokens go: (history [N, S], fed [R, T], slot, base, first, end int32[R]).

  Args:
    tokens_P: int32, the tokens of each shard's slots one slot after the other, and padding.
    count_N: int32, how many of them each slot takes.
    history_NS: what each slot has seen.
    length_N: int32; the last of these is pending and is fed first, as the last new one will be.
    rows: R of a shard; the host has seen to it that they are enough (`rows_needed`).
  """

  def local(tokens_P, count_N, history_NS, length_N):
    N, size = history_NS.shape
    ends_N = jnp.cumsum(count_N)
    index_P = jnp.arange(len(tokens_P))
    slot_P = jnp.searchsorted(ends_N, index_P, side="right", method="compare_all")
    at_P = jnp.minimum(slot_P, N - 1)
    column_P = length_N[at_P] + index_P - (ends_N - count_N)[at_P]
    history_NS = history_NS.at[slot_P, column_P].set(tokens_P, mode="drop")

    start_N = jnp.maximum(length_N - 1, 0)
    stop_N = jnp.where(count_N > 0, length_N + count_N - 1, start_N)
    base_N = start_N // TILE * TILE
    tiles_N = jnp.where(stop_N > start_N, -(-(stop_N - base_N) // TILE), 0)
    last_N = jnp.cumsum(tiles_N)
    index_R = jnp.minimum(jnp.arange(rows), jnp.maximum(last_N[-1] - 1, 0))
    slot_R = jnp.searchsorted(last_N, index_R, side="right", method="compare_all")
    slot_R = jnp.minimum(slot_R, N - 1)
    base_R = base_N[slot_R] + (index_R - (last_N - tiles_N)[slot_R]) * TILE
    first_R = jnp.clip(start_N[slot_R] - base_R, 0, TILE)
    end_R = jnp.clip(stop_N[slot_R] - base_R, 0, TILE)
    end_R = jnp.where(jnp.arange(rows) < last_N[-1], end_R, first_R)
    columns_RT = jnp.minimum(base_R[:, None] + jnp.arange(TILE), size - 1)
    fed_RT = history_NS[slot_R[:, None], columns_RT]
    return history_NS, fed_RT, *(x.astype(jnp.int32) for x in (slot_R, base_R, first_R, end_R))

  run = _over(len(count_N), local, (P(ROWS),) * 4, (P(ROWS),) * 6)
  return run(tokens_P, count_N, history_NS, length_N)


def rows_needed(count: int) -> int:
  """The most tiles that `count` new tokens of one slot fill, wherever they begin."""
  return (count + TILE - 2) // TILE + 1


def calls(
  pieces: dict[int, np.ndarray], slots: int, shards: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
  """(tokens_P and count_N of `place`, rows of a shard) of the programs that append these pieces.

  Every shard's slots get as many tokens in a call as fit MOST_TILES; the rest follows in the next.
  """
  waiting = {slot: ids for slot, ids in sorted(pieces.items()) if len(ids)}
  while waiting:
    parts: list[list[np.ndarray]] = [[] for _ in range(shards)]
    used, count_N = [0] * shards, np.zeros(slots, np.int32)
    for slot, ids in list(waiting.items()):
      shard = slot * shards // slots
      fit = (MOST_TILES - used[shard] - 1) * TILE  # rows_needed of so many is what is left
      if fit > 0:
        part, rest = ids[:fit], ids[fit:]
        parts[shard].append(part)
        used[shard] += rows_needed(len(part))
        count_N[slot] = len(part)
        waiting[slot] = rest  # in its place: a shard's tokens stand in the order of its slots
    waiting = {slot: ids for slot, ids in waiting.items() if len(ids)}
    rows = 2
    while rows < max(used):
      rows *= 4
    tokens = np.zeros((shards, rows * TILE), np.int32)
    for row, listed in zip(tokens, parts, strict=True):
      flat = np.concatenate([*listed, np.zeros(0, np.int32)])
      row[: len(flat)] = flat
    yield tokens.reshape(-1), count_N, rows


def tiles(
  slot_R: jax.Array, base_R: jax.Array, first_R: jax.Array, end_R: jax.Array, cache: HeadCache
) -> Tiles:
  """The plan of rows as `place` gives them."""
  seen_R = jnp.where(end_R > first_R, base_R + end_R, 0)
  return Tiles(slot_R, base_R, first_R, end_R, _work(seen_R, len(slot_R), cache))


def _work(seen_R, rows, cache):
  """steps_of on every shard: ([shards * W], [shards * W], [shards])."""
  heads, size, width = cache.k.shape[2:]
  mesh = mesh_of_rows(rows)
  if _heads(heads, mesh):
    heads //= mesh.shape["tensor"]
  kernels = _kernels()
  block = kernels.block_of(size, heads, width, cache.k.dtype.itemsize)

  def local(seen):
    row, at, count = kernels.steps_of(seen, size, block)
    return row, at, count[None]

  return _over(rows, local, (P(ROWS),), (P(ROWS),) * 3)(seen_R)


def _over(rows: int, function, in_specs, out_specs):
  """`function` on every chip's own rows; without a mesh, or where rows do not divide, on all."""
  if mesh_of_rows(rows) is None:
    return function
  return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _heads(kv_heads: int, mesh: Any) -> str | None:
  return "tensor" if mesh is not None and kv_heads % mesh.shape["tensor"] == 0 else None


def _interpret() -> bool:
  return platform() == "cpu"


def _kernels():
  from steptool_jax.policy.kernels import cached  # Pallas takes a second to import

  return cached
