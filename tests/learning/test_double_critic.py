"""ArCHer's critic: values of utterances, targets, losses, replay, Polyak averages."""

import dataclasses
import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import samples

from steptool_jax.config import Advantage, Archer, Config, Critic, Loss
from steptool_jax.learning import algorithms, batching, double_critic
from steptool_jax.learning.outputs import policy_outputs
from steptool_jax.learning.programs import learners, preparation, update
from steptool_jax.policy import model

CONFIG = fakes.tiny_config()
GAMMA = 0.9


def trajectories(count=6, seed=0):
  rng = np.random.default_rng(seed)
  return [fakes.random_trajectory(rng) for _ in range(count)]


def packed(fresh, past=(), row_tokens=48, rows=4, bootstrap=()):
  units = [(t,) for t in fresh]
  packed = batching.pack_units(
    units, row_tokens, replayed=past, whole_actions=True, bootstrap=bootstrap
  )
  return fakes.padded(packed, rows)


def steps_of(batch):
  """(row, segment, [positions of step 0, of step 1, …]) of every trajectory."""
  for row in range(batch.tokens.shape[0]):
    for segment in range(1, batch.segment_ids[row].max() + 1):
      here = batch.segment_ids[row] == segment
      count = batch.step_ids[row][here].max() + 1
      steps = [np.flatnonzero(here & (batch.step_ids[row] == k)) for k in range(count)]
      yield row, segment, steps


def test_q_reads_after_the_utterance_and_v_before_it():
  """hidden[t] = (t, row): Q of a step is at the position after its last token's target."""
  batch = packed(trajectories())
  rows, length = batch.tokens.shape
  at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.float32), (rows, length))
  hidden = jnp.stack([at, jnp.ones_like(at)], axis=-1)
  heads = {
    "q1": {"kernel": jnp.array([[1.0], [0.0]]), "bias": jnp.zeros(1)},
    "q2": {"kernel": jnp.array([[2.0], [0.0]]), "bias": jnp.ones(1)},
    "v": {"kernel": jnp.array([[1.0], [0.5]]), "bias": jnp.zeros(1)},
  }
  out = double_critic.project(heads, hidden, batch)
  seen = 0
  for row, segment, steps in steps_of(batch):
    for positions in steps:
      first, after = positions[0], positions[-1] + 1
      assert after < length, "the last token is an input too"
      assert batch.segment_ids[row, after] == segment
      assert batch.tokens[row, after] == batch.targets[row, positions[-1]]
      assert out.q1[row, first] == after
      assert out.q2[row, first] == 2 * after + 1
      assert out.q[row, first] == after
      assert out.v[row, first] == first + 0.5
      seen += 1
  assert seen > 8


@pytest.mark.parametrize("bootstrap", [(), ("step_budget",), ("token_budget",)])
def test_targets_and_advantages_equal_loops(bootstrap):
  group = trajectories(12)
  statuses = {np.concatenate([s.tokens for s in t.steps]).tobytes(): t.status for t in group}
  batch = packed(group[:7], group[7:], bootstrap=bootstrap, rows=8)
  rng = np.random.default_rng(1)
  shape = batch.tokens.shape
  target = double_critic.Utterances(
    *(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))
  )
  returns, value_targets = double_critic.targets(batch, jnp.asarray(batch.rewards), target, GAMMA)
  adv = double_critic.utterance_advantages(batch, target)
  ended, fresh = set(), 0
  for row, segment, steps in steps_of(batch):
    firsts = [positions[0] for positions in steps]
    status = statuses[batch.targets[row, np.concatenate(steps)].tobytes()]
    last = np.flatnonzero(batch.segment_ids[row] == segment)[-1]
    q1, q2, v = (np.asarray(x)[row, firsts] for x in target)
    rewards = [batch.rewards[row, positions[-1]] for positions in steps]
    after = float(target.v[row, last]) if status in bootstrap else 0.0
    expected = oracles.archer_targets(rewards, v, q1, q2, after, GAMMA)
    np.testing.assert_allclose(returns[row, firsts], expected[0], atol=1e-5)
    np.testing.assert_allclose(value_targets[row, firsts], expected[1], atol=1e-6)
    learns = batch.action_mask[row, firsts[0]]
    for k, positions in enumerate(steps):
      wanted = min(q1[k], q2[k]) - v[k] if learns else 0.0
      np.testing.assert_allclose(adv[row, positions], wanted, atol=1e-6)
    ended.add(status)
    fresh += learns
  assert ended == {"answered", "step_budget", "token_budget"}, "all ways of ending are to be seen"
  assert fresh == 7


