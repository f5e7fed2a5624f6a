"""Keys and values as int8: one float32 scale for each position of each key-value head.

    scale = max |x| / 127,   x' = round(x / scale),   x is read as scale * x'

so that an element is off by scale / 2 at most. Integers up to 127 are exact in bfloat16, and a
scale is the same for all elements of a position: attention multiplies scores, and probabilities
before they meet the values, by it, and nothing is rounded a second time.
"""

import jax
import jax.numpy as jnp

LARGEST = 127.0


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(int8 [..., h], scale float32 [...]) of [..., h]; what is all zeros has the scale 0.

  A number that is not finite makes its scale so: what it spoils is found out, as without int8.
  """
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1) / LARGEST
  whole = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
  return whole.astype(jnp.int8), scale


def empty_scales(
  dtype: str, layers: int, slots: int, kv_heads: int, size: int
) -> tuple[jax.Array, ...]:
  """Those of keys and of values in a cache of this dtype; none where it is not int8.

  float32 [layers, slots, kv_heads, 1, size]: positions fill the rows of a TPU's tiles.
  """
  count = 2 if dtype == "int8" else 0
  shape = (layers, slots, kv_heads, 1, size)
  return tuple(jnp.zeros(shape, jnp.float32) for _ in range(count))
