"""A prompt that is computed once for all samples of its task gives what separate rows give."""

import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import samples

from steptool_jax.config import Advantage, Config, Loss, Train
from steptool_jax.learning import algorithms, batching
from steptool_jax.learning.programs import learners, update
from steptool_jax.policy import attention, lora, model
from steptool_jax.run.training import setup
from steptool_jax.types import TRUNCATED

CONFIG = fakes.tiny_config()
FIRST = ("steptool", "ppo", "grpo_step", "gigpo")  # one of each kind; the others in the campaign


def groups(seed=0, prompt=9, tasks=5):
  """Samples of some tasks, with prompts of `prompt` tokens."""
  rng = np.random.default_rng(seed)
  prompts = rng.integers(0, 61, (tasks, prompt)).astype(np.int32)
  made, _ = samples.random_samples(seed, tasks=tasks)
  return [t.__class__(**(vars(t) | {"prompt_tokens": prompts[int(t.task_id[1:])]})) for t in made]


def both(trajectories, row_tokens=64, rows=12):
  """(alone, shared): packed without and with sharing, each padded to `rows` rows."""
  found = [
    batching.pack(trajectories, row_tokens, TRUNCATED, share=share) for share in (False, True)
  ]
  return found, [fakes.padded(packed, rows) for packed in found]


def path_of(batch, place):
  """The tokens that the last position of a trajectory sees, itself included."""
  row, last = place.row, place.stop - 1
  return [k for k in range(last + 1) if last < batch.until[row, k]]


@pytest.mark.parametrize("row_tokens", [64, 34])
def test_every_trajectory_is_on_a_path_of_its_own(row_tokens):
  """Tokens and positions along the path are those of the trajectory, whoever stands between."""
  trajectories = groups()
  packed = batching.pack(trajectories, row_tokens, TRUNCATED, share=True)
  rows_alone = len(batching.pack(trajectories, row_tokens, TRUNCATED).batch.tokens)
  assert len(packed.batch.tokens) < rows_alone
  for t, (place,) in zip(packed.trajectories, packed.places, strict=True):
    ids = np.concatenate(
      [t.prompt_tokens, *(x for s in t.steps for x in (s.tokens, s.observation_tokens))]
    )
    path = path_of(packed.batch, place)
    np.testing.assert_array_equal(
      packed.batch.tokens[place.row, path], ids[: batching.packed_length(t, bootstrap=TRUNCATED)]
    )
    np.testing.assert_array_equal(packed.batch.positions[place.row, path], np.arange(len(path)))
  shared = (packed.batch.segment_ids > 0).sum()
  alone = sum(batching.packed_length(t, bootstrap=TRUNCATED) for t in trajectories)
  assert shared < alone


def test_by_hand():
  """A prompt of three tokens and two answers: 2 shared, then each its last token and its own."""
  one = samples.sample(0, [1.0], lengths=[2], seed=0)
  two = samples.sample(0, [0.0], lengths=[1], seed=1)
  trajectories = [
    t.__class__(**(vars(t) | {"prompt_tokens": np.array([5, 6, 7], np.int32)})) for t in (one, two)
  ]
  batch = batching.pack(trajectories, 8, share=True).batch
  (a, b), (c,) = one.steps[0].tokens, two.steps[0].tokens
  assert batch.tokens.tolist() == [[5, 6, 7, a, 7, 0, 0, 0]]
  assert batch.targets[0, 2:5].tolist() == [a, b, c]
  assert batch.positions[0, :5].tolist() == [0, 1, 2, 3, 2]
  assert batch.segment_ids.tolist() == [[1, 1, 2, 2, 3, 0, 0, 0]]
  assert batch.until.tolist() == [[5, 5, 4, 4, 5, 6, 7, 8]]
  assert batch.action_mask.tolist() == [[False, False, True, True, True, False, False, False]]


def learner_of(name):
  row = algorithms.get_algorithm(name)
  config = Config(
    advantage=Advantage(gamma=0.9, lam=0.8),
    loss=Loss(kl_coef=0.1, value_coef=1.0, logprob_chunk=16),
  )
  return learners.Learner(CONFIG, row, algorithms.resolve(row, config), optax.sgd(1.0))


