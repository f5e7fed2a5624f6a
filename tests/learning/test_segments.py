"""Trajectories of several segments: history was changed, so steps have prompts of their own.

What is learnt from one must be what is learnt where each step is computed alone from its own
prompt, whichever rows its segments lie in.
"""

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
import thinker

from steptool_jax.config import Advantage, Config, Critic, Loss
from steptool_jax.learning import advantages, algorithms, batching, groups, losses
from steptool_jax.learning.programs import learners, update
from steptool_jax.learning.steptable import build
from steptool_jax.policy import lora, model
from steptool_jax.types import TRUNCATED

CONFIG = fakes.tiny_config()
ADVANTAGE = Advantage(gamma=0.9, lam=0.8)
ROWS, ROW_TOKENS = 12, 40


def broken(trajectory, prompts):
  """The trajectory, whose steps named by `prompts` {step: ids} have prompts of their own."""
  steps = tuple(
    dataclasses.replace(step, prompt_tokens=np.array(prompts[k], np.int32))
    if k in prompts
    else step
    for k, step in enumerate(trajectory.steps)
  )
  return dataclasses.replace(trajectory, steps=steps)


def random_breaks(trajectories, seed):
  """Every step but the first has a prompt of its own with a chance of one half."""
  rng = np.random.default_rng(seed)
  return [
    broken(
      t,
      {
        k: rng.integers(0, fakes.VOCAB, rng.integers(1, 9))
        for k in range(1, len(t.steps))
        if rng.random() < 0.5
      },
    )
    for t in trajectories
  ]


def group(seed=0):
  return samples.random_samples(seed, tasks=5)[0]


def gae_of(packed, rng_values, **kwargs):
  batch = jax.tree.map(jnp.asarray, packed.batch)
  values = rng_values(batch.tokens.shape)
  found = advantages.gae(batch, batch.rewards, values, gamma=0.9, lam=0.8, **kwargs)
  return [batching.unpack(packed, np.asarray(x)) for x in (*found, values)], np.asarray(values)


def test_gae_across_a_break_by_hand():
  """Two steps of one token, gamma = lambda = .5, V = 1 and 2, r = 1 and 4, a break between them.

  Last: 4 - 2 = 2. First: 1 + .5 * 2 - 1 = 1, and + .25 * 2 = 1.5. A break that ended the episode
  would give 1 - 1 = 0 for the first, and one row a segment must not hide that.
  """
  t = broken(samples.sample(0, [1.0, 4.0], lengths=[1, 1]), {1: [8, 9, 3]})
  packed = batching.pack([t], 3)
  assert [[p.row for p in places] for places in packed.places] == [[1, 0]]
  batch = packed.batch
  assert batch.part_ids.tolist() == [[2, 2, 2], [1, 1, 0]]
  values = np.where(batch.action_mask, batch.step_ids + 1.0, 7.0).astype(np.float32)
  for level in ("step", "token"):
    found, returns = advantages.gae(
      batch, jnp.asarray(batch.rewards), jnp.asarray(values), gamma=0.5, lam=0.5, level=level
    )
    (own,), (back,) = (batching.unpack(packed, np.asarray(x)) for x in (found, returns))
    assert own.tolist() == [1.5, 2.0]
    assert back.tolist() == [2.5, 4.0]


def test_what_a_segment_holds_by_hand():
  """The ids, positions and masks of a break are those recorded; what followed the step before it
  stands in the new prompt, and not behind that step a second time."""
  t = broken(samples.sample(0, [1.0, 4.0], lengths=[2, 1]), {1: [8, 9, 3]})
  (a, b), (c,) = (s.tokens for s in t.steps)
  batch = batching.pack([t], 8).batch
  assert batch.tokens.tolist() == [[5, 0, a, 8, 9, 3, 0, 0]]
  assert batch.targets[0, :6].tolist() == [0, a, b, 9, 3, c]
  assert batch.positions[0, :6].tolist() == [0, 1, 2, 0, 1, 2]
  assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 2, 0, 0]]
  assert batch.step_ids.tolist() == [[-1, 0, 0, -1, -1, 1, -1, -1]]
  assert batch.trajectory_tokens[0, :6].tolist() == [3] * 6
  assert (t.num_tokens, t.longest, batching.packed_length(t)) == (8, 4, 6)


