import dataclasses
import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import rlax
from hypothesis import given, settings
from hypothesis import strategies as st

from steptool_jax.config import Advantage, Config
from steptool_jax.learning import advantages, algorithms, batching, losses
from steptool_jax.types import Finish, Status, Step, Trajectory

GAMMA, LAM = 0.9, 0.8


BUDGETS = (Status.STEP_BUDGET, Status.TOKEN_BUDGET)
choices = st.sampled_from(
  [(), ("step_budget",), ("token_budget",), ("step_budget", "token_budget")]
)


def packed(seed, count=6, row_tokens=64, bootstrap=("step_budget", "token_budget"), **kwargs):
  """([(trajectory, row, its positions)], the batch, values). Where a trajectory lies, and how it
  ends, is asked of the trajectory and not of the batch, which may be what is wrong."""
  rng = np.random.default_rng(seed)
  trajectories = [fakes.random_trajectory(rng, **kwargs) for _ in range(count)]
  found = batching.pack(trajectories, row_tokens, bootstrap)
  # One shape for all examples: one compilation.
  batch = fakes.padded(found, 6)
  values = rng.normal(size=batch.tokens.shape).astype(np.float32)
  places = [
    (t, row, np.arange(start, stop))
    for t, ((row, start, stop, _),) in zip(found.trajectories, found.places, strict=True)
  ]
  return places, batch, values


def value_after(trajectory, row_values, bootstrap):
  """V of the state after a trajectory: at its last position, or 0 where it ends for good."""
  return row_values[-1] if trajectory.status in bootstrap else 0.0


@functools.partial(jax.jit, static_argnames=("level", "broadcast", "step_episodes"))
def jitted_gae(batch, values, gamma, lam, **kwargs):
  return advantages.gae(batch, batch.rewards, values, gamma=gamma, lam=lam, **kwargs)


def run_gae(batch, values, gamma=GAMMA, lam=LAM, **kwargs):
  adv, ret = jitted_gae(batch, values, gamma, lam, **kwargs)
  return np.asarray(adv), np.asarray(ret)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["step", "token"]), choices)
def test_gae_equals_the_token_oracle_on_packed_rows(seed, level, bootstrap):
  places, batch, values = packed(seed, bootstrap=bootstrap)
  adv, ret = run_gae(batch, values, level=level, broadcast=False)
  for t, row, at in places:
    act = at[batch.action_mask[row, at]]
    expected = oracles.gae_tokens(
      batch.rewards[row, act],
      values[row, act],
      batch.step_end[row, act],
      value_after(t, values[row, at], bootstrap),
      GAMMA,
      LAM,
      level,
    )
    np.testing.assert_allclose(adv[row, act], expected, atol=1e-5)
    np.testing.assert_allclose(ret[row, act], expected + values[row, act], atol=1e-5)
  assert (adv[~batch.action_mask] == 0).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), choices)
