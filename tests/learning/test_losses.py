"""The policy's losses, each against its paper's formula in NumPy, and against a literal."""

import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples

from steptool_jax.config import Config, Loss, Rollout
from steptool_jax.learning import algorithms, batching, losses
from steptool_jax.learning.outputs import Outputs

ROWS = 6
SETTINGS = {
  "clip_low": 0.2,
  "clip_high": 0.3,
  "dual_clip": 3.0,
  "sapo_positive": 1.0,
  "sapo_negative": 1.05,
}


def made(seed=0, count=6):
  rng = np.random.default_rng(seed)
  return [fakes.random_trajectory(rng) for _ in range(count)]


def filled(trajectories, alone=False):
  """(batch of ROWS rows with old log-probs and advantages, log-probs), packed or one a row.

  Both belong to a trajectory, wherever it lies; some ratios run away.
  """
  parts = [trajectories] if not alone else [[t] for t in trajectories]
  batches = [batching.pack(part, 64).batch for part in parts]
  rows = jax.tree.map(lambda *x: np.concatenate(x), *batches)
  empty = batching.empty_batch(ROWS - len(rows.tokens), 64)
  batch = jax.tree.map(lambda x, pad: np.concatenate([x, pad]), rows, empty)
  logprobs, old, advantage = (np.zeros(batch.tokens.shape, np.float32) for _ in range(3))
  for row, at in units(batch, "trajectory"):
    rng = np.random.default_rng(batch.targets[row, at])
    logprobs[row, at] = rng.normal(-1.5, 0.5, at.size)
    old[row, at] = logprobs[row, at] - rng.normal(0, 1.2, at.size)
    advantage[row, at] = rng.normal()
  return batch._replace(old_logprobs=old, advantages=advantage), logprobs


def units(batch, unit):
  """[(row, positions)] of everything that shares a ratio or a weight."""
  out = []
  for row in range(len(batch.tokens)):
    for t in np.flatnonzero(batch.action_mask[row]):
      key = (int(batch.segment_ids[row, t]), int(batch.step_ids[row, t]), int(t))
      size = {"trajectory": 1, "step": 2, "token": 3}[unit]
      out.append(((row, *key[:size]), t))
  grouped = {}
  for key, t in out:
    grouped.setdefault(key, []).append(t)
  return [(key[0], np.array(at)) for key, at in grouped.items()]


def surrogate_oracle(name, ratio, logprob, a, c):
  """The loss of one token by its paper's formula."""
  limited = min(max(ratio, 1 - c.clip_low), 1 + c.clip_high)
  ppo = min(ratio * a, limited * a)
  if name == "ppo":  # Schulman et al. 2017, eq. 7
    return -ppo
  if name == "dual_clip":  # Ye et al. 2020, eq. 5
    return -max(ppo, c.dual_clip * a) if a < 0 else -ppo
  if name == "cispo":  # MiniMax-M1, eq. 4 and 5, no lower bound
    return -min(ratio, 1 + c.clip_high) * a * logprob
  tau = c.sapo_positive if a > 0 else c.sapo_negative  # SAPO: sigma(tau (r - 1)) 4 / tau
  return -a * 4 / tau / (1 + np.exp(-tau * (ratio - 1)))


def oracle(batch, logprobs, aggregation, c, rollout):
  """(sum, denominator): loops over trajectories, steps and tokens, float64."""
  total, weight = 0.0, 0.0
  losses_of = np.zeros(logprobs.shape)
  for row, at in units(batch, c.ratio):
    ratio = np.exp(np.mean(logprobs[row, at].astype(float) - batch.old_logprobs[row, at]))
    for t in at:
      a = float(batch.advantages[row, t])
      losses_of[row, t] = surrogate_oracle(c.surrogate, ratio, float(logprobs[row, t]), a, c)
  kind = "token" if aggregation == "constant" else aggregation
  for row, at in units(batch, kind):
    total += losses_of[row, at].mean()
    weight += 1
  if aggregation == "constant":
    longest = min(rollout.max_steps * rollout.max_step_tokens, rollout.max_tokens)
    weight = longest * len(units(batch, "trajectory"))
  return total, weight


@functools.partial(jax.jit, static_argnums=2)
def term(batch, logprobs, config):
  loss_BT, metrics = losses.policy(logprobs, batch, config.loss)
  return losses.aggregate(loss_BT, batch, config), metrics


def config_of(surrogate="ppo", ratio="token", aggregation="token"):
  loss = Loss(surrogate=surrogate, ratio=ratio, aggregation=aggregation, **SETTINGS)
  return Config(loss=loss, rollout=Rollout(max_steps=4, max_step_tokens=8))