@pytest.mark.parametrize("level", ["step", "token"])
def test_gae_equals_the_oracle_wherever_segments_lie(level):
  """A carry that is lost, or goes to another trajectory, would show in one of these rows."""
  trajectories = random_breaks(group(1) + group(7), 1)
  packed = batching.pack(trajectories, 24, TRUNCATED)
  assert sum(len(t.parts) > 2 for t in trajectories) > 3
  assert any(len({p.row for p in places}) > 1 for places in packed.places)
  rng = np.random.default_rng(0)
  draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  (found, returns, values), values_BT = gae_of(packed, draw, level=level, broadcast=False)
  for t, places, own, back, v in zip(
    trajectories, packed.places, found, returns, values, strict=True
  ):
    rewards, ends = [], []
    for step in t.steps:
      rewards += [0.0] * (len(step.tokens) - 1) + [step.reward]
      ends += [False] * (len(step.tokens) - 1) + [True]
    after = values_BT[places[-1].row, places[-1].stop - 1] if t.truncated else 0.0
    expected = oracles.gae_tokens(np.array(rewards), v, ends, after, 0.9, 0.8, level)
    np.testing.assert_allclose(own, expected, atol=2e-6)
    np.testing.assert_allclose(back, expected + v, atol=2e-6)


def test_one_segment_gives_what_it_gave():
  """Where part ids are there, but no break is, everything has the same bits as without them."""
  trajectories = group(2)
  plain, marked = (
    batching.pack(trajectories, 40, TRUNCATED, segmented=segmented) for segmented in (False, True)
  )
  for name, x in plain.batch._asdict().items():
    np.testing.assert_array_equal(x, getattr(marked.batch, name)) if x is not None else None
  values = np.random.default_rng(0).normal(size=plain.batch.tokens.shape).astype(np.float32)
  for function in FUNCTIONS[::2]:
    one, two = (np.asarray(function(p.batch, jnp.asarray(values))) for p in (plain, marked))
    np.testing.assert_array_equal(one, two)


FUNCTIONS = [
  lambda b, v: advantages.gae(b, b.rewards + v * b.action_mask, v, gamma=0.9, lam=0.8)[0],
  lambda b, v: groups.group_relative(b, b.rewards + v * b.action_mask),
  lambda b, v: groups.leave_one_out(b, b.rewards + v * b.action_mask),
  lambda b, v: groups.step_relative(b, b.rewards + v * b.action_mask, 0.9),
  lambda b, v: losses.action_weights(b, "trajectory"),
]


def alone(trajectories):
  """The same trajectories without breaks: for all that asks only for rewards and their order."""
  bare = lambda t: [dataclasses.replace(s, prompt_tokens=None) for s in t.steps]  # noqa: E731
  return [dataclasses.replace(t, steps=tuple(bare(t))) for t in trajectories]


@pytest.mark.parametrize("function", FUNCTIONS[1:])
def test_baselines_know_whole_trajectories(function):
  """A segment that counted as a sample of its own would move every mean of its group."""
  trajectories = random_breaks(group(3), 3)
  found = []
  for those in (trajectories, alone(trajectories)):
    packed = batching.pack(those, ROW_TOKENS)
    zeros = jnp.zeros(packed.batch.tokens.shape, jnp.float32)
    found.append(batching.unpack(packed, np.asarray(function(packed.batch, zeros))))
  for own, expected in zip(*found, strict=True):
    np.testing.assert_allclose(own, expected, atol=1e-6)


