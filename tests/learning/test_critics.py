"""Critics in closed form: no own return in a value, an oracle that loops, and what is cut."""

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
from hypothesis import given, settings
from hypothesis import strategies as st

from steptool_jax import config as config_lib
from steptool_jax.config import Advantage, Config, Critic, Loss
from steptool_jax.learning import algorithms, batching, critics, steptable
from steptool_jax.learning.programs import learners, preparation, update
from steptool_jax.policy import model
from steptool_jax.types import (
  TRUNCATED,
  Code,
  Finish,
  Observation,
  Status,
  Step,
  ToolCall,
  Trajectory,
)
from steptool_jax.validation import validate

GAMMA = 0.9


def called(trajectory: Trajectory, marks) -> Trajectory:
  """The same with calls in the place of answers, but for a last one; `marks`: their SC."""
  steps = []
  for k, step in enumerate(trajectory.steps):
    last = k == len(trajectory.steps) - 1 and not trajectory.truncated
    action = Finish("x") if last else ToolCall("f", {})
    steps.append(dataclasses.replace(step, action=action, success_calling=marks[k]))
  return dataclasses.replace(trajectory, steps=tuple(steps))


def random_group(seed, tasks=6):
  trajectories, _ = samples.random_samples(seed, tasks=tasks)
  rng = np.random.default_rng(seed)
  return [called(t, rng.choice([0.0, 0.5, 1.0], 8)) for t in trajectories]


def packed_table(trajectories, row_tokens=40, rows=12, width=24):
  """(packed, batch, table), all of one shape for one compilation."""
  packed = batching.pack(trajectories, row_tokens, TRUNCATED)
  return packed, fakes.padded(packed, rows), fakes.padded_table(packed, rows, width)


def entries_of(packed, table, x_BK):
  """x of every trajectory's entries: its steps', and of the state in which it was cut."""
  out = []
  for trajectory, ((row, start, stop, _),) in zip(packed.trajectories, packed.places, strict=True):
    here = (table.position[row] >= start) & (table.position[row] < stop)
    out.append(np.asarray(x_BK)[row, here])
    assert len(out[-1]) == len(trajectory.steps) + trajectory.truncated
  return out


def to_go(trajectory):
  return oracles.returns_to_go([s.reward for s in trajectory.steps], GAMMA)


def returns(packed, table):
  """float32 [B, K]: G at the entries, 0 elsewhere."""
  out = np.zeros(table.position.shape, np.float32)
  for t, ((row, start, stop, _),) in zip(packed.trajectories, packed.places, strict=True):
    here = np.flatnonzero((table.position[row] >= start) & (table.position[row] < stop))
    out[row, here[: len(t.steps)]] = to_go(t)
  return out


ridge = jax.jit(critics.ridge, static_argnames="folds")
group = jax.jit(functools.partial(critics.group, hidden=None, penalty=1.0, folds=2))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_the_table_holds_what_is_known_in_front_of_a_step(seed):
  """A count that includes the step's own call would tell the critic what the step earns."""
  trajectories = random_group(seed)
  packed, batch, table = packed_table(trajectories)
  for field in ("succeeded", "failed", "last_failed", "step"):
    found = entries_of(packed, table, getattr(table, field))
    for t, values in zip(packed.trajectories, found, strict=True):
      marks = [s.success_calling for s in t.steps if isinstance(s.action, ToolCall)]
      for k, value in enumerate(values):
        before = marks[:k]
        expected = {
          "succeeded": sum(before),
          "failed": sum(1 - m for m in before),
          "last_failed": 1 - before[-1] if before else 0.0,
          "step": k,
        }[field]
        assert value == pytest.approx(expected), (field, k)
  starts = np.zeros(batch.tokens.shape, bool)
  for row, column in zip(*np.nonzero((table.position >= 0) & ~table.final), strict=True):
    starts[row, table.position[row, column]] = True
  inside = np.pad(batch.action_mask, ((0, 0), (1, 0)))[:, :-1]
  ids = np.pad(batch.step_ids, ((0, 0), (1, 0)), constant_values=-2)[:, :-1]
  segments = np.pad(batch.segment_ids, ((0, 0), (1, 0)))[:, :-1]
  same = inside & (ids == batch.step_ids) & (segments == batch.segment_ids)
  np.testing.assert_array_equal(starts, batch.action_mask & ~same)
  cut = [(r, table.position[r, k]) for r, k in zip(*np.nonzero(table.final), strict=True)]
  assert sorted(cut) == sorted(zip(*np.nonzero(batch.bootstrap), strict=True))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_values_reach_all_tokens_of_their_step_and_no_others(seed):
  packed, batch, table = packed_table(random_group(seed))
  values = np.where(table.position >= 0, np.arange(table.position.size).reshape(12, -1) + 1.0, 0.0)
  spread = np.asarray(steptable.scatter(jnp.asarray(values, jnp.float32), table, batch))
  np.testing.assert_array_equal(steptable.gather(jnp.asarray(spread), table), values)
  assert (spread[~(batch.action_mask | batch.bootstrap)] == 0).all()
  for ((row, start, stop, _),), own in zip(
    packed.places, entries_of(packed, table, values), strict=True
  ):
    mask, ids = batch.action_mask[row, start:stop], batch.step_ids[row, start:stop]
    np.testing.assert_array_equal(spread[row, start:stop][mask], own[ids[mask]])


