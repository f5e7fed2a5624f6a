"""The value head's options, returns in the batch's own units and passes of its own, by hand."""

import functools
import types

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import samples

from steptool_jax import config as config_lib
from steptool_jax.config import Advantage, Config, Critic, Loss
from steptool_jax.learning import algorithms, batching
from steptool_jax.learning.programs import learners, preparation, update
from steptool_jax.policy import model
from steptool_jax.run.training import iteration, setup
from steptool_jax.validation import validate

MODEL = fakes.tiny_config()
GAMMA, LAM, COEF = 0.9, 0.8, 0.1


def learner_with(optimizer=None, **critic):
  row = algorithms.get_algorithm("steptool")
  config = Config(
    advantage=Advantage(gamma=GAMMA, lam=LAM, whiten=False),
    critic=Critic(kind="value", **critic),
    loss=Loss(kl="none", logprob_chunk=16, value_coef=COEF, value_clip=100.0),
  )
  optimizer = optimizer or optax.sgd(1.0)
  return learners.Learner(MODEL, row, algorithms.resolve(row, config), optimizer)


@pytest.fixture(scope="module")
def params():
  params = model.init_params(MODEL, jax.random.key(0))
  params["value_head"]["kernel"] = jax.random.normal(jax.random.key(1), (32, 1)) * 0.3
  return params


def rollouts(seed=0, count=10):
  rng = np.random.default_rng(seed)
  return [fakes.random_trajectory(rng) for _ in range(count)]


def prepared_by(learner, params, batch, micro=1):
  state = learners.init_state(learner, {"params": params}, {})
  stacked = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, micro, x.shape[-1]), batch)
  prepared, _ = jax.jit(functools.partial(preparation.prepare, learner))(
    state, stacked, stacked.tokens.shape[0]
  )
  return state, prepared


def first_tokens(batch, row):
  """Positions of the row's step starts."""
  at = np.flatnonzero(batch.action_mask[row])
  keys = [(batch.segment_ids[row, t], batch.step_ids[row, t]) for t in at]
  return [t for i, t in enumerate(at) if i == 0 or keys[i] != keys[i - 1]]


def test_normalised_values_equal_loops(params):
  """The head's output taken for a return as it is, or a target left in the rewards' own units."""
  packed = batching.pack(rollouts(), 64)
  batch = packed.batch
  _, plain = prepared_by(learner_with(), params, batch)
  _, scaled = prepared_by(learner_with(normalise=True), params, batch)
  flat = {
    name: np.asarray(getattr(scaled, name)).reshape(batch.tokens.shape)
    for name in ("values", "advantages", "returns")
  }
  head = np.asarray(plain.values).reshape(batch.tokens.shape)
  np.testing.assert_allclose(flat["values"], head, atol=1e-6)
  to_go = []
  for ((row, start, stop, _),) in packed.places:
    later = 0.0
    for t in range(stop - 1, start - 1, -1):
      if batch.action_mask[row, t]:
        later = batch.rewards[row, t] + (GAMMA if batch.step_end[row, t] else 1.0) * later
        if t in first_tokens(batch, row):
          to_go.append(later)
  mean, deviation = np.mean(to_go), np.std(to_go)
  assert deviation > 0.1
  for ((row, start, stop, _),) in packed.places:
    at = np.arange(start, stop)
    act, boot = at[batch.action_mask[row, at]], at[batch.bootstrap[row, at]]
    values = mean + deviation * head[row]
    tokens = oracles.gae_tokens(
      batch.rewards[row, act],
      values[act],
      batch.step_end[row, act],
      values[boot[0]] if boot.size else 0.0,
      GAMMA,
      LAM,
      "step",
    )
    firsts = np.searchsorted(batch.step_ids[row, act], batch.step_ids[row, act])
    np.testing.assert_allclose(flat["advantages"][row, act], tokens[firsts], atol=1e-4)
    target = (tokens + values[act] - mean) / deviation
    np.testing.assert_allclose(flat["returns"][row, act], target, atol=1e-4)