def test_step_level_broadcast_equals_gae_over_steps(seed, bootstrap):
  """The paper: one advantage a step, shared by its tokens; checked against oracle and rlax."""
  # With a prompt of one token, sampled tokens of two trajectories stand side by side.
  places, batch, values = packed(seed, prompt=1, bootstrap=bootstrap)
  adv, ret = run_gae(batch, values)
  for t, row, at in places:
    act = at[batch.action_mask[row, at]]
    ids = batch.step_ids[row, act]
    firsts = np.array([act[ids == k][0] for k in range(ids.max() + 1)])
    ends = np.array([act[ids == k][-1] for k in range(ids.max() + 1)])
    last = value_after(t, values[row, at], bootstrap)
    r, v = batch.rewards[row, ends], values[row, firsts]
    expected = oracles.gae_steps(r, v, last, GAMMA, LAM)
    np.testing.assert_allclose(adv[row, act], expected[ids], atol=1e-5)
    np.testing.assert_allclose(ret[row, firsts], expected + v, atol=1e-5)
    discount = np.full(len(r), GAMMA, np.float32)
    theirs = rlax.truncated_generalized_advantage_estimation(
      jnp.asarray(r), jnp.asarray(discount), LAM, jnp.asarray(np.append(v, last), jnp.float32)
    )
    np.testing.assert_allclose(adv[row, firsts], theirs, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_released_level_equals_the_authors_formula(seed):
  places, batch, values = packed(seed)  # truncated ones too: the authors never bootstrap
  adv, _ = run_gae(batch, values, level="released", gamma=0.99, lam=0.95)
  for _, row, at in places:
    expected = oracles.gae_released(
      batch.rewards[row, at][batch.step_end[row, at]],
      values[row, at],
      batch.action_mask[row, at],
      batch.step_end[row, at],
      0.99,
      0.95,
    )
    np.testing.assert_allclose(adv[row, at], expected, atol=1e-4)


def test_released_weights_are_on_rewards_and_not_on_a_kl_penalty():
  """The authors add (n - i - 1) r_i to the penalty; the last step's penalty is not multiplied by 0.

  One step of two tokens (n = 1): its reward counts nothing, its penalties -.1 and -.2 count.
  """
  step = Step(np.arange(2, dtype=np.int32), np.zeros(2, np.float32), Finish("x"), reward=0.7)
  trajectory = Trajectory("t", 0, np.arange(2, dtype=np.int32), (step,), Status.ANSWERED)
  batch = batching.pack([trajectory], 4).batch
  rewards = jnp.asarray(batch.rewards) + jnp.array([[0, -0.1, -0.2, 0]], jnp.float32)
  zero = jnp.zeros((1, 4), jnp.float32)
  adv, _ = advantages.gae(batch, rewards, zero, gamma=0.5, lam=0.5, level="released")
  np.testing.assert_allclose(adv[0], [0, -0.15, -0.2, 0], atol=1e-6)


def test_step_episodes_cut_the_flow_at_step_ends():
  places, batch, values = packed(3, count=1)
  adv, _ = run_gae(batch, values, level="token", step_episodes=True)
  for t, row, at in places:
    act = at[batch.action_mask[row, at]]
    for k in range(len(t.steps)):
      part = act[batch.step_ids[row, act] == k]
      expected = oracles.gae_tokens(
        batch.rewards[row, part],
        values[row, part],
        batch.step_end[row, part],
        0,
        GAMMA,
        LAM,
        "token",
      )
      np.testing.assert_allclose(adv[row, part], expected, atol=1e-5)


def literal_trajectory(status):
  def step(n, m, reward):
    return Step(
      np.arange(n, dtype=np.int32),
      np.zeros(n, np.float32),
      Finish("x"),
      observation_tokens=np.arange(m, dtype=np.int32),
      reward=reward,
    )

  last = step(1, 0 if status == Status.ANSWERED else 1, 1.0)
  return Trajectory("t", 0, np.arange(2, dtype=np.int32), (step(2, 1, 0.7), last), status)


def test_hand_computed_literal():
  """Step 0 has tokens at 1, 2 (V .5, .1), reward .7; step 1 one token at 4 (V .2), reward 1."""
  batch = batching.pack([literal_trajectory(Status.ANSWERED)], 8).batch
  assert batch.action_mask[0].tolist() == [False, True, True, False, True, False, False, False]
  values = np.array([[9, 0.5, 0.1, 9, 0.2, 9, 9, 9]], np.float32)
  adv, ret = run_gae(batch, values, gamma=0.5, lam=0.5)
  # A_1 = 1 - .2 = .8; A_0 = .7 + .5 * .2 - .5 + .25 * .8 = .5
  np.testing.assert_allclose(adv[0], [0, 0.5, 0.5, 0, 0.8, 0, 0, 0], atol=1e-6)
  adv, _ = run_gae(batch, values, gamma=0.5, lam=0.5, broadcast=False)
  # token 2: .7 + .5 * .2 - .1 + .25 * .8 = .9
  np.testing.assert_allclose(adv[0], [0, 0.5, 0.9, 0, 0.8, 0, 0, 0], atol=1e-6)
  np.testing.assert_allclose(ret[0, [1, 4]], [1.0, 1.0], atol=1e-6)


@pytest.mark.parametrize(
  ("name", "level", "expected"),
  [
    ("ppo", "", [-0.225, 0.9, 0.8]),  # 0 + .5 * .1 - .5 + .25 * .9
    ("steptool", "", [0.5, 0.5, 0.8]),
    ("steptool_no_step_rewards", "", [0.5, 0.5, 0.8]),
    ("steptool_no_step_grained", "", [-0.3, 0.6, 0.8]),  # .7 - .1; .5 * .1 - .5 + .25 * .6
    ("ppo", "step", [0.5, 0.5, 0.8]),  # the config's word counts
    ("steptool", "token", [-0.225, 0.9, 0.8]),
  ],
)
def test_the_advantage_of_every_algorithm_by_hand(name, level, expected):
  """The trajectory of the literal above, gamma = lambda = .5."""
  row = algorithms.get_algorithm(name)
  config = algorithms.resolve(row, Config(advantage=Advantage(gamma=0.5, lam=0.5, level=level)))
  batch = batching.pack([literal_trajectory(Status.ANSWERED)], 8).batch
  values = jnp.array([[9, 0.5, 0.1, 9, 0.2, 9, 9, 9]], jnp.float32)
  adv = row.advantage(batch, jnp.asarray(batch.rewards), values, config)["advantages"]
  np.testing.assert_allclose(adv[0, [1, 2, 4]], expected, atol=1e-6)


@pytest.mark.parametrize("status", BUDGETS)
@pytest.mark.parametrize("level", ["step", "token"])
def test_a_spent_budget_is_worth_nothing_unless_it_is_to_bootstrap(status, level):
  """A cut that is paid V like a success teaches to run into the budget; and a batch that knows one
  of the two budgets only would pay the other one so.

  ids: 2 prompt, 2 sampled, 1 observed, 1 sampled, 1 observed; the next state stands at position 6.
  """
  cut = literal_trajectory(status)
  values = np.array([[9, 0.5, 0.1, 9, 0.2, 9, 4.0, 9]], np.float32)
  for bootstrap in ((), tuple(other for other in BUDGETS if other != status)):
    ends = batching.pack([cut], 8, bootstrap).batch
    assert not ends.bootstrap.any()
    adv, _ = run_gae(ends, values, gamma=0.5, lam=0.5, level=level)
    np.testing.assert_allclose(adv[0, 4], 1 - 0.2, atol=1e-6)
    assert batching.packed_length(cut, bootstrap=bootstrap) == 5
  goes_on = batching.pack([cut], 8, (str(status),)).batch  # the config's word
  assert np.flatnonzero(goes_on.bootstrap[0]).tolist() == [6]
  adv, _ = run_gae(goes_on, values, gamma=0.5, lam=0.5, level=level)
  np.testing.assert_allclose(adv[0, 4], 1 + 0.5 * 4.0 - 0.2, atol=1e-6)
  whole = batching.pack([literal_trajectory(Status.ANSWERED)], 8, BUDGETS).batch
  assert not whole.bootstrap.any()


def test_a_fractional_reward_reaches_the_advantage():
  """A reward of 0.7 that is scattered into an integer array becomes 0."""
  batch = batching.pack([literal_trajectory(Status.ANSWERED)], 8).batch
  assert batch.rewards.dtype == np.float32
  zero = np.zeros((1, 8), np.float32)
  adv, _ = run_gae(batch, zero, gamma=0.0)
  np.testing.assert_allclose(adv[0, 1], 0.7, atol=1e-6)


def test_wrong_dtype_and_rank_are_refused():
  batch = batching.pack([literal_trajectory(Status.ANSWERED)], 8).batch
  with pytest.raises(AssertionError):
    advantages.gae(batch, jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 8)), gamma=1, lam=1)
  with pytest.raises(AssertionError):
    advantages.gae(batch, jnp.zeros(8), jnp.zeros(8), gamma=1, lam=1)