def test_the_step_table_and_its_critics_know_whole_trajectories():
  """Entries lie in the rows of their segments; what a sample's own return is must not change."""
  from steptool_jax.learning import critics

  trajectories = random_breaks(group(4), 4)
  found = []
  for those in (trajectories, alone(trajectories)):
    packed = batching.pack(those, ROW_TOKENS, TRUNCATED)
    table = build(packed, 24)
    g = {}
    for number, t in enumerate(those, start=1):
      for k, x in enumerate(oracles.returns_to_go([s.reward for s in t.steps], 0.9)):
        g[number, k] = x
    keys = list(zip(table.trajectory.reshape(-1), table.step.reshape(-1), strict=True))
    returns = np.array([g.get(key, 0.0) for key in keys], np.float32).reshape(table.step.shape)
    returns *= (table.position >= 0) & ~table.final
    values = np.asarray(critics.group(table, jnp.asarray(returns), None, 1.0, 2)).reshape(-1)
    there = table.position.reshape(-1) >= 0
    found.append({key: v for key, v, here in zip(keys, values, there, strict=True) if here})
  assert found[0].keys() == found[1].keys()
  for key, value in found[0].items():
    np.testing.assert_allclose(value, found[1][key], atol=1e-6)


# --- gradients ---------------------------------------------------------------------------------


def learner_of(name, aggregation="", shape=CONFIG):
  row = algorithms.get_algorithm(name)
  config = Config(
    advantage=ADVANTAGE,
    critic=Critic(kind="value" if row.gae else ""),
    loss=Loss(kl_coef=0.1, value_coef=1.0, logprob_chunk=16, aggregation=aggregation),
  )
  return learners.Learner(shape, row, algorithms.resolve(row, config), optax.sgd(1.0))


@functools.cache
def params(shape=CONFIG):
  made = model.init_params(shape, jax.random.key(0))
  made["value_head"]["kernel"] = jax.random.normal(jax.random.key(1), (32, 1)) * 0.3
  return made


def learnt(name, packed, micro=3, aggregation="", shape=CONFIG, rows=ROWS):
  """(advantages of each trajectory, weights after a step of SGD)."""
  learner = learner_of(name, aggregation, shape)
  made = {"params": jax.tree.map(jnp.copy, params(shape))}
  parts = lora.split_variables(made, train_values=learner.critic == "value")
  state = learners.init_state(learner, *parts)
  batch = fakes.padded(packed, rows)
  stack = functools.partial(jax.tree.map, lambda x: jnp.asarray(x).reshape(-1, micro, x.shape[-1]))
  prepare, step = update.compile_programs(learner)
  count = len(batch.tokens) // micro
  prepared, _ = prepare(state, stack(batch), count)
  found = batching.unpack(packed, np.asarray(prepared.advantages).reshape(batch.tokens.shape))
  state, metrics = step(state, prepared, count)
  assert float(metrics["skipped"]) == 0
  return found, lora.join_variables(state.trainable, state.frozen)["params"]


def each_step_alone(trajectories, found, aggregation, shape=CONFIG):
  """The oracle: - sum of w A log pi(token | its own prompt) over steps, each of them in a forward
  pass of its own; its gradient by JAX, advantages as given. w: 1, or 1 / tokens of the trajectory.
  """
  steps = []
  for t, own in zip(trajectories, found, strict=True):
    total = sum(len(s.tokens) for s in t.steps)
    ends = np.cumsum([len(s.tokens) for s in t.steps])
    shown = t.prompt_tokens
    for step, a in zip(t.steps, np.split(own, ends[:-1]), strict=True):
      shown = shown if step.prompt_tokens is None else step.prompt_tokens
      weight = 1.0 if aggregation == "token" else 1.0 / total
      steps.append((shown, step.tokens, a, weight))
      shown = np.concatenate([shown, step.tokens, step.observation_tokens])
  size = max(len(shown) + len(tokens) for shown, tokens, _, _ in steps)
  ids = np.zeros((len(steps), size), np.int32)
  coefficient = np.zeros((len(steps), size), np.float32)
  for n, (shown, tokens, a, weight) in enumerate(steps):
    ids[n, : len(shown) + len(tokens)] = np.concatenate([shown, tokens])
    coefficient[n, len(shown) - 1 : len(shown) + len(tokens) - 1] = a * weight
  weights = sum(w * len(tokens) for _, tokens, _, w in steps)

  @jax.grad
  def gradient(p):
    positions = jnp.broadcast_to(jnp.arange(size), ids.shape)
    hidden = model.forward(shape, {"params": p}, ids, positions, jnp.ones_like(ids))
    logp = jax.nn.log_softmax(model.project_logits(shape, {"params": p}, hidden))
    next_logp = jnp.take_along_axis(logp[:, :-1], ids[:, 1:, None], -1)[..., 0]
    return -(coefficient[:, :-1] * next_logp).sum() / weights

  return gradient(params(shape))