@pytest.mark.parametrize(
  ("rewards", "expected", "targets"),
  [((1.0, 3.0), (-1.0, 1.0), (-1.0, 1.0)), ((2.0, 2.0), (0.0, 0.0), (0.0, 0.0))],
)
def test_normalised_literal(params, rewards, expected, targets):
  """A head of zeros says the mean return; where all are the same nothing is divided by 0."""
  pair = [samples.sample(i, [r]) for i, r in enumerate(rewards)]
  batch = batching.pack(pair, 64).batch
  untaught = params | {"value_head": jax.tree.map(jnp.zeros_like, params["value_head"])}
  _, prepared = prepared_by(learner_with(normalise=True), untaught, batch)
  mask = np.asarray(prepared.action_mask)
  found = np.asarray(prepared.advantages)[mask]
  assert sorted(set(np.round(found, 5))) == sorted(set(expected))
  ends = np.asarray(prepared.returns)[mask]
  assert sorted(set(np.round(ends, 5))) == sorted(set(targets))


def test_a_pass_of_the_head_equals_a_loop(params):
  """The head's gradient over the whole minibatch, whatever the micro-batches; the policy's weights
  keep their bits."""
  learner = learner_with(passes=2)
  batch = fakes.padded(batching.pack(rollouts(), 64), 4)
  state, prepared = prepared_by(learner, params, batch, 2)
  new = jax.jit(functools.partial(update.fit_values, learner))(
    state, prepared, prepared.tokens.shape[0]
  )
  hidden = np.asarray(
    model.forward(MODEL, {"params": params}, batch.tokens, batch.positions, batch.segment_ids),
    np.float64,
  )
  returns = np.asarray(prepared.returns, np.float64).reshape(batch.tokens.shape)
  kernel = np.asarray(params["value_head"]["kernel"], np.float64)
  bias = float(params["value_head"]["bias"][0])
  gradient, of_bias, count = np.zeros_like(kernel), 0.0, 0
  for row in range(len(batch.tokens)):
    for t in first_tokens(batch, row):
      error = float((hidden[row, t] @ kernel)[0]) + bias - returns[row, t]
      gradient[:, 0] += error * hidden[row, t]
      of_bias, count = of_bias + error, count + 1
  head = new.trainable["params"]["value_head"]
  np.testing.assert_allclose(head["kernel"], kernel - COEF * gradient / count, atol=2e-5)
  np.testing.assert_allclose(head["bias"][0], bias - COEF * of_bias / count, atol=2e-5)
  for name, before in state.trainable["params"].items():
    if name != "value_head":
      after = new.trainable["params"][name]
      jax.tree.map(np.testing.assert_array_equal, after, before)


def test_a_pass_of_the_head_leaves_the_policys_moments_alone(params):
  """Adam's decay would move the policy in passes that are none of its own, and its count the
  schedule."""
  optimizer = setup.build_optimizer(config_lib.Optimizer(learning_rate=1e-2), 10, critic_rate=2.0)
  learner = learner_with(optimizer, passes=2)
  batch = fakes.padded(batching.pack(rollouts(), 64), 4)
  state, prepared = prepared_by(learner, params, batch, 2)
  change = jax.jit(functools.partial(update.update, learner))
  state, _ = change(state, prepared, prepared.tokens.shape[0])
  fit = jax.jit(functools.partial(update.fit_values, learner))
  new = fit(state, prepared, prepared.tokens.shape[0])
  changed = set()

  def compare(path, after, before):
    if not np.array_equal(after, before):
      changed.add("value_head" in jax.tree_util.keystr(path))

  jax.tree_util.tree_map_with_path(compare, new, state)
  assert changed == {True}
  broken = prepared._replace(returns=prepared.returns * jnp.nan)
  jax.tree.map(np.testing.assert_array_equal, fit(state, broken, prepared.tokens.shape[0]), state)


