"""The live cache of either kind: as XLA reads it (attention), as a TPU's kernels do (headcache)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from steptool_jax.policy import attention, headcache, sharding
from steptool_jax.policy.attention import KVCache
from steptool_jax.policy.headcache import HeadCache

Cache = KVCache | HeadCache  # both [layers, slots, …]


def positions_axis(cache: Cache) -> int:
  """Where positions are in k and v."""
  return 3 if isinstance(cache, HeadCache) else attention.positions_axis()


def specs(cache: Cache, mesh: Any) -> Cache:
  """The layout of each array on a mesh; scales lie as the kernels' keys do."""
  if positions_axis(cache) == 3:
    lies = scales = headcache.cache_spec(cache.k.shape[2], mesh)
  else:
    lies = sharding.cache_spec(cache.k.shape[3:], mesh)
    scales = P(*lies[:2], *lies[3:])
  return type(cache)(lies, lies, *(None if x is None else scales for x in cache[2:]))


def copy_slots(
  cache: Cache, source_N: jax.Array, longest: jax.Array, origin: Cache | None = None
) -> Cache:
  """Slot n gets the first `longest` positions of slot source[n], which is not itself copied over.

  A block of one layer at a time: so much travels between the chips, and never a whole cache.
  origin: a cache of slots that are no longer than these, whose they are copied from; there, a
  source below 0 leaves a slot as it is.
  """
  size = (cache if origin is None else origin).k.shape[positions_axis(cache)]
  width = attention.cache_block(size)
  mesh = sharding.mesh_of_rows(len(source_N))

  def local(cache, origin, source_N, blocks):
    """The slots of one chip; source_N: of all."""
    own, source_n = cache.k.shape[1], source_N
    if mesh is not None:
      source_n = lax.dynamic_slice(source_N, (lax.axis_index(sharding.ROWS) * own,), (own,))

    def block(at, x, source, axis):
      def part_of(x):
        return lax.dynamic_slice(x, start, (1, *x.shape[1:axis], width, *x.shape[axis + 1 :]))[0]

      start = [at // blocks, 0, 0, 0, 0][: x.ndim]
      start[axis] = jnp.minimum(at % blocks * width, size - width)
      part = part_of(source)
      if mesh is not None:
        part = lax.all_gather(part, sharding.ROWS, tiled=True)
      part = part[source_n]
      if origin is not None:
        moved = (source_n >= 0).reshape(-1, *(1,) * (part.ndim - 1))
        part = jnp.where(moved, part, part_of(x))
      return lax.dynamic_update_slice(x, part[None], start)

    def all_arrays(at, cache):
      axes = (positions_axis(cache),) * 2 + (4,) * 2  # keys and values, and scales
      arrays = zip(cache, cache if origin is None else origin, axes, strict=False)
      return type(cache)(*(x if x is None else block(at, x, y, axis) for x, y, axis in arrays))

    return lax.fori_loop(0, cache.k.shape[0] * blocks, all_arrays, cache)

  if mesh is not None:
    lies = specs(cache, mesh)
    given = lies if origin is not None else None
    local = jax.shard_map(local, in_specs=(lies, given, P(), P()), out_specs=lies, check_vma=False)
  return local(cache, origin, source_N, -(-longest // width))
