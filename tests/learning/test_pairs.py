"""Selections, pairs in neighbouring rows, and the DPO loss on them."""

import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import samples

from steptool_jax.config import Config, Dpo, Loss
from steptool_jax.learning import algorithms, batching, losses
from steptool_jax.learning.outputs import policy_outputs
from steptool_jax.learning.programs import learners, preparation, update
from steptool_jax.learning.selection import PAIRS, SOLVED
from steptool_jax.policy import model

CONFIG = fakes.tiny_config()


def made(*outcomes):
  """(task, solved) -> trajectories of one to three steps."""
  return [
    samples.sample(task, [0.0] * (n % 3 + 1), [n % 4 + 1] * (n % 3 + 1), seed=n, solved=solved)
    for n, (task, solved) in enumerate(outcomes)
  ]


def test_solved_ones_each_way_once():
  group = made((0, 1.0), (0, 0.5), (0, 0.0), (1, 1.0))
  again = samples.sample(0, [0.0], [1], seed=0, solved=1.0)
  assert again.steps[0].tokens.tolist() == group[0].steps[0].tokens.tolist()
  picked = SOLVED.pick([*group, again])
  assert [unit[0].task_id for unit in picked] == ["t0", "t1"]
  assert SOLVED.pick(group[1:3]) == []


def test_pairs_of_a_task():
  group = made((0, 1.0), (0, 0.0), (0, 0.0), (0, 0.5), (1, 1.0), (2, 0.0), (3, 0.0), (3, 1.0))
  pairs = PAIRS.pick(group)
  index = {id(t): n for n, t in enumerate(group)}
  assert [(index[id(a)], index[id(b)]) for a, b in pairs] == [(0, 1), (0, 2), (7, 6)]
  assert PAIRS.pick(group[3:6]) == []


def test_pairs_lie_in_neighbouring_rows_segment_by_segment():
  group = made(*((task, float(n == 0)) for task in range(6) for n in range(3)))
  pairs = PAIRS.pick(group)
  assert len(pairs) == 12
  batch = batching.pack_units(pairs, 24).batch
  assert (batch.segment_ids.max(axis=1) > 1).any(), "nothing is packed"
  left = [(a.steps[0].tokens.tobytes(), b.steps[0].tokens.tobytes()) for a, b in pairs]
  for row in range(0, batch.tokens.shape[0], 2):
    assert batch.segment_ids[row].max() == batch.segment_ids[row + 1].max()
    for segment in range(1, batch.segment_ids[row].max() + 1):
      first = []
      for member in (row, row + 1):
        here = batch.segment_ids[member] == segment
        assert len(set(batch.group_ids[member][here])) == 1
        step = here & (batch.step_ids[member] == 0)
        first.append(batch.targets[member][step].tobytes())
      left.remove(tuple(first))
  assert not left


def paired(row_tokens=24, rows=4):
  group = made(*((task, float(n == 0)) for task in range(5) for n in range(3)))
  pairs = PAIRS.pick(group)
  return pairs, fakes.padded(batching.pack_units(pairs, row_tokens), rows)


def test_dpo_equals_a_loop_over_pairs():
  pairs, batch = paired()
  rng = np.random.default_rng(0)
  now = rng.normal(-1, 1, batch.tokens.shape).astype(np.float32)
  ref = rng.normal(-1, 1, batch.tokens.shape).astype(np.float32)
  (total, count), metrics = losses.dpo(jnp.asarray(now), jnp.asarray(ref), batch, 0.3)
  expected, slope = oracles.dpo(*by_row(batch, now - ref), 0.3)
  assert count == len(pairs)
  np.testing.assert_allclose(total / count, expected, rtol=1e-5)
  grad = jax.grad(lambda x: losses.dpo(x, jnp.asarray(ref), batch, 0.3)[0][0] / count)(
    jnp.asarray(now)
  )
  assert (np.asarray(grad)[~batch.action_mask] == 0).all()
  got = np.sort([grad[r, at[0]] for r, at in places(batch) if r % 2 == 0])
  np.testing.assert_allclose(got, np.sort(slope), atol=1e-6)
  margins = 0.3 * np.subtract(*by_row(batch, now - ref))
  np.testing.assert_allclose(metrics["pair_accuracy"][0], (margins > 0).sum())
  np.testing.assert_allclose(metrics["pair_margin"][0], margins.sum(), rtol=1e-4)