def test_the_group_critic_by_hand():
  """Three samples: returns 1, 0 and .5 at step 0; only two reach step 1; one is cut after it."""
  group_of_three = [
    samples.sample(0, [0.0, 1.0], seed=0),
    samples.sample(0, [0.0], seed=1),
    samples.sample(0, [0.1, 0.4], seed=2, status=Status.STEP_BUDGET),
    samples.sample(1, [0.7], seed=3),
  ]
  packed, _, table = packed_table(group_of_three)
  g = jnp.asarray(np.where(table.position >= 0, returns(packed, table), 0.0), jnp.float32)
  found = entries_of(packed, table, group(table, g))
  values = {t.sample: v for t, v in zip(packed.trajectories, found, strict=True)}
  first, cut = 0.9, 0.1 + 0.9 * 0.4
  np.testing.assert_allclose(values[0], [(0.0 + cut) / 2, 0.4], atol=1e-6)
  np.testing.assert_allclose(values[1], [(first + cut) / 2], atol=1e-6)
  # After the cut nobody of the task has a step: the mean return of the others.
  np.testing.assert_allclose(values[2], [first / 2, 1.0, first / 2], atol=1e-6)
  np.testing.assert_allclose(values[3], [0.0], atol=1e-6)  # alone


def oracle_ridge(packed, table, hidden_BKD, penalty, folds):
  """Slow: one regression a fold, features one by one."""
  there = table.position >= 0
  flat = hidden_BKD[there]
  hidden = (hidden_BKD - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-6)
  hidden = hidden * np.sqrt(0.09 / hidden.shape[-1])
  rows = []
  for t, ((row, start, stop, _),) in zip(packed.trajectories, packed.places, strict=True):
    others = [to_go(o)[0] for o in packed.trajectories if o.task_id == t.task_id and o is not t]
    mean = np.mean(others) if others else 0.0
    at = np.flatnonzero((table.position[row] >= start) & (table.position[row] < stop))
    marks = [s.success_calling for s in t.steps if isinstance(s.action, ToolCall)]
    for k, entry in enumerate(at):
      step = np.eye(9)[min(k, 8)]
      calls = [sum(marks[:k]), sum(1 - m for m in marks[:k]), 1 - marks[k - 1] if k else 0.0]
      x = np.concatenate([[1.0], step, calls, step * mean, hidden[row, entry]])
      target = to_go(t)[k] if k < len(t.steps) else None
      rows.append((row, entry, table.task[row, entry] % folds, x, target))
  values = np.zeros(table.position.shape)
  penalties = penalty * np.diag([1e-3] + [1.0] * (len(rows[0][3]) - 1))
  for fold in range(folds):
    fitted = [(x, y) for _, _, f, x, y in rows if f != fold and y is not None]
    x, y = np.array([f[0] for f in fitted]), np.array([f[1] for f in fitted])
    weights = np.linalg.solve(x.T @ x + penalties, x.T @ y)
    for row, entry, f, features, _ in rows:
      if f == fold:
        values[row, entry] = features @ weights
  return values


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_ridge_equals_the_oracle_with_cross_fitting(seed):
  packed, _, table = packed_table(random_group(seed))
  hidden = np.random.default_rng(seed).normal(2, 3, (*table.position.shape, 5)).astype(np.float32)
  found = ridge(table, returns(packed, table), hidden, 0.5, folds=3)
  expected = oracle_ridge(packed, table, hidden, 0.5, 3)
  np.testing.assert_allclose(found, expected, atol=2e-4)


