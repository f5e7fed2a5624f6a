"""Log-probs and entropy of sampled tokens, with a gradient of their own.

[B, T, V] never exists, forward or backward: sampled positions are moved to the front of their row
and worked on in chunks, the vocabulary in blocks with a running softmax. On a mesh the loops run
inside shard_map: each block of the output matrix is gathered over `fsdp` once a pass, and its
gradient is summed over a device's own rows before it is scattered back.

Shapes: B rows, T tokens, n chunks of C positions, D hidden, V vocabulary, v tokens of a block.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from steptool_jax.policy import model
from steptool_jax.policy.attention import MASKED
from steptool_jax.policy.sharding import ROWS, mesh_of_rows, spec_for

MAX_BLOCK = 16384  # tokens of the vocabulary worked on at a time
MIN_BLOCK = 2048  # an odd vocabulary, which has no such divisor, is one block


@dataclasses.dataclass(frozen=True)
class _Static:
  """chunk: positions that are projected at a time. mesh: where the loops run; None = one device."""

  config: model.ModelConfig
  temperature: float
  chunk: int
  mesh: Any

  @property
  def tied(self) -> bool:
    """Whether the output matrix is the embedding [V, D] and not [D, V]."""
    return self.config.tie_embeddings


class _Softmax(NamedTuple):
  """The running softmax over the blocks seen so far, float32 [..., C]."""

  top: jax.Array
  total: jax.Array  # sum of exp(logit - top)
  moment: jax.Array  # sum of exp(logit - top) logit
  chosen: jax.Array  # logit of the target


def action_logprobs(
  config: model.ModelConfig,
  variables: dict,
  hidden_BTD: jax.Array,
  targets_BT: jax.Array,
  mask_BT: jax.Array,
  temperature: float,
  chunk: int,
) -> tuple[jax.Array, jax.Array]:
  """(log-prob of targets, entropy), float32 [B, T], under softmax(logits / temperature).

  Both are 0 outside the mask. chunk: positions of a row projected at a time; chunks without a
  sampled token are skipped at run time.
  """
  mesh = mesh_of_rows(mask_BT.shape[0])
  static = _Static(config, temperature, min(chunk, mask_BT.shape[1]), mesh)
  if config.tie_embeddings:
    head = {"kernel": variables["params"]["embed"]["embedding"]}
  else:
    head = {"kernel": variables["params"]["lm_head"]["kernel"]}
  head |= variables.get("lora", {}).get("lm_head", {})
  return _logprobs(static, head, hidden_BTD, targets_BT, mask_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(static, head, hidden_BTD, targets_BT, mask_BT):
  return _forward(static, head, hidden_BTD, targets_BT, mask_BT)[0]


def _forward(static, head, hidden_BTD, targets_BT, mask_BT):
  specs = (_head_specs(static, head), P(ROWS), P(ROWS), P(ROWS))
  run = _over_mesh(static, _forward_rows, specs, (P(ROWS),) * 3)
  logprobs_BT, entropy_BT, normalizer_BT = run(head, hidden_BTD, targets_BT, mask_BT)
  residuals = (head, hidden_BTD, targets_BT, mask_BT, entropy_BT, normalizer_BT)
  return (logprobs_BT, entropy_BT), residuals


def _backward(static, residuals, cotangents):
  head_specs = _head_specs(static, residuals[0])
  specs = ((head_specs, *(P(ROWS),) * 5), (P(ROWS), P(ROWS)))
  run = _over_mesh(static, _backward_rows, specs, (head_specs, P(ROWS)))
  d_head, d_hidden_BTD = run(residuals, cotangents)
  return d_head, d_hidden_BTD, None, None


_logprobs.defvjp(_forward, _backward)


def _over_mesh(static, function, in_specs, out_specs):
  function = functools.partial(function, static)
  if static.mesh is None:
    return function
  return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _head_specs(static, head):
  if static.mesh is None:
    return None
  names = {"kernel": "embed/embedding" if static.tied else "lm_head/kernel"}
  return {
    name: spec_for(names.get(name, f"lm_head/{name}"), x.shape, static.mesh)
    for name, x in head.items()
  }


# --- the rows of one device ---


def _forward_rows(static, head, hidden_BTD, targets_BT, mask_BT):
  rows = _Rows(static, mask_BT)
  hidden, targets = rows.chunks(hidden_BTD), rows.chunks(targets_BT)
  blocks, first = _blocks(static, head)

  def one_block(stats, number):
    block = _gather_block(static, head, number, blocks)

    def one_chunk(hidden_BCD, targets_BC, stats):
      logits_BCv = _project(static, block, hidden_BCD)
      at_BC = targets_BC - (first + number * logits_BCv.shape[-1])
      inside_BC = (at_BC >= 0) & (at_BC < logits_BCv.shape[-1])
      index_BC = jnp.where(inside_BC, at_BC, 0)
      chosen_BC = jnp.take_along_axis(logits_BCv, index_BC[..., None], axis=-1)[..., 0]
      top_BC = jnp.maximum(stats.top, logits_BCv.max(axis=-1))
      weights_BCv = jnp.exp(logits_BCv - top_BC[..., None])
      decay_BC = jnp.exp(stats.top - top_BC)
      return _Softmax(
        top_BC,
        stats.total * decay_BC + weights_BCv.sum(axis=-1),
        stats.moment * decay_BC + (weights_BCv * logits_BCv).sum(axis=-1),
        stats.chosen + jnp.where(inside_BC, chosen_BC, 0.0),
      )

    return rows.each(one_chunk, lambda _h, _t, stats: stats, hidden, targets, stats), None

  zeros = jnp.zeros(targets.shape, jnp.float32)
  stats = _Softmax(jnp.full(targets.shape, MASKED, jnp.float32), zeros, zeros, zeros)
  stats, _ = lax.scan(one_block, stats, jnp.arange(blocks))
  if static.mesh is not None:
    top = lax.pmax(stats.top, "tensor")
    decay = jnp.exp(stats.top - top)
    total, moment = stats.total * decay, stats.moment * decay
    stats = _Softmax(top, *lax.psum((total, moment, stats.chosen), "tensor"))
  total = jnp.maximum(stats.total, 1e-30)  # a skipped chunk has seen nothing
  normalizer = stats.top + jnp.log(total)
  entropy = normalizer - stats.moment / total
  return rows.back(stats.chosen - normalizer), rows.back(entropy), rows.back(normalizer)


def _backward_rows(static, residuals, cotangents):
  """d log-prob / d logit_j = [j = target] - p_j; d H / d logit_j = -p_j (log p_j + H)."""
  head, hidden_BTD, targets_BT, mask_BT, entropy_BT, normalizer_BT = residuals
  rows = _Rows(static, mask_BT)
  hidden, targets = rows.chunks(hidden_BTD), rows.chunks(targets_BT)
  numbers = [
    rows.chunks(jnp.where(mask_BT, x, 0.0)) for x in (entropy_BT, normalizer_BT, *cotangents)
  ]
  blocks, first = _blocks(static, head)

  def one_block(carry, number):
    d_head, d_hidden = carry
    block = _gather_block(static, head, number, blocks)

    def one_chunk(hidden_BCD, targets_BC, entropy_BC, normalizer_BC, d_logprob_BC, d_entropy_BC):
      logits_BCv = _project(static, block, hidden_BCD)
      at_BC1 = (targets_BC - (first + number * logits_BCv.shape[-1]))[..., None]
      log_probs_BCv = logits_BCv - normalizer_BC[..., None]
      probs_BCv = jnp.exp(log_probs_BCv)
      d_logits_BCv = d_logprob_BC[..., None] * (
        (at_BC1 == jnp.arange(logits_BCv.shape[-1])) - probs_BCv
      ) - d_entropy_BC[..., None] * probs_BCv * (log_probs_BCv + entropy_BC[..., None])
      if static.config.final_logit_cap is not None:
        tanh_BCv = logits_BCv * (static.temperature / static.config.final_logit_cap)
        d_logits_BCv *= 1.0 - jnp.square(tanh_BCv)
      return _project_back(static, block, hidden_BCD, d_logits_BCv)

    def skipped(hidden_BCD, *_):
      return _zeros(block), jnp.zeros(hidden_BCD.shape, jnp.float32)

    d_block, d_more = rows.sum_and_each(
      one_chunk, skipped, _zeros(block), hidden, targets, *numbers
    )
    return (_scatter_block(static, d_head, d_block, number, blocks), d_hidden + d_more), None

  start = (_zeros(head), jnp.zeros(hidden.shape, jnp.float32))
  (d_head, d_hidden), _ = lax.scan(one_block, start, jnp.arange(blocks))
  if static.mesh is not None:
    d_hidden = lax.psum(d_hidden, "tensor")
    if "a" in d_head:  # each shard of the vocabulary adds to it
      d_head["a"] = lax.psum(d_head["a"], "tensor")
  d_head = jax.tree.map(lambda d, x: d.astype(x.dtype), d_head, head)
  return d_head, rows.back(d_hidden).astype(hidden_BTD.dtype)


class _Rows:
  """Sampled positions first, cut into chunks [n, B, C, ...] and back."""

  def __init__(self, static, mask_BT):
    length = mask_BT.shape[1]
    self.mask_BT, self.chunk = mask_BT, static.chunk
    self.number = -(-length // self.chunk)
    # A stable sort of (not sampled) brings the sampled positions to the front in their order.
    order_BT = jnp.argsort(~mask_BT, axis=1, stable=True)
    self.inverse_BT = jnp.argsort(order_BT, axis=1)
    self.order_BT, self.pad = order_BT, self.number * self.chunk - length
    used = jnp.arange(self.number) * self.chunk
    self.used_n = jnp.any(mask_BT.sum(axis=1)[:, None] > used, axis=0)

  def chunks(self, x_BTX):
    index = self.order_BT.reshape(*self.order_BT.shape, *(1,) * (x_BTX.ndim - 2))
    taken = jnp.take_along_axis(x_BTX, index, axis=1)
    taken = jnp.pad(taken, ((0, 0), (0, self.pad), *((0, 0),) * (x_BTX.ndim - 2)))
    shape = (x_BTX.shape[0], self.number, self.chunk, *x_BTX.shape[2:])
    return taken.reshape(shape).swapaxes(0, 1)

  def back(self, x_nBCX):
    rows, length = self.mask_BT.shape
    flat = x_nBCX.swapaxes(0, 1).reshape(rows, self.number * self.chunk, *x_nBCX.shape[3:])
    extra = (1,) * (flat.ndim - 2)
    taken = jnp.take_along_axis(flat, self.inverse_BT.reshape(rows, length, *extra), axis=1)
    return jnp.where(self.mask_BT.reshape(rows, length, *extra), taken, 0.0)

  def each(self, function, skipped, *arrays):
    """The function's results of every chunk, stacked; `skipped` stands in where none is sampled."""
    return lax.scan(
      lambda _, x: (None, lax.cond(x[0], function, skipped, *x[1:])), None, (self.used_n, *arrays)
    )[1]

  def sum_and_each(self, function, skipped, zero, *arrays):
    """(sum of the first results, second results stacked)."""

    def step(total, x):
      first, second = lax.cond(x[0], function, skipped, *x[1:])
      return jax.tree.map(jnp.add, total, first), second

    return lax.scan(step, zero, (self.used_n, *arrays))


