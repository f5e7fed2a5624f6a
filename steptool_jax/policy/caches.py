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
  return 3 if isinstance(cache, HeadCache) else 2


def spec(cache: Cache, mesh: Any) -> P:
  """The layout of k and v on a mesh."""
  if isinstance(cache, HeadCache):
    return headcache.cache_spec(cache.k.shape[2], mesh)
  return sharding.cache_spec(cache.k.shape[3:], mesh)


def copy_slots(cache: Cache, source_N: jax.Array, longest: jax.Array) -> Cache:
  """Slot n gets the first `longest` positions of slot source[n], which is not itself copied over.

  A block of one layer at a time: so much travels between the chips, and never a whole cache.
  """
  axis = positions_axis(cache)
  size = cache.k.shape[axis]
  width = attention.cache_block(size)
  mesh = sharding.mesh_of_rows(len(source_N))

  def local(cache, source_N, blocks):
    """The slots of one chip; source_N: of all."""
    own, source_n = cache.k.shape[1], source_N
    if mesh is not None:
      source_n = lax.dynamic_slice(source_N, (lax.axis_index(sharding.ROWS) * own,), (own,))

    def block(at, x):
      start = [at // blocks, 0, 0, 0, 0][: x.ndim]
      start[axis] = jnp.minimum(at % blocks * width, size - width)
      shape = (1, *x.shape[1:axis], width, *x.shape[axis + 1 :])
      part = lax.dynamic_slice(x, start, shape)[0]
      if mesh is not None:
        part = lax.all_gather(part, sharding.ROWS, tiled=True)
      return lax.dynamic_update_slice(x, part[source_n][None], start)

    def both(at, cache):
      return type(cache)(*(block(at, x) for x in cache))

    return lax.fori_loop(0, cache.k.shape[0] * blocks, both, cache)

  if mesh is not None:
    lies = spec(cache, mesh)
    local = jax.shard_map(local, in_specs=(lies, P(), P()), out_specs=lies, check_vma=False)
  return local(cache, source_N, -(-longest // width))