@pytest.mark.parametrize(
  ("surrogate", "ratio", "aggregation"),
  [
    *((surrogate, "token", "token") for surrogate in losses.SURROGATES),
    ("ppo", "step", "step"),
    ("dual_clip", "trajectory", "trajectory"),
    ("ppo", "trajectory", "constant"),
  ],
)
def test_a_loss_equals_its_formula_however_it_is_packed(surrogate, ratio, aggregation):
  """A ratio over the wrong tokens, a clip on the wrong side, a weight of the wrong unit; and a
  ratio that flows from a trajectory to its neighbour in the row."""
  config = config_of(surrogate, ratio, aggregation)
  found = []
  for alone in (False, True):
    batch, logprobs = filled(made(), alone)
    (total, denominator), _ = term(batch, logprobs, config)
    expected = oracle(batch, logprobs, aggregation, config.loss, config.rollout)
    np.testing.assert_allclose([total, denominator], expected, rtol=2e-5)
    found.append(float(total / denominator))
  assert found[0] == pytest.approx(found[1], rel=1e-5)


def literal(surrogate, ratios, advantages, **changes):
  """The losses of single tokens, each a trajectory of its own."""
  batch, _ = filled(made(count=1))
  at = np.flatnonzero(batch.action_mask[0])[: len(ratios)]
  mask = np.zeros_like(batch.action_mask)
  mask[0, at] = True
  old, advantage = np.zeros_like(batch.old_logprobs), np.zeros_like(batch.advantages)
  old[0, at] = np.log(0.5) - np.log(ratios)
  advantage[0, at] = advantages
  logprobs = np.full(mask.shape, np.log(0.5), np.float32)
  batch = batch._replace(action_mask=mask, old_logprobs=old, advantages=advantage)
  c = Loss(surrogate=surrogate, ratio="token", aggregation="token", **SETTINGS | changes)
  loss, metrics = losses.policy(jnp.asarray(logprobs), batch, c)
  return np.asarray(loss)[0, at], float(metrics["clip_fraction"][0])


def test_ppo_literal():
  """Ratios 1.5 and .5 with A = +1, -1: min(1.5, 1.2) = 1.2; min(-.5, -.8) = -.8; 1.5 with -1."""
  found, clipped = literal("ppo", [1.5, 0.5, 1.5], [1.0, -1.0, -1.0], clip_high=0.2)
  np.testing.assert_allclose(found, [-1.2, 0.8, 1.5], atol=1e-6)
  assert clipped == 2


def test_dual_clip_literal():
  """With c = 3 a ratio of 9 at A = -2 costs 6 and not 18; where A is positive all is PPO's."""
  found, clipped = literal("dual_clip", [9.0, 2.0, 9.0, 0.5], [-2.0, -2.0, 1.0, -1.0])
  np.testing.assert_allclose(found, [6.0, 4.0, -1.3, 0.8], atol=1e-5)
  assert clipped == 3


def test_cispo_literal():
  """Weights 1.3 (of 2), 1.1 and .1 (no lower bound) on A log .5."""
  found, clipped = literal("cispo", [2.0, 1.1, 0.1], [1.0, -1.0, 1.0])
  np.testing.assert_allclose(found, np.log(0.5) * np.array([-1.3, 1.1, -0.1]), atol=1e-6)
  assert clipped == 1


def test_sapo_literal():
  """4 sigmoid(0) = 2 at ratio 1; 4 / 1.05 sigmoid(1.05) = 2.8220 at ratio 2, A = -1."""
  found, clipped = literal("sapo", [1.0, 2.0], [1.0, -1.0])
  np.testing.assert_allclose(found, [-2.0, 2.82200], atol=1e-5)
  assert clipped == 0


def test_gspo_literal():
  """Two tokens of one trajectory with ratios 2 and .5 have one ratio, sqrt(2 x .5) = 1."""
  batch, _ = filled(made(count=1))
  at = np.flatnonzero(batch.action_mask[0])[:2]
  mask = np.zeros_like(batch.action_mask)
  mask[0, at] = True
  old = np.zeros_like(batch.old_logprobs)
  old[0, at] = -np.log([2.0, 0.5])
  batch = batch._replace(action_mask=mask, old_logprobs=old)
  found = losses.log_ratio(batch, jnp.zeros(mask.shape), "trajectory")
  np.testing.assert_allclose(np.asarray(found)[0, at], [0.0, 0.0], atol=1e-6)
  old[0, at] = -np.log([8.0, 2.0])
  found = losses.log_ratio(batch._replace(old_logprobs=old), jnp.zeros(mask.shape), "trajectory")
  np.testing.assert_allclose(np.exp(np.asarray(found)[0, at]), [4.0, 4.0], rtol=1e-6)


