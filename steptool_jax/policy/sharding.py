"""Mesh and one table: parameter path -> PartitionSpec. Used also with one device.

Axes: `data` replicates parameters, `fsdp` shards them (and rows; experts by their number), `tensor`
shards heads, the MLP and the vocabulary. Rows of a batch and slots of the engine lie over (data,
fsdp).
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

# Matched against the end of the path, so that optimizer moments (opt_state/0/mu/params/layers/…),
# trainable subtrees and copies for the reference find the rule of their parameter.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
  (r"embed/embedding", P("tensor", "fsdp")),
  (r"lm_head/kernel", P("fsdp", "tensor")),
  (r"lm_head/a", P("fsdp", None)),
  (r"lm_head/b", P(None, "tensor")),
  (r"layers/(q|k|v|gate|up)/kernel", P(None, "fsdp", "tensor")),
  (r"layers/(q|k|v|gate|up)/a", P(None, "fsdp", None)),
  (r"layers/(q|k|v|gate|up)/b", P(None, None, "tensor")),
  (r"layers/(o|down)/kernel", P(None, "tensor", "fsdp")),
  (r"layers/(o|down)/a", P(None, "tensor", None)),
  (r"layers/(o|down)/b", P(None, None, "fsdp")),
  (r"layers/(q|k|v)/bias", P(None, "tensor")),
  (r"layers/o/bias", P(None, None)),
  (r"layers/(attn|mlp|q|k|post_attn|post_mlp)_norm/scale", P(None, None)),
  (r"layers/router/kernel", P(None, None, None)),
  (r"layers/expert_(gate|up)/kernel", P(None, "fsdp", None, "tensor")),
  (r"layers/expert_down/kernel", P(None, "fsdp", "tensor", None)),
  (r"final_norm/scale", P(None)),
  (r"(critic|target)/(q1|q2|v)/kernel", P(None, None)),
  (r"(critic|target)/(q1|q2|v)/bias", P(None)),
  (r"(value_head|reward_heads)/kernel", P(None, None)),
  (r"(value_head|reward_heads)/bias", P(None)),
  (r"ns_coeffs", P(None)),  # Muon's constants
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
  """A mesh over all devices (or `devices`); at most one axis is -1 and takes the rest."""
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
  for axis, size in sizes.items():
    if size != -1 and (size < 1 or count % size):
      raise ValueError(
        f"mesh axis {axis}: {size} does not divide {count} devices; valid: -1, {_divisors(count)}"
      )
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise ValueError(f"mesh axes {', '.join(free)}: only one of them can be -1")
  axis = free[0] if free else max(sizes, key=sizes.__getitem__)
  others = {a: s for a, s in sizes.items() if a != axis}
  rest = math.prod(others.values())
  if free and count % rest == 0:
    sizes[axis] = count // rest
  if sizes[axis] * rest != count:
    remedy = f"valid: {count // rest}" if count % rest == 0 else "make one of the others smaller"
    raise ValueError(
      f"mesh axis {axis}: {sizes[axis]} with {others} does not cover {count} devices; {remedy}"
    )
  shape = tuple(sizes.values())
  # In the order that suits the interconnect.
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """The rule of one array by its path ('/'-joined); scalars are replicated.

  ValueError with the path when no rule fits, and with parameter, axis and valid sizes when an axis
  does not divide its dimension.
  """
  if not shape:
    return P()
  spec = next((spec for rule, spec in RULES if re.search(f"(^|/){rule}$", path)), None)
  if spec is None:
    raise ValueError(f"no sharding rule for {path} {shape}: add one to policy/sharding.py RULES")
  if len(spec) != len(shape):
    raise ValueError(f"sharding rule {spec} of {path} does not fit the shape {shape}")
  for size, axis in zip(shape, spec, strict=True):
    if axis is not None and size % mesh.shape[axis]:
      raise ValueError(
        f"mesh axis {axis}: {mesh.shape[axis]} does not divide dimension {size} of {path} {shape}; "
        f"valid for {axis}: {_divisors(size, mesh.size)}"
      )
  return spec


def shardings(tree: Any, mesh: Mesh) -> Any:
  """The same tree with a NamedSharding for every array (or ShapeDtypeStruct)."""

  def leaf(path, x):
    return NamedSharding(mesh, spec_for(path_string(path), np.shape(x), mesh))

  return jax.tree_util.tree_map_with_path(leaf, tree)


def abstract(tree: Any, where: Any) -> Any:
  """The shapes of `tree` as ShapeDtypeStructs that lie as `where`, a tree of shardings, says."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)