def _zeros(tree):
  return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


# --- blocks of the vocabulary ---


def _blocks(static, head) -> tuple[int, Any]:
  """(number of blocks, first token) of the vocabulary that this device holds."""
  size = head["kernel"].shape[0 if static.tied else 1]
  block = next((b for b in range(min(MAX_BLOCK, size), MIN_BLOCK - 1, -1) if size % b == 0), size)
  shard = 0 if static.mesh is None else lax.axis_index("tensor")
  return size // block, shard * size


def _vocabulary_axis(static, name) -> int | None:
  return {"kernel": 0 if static.tied else 1, "b": 1}.get(name)


def _gather_block(static, head, number, blocks):
  """Block `number` of the output matrix (and its adapter), whole in D, in the compute dtype."""

  def one(name, x):
    axis = _vocabulary_axis(static, name)
    if axis is not None:
      size = x.shape[axis] // blocks
      x = lax.dynamic_slice_in_dim(x, number * size, size, axis)
    x = x.astype(static.config.dtype)
    if static.mesh is not None and name != "b":
      x = lax.all_gather(x, "fsdp", axis=1 if name == "kernel" and static.tied else 0, tiled=True)
    return x

  return {name: one(name, x) for name, x in head.items()}


def _scatter_block(static, d_head, d_block, number, blocks):
  """Adds a block's gradient, summed over all rows, to this device's shard."""

  def one(name, total, d):
    if static.mesh is not None:
      if name == "b":
        d = lax.psum(d, ROWS)
      else:
        axis = 1 if name == "kernel" and static.tied else 0
        d = lax.psum(lax.psum_scatter(d, "fsdp", scatter_dimension=axis, tiled=True), "data")
    axis = _vocabulary_axis(static, name)
    if axis is None:
      return total + d
    return lax.dynamic_update_slice_in_dim(total, d, number * (total.shape[axis] // blocks), axis)

  return {name: one(name, d_head[name], d_block[name]) for name in d_head}


def _project(static, block, hidden_BCD):
  kernel = "bcd,vd->bcv" if static.tied else "bcd,dv->bcv"
  logits_BCv = _product(static, kernel, hidden_BCD, block["kernel"])
  if "a" in block:
    low = _product(static, "bcd,dr->bcr", hidden_BCD, block["a"])
    logits_BCv += static.config.lora_scale * _product(static, "bcr,rv->bcv", low, block["b"])
  return model.cap_logits(static.config, logits_BCv) / static.temperature


def _project_back(static, block, hidden_BCD, d_logits_BCv):
  """Gradients of the block and of the hidden states, float32."""
  d_logits_BCv = d_logits_BCv / static.temperature
  kernel = block["kernel"]
  if static.tied:
    d_block = {"kernel": _product(static, "bcv,bcd->vd", d_logits_BCv, hidden_BCD)}
    d_hidden_BCD = _product(static, "bcv,vd->bcd", d_logits_BCv, kernel)
  else:
    d_block = {"kernel": _product(static, "bcd,bcv->dv", hidden_BCD, d_logits_BCv)}
    d_hidden_BCD = _product(static, "bcv,dv->bcd", d_logits_BCv, kernel)
  if "a" in block:
    scaled_BCv = static.config.lora_scale * d_logits_BCv
    low = _product(static, "bcd,dr->bcr", hidden_BCD, block["a"])
    d_low = _product(static, "bcv,rv->bcr", scaled_BCv, block["b"])
    d_block["b"] = _product(static, "bcr,bcv->rv", low, scaled_BCv)
    d_block["a"] = _product(static, "bcd,bcr->dr", hidden_BCD, d_low)
    d_hidden_BCD += _product(static, "bcr,dr->bcd", d_low, block["a"])
  return d_block, d_hidden_BCD


def _product(static, subscripts, x, y):
  """Compute-dtype factors, float32 accumulation."""
  dtype = static.config.dtype
  return jnp.einsum(
    subscripts, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32
  )