def test_a_pass_of_the_head_is_a_whole_step_of_adam(params):
  """With the policy's count Adam took the head's second moment for too young: passes shrank."""
  rate = 1e-3
  optimizer = setup.build_optimizer(
    config_lib.Optimizer(learning_rate=rate, max_grad_norm=0.0), 100, head_passes=True
  )
  learner = learner_with(optimizer, passes=5)
  batch = batching.pack([samples.sample(0, [1e6])], 64).batch  # so far away that nothing changes
  state, prepared = prepared_by(learner, params, batch)
  change = jax.jit(functools.partial(update.update, learner))
  fit = jax.jit(functools.partial(update.fit_values, learner))
  for _ in range(4):
    before = state.trainable["params"]["value_head"]["bias"]
    state, _ = change(state, prepared, 1)
    for _ in range(4):
      state = fit(state, prepared, 1)
    moved = state.trainable["params"]["value_head"]["bias"] - before
    np.testing.assert_allclose(moved, 5 * rate, rtol=0.01)


def test_passes_come_after_the_policys_updates():
  """A pass too many, or one before the policy's, whose clip would then start from other values."""
  config = config_lib.Config(
    critic=Critic(kind="value", passes=3), train=config_lib.Train(epochs=1, minibatches=2)
  )
  done = []

  class Phase:
    state = types.SimpleNamespace(kl_coef=0.0)

    def pack(self, kept):
      return batching.pack(rollouts(count=2), 64)

    def prepare(self, packed):
      return packed.batch, {}

    def minibatches(self, prepared, rows, epoch):
      return [((epoch, i), 1) for i in range(2)]

    def update(self, minibatch, count):
      done.append(("policy", *minibatch))
      return {"grad_norm": 1.0}

    def fit_values(self, minibatch, count):
      done.append(("head", *minibatch))

  recorder = types.SimpleNamespace(wants=lambda done: False)
  for _ in iteration._learn(config, Phase(), recorder, [], 0):
    pass
  policy = [("policy", 0, i) for i in range(2)]
  assert done == policy + [("head", epoch, i) for epoch in (1, 2) for i in range(2)]


@pytest.mark.parametrize(
  ("algorithm", "expected"),
  [("steptool", [0.81, 0.9, 1.0]), ("steptool_no_step_grained", [0.0, 0.0, 1.0])],
)
def test_critics_are_fitted_to_the_returns_that_gae_has(algorithm, expected):
  """Where each step is an episode, values of the whole trajectory punish all steps but the last."""
  row = algorithms.get_algorithm(algorithm)
  config = Config(advantage=Advantage(gamma=0.9), critic=Critic(kind="ridge"))
  learner = learners.Learner(MODEL, row, algorithms.resolve(row, config), optax.sgd(1.0))
  batch = batching.pack([samples.sample(0, [0.0, 0.0, 1.0], [1, 1, 1])], 64).batch
  batch = jax.tree.map(jnp.asarray, batch)
  found = preparation._returns_to_go(learner, batch, batch.rewards)
  np.testing.assert_allclose(found[batch.action_mask], expected, atol=1e-6)


@pytest.mark.parametrize(
  ("fields", "reason"),
  [
    ({"critic.passes": 3}, "critic.passes: 3.*'ridge'.*leave it at 1.*'value'"),
    ({"algorithm": "grpo", "critic.normalise": True}, "critic.normalise.*'none'"),
    ({"algorithm": "archer", "critic.passes": 2}, "'double'"),
    ({"algorithm": "ppo", "critic.passes": 0}, "above 0"),
    ({"algorithm": "grpo_step", "advantage.bootstrap": ("step_budget",)}, "bootstrap.*no critic"),
    ({"algorithm": "archer", "loss.kl": "reward"}, "replayed steps"),
    ({"algorithm": "ppo", "critic.passes": 2, "train.optimizer.muon_rate": 0.1}, "Muon"),
  ],
)
def test_options_of_the_value_head_elsewhere_are_refused(fields, reason):
  """They would be read by nothing."""
  config = config_lib.base_config()
  config.update_from_flattened_dict(fields)
  with pytest.raises(ValueError, match=reason):
    validate(config)