def places(batch):
  """(row, sampled positions) of every trajectory, row by row."""
  for row in range(batch.tokens.shape[0]):
    for segment in range(1, batch.segment_ids[row].max() + 1):
      yield row, np.flatnonzero((batch.segment_ids[row] == segment) & batch.action_mask[row])


def by_row(batch, x):
  """(of chosen, of rejected): sums over the sampled tokens, pair by pair."""
  rows = {}
  for row, at in places(batch):
    rows.setdefault(row, []).append(x[row, at].sum())
  both = [[s for row in sorted(rows) if row % 2 == m for s in rows[row]] for m in (0, 1)]
  return np.array(both[0]), np.array(both[1])


def test_dpo_literal():
  """log-ratios 1 and -2 against .5 and 1, beta 2: -log sigmoid(1), -log sigmoid(-6)."""
  pairs = [
    (samples.sample(task, [0.0], [2], seed=1), samples.sample(task, [0.0], [1], seed=2))
    for task in (0, 1)
  ]
  batch = batching.pack_units(pairs, 8).batch
  now = np.zeros(batch.tokens.shape, np.float32)
  for row, segment, values in ((0, 1, (0.25, 0.75)), (0, 2, (0, -2)), (1, 1, (0.5,)), (1, 2, (1,))):
    at = (batch.segment_ids[row] == segment) & batch.action_mask[row]
    now[row, at] = values
  (total, count), _ = losses.dpo(jnp.asarray(now), jnp.zeros_like(now), batch, 2.0)
  assert count == 2
  np.testing.assert_allclose(total, np.log1p(np.exp(-1)) + np.log1p(np.exp(6)), rtol=1e-6)


@pytest.fixture(scope="module")
def params():
  return model.init_params(CONFIG, jax.random.key(0))


def learner_of(name="eto"):
  row = algorithms.get_algorithm(name)
  return learners.Learner(
    model=CONFIG,
    algorithm=row,
    config=algorithms.resolve(row, Config(dpo=Dpo(beta=0.5), loss=Loss(logprob_chunk=16))),
    optimizer=optax.sgd(1.0),
  )


@functools.cache
def programs(name):
  learner = learner_of(name)
  return (
    jax.jit(functools.partial(preparation.prepare, learner)),
    jax.jit(functools.partial(update.update, learner)),
  )


def test_the_gradient_is_dpos_and_accumulation_is_exact(params):
  """The update against a direct loss; two and six micro-batches; the reference is not moved."""
  _, batch = paired(rows=12)
  state = learners.init_state(learner_of(), {"params": params}, {})
  state = state._replace(reference=jax.tree.map(lambda x: 1.2 * x, state.reference))
  results = []
  for micro in (6, 2):
    stacked = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, micro, x.shape[-1]), batch)  # noqa: B023
    prepare, step = programs("eto")
    prepared, metrics = prepare(state, stacked, stacked.tokens.shape[0])
    new, after = step(state, prepared, stacked.tokens.shape[0])
    results.append(jax.tree.map(jnp.subtract, params, new.trainable["params"]))
    assert prepared.advantages is None
    assert float(metrics["kl"]) != 0.0
  for a, b in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, new.reference, state.reference)

  flat = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, x.shape[-1]), batch)
  ref = prepared.ref_logprobs.reshape(flat.tokens.shape)
  log_ratio = functools.partial(policy_outputs, CONFIG, temperature=1.0, chunk=512)

  def loss(p):
    x = (log_ratio({"params": p}, flat).logprobs - ref) * flat.action_mask
    total = 0.0
    at = list(places(batch))
    by = {}
    for row, positions in at:
      by.setdefault(row, []).append(x[row, positions].sum())
    for row in range(0, batch.tokens.shape[0], 2):
      for chosen, rejected in zip(by.get(row, []), by.get(row + 1, []), strict=True):
        total += jnp.log1p(jnp.exp(-0.5 * (chosen - rejected)))
    return total / int((batch.segment_ids[::2].max(axis=1)).sum())

  expected = jax.jit(jax.grad(loss))(params)
  np.testing.assert_allclose(after["loss"], jax.jit(loss)(params), rtol=1e-4)
  for a, b in zip(jax.tree.leaves(results[1]), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
