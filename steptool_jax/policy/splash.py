"""Attention over packed rows on a TPU: JAX's splash kernel, rows and heads split over the mesh.

The kernel never writes scores to memory and passes over blocks above the diagonal. Shapes as in
attention.py; any T, because rows are padded to whole blocks.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from steptool_jax.policy.sharding import AXES, ROWS, rows_divide

BLOCKS = (512, 256, 128)  # the largest that divides the padded row is taken


def attend(
  q_BTHh: jax.Array,
  k_BTKh: jax.Array,
  v_BTKh: jax.Array,
  segment_ids_BT: jax.Array,
  *,
  window: int | None = None,
  name: str = "",
  interpret: bool = False,
) -> jax.Array:
  """Does what attention.attend does.

  window: a token sees so many tokens, itself included; None = all. name: for remat policies, of
  what the backward pass reads. interpret: runs the kernel's Python on any platform, for tests.
  """
  T, h = q_BTHh.shape[1], q_BTHh.shape[3]
  pad = -T % BLOCKS[-1]

  def heads_first(x_BTXh):
    return jnp.pad(x_BTXh, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2)

  inputs = (heads_first(q_BTHh * (h**-0.5)), heads_first(k_BTKh), heads_first(v_BTKh))
  # Padding is a segment of its own after everything else, so it sees itself and nothing sees it.
  segments_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, pad)))
  run = functools.partial(_attend, window=window, name=name, interpret=interpret)
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.axis_names == AXES:
    rows = ROWS if rows_divide(q_BTHh.shape[0], mesh) else None
    heads = "tensor" if k_BTKh.shape[2] % mesh.shape["tensor"] == 0 else None
    split = P(rows, heads)
    run = jax.shard_map(
      run, in_specs=(split, split, split, P(rows)), out_specs=split, check_vma=False
    )
  return run(*inputs, segments_BT)[:, :, :T].swapaxes(1, 2)


def _attend(q_BHTh, k_BKTh, v_BKTh, segments_BT, *, window, name, interpret):
  program = _kernel(q_BHTh.shape[1], q_BHTh.shape[2], window, name, interpret)
  return jax.vmap(lambda q, k, v, s: program(q, k, v, kernel.SegmentIds(s, s)))(
    q_BHTh, k_BKTh, v_BKTh, segments_BT
  )


def block_size(length: int) -> int:
  """Edge of the square blocks that a row of `length` tokens is worked on in."""
  return next(block for block in BLOCKS if length % block == 0)


def _kernel(heads: int, length: int, window: int | None, name: str, interpret: bool):
  block = block_size(length)
  names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
  mask = masks.CausalMask((length, length))
  if window is not None:
    mask = masks.LocalMask((length, length), window_size=(window - 1, 0), offset=0)
  return kernel.make_splash_mha(
    mask=masks.MultiHeadMask([mask] * heads),
    block_sizes=kernel.BlockSizes(**{f"block_{name}": block for name in names}),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=name or None,
    interpret=interpret,
  )


def kernel_flops(name: str, queries: tuple[int, ...]) -> float:
  """FLOPs of one run of a splash kernel by its name and the shape [..., H, T, h] of its queries.

  XLA does not see into kernels. Blocks on the diagonal are worked on whole. 0 for other kernels.
  """
  products = {"fwd": 2, "dq": 3, "dkv": 4}
  kind = next((k for k in products if f"splash_mha_{k}_" in name), None)
  if kind is None:
    return 0.0
  heads, length, width = queries[-3:]
  block = block_size(length)
  blocks = length // block
  pairs = block * block * blocks * (blocks + 1) / 2
  return 2.0 * products[kind] * math.prod(queries[:-3]) * heads * width * pairs
