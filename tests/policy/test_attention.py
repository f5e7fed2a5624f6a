"""Attention against a slow oracle, values and gradients, in one pass and in several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree, token_by_token

from steptool_jax.policy import attention

oracle = token_by_token(lambda segments, b, t, s: segments[b, s] == segments[b, t])
# Those on the way from the root.
tree_oracle = token_by_token(lambda until, b, t, s: t < until[b][s] or s == t)


@pytest.mark.parametrize("block", [128, 4])
@pytest.mark.parametrize(
  "segments",
  [
    [[1, 1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 10],
    [[3, 3, 1, 1, 2, 2, 2, 2, 2, 4], [0] * 10],
  ],
)
def test_values_and_gradients(segments, block, monkeypatch):
  monkeypatch.setattr(attention, "CPU_BLOCK", block)
  keys = jax.random.split(jax.random.key(0), 4)
  q, weight = (jax.random.normal(key, (2, 10, 4, 6)) for key in keys[:2])
  k, v = (jax.random.normal(key, (2, 10, 2, 6)) for key in keys[2:])

  assert_agree(attention.attend, oracle, (q, k, v), np.array(segments), weight)


# A root of two tokens with two branches, the second of which has two of its own; then a path.
TREE = [8, 8, 4, 4, 8, 6, 8, 8, 10, 10]


@pytest.mark.parametrize("block", [128, 4])
def test_a_token_sees_its_own_path_through_a_tree(block, monkeypatch):
  """Branches that saw each other would be trained on what was never in their context."""
  monkeypatch.setattr(attention, "CPU_BLOCK", block)
  keys = jax.random.split(jax.random.key(0), 4)
  q, weight = (jax.random.normal(key, (2, 10, 4, 6)) for key in keys[:2])
  k, v = (jax.random.normal(key, (2, 10, 2, 6)) for key in keys[2:])
  until = np.array([TREE, [*range(1, 11)]])  # the second row is padding: each sees itself

  def attend(q, k, v, until):
    return attention.attend(
      q, k, v, jnp.zeros_like(until), attention.Tree(until, jnp.zeros_like(until))
    )

  assert_agree(attend, tree_oracle, (q, k, v), until, weight)


def test_blocks_seen_by_hand():
  """Blocks of two: the root is seen by all, the first branch by nobody after it."""
  until = jnp.array(TREE).reshape(5, 1, 2)
  seen = np.tril(attention._blocks_seen((until, jnp.zeros_like(until))))
  assert seen.astype(int).tolist() == [
    [1, 0, 0, 0, 0],
    [1, 1, 0, 0, 0],
    [1, 0, 1, 0, 0],
    [1, 0, 1, 1, 0],
    [0, 0, 0, 0, 1],
  ]


def test_keys_of_another_trajectory_are_not_worked_on(monkeypatch):
  monkeypatch.setattr(attention, "CPU_BLOCK", 4)
  k = jnp.ones((1, 12, 1, 2)).at[:, :4].set(jnp.nan)  # masked, NaN would stay NaN
  segments = jnp.array([[1] * 4 + [2] * 8])

  def tail(q):
    return attention.attend(q, k, k, segments)[:, 4:].sum()

  value, grad = jax.value_and_grad(tail)(jnp.ones((1, 12, 1, 2)))
  assert np.isfinite(value)
  assert np.isfinite(grad[:, 4:]).all()


def test_large_scores_stay_finite():
  q = jnp.full((1, 6, 1, 2), 200.0)
  segments = jnp.array([[1, 1, 1, 2, 0, 0]])
  value, grads = jax.value_and_grad(lambda q: attention.attend(q, q, q, segments).sum())(q)
  assert np.isfinite(value)
  assert np.isfinite(grads).all()
