"""Attention over packed rows on a TPU: JAX's splash kernel, rows and heads split over the mesh.

The kernel never writes scores to memory and passes over blocks that no query sees. Rows of segments
need no mask in memory; rows of trees have one each while a layer is worked on, because the kernel
knows no other mask that differs from row to row, and takes it as int32: in an update some 11 T x T
bytes (.7 GiB at 8k tokens, 11.6 at 32k, as compiled for v5e). Shapes as in attention.py; any T,
because rows are padded to whole blocks.
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
  tree: tuple[jax.Array, jax.Array] | None = None,
  *,
  window: int | jax.Array | None = None,
  name: str = "",
  interpret: bool = False,
) -> jax.Array:
  """Does what attention.attend does.

  tree: an attention.Tree (until, positions), int32 [B, T] each; None: segments say it all.
  window: a token sees so many tokens of its path, itself included; None = all. int32[] with a tree
    only. name: for remat policies, of what the backward pass reads. interpret: runs the kernel's
    Python on any platform, for tests.
  """
  T, h = q_BTHh.shape[1], q_BTHh.shape[3]
  pad = -T % BLOCKS[-1]

  def heads_first(x_BTXh):
    return jnp.pad(x_BTXh, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2)

  inputs = (heads_first(q_BTHh * (h**-0.5)), heads_first(k_BTKh), heads_first(v_BTKh))
  # Padding is a segment of its own after everything else, so it sees itself and nothing sees it; in
  # a tree its subtrees end at 0.
  told = (segment_ids_BT,) if tree is None else (*tree, jnp.int32(T if window is None else window))
  told = tuple(jnp.pad(x, ((0, 0), (0, pad))) if x.ndim else x for x in told)
  run = functools.partial(_attend_segments, window=window) if tree is None else _attend_trees
  run = functools.partial(run, name=name, interpret=interpret)
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and mesh.axis_names == AXES:
    rows = ROWS if rows_divide(q_BTHh.shape[0], mesh) else None
    heads = "tensor" if k_BTKh.shape[2] % mesh.shape["tensor"] == 0 else None
    split = P(rows, heads)
    specs = (split, split, split, *(P(rows) if x.ndim else P() for x in told))
    run = jax.shard_map(run, in_specs=specs, out_specs=split, check_vma=False)
  return run(*inputs, *told)[:, :, :T].swapaxes(1, 2)


def _attend_segments(q_BHTh, k_BKTh, v_BKTh, segments_BT, *, window, name, interpret):
  heads, length = q_BHTh.shape[1:3]
  mask = masks.CausalMask((length, length))
  if window is not None:
    mask = masks.LocalMask((length, length), window_size=(window - 1, 0), offset=0)
  program = _kernel(masks.MultiHeadMask([mask] * heads), name, interpret)
  return jax.vmap(lambda q, k, v, s: program(q, k, v, kernel.SegmentIds(s, s)))(
    q_BHTh, k_BKTh, v_BKTh, segments_BT
  )


def _attend_trees(q_BHTh, k_BKTh, v_BKTh, until_BT, positions_BT, reach, *, name, interpret):
  def row(q, k, v, until_T, at_T):
    program = _kernel(tree_mask(until_T, at_T, reach)[None], name, interpret)
    # Made under jit, the kernel has a tracer where it wants to know whether its mask is dynamic.
    infos = (program.fwd_mask_info, program.dq_mask_info, program.dkv_mask_info)
    infos = (info._replace(is_dynamic_mask=True) for info in infos)
    return kernel.SplashAttentionKernel(*infos, **program.kwargs)(q, k, v)

  return jax.vmap(row)(q_BHTh, k_BKTh, v_BKTh, until_BT, positions_BT)


def tree_mask(until_T: jax.Array, positions_T: jax.Array, reach: jax.Array) -> jax.Array:
  """bool [T, T], which query (first axis) sees which key: attention.Tree says how.

  reach: int32[], how many tokens of its path a query sees. It always sees itself.
  """
  key = jnp.arange(len(until_T))
  query = key[:, None]
  below = (key < query) & (query < until_T) & (positions_T[:, None] - positions_T < reach)
  return below | (key == query)


def block_size(length: int) -> int:
  """Edge of the square blocks that a row of `length` tokens is worked on in."""
  return next(block for block in BLOCKS if length % block == 0)


def _kernel(mask: masks.MultiHeadMask | jax.Array, name: str, interpret: bool):
  """mask: bool [1, T, T] is that of all heads."""
  block = block_size(mask.shape[-1])
  names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
  return kernel.make_splash_mha(
    mask=mask,
    block_sizes=kernel.BlockSizes(**{f"block_{name}": block for name in names}),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=name or None,
    interpret=interpret,
  )


def kernel_flops(name: str, queries: tuple[int, ...]) -> float:
  """FLOPs of one run of a splash kernel by its name and the shape [..., H, T, h] of its queries.

  XLA does not see into kernels. Blocks on the diagonal are worked on whole; trees, whose branches
  pass over each other's blocks, are counted as one path. 0 for other kernels.
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
