"""A mixture of experts: a router sends each token to its k experts, grouped products compute them.

    p = softmax(x R) in float32      y = sum over the k experts e with the largest p of w_e MLP_e(x)

with w = p, or p divided by the sum of the k (norm_topk). No token is dropped, there is no capacity:
on a mesh experts lie over `fsdp`, where a device gathers the tokens, works on those that chose its
own experts, sorted by expert and in blocks, as many as there are, and scatters the sums back. So
weights stay where they are. The auxiliary loss that balances experts in pretraining is left out:
in RL it would only pull the policy away from its reference.

Shapes: B rows, T tokens, n tokens, k experts a token, E experts, e of them here, D hidden, F width
of an expert, C pairs of a token and an expert in a block.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from steptool_jax.policy.sharding import AXES, ROWS, rows_divide

PAIRS = 8192  # in a block, at most
TILE = 128  # rows that a TPU's grouped product works on together
SCOPE = "expert_blocks"  # name, in compiled programs, of the loop over blocks
TOKENS = 16384  # that are gathered at a time, at most (more where that divides no row)


class Kernels(NamedTuple):
  """gate, up [E, D, F] over (fsdp, -, tensor); down [E, F, D] over (fsdp, tensor, -)."""

  gate: jax.Array
  up: jax.Array
  down: jax.Array


SPLIT = Kernels(P("fsdp", None, "tensor"), P("fsdp", None, "tensor"), P("fsdp", "tensor", None))


def choose(
  x: jax.Array, router_DE: jax.Array, per_token: int, normalised: bool
) -> tuple[jax.Array, jax.Array]:
  """(weights float32 [..., k], experts int32 [..., k]); all of it in float32."""
  x, router_DE = x.astype(jnp.float32), router_DE.astype(jnp.float32)
  probs = jax.nn.softmax(jnp.matmul(x, router_DE, precision="highest"), axis=-1)
  weights, chosen = lax.top_k(probs, per_token)
  if normalised:
    weights = weights / weights.sum(axis=-1, keepdims=True)
  return weights, chosen.astype(jnp.int32)


def mix(
  x_BTD: jax.Array,
  weights_BTk: jax.Array,
  chosen_BTk: jax.Array,
  kernels: Kernels,
  gated: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """[B, T, D], the weighted sum of each token's experts. gated: of gate and up to down's input."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.axis_names != AXES or mesh.size == 1:
    return _of_rows(gated, None, x_BTD, weights_BTk, chosen_BTk, kernels)
  rows = P(ROWS) if rows_divide(x_BTD.shape[0], mesh) else P()
  run = jax.shard_map(
    functools.partial(_of_rows, gated, rows != P()),
    in_specs=(rows, rows, rows, SPLIT),
    out_specs=rows,
    check_vma=False,
  )
  return run(x_BTD, weights_BTk, chosen_BTk, kernels)


