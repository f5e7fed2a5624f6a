"""rollout.reuse: what the engine has recorded in the place of prepare's forward pass."""

import dataclasses
import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steptool_jax.config import Advantage, Config, Critic, Limits, Loss, Rollout
from steptool_jax.learning import algorithms, batching, steptable
from steptool_jax.learning.programs import learners, update
from steptool_jax.policy import engine, model
from steptool_jax.rollout import chain
from steptool_jax.rollout.setting import Sampling, Setting
from steptool_jax.simulators.runner import ToolRunner
from steptool_jax.types import Code, Observation, Task, ToolSpec

TEMPERATURE, BOUND = 0.7, 1e-3
ECHO = ToolSpec("echo", "", {"type": "object", "properties": {}})
LIMITS = Limits(max_steps=4, max_step_tokens=12, max_tokens=160, max_invalid=9)


class Script:
  """An environment that nobody's calls reach: a random model's turns are malformed, or cut."""

  name = "script"

  def open(self, task, sample):
    return self

  def call(self, call):
    return Observation("seven", Code.OK, "seven")

  def grade(self, answer):
    return 0.0

  def close(self):
    pass


@pytest.fixture(scope="module")
def chat_format(tmp_path_factory):
  return fakes.echo_format(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def policy(chat_format):
  """(model, variables with a value head that says something)."""
  config = fakes.tiny_config(vocab_size=chat_format.codec.vocab_size, num_layers=1)
  params = model.init_params(config, jax.random.key(0))
  params["value_head"]["kernel"] = jax.random.normal(jax.random.key(1), (32, 1)) * 0.3
  return config, {"params": params}


@pytest.fixture(scope="module")
def rolled(chat_format, policy):
  """(what is recorded, fold) -> paid trajectories of 4 tasks with 3 samples each."""

  @functools.cache
  def roll(record, fold):
    config, variables = policy
    eng = engine.make_engine(config, slots=5, size=160, chunk=5, leave=0.5, record=record)
    eng = dataclasses.replace(eng, buckets=())
    jobs = [
      (Task(f"t{n}", "script", f"query {n}", (ECHO,), {}), s) for n in range(4) for s in "012"
    ]
    with ToolRunner(timeout_s=5, workers=2, retries=0) as runner:
      limits = dataclasses.replace(LIMITS, fold=fold)
      setting = Setting(
        *(eng, variables, Script(), chat_format, limits, runner, Sampling(0, 0, TEMPERATURE))
      )
      found, _ = chain.rollout(setting, [(task, int(s)) for task, s in jobs])
    rng = np.random.default_rng(0)
    paid = [
      [dataclasses.replace(s, reward=float(rng.uniform()), success_calling=rng.uniform())
       for s in t.steps] for t in found
    ]  # fmt: skip
    return [dataclasses.replace(t, steps=tuple(s)) for t, s in zip(found, paid, strict=True)]

  return roll


def learner_with(policy, name, kind, **rollout):
  row = algorithms.get_algorithm(name)
  config = Config(
    advantage=Advantage(gamma=0.9, lam=0.8, whiten=False),
    critic=Critic(kind=kind, folds=3),
    # One of them with a penalty against another policy.
    loss=Loss(kl="reward" if kind == "group" else "none", kl_coef=0.1, logprob_chunk=16),
    rollout=dataclasses.replace(Rollout(), temperature=TEMPERATURE, **rollout),
  )
  return learners.Learner(policy[0], row, algorithms.resolve(row, config), optax.sgd(0.5))


compiled = functools.cache(update.compile_programs)


def stacked(x):
  """[R, ...] as micro-batches of 2 rows."""
  x = np.concatenate([x, np.zeros((len(x) % 2, *x.shape[1:]), x.dtype)])
  return jnp.asarray(x).reshape(-1, 2, *x.shape[1:])


def prepared_by(learner, policy, packed, record, change=lambda batch: None):
  """(batch, metrics) of `prepare`, [R, T] each; change: of the packed batch in place."""
  table = steptable.build(packed) if learner.fits is not None else None
  recorded = None
  if record == "values":
    values = [np.concatenate([s.values for s in t.steps]) for t in packed.trajectories]
    recorded = stacked(batching.lay_out(packed, values))
  elif record == "hidden":
    recorded = stacked(steptable.recorded_hidden(packed, table))
  change(packed.batch)
  batch = jax.tree.map(stacked, fakes.padded(packed, 2))
  if table is not None:
    table = jax.tree.map(stacked, fakes.padded_table(packed, 2))
  state = learners.init_state(learner, policy[1], {})
  state = state._replace(reference=jax.tree.map(lambda x: 1.1 * x, state.reference))
  prepare, _ = compiled(learner)
  prepared, metrics = prepare(state, batch, batch.tokens.shape[0], table, recorded)
  return jax.tree.map(lambda x: np.asarray(x).reshape(-1, x.shape[-1]), prepared), metrics


@pytest.mark.parametrize(
  ("name", "kind", "record", "fold"),
  [
    ("steptool", "ridge", "hidden", 1),
    ("steptool", "group", "", 0),
    ("ppo", "value", "values", 0),
    ("grpo_step", "", "", 0),
  ],
)
def test_what_was_recorded_is_what_a_forward_pass_gives(name, kind, record, fold, policy, rolled):
  """A state of one token before or after, of a later decode call of the turn, of another row, or
  log-probs of another temperature would be learnt from unseen."""
  trajectories = rolled(record or "values", fold)
  assert max(len(s.tokens) for t in trajectories for s in t.steps) > 5, "one call says it all"
  packed = batching.pack(trajectories, 320, share=True)
  assert (packed.batch.part_ids is not None) == bool(fold)
  today, known = prepared_by(learner_with(policy, name, kind), policy, packed, "")
  taken, figures = prepared_by(
    learner_with(policy, name, kind, reuse=BOUND), policy, packed, record
  )
  rows = len(packed.batch.tokens)
  assert rows > 2, "one micro-batch: all of it is computed"
  assert (float(figures["reused"]), float(known["sampler_gap"]) < 1e-4) == (1.0, True)
  mask = packed.batch.action_mask
  assert np.abs(today.old_logprobs[:rows][mask]).max() > 1
  np.testing.assert_array_equal(
    taken.old_logprobs[:rows][mask], packed.batch.behaviour_logprobs[mask]
  )
  assert (taken.old_logprobs[:rows][~mask] == 0).all()
  np.testing.assert_allclose(taken.old_logprobs, today.old_logprobs, atol=1e-4)
  np.testing.assert_allclose(taken.ref_logprobs, today.ref_logprobs, atol=1e-4)
  assert (abs(float(known["kl"])) > 1) == (kind == "group")
  assert float(figures["kl"]) == pytest.approx(float(known["kl"]), abs=1e-3)
  for field in ("advantages", "values", "returns"):
    mine, theirs = getattr(taken, field), getattr(today, field)
    if theirs is not None:
      assert np.std(theirs[:rows][mask]) > 0.05, "an empty comparison"
      mine, theirs = (x[:rows][mask] for x in (mine, theirs))
      np.testing.assert_allclose(mine, theirs, atol=1e-3, err_msg=field)
  assert float(figures.get("importance", 1.0)) == 1.0


def test_the_gap_is_measured_on_the_first_micro_batch_only(policy, rolled):
  """Else nothing would be saved. What is off elsewhere is taken as it was recorded."""
  packed = batching.pack(rolled("values", 0), 320, share=True)
  learner = learner_with(policy, "steptool", "group", reuse=BOUND)

  def shift_last(batch):
    batch.behaviour_logprobs[2:][batch.action_mask[2:]] -= 0.5

  taken, figures = prepared_by(learner, policy, packed, "", shift_last)
  mask = packed.batch.action_mask
  np.testing.assert_array_equal(
    taken.old_logprobs[: len(mask)][mask], packed.batch.behaviour_logprobs[mask]
  )
  assert float(figures["sampler_gap"]) < 1e-4
  assert (float(figures["importance"]), float(figures["importance_cut"])) == (1.0, 0.0)


def test_above_the_bound_all_are_computed_and_weighted(policy, rolled):
  """A sampler that is off by .5 nats everywhere: pi / mu = e^.5 = 1.6487 on all advantages; by 1
  nat: e = 2.7183, cut at 2. The old log-probs and values are the trainer's."""
  packed = batching.pack(rolled("hidden", 1), 320, share=True)
  today, _ = prepared_by(learner_with(policy, "steptool", "ridge"), policy, packed, "")
  learner = learner_with(policy, "steptool", "ridge", reuse=BOUND)

  def shift(batch):
    batch.behaviour_logprobs[batch.action_mask] -= 0.5

  for gap, weight in ((0.5, 1.6487), (1.0, 2.0)):
    found, figures = prepared_by(learner, policy, packed, "hidden", shift)
    assert float(figures["reused"]) == 0.0
    assert float(figures["sampler_gap"]) == pytest.approx(gap, abs=1e-4)
    np.testing.assert_allclose(found.old_logprobs, today.old_logprobs, atol=1e-6)
    np.testing.assert_allclose(found.values, today.values, atol=1e-5)
    np.testing.assert_allclose(found.advantages, weight * today.advantages, atol=1e-3)
  assert float(figures["importance_cut"]) == 1.0


def test_a_broken_policy_is_not_taken_for_a_close_one(policy, rolled):
  """NaN is not above a bound; the update must see it and be skipped."""
  packed = batching.pack(rolled("values", 0), 320, share=True)
  learner = learner_with(policy, "steptool", "group", reuse=BOUND)
  mask = packed.batch.action_mask
  broken = jax.tree.map(lambda x: x * np.nan, policy[1])
  taken, figures = prepared_by(learner, (policy[0], broken), packed, "")
  assert np.isnan(taken.old_logprobs[: len(mask)][mask]).all()
  assert float(figures["reused"]) == 0.0


def test_values_are_laid_out_where_unpack_finds_them(rolled):
  """Trajectories of several segments in several rows, behind prompts that are shared."""
  packed = batching.pack(rolled("hidden", 1), 170, share=True)
  assert len({place.row for place in packed.places[0]}) > 1
  rng = np.random.default_rng(0)
  sizes = [sum(len(s.tokens) for s in t.steps) for t in packed.trajectories]
  values = [rng.normal(size=size).astype(np.float32) for size in sizes]
  laid_out = batching.lay_out(packed, values)
  for mine, theirs in zip(batching.unpack(packed, laid_out), values, strict=True):
    np.testing.assert_array_equal(mine, theirs)
  assert (laid_out[~packed.batch.action_mask] == 0).all()