def test_gradients_equal_each_step_alone(tmp_path):
  """From the rollout of a thinker to the weights that one step of SGD moves: thoughts stripped and
  results folded, nothing of either reaches a step that did not see it. Beside them random breaks.
  """
  codec = thinker.tokenizer(tmp_path / "tokenizer")
  trajectories = []
  for n, (thinking, fold) in enumerate((("stripped", 0), ("kept", 1), ("stripped", 1))):
    chat_format = thinker.hermes(codec, thinking)
    limits = dataclasses.replace(thinker.LIMITS, fold=fold)
    (t,), engine = thinker.rollouts(chat_format, limits, calls=2)
    assert thinker.contexts(t) == [seen for seen, _ in engine.turns]
    paid = [dataclasses.replace(s, reward=float(k + n)) for k, s in enumerate(t.steps)]
    trajectories.append(dataclasses.replace(t, sample=n, steps=tuple(paid)))
  assert [len(t.parts) for t in trajectories] == [3, 2, 3]
  trajectories += random_breaks(group(5), 5)
  shape = fakes.tiny_config(vocab_size=codec.vocab_size, max_position_embeddings=512)
  packed = batching.pack(trajectories, 480)
  # Micro-batches of two rows: segments of a trajectory lie in different ones.
  found, after = learnt("rloo", packed, 2, "trajectory", shape, rows=8)
  expected = each_step_alone(trajectories, found, "trajectory", shape)
  moved = jax.tree.map(lambda x, y: x - y, params(shape), after)
  for path, x in jax.tree_util.tree_leaves_with_path(moved):
    y = functools.reduce(lambda tree, key: tree[key.key], path, expected)
    if "value_head" not in jax.tree_util.keystr(path):
      np.testing.assert_allclose(x, y, atol=2e-6, err_msg=jax.tree_util.keystr(path))
  assert np.abs(moved["embed"]["embedding"]).max() > 1e-3, "an empty comparison"


def test_padding_is_no_worse():
  """Segments are packed one by one, so they leave no more room than whole trajectories do."""
  rng = np.random.default_rng(0)
  whole = [fakes.random_trajectory(rng) for _ in range(400)]
  parted = random_breaks(whole, 0)
  shares = [batching.padding_share(batching.pack(t, 80).batch) for t in (whole, parted)]
  assert shares[1] <= shares[0]


def test_pairs_refuse_segments_by_name():
  """ETO compares sums over whole trajectories; half of one must not pass for all of it."""
  one = broken(samples.sample(0, [1.0, 0.0]), {1: [4, 4]})
  with pytest.raises(ValueError, match=r"'t0' has 2 segments.*use algorithm rft or grpo"):
    batching.pack_units([(one, samples.sample(0, [0.0]))], 40)


@pytest.mark.parametrize(
  ("name", "changes", "match"),
  [
    ("eto", {}, "config.algorithm: 'eto'.*use 'rft' or 'grpo'"),
    ("gspo", {}, "config.loss.ratio: 'trajectory'.*use 'step'"),
    ("ppo", {"advantage": Advantage(level="released")}, "level: 'released'.*use 'step' or 'token'"),
  ],
)
def test_what_needs_a_trajectory_in_one_place_is_refused(name, changes, match):
  with pytest.raises(ValueError, match=match):
    algorithms.refuse_segments(Config(algorithm=name, **changes), "rollout.fold = 2")
  for other in algorithms.ALGORITHMS.keys() - {"eto", "gspo"}:
    algorithms.refuse_segments(Config(algorithm=other), "rollout.fold = 2")