def test_literal():
  """Two steps, rewards 0 and 1, target V .4 and .6, gamma .5: Q's targets are .3 and 1."""
  batch = packed([samples.sample(0, [0.0, 1.0], [1, 1])], rows=1, row_tokens=8)
  first, second = (int(positions[0]) for positions in next(steps_of(batch))[2])

  def at(a, b):
    return jnp.zeros((1, 8)).at[0, first].set(a).at[0, second].set(b)

  target = double_critic.Utterances(at(0.2, 0.9), at(0.1, 0.95), at(0.4, 0.6))
  returns, values = double_critic.targets(batch, jnp.asarray(batch.rewards), target, 0.5)
  np.testing.assert_allclose(returns[0, [first, second]], [0.3, 1.0], atol=1e-6)
  np.testing.assert_allclose(values[0, [first, second]], [0.1, 0.9], atol=1e-6)
  filled = batch._replace(returns=returns, value_targets=values)
  # ((.2 - .3)^2 + (.1 - .3)^2 + (.9 - 1)^2 + (.95 - 1)^2) / 2; ((.4 - .1)^2 + (.6 - .9)^2) / 2
  q, v = double_critic.q_loss(target, filled), double_critic.v_loss(target, filled)
  np.testing.assert_allclose(q, (0.03125, 2), atol=1e-6)
  np.testing.assert_allclose(v, (0.09, 2), atol=1e-6)


def test_with_a_fitted_critic_the_advantage_is_one_step_of_it():
  """r + gamma V(s') - V(s) of the values that `ridge` fits, on all tokens of the step, and no loss
  of a critic that is not there: bit for bit outcomes under GAE over steps with lambda 0."""
  fresh = samples.random_samples(3, tasks=6)[0]
  built = batching.pack(fresh, 40)
  batch, table = fakes.padded(built, 4), fakes.padded_table(built, 4)
  stack = functools.partial(jax.tree.map, lambda x: jnp.asarray(x)[None])
  found = {}
  for name, lam in (("archer", 0.7), ("steptool_no_step_rewards", 0.0)):
    row = algorithms.get_algorithm(name)
    config = Config(
      advantage=Advantage(gamma=0.9, lam=lam), critic=Critic(kind="ridge"), loss=Loss(kl="none")
    )
    learner = learners.Learner(CONFIG, row, algorithms.resolve(row, config), optax.sgd(1.0))
    params = model.init_params(CONFIG, jax.random.key(0))  # the update takes them
    state = learners.init_state(learner, {"params": params}, {})
    assert state.target == ()
    prepare, change = update.compile_programs(learner)
    prepared, _ = prepare(state, stack(batch), 1, stack(table))
    new, metrics = change(state, prepared, 1)
    found[name] = (prepared.advantages, new.trainable, sorted(metrics))
  jax.tree.map(np.testing.assert_array_equal, *(f[:2] for f in found.values()))
  assert found["archer"][2] == found["steptool_no_step_rewards"][2]
  assert float(jnp.abs(found["archer"][0]).max()) > 0.1


def test_polyak_literal():
  mean = double_critic.polyak({"a": jnp.array([1.0])}, {"a": jnp.array([3.0])}, 0.1)
  np.testing.assert_allclose(mean["a"], [1.2], rtol=1e-6)


# --- in the update ---

SETTINGS = Config(
  advantage=Advantage(gamma=GAMMA, whiten=False),
  loss=Loss(kl="none", value_coef=0.5, logprob_chunk=16),
  archer=Archer(tau=0.25),
)
ROW = algorithms.get_algorithm("archer")
LEARNER = learners.Learner(
  model=CONFIG,
  algorithm=ROW,
  config=algorithms.resolve(ROW, SETTINGS),
  optimizer=optax.sgd(1.0),
)


@pytest.fixture(scope="module")
def state():
  params = model.init_params(CONFIG, jax.random.key(0))
  del params["value_head"]
  state = learners.init_state(LEARNER, {"params": params}, {}, seed=3)
  heads = jax.tree.map(
    lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), state.target
  )
  return state._replace(target=heads)


@pytest.fixture(scope="module")
def programs():
  return (
    jax.jit(functools.partial(preparation.prepare, LEARNER)),
    jax.jit(functools.partial(update.update, LEARNER)),
  )


def one_update(programs, state, batch, micro):
  stacked = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, micro, x.shape[-1]), batch)
  count = stacked.tokens.shape[0]
  prepared, _ = programs[0](state, stacked, count)
  new, metrics = programs[1](state, prepared, count)
  return prepared, new, metrics


