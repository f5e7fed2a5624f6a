"""Whether two implementations of attention agree; the slow one."""

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


def token_by_token(sees):
  """Attention in a loop; sees: (what is said of the rows, row, query, key <= query) -> bool."""

  def attend(q, k, v, said):
    B, T, H, h = q.shape
    k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    rows = []
    for b in range(B):
      for t in range(T):
        seen = np.array([s for s in range(t + 1) if sees(said, b, t, s)])
        probs = jax.nn.softmax(jnp.einsum("shd,hd->hs", k[b, seen], q[b, t]) / np.sqrt(h))
        rows.append(jnp.einsum("hs,shd->hd", probs, v[b, seen]))
    return jnp.stack(rows).reshape(B, T, H, h)

  return attend
