"""Advantages without a critic, against loops over trajectories."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import samples
from hypothesis import given, settings
from hypothesis import strategies as st

from steptool_jax.config import Advantage, Config
from steptool_jax.learning import algorithms, batching, groups, losses
from steptool_jax.learning.algorithms import ALGORITHMS
from steptool_jax.types import Status

GAMMA = 0.9
CONFIG = Config(advantage=Advantage(gamma=GAMMA, omega=0.5))
WITHOUT_CRITIC = ("reinforce", "rloo", "grpo", "grpo_step", "gigpo")


@functools.partial(jax.jit, static_argnums=(0, 3))
def jitted(name, batch, rewards, config=CONFIG):
  return ALGORITHMS[name].advantage(batch, rewards, None, config)["advantages"]


def advantages_of(name, batch, config=CONFIG):
  return np.asarray(jitted(name, batch, jnp.asarray(batch.rewards), config))


def expected_of(name, group):
  if name == "gigpo":
    parts = [oracles.episode_advantages(group, GAMMA, kind) for kind in ("grpo", "anchor")]
    return [episode + 0.5 * step for episode, step in zip(*parts, strict=True)]
  return oracles.episode_advantages(group, GAMMA, name)


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_advantages_equal_loops_over_trajectories(name, seed):
  trajectories, group = samples.random_samples(seed)
  batch = samples.pack(trajectories)
  got = advantages_of(name, batch)
  expected = expected_of(name, group)
  for t, mine, theirs in zip(
    trajectories, samples.found(batch, got, trajectories), expected, strict=True
  ):
    per_token = np.repeat(theirs, [len(step.tokens) for step in t.steps])
    np.testing.assert_allclose(mine, per_token, atol=1e-4)
  assert (got[~batch.action_mask] == 0).all()


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_packed_equals_one_trajectory_a_row(name):
  trajectories, _ = samples.random_samples(5)
  packed = samples.pack(trajectories)
  alone = samples.pack(trajectories[:1], rows=12)
  parts = [batching.pack([t], 40).batch for t in trajectories]
  # Numbers of tasks and anchors are those of the whole batch.
  fields = {name: np.concatenate([getattr(p, name) for p in parts]) for name in alone._fields[:11]}
  tasks = {t.task_id: n for n, t in enumerate(trajectories)}
  group_ids = np.array([[tasks[t.task_id] + 1] * 40 for t in trajectories], np.int32)
  keys = {}
  anchor_ids = np.zeros_like(group_ids)
  for row, t in enumerate(trajectories):
    seen = [t.prompt_tokens, *(s.observation_tokens for s in t.steps[:-1])]
    for k, ids in enumerate(seen):
      number = keys.setdefault((t.task_id, ids.tobytes()), len(keys) + 1)
      anchor_ids[row, parts[row].step_ids[0] == k] = number
  alone = batching.TokenBatch(**fields, group_ids=group_ids, anchor_ids=anchor_ids)
  for a, b in zip(
    samples.found(packed, advantages_of(name, packed), trajectories),
    samples.found(alone, advantages_of(name, alone), trajectories),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_literals():
  """Task 0: outcomes 1, 0, 0. Task 1: outcomes 1, 0. Each of one step of one token."""
  made = [samples.sample(task, [r], [1], seed=n) for n, (task, r) in enumerate(OUTCOMES)]
  batch = samples.pack(made)

  def of(name):
    return np.array([a[0] for a in samples.found(batch, advantages_of(name, batch), made)])

  np.testing.assert_allclose(of("reinforce"), [0.6, -0.4, -0.4, 0.6, -0.4], atol=1e-6)
  np.testing.assert_allclose(of("rloo"), [1, -0.5, -0.5, 1, -1], atol=1e-6)
  third = np.sqrt(2) / 3 + 1e-4  # deviation of 1, 0, 0
  grpo = [2 / 3 / third, -1 / 3 / third, -1 / 3 / third, 0.5 / 0.5001, -0.5 / 0.5001]
  np.testing.assert_allclose(of("grpo"), grpo, atol=1e-5)
  np.testing.assert_allclose(of("grpo_step"), grpo, atol=1e-5)
  # All first steps of a task share the prompt as their anchor.
  np.testing.assert_allclose(of("gigpo"), np.multiply(grpo, 1.5), atol=1e-5)


OUTCOMES = ((0, 1.0), (0, 0.0), (0, 0.0), (1, 1.0), (1, 0.0))


def test_anchor_groups_by_hand():
  """Two samples, gamma 0.5: the second steps share what was observed, the third do not.

  Returns-to-go: .25, .5, 1 and 0, 0, 0.
  """
  made = [
    samples.sample(0, [0, 0, 1.0], [1] * 3, (4, 5)),
    samples.sample(0, [0.0] * 3, [1] * 3, (4, 6), seed=1),
  ]
  batch = samples.pack(made)
  adv = np.asarray(groups.anchor_relative(batch, jnp.asarray(batch.rewards), 0.5))
  first, second = samples.found(batch, adv, made)
  np.testing.assert_allclose(first, [0.125 / 0.1251, 0.25 / 0.2501, 0], atol=1e-5)
  np.testing.assert_allclose(second, [-0.125 / 0.1251, -0.25 / 0.2501, 0], atol=1e-5)
  # The same observation in another task is another state.
  other = [made[0], samples.sample(1, [0.0] * 3, [1] * 3, (4, 6), seed=1)]
  batch = samples.pack(other)
  assert not np.any(groups.anchor_relative(batch, jnp.asarray(batch.rewards), 0.5))


def test_step_rewards_are_normalised_first_and_summed_up_then():
  """By hand, gamma .5: rewards .5, 1 and 0, 0; means .75 and 0, in all .375, variance
  (.125^2 + .625^2 + 2 * .375^2) / 4 = .171875."""
  made = [samples.sample(0, r, [2, 1], seed=n) for n, r in enumerate(([0.5, 1.0], [0.0, 0.0]))]
  batch = samples.pack(made)
  adv = groups.step_relative(batch, jnp.asarray(batch.rewards), 0.5)
  one, other = samples.found(batch, adv, made)
  std = np.sqrt(0.171875) + 1e-4
  first = 0.125 + 0.5 * 0.625
  np.testing.assert_allclose(one, np.array([first, first, 0.625]) / std, atol=1e-5)
  np.testing.assert_allclose(other, np.array([-0.5625, -0.5625, -0.375]) / std, atol=1e-5)


def test_a_right_answer_is_praised_and_a_call_without_use_is_not():
  """Two solve a task of two calls, one of them with a call without use in between; one makes such a
  call and answers wrongly, one makes nothing else. As normalised returns-to-go, which fall along an
  episode by themselves, the right answers had advantages below 0.
  """
  ends = (
    ([0.5, 0.5, 1.0], Status.ANSWERED),
    ([0.5, 0.0, 0.5, 1.0], Status.ANSWERED),
    ([0.5, 0.0, 0.0], Status.ANSWERED),
    ([0.0] * 4, Status.STEP_BUDGET),
  )
  for group in (ends[:3], ends):
    made = [
      samples.sample(0, r, [1] * len(r), seed=n, status=status)
      for n, (r, status) in enumerate(group)
    ]
    batch = samples.pack(made)
    adv = groups.step_relative(batch, jnp.asarray(batch.rewards), 1.0)
    right, detour, wrong, *spam = samples.found(batch, adv, made)
    assert (right > 0).all()
    assert detour[-1] > 0
    assert detour[1] < right[1], "the call without use, beside the one of use"
    assert (wrong[1:] < 0).all()
    assert all((s < 0).all() for s in spam)


@pytest.mark.parametrize("name", ["rloo", "grpo", "grpo_step", "gigpo"])
def test_a_missing_rollout_is_in_no_baseline(name):
  """Three of four samples are there: their mean is over three."""
  made = [samples.sample(0, [r], [1], seed=n) for n, r in enumerate((1.0, 0.0, 0.5))]
  batch = samples.pack(made)
  got = np.array([a[0] for a in samples.found(batch, advantages_of(name, batch), made)])
  deviation = np.sqrt(1 / 6) + 1e-4
  expected = [0.75, -0.75, 0] if name == "rloo" else [0.5 / deviation, -0.5 / deviation, 0]
  np.testing.assert_allclose(got, np.multiply(expected, 1.5 if name == "gigpo" else 1), atol=1e-5)


@pytest.mark.parametrize("name", ["rloo", "grpo", "grpo_step", "gigpo"])
def test_equal_returns_and_a_lone_sample_give_exactly_nothing(name):
  """The float32 mean of seven times .7 is not .7; a deviation of that size would blow it up."""
  made = [samples.sample(0, [0.7], [n % 3 + 1], seed=n) for n in range(7)]
  made += [samples.sample(1, [0.7], seed=9)]
  got = advantages_of(name, samples.pack(made))
  assert np.isfinite(got).all()
  assert not got.any()


@pytest.mark.parametrize("name", ["rloo", "grpo", "grpo_step"])
def test_long_trajectories_do_not_weigh_more_in_a_baseline(name):
  """Making one sample's step longer, or padding it with equal steps, moves nobody's advantage."""
  short = [samples.sample(0, [r], [1], seed=n) for n, r in enumerate((1.0, 0.0, 0.0))]
  longer = [samples.sample(0, [1.0], [9], seed=0), *short[1:]]
  results = []
  for made in (short, longer):
    batch = samples.pack(made)
    results.append([a[0] for a in samples.found(batch, advantages_of(name, batch), made)])
  np.testing.assert_allclose(results[0], results[1], atol=1e-6)
  if name == "grpo_step":
    # Six steps of reward 1 count as much as one: mean 1 / 3, and nobody else's moves.
    many = [samples.sample(0, [1.0] * 6, [1] * 6, seed=0), *short[1:]]
    batch = samples.pack(many)
    config = Config(advantage=Advantage(gamma=1.0))
    got = samples.found(batch, advantages_of(name, batch, config), many)
    np.testing.assert_allclose(got[0], results[0][0] * np.arange(6, 0, -1), rtol=1e-5)
    np.testing.assert_allclose(got[1], results[0][1], atol=1e-5)


@pytest.mark.parametrize("name", ["grpo", "grpo_step", "gigpo"])
def test_long_trajectories_do_not_weigh_more_in_the_loss(name):
  """The rows' own aggregation: all tokens of a trajectory together weigh 1."""
  made = [samples.sample(0, [1.0], [9], seed=0), samples.sample(0, [0.0], [1], seed=1)]
  batch = samples.pack(made)
  config = algorithms.resolve(ALGORITHMS[name], CONFIG)
  weights = losses.action_weights(batch, config.loss.aggregation)
  long, short = samples.found(batch, weights, made)
  np.testing.assert_allclose([long.sum(), short.sum()], [1, 1], rtol=1e-6)


def test_a_kl_penalty_in_the_reward_is_part_of_the_return():
  """rloo's KL: one sample pays 0.3 on a token, and the others' baseline sees it."""
  made = [samples.sample(0, [r], [2], seed=n) for n, r in enumerate((1.0, 0.0))]
  batch = samples.pack(made)
  rewards = np.array(batch.rewards)
  row, at = np.argwhere(batch.rewards == 1.0)[0]
  rewards[row, at - 1] -= 0.3
  got = samples.found(batch, jitted("rloo", batch, jnp.asarray(rewards)), made)
  np.testing.assert_allclose(got, [[0.7, 0.7], [-0.7, -0.7]], atol=1e-6)


def test_relative_refuses_wrong_types():
  ints, floats = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3))
  with pytest.raises(AssertionError):
    groups.relative(ints, floats, ints)
  with pytest.raises(AssertionError):
    groups.relative(floats[0], floats[0], ints[0])