def test_ridge_of_one_feature_by_hand():
  """Two tasks of one sample and one step, two folds: V of one is what the other's return says.

  x = (1, 1 at step 0, the rest 0): w = G / (1 + 1e-3) on the intercept's side, shrunk by both
  penalties: V = G (1/p + 1) / (1 + 1/p + 1), p = 1e-3 the intercept's.
  """
  packed, _, table = packed_table([samples.sample(0, [1.0]), samples.sample(1, [0.2])])
  hidden = np.zeros((*table.position.shape, 3), np.float32)
  values = entries_of(packed, table, ridge(table, returns(packed, table), hidden, 1.0, folds=2))
  shrunk = 1001 / 1002
  found = {t.task_id: v[0] for t, v in zip(packed.trajectories, values, strict=True)}
  assert found["t0"] == pytest.approx(0.2 * shrunk, abs=1e-5)
  assert found["t1"] == pytest.approx(1.0 * shrunk, abs=1e-5)


@pytest.mark.parametrize("kind", ["group", "ridge"])
def test_no_trajectory_sees_its_own_return(kind):
  """A baseline that knows the return it is subtracted from takes the learning signal away."""
  trajectories = random_group(5)
  hidden, noticed = None, 0.0
  for victim in range(len(trajectories)):
    t = trajectories[victim]
    last = dataclasses.replace(t.steps[-1], reward=t.steps[-1].reward + 5.0)
    changed = dataclasses.replace(t, steps=(*t.steps[:-1], last))
    both = []
    for these in (trajectories, [*trajectories[:victim], changed, *trajectories[victim + 1 :]]):
      packed, _, table = packed_table(these)
      if hidden is None:
        hidden = np.random.default_rng(0).normal(size=(*table.position.shape, 5))
        hidden = hidden.astype(np.float32)
      g = jnp.asarray(returns(packed, table))
      values = ridge(table, g, hidden, 1.0, folds=3) if kind == "ridge" else group(table, g)
      index = [t.sample for t in packed.trajectories].index(t.sample)
      both.append((entries_of(packed, table, values)[index], np.asarray(values)))
    np.testing.assert_allclose(both[0][0], both[1][0], atol=1e-4)
    noticed = max(noticed, np.abs(both[0][1] - both[1][1]).max())
  assert noticed > 0.1, "others do not see it either"


def learner_with(kind, name="steptool", **advantage):
  row = algorithms.get_algorithm(name)
  config = Config(
    advantage=Advantage(gamma=GAMMA, lam=0.8, whiten=False, **advantage),
    critic=Critic(kind=kind, folds=3),
    loss=Loss(kl="none", logprob_chunk=16),
  )
  return learners.Learner(fakes.tiny_config(), row, algorithms.resolve(row, config), optax.sgd(0.5))


