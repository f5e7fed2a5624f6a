"""The TPU kernel, interpreted, against slower attention: values, gradients, and its FLOPs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree

from steptool_jax.policy import attention, sharding, splash


@pytest.mark.parametrize("length", [256, 150])
def test_equals_xla_with_segments(length):
  """Grouped heads, two trajectories and padding in a row, a row of padding only."""
  keys = jax.random.split(jax.random.key(0), 4)
  q, weight = (jax.random.normal(key, (2, length, 4, 32)) for key in keys[:2])
  k, v = (jax.random.normal(key, (2, length, 2, 32)) for key in keys[2:])
  segments = np.zeros((2, length), np.int32)
  segments[0, :90], segments[0, 90:140] = 1, 2
  interpreted = functools.partial(splash.attend, interpret=True)
  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    assert_agree(interpreted, attention.attend, (q, k, v), segments, weight)


# A root of two tokens with two branches, the second of which has two of its own; then a path.
TREE = [8, 8, 4, 4, 8, 6, 8, 8, 10, 10]
PATHS = [0, 1, 2, 3, 2, 3, 3, 4, 0, 1]


def test_mask_of_a_tree_by_hand():
  """The sixth token (5) sees the root and its parent; with a reach of 3 not the root's first."""
  until, positions = jnp.array(TREE), jnp.array(PATHS)
  seen = np.array(splash.tree_mask(until, positions, jnp.int32(10))).astype(int)
  assert seen.tolist() == [
    [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 1, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 1, 1, 0, 0, 0, 0],
    [1, 1, 0, 0, 1, 0, 1, 0, 0, 0],
    [1, 1, 0, 0, 1, 0, 1, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0, 1, 0],
    [0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
  ]
  near = splash.tree_mask(until, positions, jnp.int32(3))
  assert np.flatnonzero(near[5]).tolist() == [1, 4, 5]


@pytest.mark.parametrize("reach", [None, 40])
def test_trees_equal_the_slow_oracle(reach):
  """A branch that saw its sibling, or whose gradient reached it, in blocks of 128: the first row's
  first branch is a block that the second one passes over; the second row is padding."""
  length = 300
  keys = jax.random.split(jax.random.key(0), 4)
  q, weight = (jax.random.normal(key, (2, length, 2, 8)) for key in keys[:2])
  k, v = (jax.random.normal(key, (2, length, 1, 8)) for key in keys[2:])
  until = np.tile(np.arange(1, length + 1), (2, 1))
  positions = np.zeros((2, length), np.int32)
  for start, stop, end, first in ((0, 100, 290, 0), (100, 256, 256, 100), (256, 290, 290, 100)):
    until[0, start:stop] = end
    positions[0, start:stop] = first + np.arange(stop - start)

  def sees(b, t, s):
    near = reach is None or positions[b, t] - positions[b, s] < reach
    return s == t or (s < t < ends[b, s] and near)

  ends = until

  def interpreted(q, k, v, until):
    window = None if reach is None else jnp.int32(reach)
    tree = attention.Tree(until, positions)
    return splash.attend(q, k, v, jnp.zeros_like(until), tree, window=window, interpret=True)

  def oracle(q, k, v, until):
    every = range(length)
    seen = np.array([[[sees(b, t, s) for s in every] for t in every] for b in (0, 1)])
    k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(8)
    probs = jax.nn.softmax(jnp.where(seen[:, None], scores, -np.inf))
    return jnp.einsum("bhts,bshd->bthd", probs, v)

  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    assert_agree(interpreted, oracle, (q, k, v), until, weight)


def test_flops_of_the_kernels_by_hand():
  # 1,024 tokens are 2 x 2 blocks of 512, of which 3 are worked on; 8 heads of width 128.
  pairs = 3 * 512 * 512
  shape = (8, 1024, 128)
  forward = 2 * 2 * 8 * 128 * pairs
  assert splash.kernel_flops("splash_mha_fwd_segmented_residuals.2", shape) == forward
  assert splash.kernel_flops("splash_mha_dq_segmented_no_residuals.1", shape) == forward * 3 / 2
  assert splash.kernel_flops("splash_mha_dkv_segmented_no_residuals", (3, *shape)) == 6 * forward
  assert splash.kernel_flops("another_kernel", shape) == 0


def test_the_platform_is_that_of_the_mesh():
  assert sharding.platform() == jax.default_backend()
  assert not sharding.compiler_options()
  mesh = jax.sharding.AbstractMesh(
    (1, 1, 1),
    sharding.AXES,
    abstract_device=jax.sharding.AbstractDevice("TPU v5 lite", 1, platform="tpu"),
  )
  with jax.sharding.use_abstract_mesh(mesh):
    assert sharding.platform() == "tpu"
    assert sharding.compiler_options()