def test_whitening_uses_the_weights_and_the_whole_batch():
  x = jnp.array([[1.0, 2.0, 100.0], [3.0, 6.0, 100.0]])
  weights = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
  out = np.asarray(advantages.whiten(x, weights))
  std = np.sqrt(14 / 4)
  np.testing.assert_allclose(out, [[-2 / std, -1 / std, 0], [0, 3 / std, 0]], atol=1e-5)
  # Weights 1 and 3: mean 2.5, variance (2.25 + 3 * .25) / 4 = .75.
  out = np.asarray(advantages.whiten(jnp.array([[1.0, 3.0]]), jnp.array([[0.5, 1.5]])))
  np.testing.assert_allclose(out, [[-1.5 / np.sqrt(0.75), 0.5 / np.sqrt(0.75)]], atol=1e-5)
  assert not np.any(advantages.whiten(x, jnp.zeros_like(weights)))


@pytest.mark.parametrize(
  ("aggregation", "expected"),
  [
    # Two steps of 1 and 9 tokens with advantages 1 and -1. By token: mean -.8, deviation .6.
    ("token", [1.8 / 0.6, -0.2 / 0.6]),
    ("step", [1.0, -1.0]),
    ("trajectory", [1.8 / 0.6, -0.2 / 0.6]),  # both are of one trajectory
  ],
)
def test_whitening_takes_the_losss_weights(aggregation, expected):
  """Whitened over tokens, a loss that weighs steps sums up advantages whose mean is 1.33, not 0."""
  steps = tuple(
    Step(np.arange(n, dtype=np.int32), np.zeros(n, np.float32), Finish("x")) for n in (1, 9)
  )
  trajectory = Trajectory("t", 0, np.arange(2, dtype=np.int32), steps, Status.ANSWERED)
  batch = batching.pack([trajectory], 16).batch
  ids = batch.step_ids[0]
  x = jnp.asarray(np.where(ids == 0, 1.0, np.where(ids == 1, -1.0, 7.0)), jnp.float32)[None]
  weights = losses.action_weights(batch, aggregation)
  out = np.asarray(advantages.whiten(x, weights))[0]
  np.testing.assert_allclose([out[ids == 0][0], out[ids == 1][0]], expected, atol=1e-5)
  assert not out[ids < 0].any()
  total, _ = losses.weighted(jnp.asarray(out)[None], weights)
  np.testing.assert_allclose(total, 0.0, atol=1e-5)


