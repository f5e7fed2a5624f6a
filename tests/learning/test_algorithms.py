"""The table itself: what a row costs, and what it takes to add one."""

import dataclasses
import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import samples

from steptool_jax.config import Advantage, Config, Loss
from steptool_jax.learning import algorithms
from steptool_jax.learning.outputs import policy_outputs
from steptool_jax.learning.programs import learners, update
from steptool_jax.policy import lora, model
from steptool_jax.run.training import setup

CONFIG = fakes.tiny_config(hidden_size=64)


def learner_of(name, **changes):
  row = algorithms.get_algorithm(name)
  settings = Config(advantage=Advantage(**changes), loss=Loss(kl="none", logprob_chunk=16))
  return learners.Learner(CONFIG, row, algorithms.resolve(row, settings), optax.sgd(1.0))


@functools.cache
def params():
  return model.init_params(CONFIG, jax.random.key(0))


def start(learner):
  """Its buffers are its own, since an update takes them."""
  with_values = learner.algorithm.critic == "value"
  own = jax.tree.map(jnp.copy, params())
  return learners.init_state(
    learner, *lora.split_variables({"params": own}, train_values=with_values)
  )


def stacked():
  trajectories, _ = samples.random_samples(1)
  return jax.tree.map(lambda x: jnp.asarray(x)[None], samples.pack(trajectories))


def compiled(name):
  learner = learner_of(name)
  state, batch = start(learner), stacked()
  prepare, step = update.compile_programs(learner)
  prepared, _ = jax.eval_shape(prepare, state, batch, 1)
  return step.lower(state, prepared, 1).compile()


def test_an_update_without_a_critic_computes_none():
  flops = {name: compiled(name).cost_analysis()["flops"] for name in ("grpo", "ppo")}
  assert flops["grpo"] < flops["ppo"]
  state = start(learner_of("grpo"))
  assert "value_head" not in state.trainable
  assert "value_head" in state.frozen
  assert jax.tree.structure(lora.join_variables(state.trainable, state.frozen)) == (
    jax.tree.structure({"params": params()})
  )


def test_omega_0_is_grpo_bit_for_bit():
  batch = stacked()
  results = {}
  for name, omega in (("grpo", 1.0), ("gigpo", 0.0), ("gigpo", 1.0)):
    learner = learner_of(name, omega=omega)
    prepare, step = update.compile_programs(learner)
    state = start(learner)
    prepared, _ = prepare(state, batch, 1)
    results[name, omega] = (np.asarray(prepared.advantages),)
    if (name, omega) != ("gigpo", 1.0):
      results[name, omega] += (step(state, prepared, 1)[0].trainable,)
  for a, b in zip(
    *map(jax.tree.leaves, (results["grpo", 1.0], results["gigpo", 0.0])), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  assert not np.array_equal(results["grpo", 1.0][0], results["gigpo", 1.0][0])


@pytest.mark.parametrize("name", ["reinforce", "grpo"])  # of both aggregations
def test_the_gradient_is_reinforces(name):
  """- sum_tokens w A grad log pi, with the weights of the row's aggregation."""
  learner = learner_of(name)
  prepare, step = update.compile_programs(learner)
  state, batch = start(learner), stacked()
  prepared, _ = prepare(state, batch, 1)
  micro = jax.tree.map(lambda x: np.asarray(x)[0], prepared)
  weights = np.zeros(micro.tokens.shape, np.float32)
  for row in range(weights.shape[0]):
    for segment in range(1, micro.segment_ids[row].max() + 1):
      at = micro.action_mask[row] & (micro.segment_ids[row] == segment)
      weights[row, at] = 1 / at.sum() if learner.algorithm.aggregation == "trajectory" else 1
  assert np.any(micro.advantages)

  def loss(params):
    out = policy_outputs(CONFIG, {"params": params}, micro, temperature=1.0, chunk=512)
    return -(weights * micro.advantages * out.logprobs).sum() / weights.sum()

  expected = jax.jit(jax.grad(loss))(state.trainable["params"])
  before = jax.tree.map(jnp.copy, state.trainable["params"])
  new, _ = step(state, prepared, 1)
  got = jax.tree.map(jnp.subtract, before, new.trainable["params"])
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@dataclasses.dataclass(frozen=True)
class LossWithMargin(Loss):
  """What a new field of config.Loss makes of it."""

  margin: float = 0.0


def test_a_new_number_is_its_definition_and_its_use(monkeypatch):
  """A field of a config's group reaches the loss that reads it; nothing in between names it."""

  def loss(outputs, batch, config):
    terms, metrics = algorithms.ALGORITHMS["sft"].loss(outputs, batch, config)
    total, count = terms["loss"]
    return {"loss": (total + config.loss.margin * count, count)}, metrics

  row = algorithms.Algorithm("outcome", loss, kl="none")
  monkeypatch.setitem(algorithms.ALGORITHMS, "toy", row)
  losses = []
  for margin in (0.0, 0.5):
    settings = Config(algorithm="toy", loss=LossWithMargin(margin=margin, logprob_chunk=16))
    learner = setup.build_learner(settings, CONFIG, "toy")
    _, step = update.compile_programs(learner)
    losses.append(float(step(start(learner), stacked(), 1)[1]["loss"]))
  assert losses[1] - losses[0] == pytest.approx(0.5, abs=1e-5)


def test_no_two_rows_are_the_same():
  rows = list(algorithms.ALGORITHMS.values())
  for n, row in enumerate(rows):
    assert row not in rows[:n]


def test_imitation_is_the_same_whatever_rl_sums_up():
  """A comparison of loss.aggregation began RL at other policies."""
  found = set()
  for word in ("", "trajectory", "constant"):
    config = dataclasses.replace(
      Config(), loss=dataclasses.replace(Config().loss, aggregation=word)
    )
    found.add(algorithms.resolve(algorithms.get_algorithm("sft"), config).loss.aggregation)
  assert found == {"token"}