def path_string(path: Any) -> str:
  """A key path of jax.tree_util as 'layers/q/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The layout of arrays whose leading axis is rows (or slots)."""
  return NamedSharding(mesh, P(ROWS))


def check_rows(name: str, rows: int, mesh: Mesh) -> None:
  """ValueError when `rows` (field `name`) does not divide over data x fsdp."""
  step = mesh.shape["data"] * mesh.shape["fsdp"]
  if rows % step:
    raise ValueError(
      f"{name}: {rows} is not a multiple of mesh axes data x fsdp = {step}; "
      f"valid: {rows - rows % step or step} or {rows + step - rows % step}"
    )


def check_heads(kv_heads: int, mesh: Mesh) -> None:
  """ValueError when mesh.tensor splits a key-value head: every chip would compute all of them."""
  tensor = mesh.shape["tensor"]
  if kv_heads % tensor:
    valid = [n for n in range(1, mesh.size + 1) if not (kv_heads % n or mesh.size % n)]
    nearest = min(valid, key=lambda n: abs(n - tensor))
    raise ValueError(
      f"mesh.tensor: {tensor} does not divide {kv_heads} key-value heads; nearest: {nearest}, "
      f"valid: {', '.join(map(str, valid))}"
    )


def rollout_mesh(mesh: Mesh, tensor: int, sizes: dict[str, int]) -> Mesh:
  """The devices of `mesh` as rollouts use them: data x tensor, nothing gathered for a token.

  Decoding reads every weight for one token a slot, so weights stay in parts (`tensor`) and slots
  are spread over the rest (`data`).

  Args:
    mesh: training's.
    tensor: 0 takes it as it is; -1 the most ways that devices and all of `sizes` split in.
    sizes: what lies over `tensor`, key-value heads among it; a head is never split.

  ValueError (rollout.tensor) with the nearest valid number where it does not divide one of them.
  """
  if not tensor:
    return mesh
  parted = {"devices": mesh.size} | sizes
  valid = [n for n in range(1, mesh.size + 1) if not any(size % n for size in parted.values())]
  if tensor != -1 and tensor not in valid:
    badly = ", ".join(f"{size} {name}" for name, size in parted.items() if size % tensor)
    nearest = min(valid, key=lambda n: abs(n - tensor))
    raise ValueError(
      f"rollout.tensor: {tensor} does not divide {badly}; nearest: {nearest}, valid: "
      f"{', '.join(map(str, valid))}, -1 (the most), 0 (as training)"
    )
  tensor = valid[-1] if tensor == -1 else tensor
  if dict(mesh.shape) == dict(zip(AXES, (mesh.size // tensor, 1, tensor), strict=True)):
    return mesh
  # In the order of training's mesh, so that one program can read one layout and write the other.
  devices = mesh.devices.reshape(mesh.size // tensor, 1, tensor)
  return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def cache_spec(row: tuple[int, ...], mesh: Any) -> PartitionSpec:
  """Of a TPU's k and v [layers, slots, S, *row]; heads are replicated where they must."""
  split = len(row) == 2 and row[0] % mesh.shape["tensor"] == 0
  return P(None, ROWS, None, *(("tensor",) if split else ()))


def place(x: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
  """An array that every process holds whole, laid out over the devices of all."""
  return jax.make_array_from_callback(np.shape(x), where, lambda index: x[index])


def to_host(x: jax.Array) -> np.ndarray:
  """The whole array in every process; all processes call it, in the same order."""
  if not x.is_fully_addressable and not x.is_fully_replicated:
    x = jax.jit(_same, out_shardings=replicated(x.sharding.mesh))(x)
  return np.asarray(x)


@jax.jit
def layer_of(x: jax.Array, layer: int) -> jax.Array:
  """One layer of a stack: x[layer] would compile anew for every layer."""
  return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)


def _same(x: jax.Array) -> jax.Array:
  return x


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  """Pins the layout of an intermediate under `jax.set_mesh`.

  Does nothing outside of one, nor where a dimension does not divide over its axes.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.axis_names != AXES or set(mesh.axis_types) != {AxisType.Auto}:
    return x
  return jax.lax.with_sharding_constraint(x, spec) if _divides(x.shape, spec, mesh) else x


def constrain_rows(x: jax.Array, sequence: bool = False) -> jax.Array:
  """Keeps activations sharded by rows.

  Without it the partitioner may follow the fsdp axis of a weight and gather activations instead.
  sequence: positions lie over `tensor` where they divide, so that what the backward pass keeps is
  stored once.
  """
  spread = P(ROWS, "tensor")
  if sequence and _divides(x.shape, spread, _mesh()):
    return constrain(x, spread)
  return constrain(x, P(ROWS))


def constrain_features(x: jax.Array, axis: str) -> jax.Array:
  """Shards the last dimension of [N, 1, X] over `axis` and rows over `data` alone.

  For one token a slot: so few activations travel to the weights, instead of all weights to them.
  """
  return constrain(x, P("data", *(None,) * (x.ndim - 2), axis))


def constrain_logits(x: jax.Array) -> jax.Array:
  """Logits [N, V] as the output matrix lies: the vocabulary over `tensor`.

  Sampling then computes its noise, maximum and sum in parts; a row of logits never travels.
  """
  spread = P(ROWS, "tensor")
  return constrain(x, spread if _divides(x.shape, spread, _mesh()) else P(ROWS))


def constrain_heads(x: jax.Array) -> jax.Array:
  """Queries, keys or values [N, C, H, h] as the cache lies."""
  return constrain(x, P(ROWS, None, "tensor"))


def _mesh() -> Any:
  return jax.sharding.get_abstract_mesh()


def rows_divide(rows: int, mesh: Any) -> bool:
  """Whether so many rows split evenly over the mesh's row axes."""
  return _divides((rows,), P(ROWS), mesh)


def _divides(shape: tuple[int, ...], spec: PartitionSpec, mesh: Any) -> bool:
  """Whether every dimension splits evenly over its axes; the mesh may be without some of them."""
  for size, axes in zip(shape, spec, strict=False):
    names = (axes,) if isinstance(axes, str) else axes or ()
    if size % math.prod(mesh.shape.get(name, 1) for name in names):
      return False
  return True


def mesh_of_rows(rows: int) -> Any:
  """The mesh that a shard_map over so many rows runs on.

  None with one device, outside of a mesh, and where the rows do not divide.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.axis_names != AXES or mesh.size == 1 or not rows_divide(rows, mesh):
    return None
  return mesh


def platform() -> str:
  """'tpu', 'gpu' or 'cpu': what programs are made for, which need not be this machine."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None:
    return device.platform
  return jax.default_backend()


def jit(function: Callable, **options: Any) -> Callable:
  """jax.jit for a run's programs, with this platform's compiler settings."""
  return jax.jit(function, compiler_options=compiler_options(), **options)


def compiler_options() -> dict[str, str]:
  """Settings of this platform's compiler.

  On TPUs weights are gathered whole for their product. XLA's other way, rings of partial products,
  is unrolled: several times the compile time, for the same estimated speed.
  """
  if platform() != "tpu":
    return {}
  return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def _divisors(size: int, most: int | None = None) -> str:
  return ", ".join(str(n) for n in range(1, (most or size) + 1) if size % n == 0)
