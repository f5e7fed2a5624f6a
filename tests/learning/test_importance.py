"""Truncated importance weights against a slow oracle and by hand."""

import fakes
import jax.numpy as jnp
import numpy as np
import pytest

from steptool_jax.learning import batching, importance


def oracle(logprobs, batch, level, bound):
  """Token by token, trajectory by trajectory, in NumPy."""
  weights = np.ones(logprobs.shape)
  ratio_of = np.exp(logprobs.astype(np.float64) - batch.behaviour_logprobs)
  for row in range(len(logprobs)):
    for segment in set(batch.segment_ids[row].tolist()) - {0}:
      at = np.flatnonzero((batch.segment_ids[row] == segment) & batch.action_mask[row])
      for t in at:
        weights[row, t] = {
          "token": min(ratio_of[row, t], bound),
          "sequence": min(np.prod(ratio_of[row, at]), bound),
          "none": 1.0,
        }[level]
  return weights


@pytest.fixture(scope="module")
def batch():
  """Several trajectories in a row, whose weights must not mix."""
  rng = np.random.default_rng(3)
  return batching.pack([fakes.random_trajectory(rng) for _ in range(7)], 64).batch


@pytest.mark.parametrize("level", importance.LEVELS)
def test_weights_are_those_of_the_oracle(level, batch):
  rng = np.random.default_rng(0)
  now = (batch.behaviour_logprobs + rng.normal(0, 0.6, batch.tokens.shape)).astype(np.float32)
  weights, metrics = importance.truncated_weights(jnp.asarray(now), batch, level, 1.5)
  expected = oracle(now, batch, level, 1.5)
  np.testing.assert_allclose(weights, expected, rtol=1e-5)
  mask = np.asarray(batch.action_mask)
  np.testing.assert_allclose(metrics["importance"], expected[mask].mean(), rtol=1e-5)
  cut = np.isclose(expected, 1.5, rtol=1e-6)
  assert cut.any() == (level != "none")
  np.testing.assert_allclose(metrics["importance_cut"], cut[mask].mean(), rtol=1e-5)


def test_literals(batch):
  """Two sampled tokens, ln 2 and ln 3 above what sampled them: 2 and 3; together 6; cut at 4."""
  one = batch._replace(
    **{name: np.asarray(getattr(batch, name))[:1, :4] for name in ("segment_ids", "action_mask")}
  )
  one = one._replace(
    segment_ids=np.array([[1, 1, 1, 0]], np.int32),
    action_mask=np.array([[False, True, True, False]]),
    behaviour_logprobs=np.array([[0.0, -3.0, -2.0, 0.0]], np.float32),
  )
  now = jnp.array([[9.0, -3.0 + np.log(2), -2.0 + np.log(3), -9.0]], jnp.float32)
  for level, bound, expected in (
    ("token", 4.0, [1, 2, 3, 1]),
    ("token", 2.5, [1, 2, 2.5, 1]),
    ("sequence", 8.0, [1, 6, 6, 1]),
    ("sequence", 4.0, [1, 4, 4, 1]),
    ("none", 4.0, [1, 1, 1, 1]),
  ):
    weights, _ = importance.truncated_weights(now, one, level, bound)
    np.testing.assert_allclose(weights[0], expected, rtol=1e-6)


def test_a_huge_ratio_is_cut_and_not_infinite(batch):
  weights, _ = importance.truncated_weights(
    jnp.full(batch.tokens.shape, 500.0, jnp.float32), batch, "sequence", 2.0
  )
  assert np.isfinite(weights).all()
  assert np.max(weights) == 2.0
