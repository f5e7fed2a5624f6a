"""Lookup in an embedding table that is sharded over its columns, without gathering the table.

Tokens travel, not the table: each device looks up its own columns for the rows of all `fsdp`
devices, and an all-to-all turns columns of all rows into all columns of its rows. The gradient goes
the same way back, so a device adds up its own shard of the table's gradient and nothing else.

Shapes: B rows, T tokens, V vocabulary, D hidden; the table lies as P("tensor", "fsdp").
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from steptool_jax.policy.sharding import ROWS, constrain, mesh_of_rows

TABLE = P("tensor", "fsdp")


def look_up(table_VD: jax.Array, tokens_BT: jax.Array, dtype: str) -> jax.Array:
  """[B, T, D] in `dtype`. Rows that do not divide over the mesh gather the table instead."""
  if mesh_of_rows(tokens_BT.shape[0]) is None:
    return constrain(table_VD, P("tensor", None))[tokens_BT].astype(dtype)
  return _look_up(dtype, table_VD, tokens_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(dtype, table_VD, tokens_BT):
  return _forward(dtype, table_VD, tokens_BT)[0]


def _forward(dtype, table_VD, tokens_BT):
  def rows(table_vd, tokens_bT):
    at, here = _on_this_device(table_vd.shape[0], tokens_bT)
    part = jnp.where(here[..., None], table_vd[at], 0).astype(dtype)
    part = lax.psum(part, "tensor")  # one of them is not zero
    return lax.all_to_all(part, "fsdp", split_axis=0, concat_axis=2, tiled=True)

  out = jax.shard_map(rows, in_specs=(TABLE, P(ROWS)), out_specs=P(ROWS), check_vma=False)
  return out(table_VD, tokens_BT), (table_VD, tokens_BT)


def _backward(dtype, residuals, d_out_BTD):
  table_VD, tokens_BT = residuals

  def rows(table_vd, tokens_bT, d_out_bTD):
    at, here = _on_this_device(table_vd.shape[0], tokens_bT)
    d_part = lax.all_to_all(d_out_bTD, "fsdp", split_axis=2, concat_axis=0, tiled=True)
    d_part = jnp.where(here[..., None], d_part, 0).astype(jnp.float32)
    d_table = jnp.zeros(table_vd.shape, jnp.float32).at[at].add(d_part)
    return lax.psum(d_table, "data").astype(table_vd.dtype)

  run = jax.shard_map(rows, in_specs=(TABLE, P(ROWS), P(ROWS)), out_specs=TABLE, check_vma=False)
  return run(table_VD, tokens_BT, d_out_BTD), None


_look_up.defvjp(_forward, _backward)


def _on_this_device(size: int, tokens_bT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The tokens of all fsdp rows as row numbers of this device's shard, and which of them it has."""
  at = lax.all_gather(tokens_bT, "fsdp", axis=0, tiled=True) - lax.axis_index("tensor") * size
  here = (at >= 0) & (at < size)
  return jnp.where(here, at, 0), here