def test_the_update_equals_a_direct_loss(state, programs):
  """Policy, Q and V terms; accumulated over micro-batches; the target follows by tau."""
  group = trajectories(8, seed=2)
  batch = packed(group[:5], group[5:])
  prepared, new, metrics = one_update(programs, state, batch, 4)
  _, again, _ = one_update(programs, state, batch, 1)
  for a, b in zip(jax.tree.leaves(new.trainable), jax.tree.leaves(again.trainable), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), prepared)
  places = [
    (row, positions, bool(batch.action_mask[row, positions[0]]))
    for row, _, steps in steps_of(batch)
    for positions in steps
  ]
  fresh = [place for place in places if place[2]]
  assert 0 < len(fresh) < len(places)

  def values(heads, hidden):
    return {name: hidden @ head["kernel"][:, 0] + head["bias"] for name, head in heads.items()}

  def loss(trainable):
    variables = {"params": trainable["params"]}
    out = policy_outputs(
      CONFIG, variables, flat, temperature=1.0, chunk=512, heads=lambda hidden: hidden
    )
    online = values(trainable["critic"], out.values)
    q = sum(
      jnp.square(online[name][row, at[-1] + 1] - flat.returns[row, at[0]])
      for row, at, _ in places
      for name in ("q1", "q2")
    )
    v = sum(
      jnp.square(online["v"][row, at[0]] - flat.value_targets[row, at[0]]) for row, at, _ in fresh
    )
    tokens = sum(len(at) for _, at, _ in fresh)
    policy = sum(
      (min_q(state, out.values, row, at) * out.logprobs[row, at]).sum() for row, at, _ in fresh
    )
    return -policy / tokens + 0.5 * (0.5 * q / len(places) + 0.5 * v / len(fresh))

  def min_q(state, hidden, row, at):
    """The advantage, without a gradient."""
    now = values(state.trainable["critic"], jax.lax.stop_gradient(hidden))
    after = at[-1] + 1
    return jnp.minimum(now["q1"][row, after], now["q2"][row, after]) - now["v"][row, at[0]]

  expected = jax.jit(jax.grad(loss))(state.trainable)
  got = jax.tree.map(jnp.subtract, state.trainable, new.trainable)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=3e-5)
  assert float(metrics["q_error"]) > 0
  for slow, old, fast in zip(
    *map(jax.tree.leaves, (new.target, state.target, new.trainable["critic"])), strict=True
  ):
    np.testing.assert_allclose(slow, 0.25 * fast + 0.75 * old, atol=1e-6)


def test_the_actor_waits_for_the_critic(state):
  settings = dataclasses.replace(SETTINGS, archer=Archer(warmup=5))
  config = algorithms.resolve(ROW, settings)
  learner = dataclasses.replace(LEARNER, config=config)
  prepare = jax.jit(functools.partial(preparation.prepare, learner))
  batch = jax.tree.map(lambda x: jnp.asarray(x)[None], packed(trajectories(4)))
  early, late = (prepare(state._replace(step=jnp.int32(n)), batch, 1)[0] for n in (4, 5))
  assert not np.any(early.advantages)
  assert np.any(late.advantages)
  np.testing.assert_array_equal(early.returns, late.returns)


def test_warm_up_moves_the_heads_alone(state):
  """Their loss reaches the layers below, so the policy moved at the full rate."""
  settings = dataclasses.replace(SETTINGS, archer=Archer(warmup=5))
  learner = dataclasses.replace(LEARNER, config=algorithms.resolve(ROW, settings))
  steps = [jax.jit(functools.partial(f, learner)) for f in (preparation.prepare, update.update)]
  batch = packed(trajectories(4))
  for step, moves in ((4, False), (5, True)):
    new = one_update(steps, state._replace(step=jnp.int32(step)), batch, 4)[1]
    same = jax.tree.map(np.array_equal, new.trainable, state.trainable)
    assert not any(jax.tree.leaves(same["critic"]["q1"]))
    assert all(jax.tree.leaves(same["params"])) is not moves
    assert int(new.step) == step + 1


def test_replay_reaches_q_alone(state, programs):
  """Actor and V are as without any past, whose rewards move Q alone."""
  group = trajectories(6, seed=4)
  richer = [
    dataclasses.replace(
      t, steps=tuple(dataclasses.replace(s, reward=s.reward + 1) for s in t.steps)
    )
    for t in group[4:]
  ]
  results = [
    one_update(programs, state, packed(group[:4], past), 4) for past in (group[4:], richer)
  ]
  (first, new, metrics), (second, other, other_metrics) = results
  alone = one_update(programs, state, packed(group[:4]), 4)[2]
  for term in ("policy_loss", "v_loss"):
    np.testing.assert_allclose(metrics[term], alone[term], rtol=1e-5)
  np.testing.assert_array_equal(first.advantages, second.advantages)
  assert float(metrics["policy_loss"]) == float(other_metrics["policy_loss"])
  assert float(metrics["v_loss"]) == float(other_metrics["v_loss"])
  assert float(metrics["q_loss"]) < float(other_metrics["q_loss"])
  same = jax.tree.map(np.array_equal, new.trainable["critic"], other.trainable["critic"])
  assert same["v"]["kernel"]
  assert not same["q1"]["kernel"]
  assert not same["q2"]["kernel"]
