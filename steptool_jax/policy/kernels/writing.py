"""A Pallas TPU kernel that writes an append's tokens into a live cache.

Shapes as in kernels/cached.py.
"""

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

WRITE = "write_cache"


def write(
  new_k_RKTh: jax.Array,
  new_v_RKTh: jax.Array,
  cache: tuple[jax.Array, ...],
  layer: jax.Array,
  slot_R: jax.Array,
  base_R: jax.Array,
  first_R: jax.Array,
  end_R: jax.Array,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, ...]:
  """The cache with the tokens first[r]..end[r] - 1 of T at base[r] + t of slot[r], in place.

  base: multiples of T. Rows of a slot follow each other. Rows without tokens are the last ones, and
  name the same place as the last row that has some.
  """
  R, K, T, h = new_k_RKTh.shape
  new = as_kept((new_k_RKTh, new_v_RKTh), cache)
  keys = pl.BlockSpec(
    (1, 1, K, T, h), lambda r, layer, slot, base, *_: (layer[0], slot[r], 0, base[r] // T, 0)
  )
  scales = pl.BlockSpec(
    (1, 1, K, 1, LANES),
    lambda r, layer, slot, base, *_: (layer[0], slot[r], 0, 0, base[r] // LANES),
  )
  kept = twice(keys, scales, len(cache))
  return tuple(
    pl.pallas_call(
      _write_kernel,
      out_shape=tuple(map(like, cache)),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(R,),
        in_specs=[
          *(pl.BlockSpec((1, *x.shape[1:]), lambda r, *_: (r, 0, 0, 0)) for x in new),
          *kept,
        ],
        out_specs=tuple(kept),
      ),
      input_output_aliases={5 + len(cache) + i: i for i in range(len(cache))},
      compiler_params=in_order(),
      interpret=interpreted(interpret),
      name=WRITE,
    )(
      layer.reshape(1),
      *(x.astype(jnp.int32) for x in (slot_R, base_R, first_R, end_R)),
      *new,
      *cache,
    )
  )


def _write_kernel(layer_ref, slot_ref, base_ref, first_ref, end_ref, *refs):
  del layer_ref
  r, parts = pl.program_id(0), len(refs) // 3
  first, end = first_ref[r], end_ref[r]
  before = jnp.maximum(r - 1, 0)

  # A row without tokens leaves the block of the row before it as it is; the first has none before.
  @pl.when((first < end) | (r == 0))
  def _():
    for part, (new, old, out) in enumerate(
      zip(refs[:parts], refs[parts:-parts], refs[-parts:], strict=True)
    ):
      if part < 2:
        at = lax.broadcasted_iota(jnp.int32, (1, new.shape[2], 1), 1)
        kept = selectable(old[0, 0])
      else:
        # Two tiles share a row of scales; what the one before has written has not left yet.
        at = lax.broadcasted_iota(jnp.int32, (1, 1, LANES), 2) - base_ref[r] % LANES
        same = (r > 0) & (slot_ref[r] == slot_ref[before])
        same &= base_ref[r] // LANES == base_ref[before] // LANES
        kept = jnp.where(same, out[0, 0], old[0, 0])
      fresh = (at >= first) & (at < end)
      out[0, 0] = jnp.where(fresh, selectable(new[0]), kept).astype(out.dtype)
