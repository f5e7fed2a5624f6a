"""What the kernels over a live cache share: its parts, new tokens as it keeps them, settings.

Shapes as in kernels/cached.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from steptool_jax.policy.kernels import int8

LANES = 128
VMEM = 64 * 2**20


def as_kept(new_RKTh: tuple[jax.Array, jax.Array], cache: tuple[jax.Array, ...]) -> list[jax.Array]:
  """New keys and values as the cache has them: of int8 the integers, and scales [R, K, 1, LANES].

  A row of a tile is the least that is written of scales: those of T tokens stand in it as often as
  they fit, so that each is also where its position is.
  """
  if len(cache) == 2:
    return [x.astype(y.dtype) for x, y in zip(new_RKTh, cache, strict=True)]
  whole, scales = zip(*map(int8.quantise, new_RKTh), strict=True)
  repeats = LANES // new_RKTh[0].shape[2]
  return [*whole, *(jnp.tile(x[:, :, None], repeats) for x in scales)]


def twice(keys: Any, scales: Any, parts: int) -> list[Any]:
  """For k and v, and for the scales of each where the cache has them."""
  return [keys, keys, scales, scales][:parts]


def selectable(x: jax.Array) -> jax.Array:
  """As numbers that a TPU chooses between: it has masks for 32 and 16 bits."""
  return x.astype(jnp.int32) if x.dtype == jnp.int8 else x


def like(x: jax.Array) -> jax.ShapeDtypeStruct:
  """Its shape and dtype, of an output."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def in_order() -> pltpu.CompilerParams:
  """The steps of a grid of one axis depend on those before."""
  return pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM)


def interpreted(interpret: bool) -> Any:
  """What pallas_call takes where there is no TPU."""
  return pltpu.InterpretParams() if interpret else False
