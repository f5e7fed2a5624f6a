"""Attention against a slow oracle, values and gradients, in one pass and in several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steptool_jax.policy import attention


def oracle(q, k, v, segments):
  """Token by token, head by head."""
  B, T, H, h = q.shape
  group = H // k.shape[2]
  rows = []
  for b in range(B):
    for t in range(T):
      seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
      for head in range(H):
        keys = jnp.stack([k[b, s, head // group] for s in seen])
        values = jnp.stack([v[b, s, head // group] for s in seen])
        rows.append(jax.nn.softmax(keys @ q[b, t, head] / np.sqrt(h)) @ values)
  return jnp.stack(rows).reshape(B, T, H, h)


@pytest.mark.parametrize("block", [128, 4])
def test_values_and_gradients(block, monkeypatch):
  monkeypatch.setattr(attention, "QUERY_BLOCK", block)
  keys = jax.random.split(jax.random.key(0), 4)
  q, weight = (jax.random.normal(key, (1, 10, 4, 6)) for key in keys[:2])
  k, v = (jax.random.normal(key, (1, 10, 2, 6)) for key in keys[2:])
  segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0, 0]])

  assert_agree(attention.attend, oracle, (q, k, v), segments, weight)


def assert_agree(one, other, inputs, segments, weight):
  """Two attentions give the same values and gradients."""

  def both(function):
    def value(q, k, v):
      return jnp.sum(weight * jnp.sin(function(q, k, v, segments)))

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))(*inputs)

  def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)

  jax.tree.map(close, both(one), both(other))


def test_passes_cover_every_query_once():
  assert attention._passes(5) == [(0, 5)]
  assert attention._passes(300) == [(0, 128), (128, 256), (256, 300)]
  assert attention._passes(8192) == [(n, n + 1024) for n in range(0, 8192, 1024)]
  assert attention._passes(1025)[-1] == (1024, 1025)


def test_large_scores_stay_finite():
  q = jnp.full((1, 6, 1, 2), 200.0)
  segments = jnp.array([[1, 1, 1, 2, 0, 0]])
  value, grads = jax.value_and_grad(lambda q: attention.attend(q, q, q, segments).sum())(q)
  assert np.isfinite(value)
  assert np.isfinite(grads).all()