@pytest.mark.parametrize("unit", ["step", "trajectory"])
def test_the_gradient_is_that_of_gspos_own_objective(unit):
  """GSPO's eq. 5 (one ratio, one advantage a unit), by differences of the NumPy formula."""
  batch, logprobs = filled(made(count=3))
  config = config_of("ppo", unit, "step" if unit == "step" else "trajectory")

  def total(x):
    return term(batch, x, config)[0][0]

  got = np.asarray(jax.grad(total)(jnp.asarray(logprobs)))
  step = 1e-3
  for row, t in list(zip(*np.nonzero(batch.action_mask), strict=True))[::3]:
    ends = []
    for sign in (step, -step):
      moved = logprobs.astype(float)
      moved[row, t] += sign
      ends.append(oracle(batch, moved, config.loss.aggregation, config.loss, config.rollout)[0])
    assert got[row, t] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=2e-4)
  assert np.abs(got).max() > 0.01


def test_cispo_keeps_the_gradient_of_a_token_that_ppo_drops():
  """Ratio 2 and A = 1: PPO learns nothing, CISPO 1.3 A. At ratio 1.1 it learns 1.1 A, since the
  weight itself has no gradient."""
  batch, _ = filled(made(count=1))
  at = np.flatnonzero(batch.action_mask[0])[:2]
  old, ones = np.zeros_like(batch.old_logprobs), np.ones_like(batch.advantages)
  old[0, at] = -1.0 - np.log([2.0, 1.1])
  batch = batch._replace(old_logprobs=old, advantages=ones)
  for surrogate, expected in (("ppo", [0.0, -1.1]), ("cispo", [-1.3, -1.1])):
    c = config_of(surrogate).loss

    def total(x, c=c):
      return losses.policy(x, batch, c)[0].sum()

    gradient = np.asarray(jax.grad(total)(jnp.full(batch.tokens.shape, -1.0)))
    np.testing.assert_allclose(gradient[0, at], expected, atol=1e-6)


def test_tokens_of_one_ratio_keep_their_own_advantages():
  """GSPO-token: the gradient of token t is s A_t, and not the mean of all: step rewards stay with
  their steps."""
  batch, logprobs = filled(made(count=1))
  at = np.flatnonzero(batch.action_mask[0])
  advantages = np.zeros_like(batch.advantages)
  advantages[0, at[0]] = -2.0  # no clip binds from above where A is negative
  old = np.where(batch.action_mask, logprobs - 0.1, logprobs).astype(np.float32)
  batch = batch._replace(advantages=advantages, old_logprobs=old)

  def total(x):
    return losses.policy(x, batch, config_of("ppo", "trajectory").loss)[0].sum()

  gradient = np.asarray(jax.grad(total)(jnp.asarray(logprobs)))[0, at]
  np.testing.assert_allclose(gradient, [2 * np.exp(0.1), *[0.0] * (at.size - 1)], rtol=1e-5)


@pytest.mark.parametrize("name", ["gspo", "dr_grpo", "cispo"])
def test_micro_batches_add_up(name):
  """(sum, denominator) of every term, the entropy too, are those of the whole minibatch."""
  row = algorithms.get_algorithm(name)
  config = algorithms.resolve(row, Config(loss=Loss(entropy_coef=0.01)))
  batch, logprobs = filled(made(), alone=True)
  entropy = np.abs(logprobs)
  parts = [jax.tree.map(lambda x, k=k: x[k : k + 2], batch) for k in range(0, ROWS, 2)]

  @jax.jit
  def loss(batch, logprobs, entropy):
    return row.loss(Outputs(logprobs, entropy, None), batch, config)

  whole = loss(batch, logprobs, entropy)
  found = [
    loss(part, logprobs[2 * k : 2 * k + 2], entropy[2 * k : 2 * k + 2])
    for k, part in enumerate(parts)
  ]
  summed = jax.tree.map(lambda *x: sum(x), *found)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(summed), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)
  assert whole[0]["policy_loss"][0] != 0


def test_dr_grpo_divides_by_neither_deviation_nor_length():
  """Returns 1 and 0: advantages +.5 and -.5. Of 9 tokens and 1 each token weighs the same, over
  two trajectories of at most 4 x 8 tokens."""
  trajectories = [samples.sample(0, [1.0], [9], seed=0), samples.sample(0, [0.0], [1], seed=1)]
  batch = samples.pack(trajectories)
  row = algorithms.get_algorithm("dr_grpo")
  rollout = Rollout(max_steps=4, max_step_tokens=8)
  config = algorithms.resolve(row, Config(rollout=rollout))
  found = row.advantage(batch, jnp.asarray(batch.rewards), None, config)["advantages"]
  good, bad = samples.found(batch, found, trajectories)
  np.testing.assert_allclose(good, [0.5] * 9, atol=1e-6)
  np.testing.assert_allclose(bad, [-0.5], atol=1e-6)
  total, denominator = losses.aggregate(-found, batch, config)
  assert (float(total), float(denominator)) == (pytest.approx(-0.5 * 9 + 0.5), 2 * 32)