@pytest.mark.parametrize("name", ["steptool", "ppo"])
def test_prepare_takes_advantages_over_the_fitted_values(name):
  """From rollouts to advantages in one program, against the oracles of both."""
  learner = learner_with("ridge", name)
  params = model.init_params(fakes.tiny_config(), jax.random.key(0))
  packed, batch, table = packed_table(random_group(7))
  state = learners.init_state(learner, {"params": params}, {})
  stack = functools.partial(jax.tree.map, lambda x: jnp.asarray(x).reshape(3, 4, x.shape[-1]))
  prepared, metrics = update.compile_programs(learner)[0](state, stack(batch), 3, stack(table))
  values = np.asarray(prepared.values).reshape(batch.tokens.shape)
  advantages = np.asarray(prepared.advantages).reshape(batch.tokens.shape)
  hidden = model.forward(
    fakes.tiny_config(), {"params": params}, batch.tokens, batch.positions, batch.segment_ids
  )
  if name == "steptool":
    fitted = oracle_ridge(packed, table, np.asarray(steptable.gather(hidden, table)), 1.0, 3)
    found = np.asarray(steptable.gather(jnp.asarray(values), table))
    np.testing.assert_allclose(found, fitted, atol=2e-4)
    left = [np.subtract(to_go(t), v[: len(t.steps)]) for t, v in zip(
      packed.trajectories, entries_of(packed, table, found), strict=True
    )]  # fmt: skip
    whole = np.concatenate([to_go(t) for t in packed.trajectories])
    expected = 1 - np.var(np.concatenate(left)) / np.var(whole)
    assert float(metrics["explained_variance"]) == pytest.approx(expected, abs=1e-3)
  for ((row, start, stop, _),) in packed.places:
    at = np.arange(start, stop)
    act = at[batch.action_mask[row, at]]
    boot = at[batch.bootstrap[row, at]]
    expected = oracles.gae_tokens(
      batch.rewards[row, act],
      values[row, act],
      batch.step_end[row, act],
      values[row, boot[0]] if boot.size else 0.0,
      GAMMA,
      0.8,
      "step" if name == "steptool" else "token",
    )
    if name == "steptool":  # one advantage a step: its first token's
      firsts = np.searchsorted(batch.step_ids[row, act], batch.step_ids[row, act])
      expected = expected[firsts]
    np.testing.assert_allclose(advantages[row, act], expected, atol=1e-4)


def test_a_fitted_critic_leaves_the_value_head_alone():
  """Its loss would move the trunk for values that nobody reads."""
  learner = learner_with("ridge")
  batch = jax.tree.map(lambda x: jnp.asarray(x)[None], packed_table(random_group(7))[1])
  params = model.init_params(fakes.tiny_config(), jax.random.key(0))
  state = learners.init_state(learner, {"params": params}, {})
  filled = {"old_logprobs", "ref_logprobs", "advantages"}
  zeros = jnp.zeros(batch.tokens.shape, jnp.float32)
  batch = batch._replace(**dict.fromkeys(filled, zeros))
  metrics = jax.eval_shape(functools.partial(update.update, learner), state, batch, 1)[1]
  assert "value_loss" not in metrics
  assert "policy_loss" in metrics


@pytest.mark.parametrize(
  ("fields", "reason"),
  [
    ({"algorithm": "grpo", "critic.kind": "ridge"}, "no GAE"),
    ({"critic.kind": "group", "rollout.samples": 1}, "samples is 1.*ridge"),
    ({"critic.kind": "rigde"}, "did you mean 'ridge'"),
    ({"critic.folds": 1}, "at least 2"),
  ],
)
def test_refused_critics(fields, reason):
  config = config_lib.base_config()
  config.update_from_flattened_dict(fields)
  with pytest.raises(ValueError, match=reason):
    validate(config)


def test_observations_of_failures_do_not_count_as_calls_of_an_answer():
  """A Finish is no call: it neither succeeded nor failed."""
  step = Step(
    tokens=np.array([1, 2], np.int32),
    logprobs=np.zeros(2, np.float32),
    action=Finish("x"),
    observation=Observation("x", Code.OK),
    observation_tokens=np.array([3], np.int32),
  )
  t = Trajectory("t", 0, np.array([1], np.int32), (step, step), Status.STEP_BUDGET)
  table = steptable.build(batching.pack([t], 20, TRUNCATED))
  assert table.failed.max() == 0


def test_a_new_critic_is_one_row(monkeypatch):
  """config.critic.kind finds it, and prepare takes advantages over its values."""

  def fit(table, returns_BK, hidden, penalty, folds):
    return jnp.full_like(returns_BK, 0.25)

  monkeypatch.setitem(critics.CRITICS, "quarter", critics.Critic(fit))
  config = config_lib.base_config()
  config.critic.kind = "quarter"
  assert validate(config).critic.kind == "quarter"
  learner = learner_with("quarter")
  params = model.init_params(fakes.tiny_config(), jax.random.key(0))
  _, batch, table = packed_table(random_group(7))
  state = learners.init_state(learner, {"params": params}, {})
  stack = functools.partial(jax.tree.map, lambda x: jnp.asarray(x)[None])
  prepared, _ = preparation.prepare(learner, state, stack(batch), 1, stack(table))
  values = np.asarray(prepared.values)[0]
  assert set(np.unique(values[batch.action_mask])) == {0.25}
