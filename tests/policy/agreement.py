"""Whether two implementations of attention agree."""

import jax
import jax.numpy as jnp
import numpy as np


def assert_agree(one, other, inputs, segments, weight):
  """Two attentions give the same values and gradients."""

  def both(function):
    def value(q, k, v):
      return jnp.sum(weight * jnp.sin(function(q, k, v, segments)))

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))(*inputs)

  def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)

  jax.tree.map(close, both(one), both(other))
