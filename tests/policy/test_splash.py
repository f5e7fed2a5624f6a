"""The TPU kernel, interpreted, against the XLA attention: values, gradients, and its FLOPs."""

import functools

import jax
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