weights_of = jax.jit(losses.action_weights, static_argnums=1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_aggregation_weights(seed):
  places, batch, _ = packed(seed)
  trajectories = [t for t, *_ in places]
  total = {a: np.asarray(weights_of(batch, a)) for a in losses.AGGREGATIONS}
  steps = sum(len(t.steps) for t in trajectories)
  assert total["token"].sum() == sum(len(s.tokens) for t in trajectories for s in t.steps)
  np.testing.assert_allclose(total["step"].sum(), steps, atol=1e-4)
  np.testing.assert_allclose(total["trajectory"].sum(), len(trajectories), atol=1e-4)
  for _, row, at in places:
    np.testing.assert_allclose(total["trajectory"][row, at].sum(), 1.0, atol=1e-5)
    for k in np.unique(batch.step_ids[row, at])[1:]:
      inside = at[batch.step_ids[row, at] == k]
      np.testing.assert_allclose(total["step"][row, inside].sum(), 1.0, atol=1e-5)


def test_packing_says_where_everything_lies():
  """Ids, log-probs and rewards are the recorded ones, token by token, and rows are full."""
  rng = np.random.default_rng(2)
  trajectories = [fakes.random_trajectory(rng) for _ in range(40)]
  trajectories.append(trajectories[3])  # sampled the same, and lies elsewhere all the same
  packed = batching.pack(trajectories, 80)
  batch, columns = packed.batch, np.indices(packed.batch.tokens.shape)[1]
  assert packed.trajectories == tuple(trajectories)
  assert len(set(packed.places)) == 41
  at = batching.unpack(packed, columns)
  for t, ((row, start, stop, _),), act in zip(trajectories, packed.places, at, strict=True):
    parts = [t.prompt_tokens, *(p for s in t.steps for p in (s.tokens, s.observation_tokens))]
    expected = np.concatenate(parts)[: batching.packed_length(t)]
    np.testing.assert_array_equal(batch.tokens[row, start:stop], expected)
    tokens, logprobs = (
      np.concatenate([getattr(s, name) for s in t.steps]) for name in ("tokens", "logprobs")
    )
    np.testing.assert_array_equal(batch.targets[row, act], tokens)
    np.testing.assert_array_equal(batch.behaviour_logprobs[row, act], logprobs)
    ids = np.repeat(np.arange(len(t.steps)), [len(s.tokens) for s in t.steps])
    np.testing.assert_array_equal(batch.step_ids[row, act], ids)
    rewards = np.array([s.reward for s in t.steps], np.float32)
    np.testing.assert_array_equal(batch.rewards[row, act[batch.step_end[row, act]]], rewards)
  assert batch.action_mask.sum() == sum(map(len, at))
  assert np.count_nonzero(batch.rewards) == sum(len(t.steps) for t in trajectories)
  for name in ("behaviour_logprobs", "rewards", "step_end"):
    assert not getattr(batch, name)[~batch.action_mask].any(), name
  assert batching.padding_share(batch) < 0.1


def test_what_is_there_for_a_critic_only_has_no_place():
  fresh = [literal_trajectory(Status.ANSWERED) for _ in range(3)]
  replayed = [literal_trajectory(Status.STEP_BUDGET) for _ in range(2)]
  packed = batching.pack_units([(t,) for t in fresh], 14, replayed=replayed)
  assert packed.trajectories == tuple(fresh)
  values = batching.unpack(packed, packed.batch.targets)
  assert [v.tolist() for v in values] == [[0, 1, 0]] * 3
  assert packed.batch.action_mask.sum() == 3 * 3


def test_packing_refuses_what_does_not_fit():
  t = literal_trajectory(Status.ANSWERED)
  with pytest.raises(ValueError, match=r"row_tokens is 4.*rollout.max_tokens"):
    batching.pack([t], 4)
  with pytest.raises(ValueError, match="no steps"):
    batching.pack([dataclasses.replace(t, steps=())], 8)


def test_a_reward_that_is_spread_over_its_tokens():
  """By hand: .6 on a step of two tokens is .3 each; over tokens that pays the first one at once."""
  trajectory = literal_trajectory(Status.ANSWERED)
  units = [(trajectory,)]
  whole = batching.pack_units(units, 16).batch
  spread = batching.pack_units(units, 16, spread=True).batch
  for k, step in enumerate(trajectory.steps):
    at = whole.step_ids[0] == k
    assert whole.rewards[0, at].tolist() == [0.0] * (at.sum() - 1) + [np.float32(step.reward)]
    np.testing.assert_allclose(spread.rewards[0, at], step.reward / at.sum(), rtol=1e-6)
  assert spread.rewards[spread.step_ids < 0].sum() == 0