@functools.cache
def params():
  made = model.init_params(CONFIG, jax.random.key(0))
  made["value_head"]["kernel"] = jax.random.normal(jax.random.key(1), (32, 1)) * 0.3
  return made


def learnt(name, packed, batch):
  """(advantages of each trajectory, metrics, weights after one step of SGD)."""
  learner = learner_of(name)
  parts = lora.split_variables(
    {"params": jax.tree.map(jnp.copy, params())}, train_values=learner.critic == "value"
  )
  state = learners.init_state(learner, *parts)
  stack = functools.partial(jax.tree.map, lambda x: jnp.asarray(x).reshape(3, -1, x.shape[-1]))
  table = None
  if learner.fits is not None:
    table = stack(fakes.padded_table(packed, len(batch.tokens), 32))
  prepare, step = update.compile_programs(learner)
  prepared, metrics = prepare(state, stack(batch), 3, table)
  advantages = ()
  if prepared.advantages is not None:
    advantages_RT = np.asarray(prepared.advantages).reshape(batch.tokens.shape)
    advantages = batching.unpack(packed, advantages_RT)
  state, more = step(state, prepared, 3)
  return advantages, metrics | more, state.trainable["params"]


@pytest.mark.parametrize(
  "name",
  [
    name if name in FIRST else pytest.param(name, marks=pytest.mark.campaign)
    for name, row in algorithms.ALGORITHMS.items()
    if algorithms.shares_prompts(row, Train())
  ],
)
def test_losses_gradients_and_metrics_are_those_of_separate_rows(name):
  (alone, shared), batches = both(groups(3))
  one, two = learnt(name, alone, batches[0]), learnt(name, shared, batches[1])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, two)
  moved = np.abs(two[2]["embed"]["embedding"] - params()["embed"]["embedding"]).max()
  assert moved > 5e-4, "an empty comparison"


def test_a_group_that_does_not_fit_a_row_is_parted():
  """Every part brings its prompt along; a sample alone shares nothing."""
  trajectories = [
    t.__class__(**(vars(t) | {"task_id": "t0", "sample": n, "prompt_tokens": np.arange(9)}))
    for n, t in enumerate(groups(1))
  ]
  packed = batching.pack(trajectories, 30, share=True)
  assert len(packed.batch.tokens) > 1
  assert sorted(t.sample for t in packed.trajectories) == list(range(len(trajectories)))
  for t, (place,) in zip(packed.trajectories, packed.places, strict=True):
    assert len(path_of(packed.batch, place)) == batching.packed_length(t)


@pytest.mark.parametrize(
  ("name", "share", "trees"),
  [("steptool", True, True), ("steptool", False, False), ("eto", True, False)],
)
def test_on_a_tpu_only_rows_that_hold_trees_pay_for_them(name, share, trees, monkeypatch):
  """Trees of which the TPU's kernel was not told: samples would see each other."""
  config = Config(algorithm=name, train=Train(share_prompts=share))
  row = algorithms.get_algorithm(name)
  learner = learners.Learner(CONFIG, row, algorithms.resolve(row, config), optax.sgd(1.0))
  micro, told = batching.empty_batch(1, 8), []
  monkeypatch.setattr(learners, "policy_outputs", lambda m, v, batch, **_: told.append(batch.until))
  monkeypatch.setattr(learners.sharding, "platform", lambda: "tpu")
  learners.forward(learner, {}, micro)
  assert [until is not None for until in told] == [trees]
  packed, _ = setup.pack(config, groups(), (), 0)  # no pairs are in them, for eto
  assert (packed is not None and reaches_past_its_segment(packed.batch)) == trees


def reaches_past_its_segment(batch):
  """Whether some token is seen by branches that follow its segment."""
  ends = np.asarray(attention._ends(jnp.asarray(batch.segment_ids)))
  return bool((batch.until > ends).any())