def _of_rows(gated, gather, x_BTD, weights_BTk, chosen_BTk, kernels):
  """What one device does. gather: whether rows lie over fsdp, too; None = there is no mesh."""
  B, T, D = x_BTD.shape
  devices = 1 if gather is None else lax.axis_size("fsdp")
  parts = _parts(B * devices if gather else B, T)

  def one_part(inputs):
    if gather:
      inputs = jax.tree.map(lambda x: lax.all_gather(x, "fsdp", axis=0, tiled=True), inputs)
    x_nD, weights_nk, chosen_nk = (x.reshape(-1, x.shape[-1]) for x in inputs)
    first = 0 if gather is None else lax.axis_index("fsdp") * kernels.gate.shape[0]
    out = _grouped(gated, devices, x_nD, weights_nk, chosen_nk - first, kernels)
    out = out.reshape(-1, T // parts, D)
    if gather is None:
      return out
    out = lax.psum(out, "tensor")
    if gather:
      return lax.psum_scatter(out, "fsdp", scatter_dimension=0, tiled=True)
    return lax.psum(out, "fsdp")

  inputs = (x_BTD, weights_BTk, chosen_BTk)
  if parts == 1:
    return one_part(inputs)
  # Gathered again in the backward pass: kept, a device would hold the tokens of all.
  cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(B, parts, T // parts, -1), 1, 0), inputs)
  out = lax.map(jax.checkpoint(one_part, prevent_cse=False), cut)
  return jnp.moveaxis(out, 0, 1).reshape(B, T, D)


def _parts(rows: int, length: int) -> int:
  """Into how many equal parts rows are cut, so that at most TOKENS are gathered at a time."""
  divisors = [n for n in range(1, length + 1) if length % n == 0]
  return next((n for n in divisors if rows * length // n <= TOKENS), 1)


def blocks(per_token: int, rows: int, length: int, devices: int) -> int:
  """How often the loop over blocks runs where all devices' experts are chosen as often.

  per_token: experts of a token. devices: over which `rows` of `length` tokens and experts lie.
  """
  pairs = rows * length // _parts(rows, length) * per_token
  return -(-pairs // (devices * _block_size(pairs, devices)))


def _block_size(pairs: int, devices: int) -> int:
  """Pairs of a block: twice a device's share in whole tiles, at most PAIRS or all there are."""
  return min(PAIRS, -(-2 * pairs // (devices * TILE)) * TILE, pairs)


def kernel_flops(name: str, shapes: Sequence[tuple[int, ...]]) -> float:
  """FLOPs of one run of a TPU's grouped product by its name and its operands' shapes; else 0.

  XLA does not see into kernels. Blocks are counted whole.
  """
  flat, stacked = ([s for s in shapes if len(s) == n] for n in (2, 3))
  if not name.startswith("ragged-dot") or not flat:
    return 0.0
  if stacked:  # rows [C, a] by kernels [E, a, b]
    return 2.0 * flat[0][0] * stacked[0][1] * stacked[0][2]
  return 2.0 * flat[0][0] * flat[0][1] * flat[1][1]  # a kernel's gradient: [C, a] by [C, b]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(gated, devices, x_nD, weights_nk, local_nk, kernels):
  """[n, D] of the experts here; local: their numbers here, all others lie elsewhere.

  devices: how many share the experts.
  """
  return _forward(gated, devices, x_nD, weights_nk, local_nk, kernels)[0]


class _Plan(NamedTuple):
  """Pairs sorted by expert, those of other devices at the end."""

  pairs: jax.Array  # int32[n * k], padded to whole blocks
  ends: jax.Array  # int32[e], where each expert's pairs end
  size: int  # of a block

  def each(self, body, carry):
    """body(block, carry) over the blocks with pairs of this device."""
    if len(self.pairs) == self.size:
      return body(0, carry)
    with jax.named_scope(SCOPE):
      return lax.fori_loop(0, -(-self.ends[-1] // self.size), body, carry)

  def block(self, i):
    """(pairs int32[C], which of them are there bool[C], how many of each expert int32[e])."""
    start = i * self.size
    pairs = lax.dynamic_slice_in_dim(self.pairs, start, self.size)
    real = start + jnp.arange(self.size) < self.ends[-1]
    sizes = jnp.diff(jnp.clip(self.ends - start, 0, self.size), prepend=0)
    # Rows of no group are undefined: the last expert gets them, as zeros.
    return pairs, real, sizes.at[-1].add(self.size - sizes.sum()).astype(jnp.int32)


def _plan(local_nk, here, devices) -> _Plan:
  flat = local_nk.reshape(-1)
  flat = jnp.where((flat >= 0) & (flat < here), flat, here)
  size = _block_size(len(flat), devices)
  order = jnp.argsort(flat, stable=True).astype(jnp.int32)
  ends = jnp.cumsum(jnp.bincount(flat, length=here + 1)[:here]).astype(jnp.int32)
  return _Plan(jnp.pad(order, (0, -len(flat) % size)), ends, size)


def _block(gated, sizes, x_CD, weights_C, kernels):
  """float32 [C, D] of rows that are sorted by expert."""
  product = functools.partial(lax.ragged_dot, group_sizes=sizes)
  hidden = gated(product(x_CD, kernels.gate), product(x_CD, kernels.up))
  return product(hidden, kernels.down).astype(jnp.float32) * weights_C[:, None]


def _taken(plan, i, x_nD, weights_nk):
  """(rows, pairs, group sizes, x [C, D], weights [C]) of a block; what is not there is dropped."""
  pairs, real, sizes = plan.block(i)
  tokens = pairs // weights_nk.shape[1]
  x_CD = jnp.where(real[:, None], x_nD[tokens], 0)
  weights_C = jnp.where(real, weights_nk.reshape(-1)[pairs], 0.0)
  away = math.prod(weights_nk.shape)
  rows, pairs = jnp.where(real, tokens, away), jnp.where(real, pairs, away)
  return rows, pairs, sizes, x_CD, weights_C


def _forward(gated, devices, x_nD, weights_nk, local_nk, kernels):
  plan = _plan(local_nk, kernels.gate.shape[0], devices)

  def body(i, out_nD):
    rows, _, sizes, x_CD, weights_C = _taken(plan, i, x_nD, weights_nk)
    return out_nD.at[rows].add(_block(gated, sizes, x_CD, weights_C, kernels), mode="drop")

  out_nD = plan.each(body, jnp.zeros(x_nD.shape, jnp.float32))
  return out_nD.astype(x_nD.dtype), (x_nD, weights_nk, local_nk, kernels)


def _backward(gated, devices, residuals, d_out_nD):
  """Hidden layers are computed again, block by block; gradients are summed in float32."""
  x_nD, weights_nk, local_nk, kernels = residuals
  plan = _plan(local_nk, kernels.gate.shape[0], devices)

  def body(i, carry):
    d_x_nD, d_weights, d_kernels = carry
    rows, pairs, sizes, x_CD, weights_C = _taken(plan, i, x_nD, weights_nk)
    _, pull_back = jax.vjp(functools.partial(_block, gated, sizes), x_CD, weights_C, kernels)
    d_out_CD = d_out_nD.at[rows].get(mode="fill", fill_value=0).astype(jnp.float32)
    d_x_CD, d_weights_C, d_more = pull_back(d_out_CD)
    return (
      d_x_nD.at[rows].add(d_x_CD.astype(jnp.float32), mode="drop"),
      d_weights.at[pairs].set(d_weights_C, mode="drop"),
      jax.tree.map(lambda total, d: total + d.astype(jnp.float32), d_kernels, d_more),
    )

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (x_nD, kernels))
  start = (zeros[0], jnp.zeros(weights_nk.size, jnp.float32), zeros[1])
  d_x_nD, d_weights, d_kernels = plan.each(body, start)
  d_kernels = jax.tree.map(lambda d, x: d.astype(x.dtype), d_kernels, kernels)
  return d_x_nD.astype(x_nD.dtype), d_weights.reshape(weights_nk.shape), None, d_kernels


_grouped.defvjp(_forward, _backward)
