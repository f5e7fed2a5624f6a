import dataclasses
import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steptool_jax.config import Advantage, Config, Critic, Loss, Rollout
from steptool_jax.learning import algorithms, batching, losses
from steptool_jax.learning.outputs import policy_outputs
from steptool_jax.learning.programs import learners, preparation, update
from steptool_jax.policy import lora, model

CONFIG = fakes.tiny_config()
ADVANTAGE = Advantage(gamma=0.9, lam=0.8)
LOSS = Loss(entropy_coef=0.01, kl="reward", kl_coef=0.3, logprob_chunk=16)


def make_learner(name="steptool", advantage=ADVANTAGE, loss=LOSS, optimizer=None, temperature=1.0):
  row = algorithms.get_algorithm(name)
  config = Config(
    advantage=advantage,
    critic=Critic(kind="value" if row.gae else ""),
    loss=loss,
    rollout=Rollout(temperature=temperature),
  )
  optimizer = optimizer or optax.sgd(0.5)
  return learners.Learner(CONFIG, row, algorithms.resolve(row, config), optimizer)


@pytest.fixture(scope="module")
def params():
  params = model.init_params(CONFIG, jax.random.key(0))
  params["value_head"]["kernel"] = jax.random.normal(jax.random.key(1), (32, 1)) * 0.3
  return params


def trajectories(seed=0, count=10):
  rng = np.random.default_rng(seed)
  return [fakes.random_trajectory(rng) for _ in range(count)]


def stacked(batch, micro):
  return jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, micro, x.shape[-1]), batch)


@jax.jit
def unpacked_forward(params, ids):
  positions = jnp.arange(ids.shape[1])[None]
  hidden = model.forward(CONFIG, {"params": params}, ids, positions, jnp.ones_like(ids))
  logits = model.project_logits(CONFIG, {"params": params}, hidden)
  return logits, model.project_values({"params": params}, hidden)


def full_logprobs(params, ids, temperature=1.0):
  """log-probs [n, V] and values [n] of one sequence; causal, so zeros after it change nothing."""
  padded = np.zeros((1, 64), np.int32)
  padded[0, : len(ids)] = ids
  logits, values = unpacked_forward(params, padded)
  logp = np.asarray(jax.nn.log_softmax(logits / temperature))[0, : len(ids)]
  return logp, np.asarray(values)[0, : len(ids)]


def heads(params):
  return lambda hidden: model.project_values({"params": params}, hidden)


@pytest.mark.parametrize("chunk", [5, 16, 512])
def test_packed_chunked_outputs_equal_single_forward_passes(params, chunk):
  """A packed row must not let its trajectories see each other: packed == unpacked."""
  group = trajectories()
  batch = batching.pack(group, 64).batch
  outputs = functools.partial(
    policy_outputs, CONFIG, temperature=0.7, chunk=chunk, heads=heads(params)
  )
  out = jax.jit(outputs)({"params": params}, batch)
  by_tokens = {}
  for t in group:
    ids = np.concatenate(
      [t.prompt_tokens, *(p for s in t.steps for p in (s.tokens, s.observation_tokens))]
    )[: batching.packed_length(t) + 1]
    by_tokens[tuple(ids[: batching.packed_length(t)])] = ids
  for row in range(batch.tokens.shape[0]):
    for segment in range(1, batch.segment_ids[row].max() + 1):
      at = np.flatnonzero(batch.segment_ids[row] == segment)
      ids = by_tokens[tuple(batch.tokens[row, at])]
      logp, values = full_logprobs(params, ids, 0.7)
      act = np.flatnonzero(batch.action_mask[row, at])
      expected = logp[act, ids[act + 1]]
      np.testing.assert_allclose(np.asarray(out.logprobs)[row, at[act]], expected, atol=2e-5)
      entropy = -(np.exp(logp[act]) * logp[act]).sum(-1)
      np.testing.assert_allclose(np.asarray(out.entropy)[row, at[act]], entropy, atol=2e-5)
      np.testing.assert_allclose(np.asarray(out.values)[row, at], values[: len(at)], atol=2e-5)
  assert (np.asarray(out.logprobs)[~batch.action_mask] == 0).all()


def test_kl_is_zero_for_actor_equal_reference_at_any_temperature(params):
  """Both sides must be divided by the temperature, or the KL of a policy to itself is not 0."""
  learner = make_learner(temperature=0.6)
  state = learners.init_state(learner, {"params": params}, {})
  batch = stacked(fakes.padded(batching.pack(trajectories(), 64), 2), 2)
  prepared, metrics = jitted(learner)[0](state, batch, batch.tokens.shape[0])
  assert float(metrics["kl"]) == 0.0
  np.testing.assert_array_equal(prepared.old_logprobs, prepared.ref_logprobs)


def test_what_an_int8_cache_has_sampled_is_weighted(params):
  """Its sampler is another policy; uncorrected, tokens count as often as that one says them."""

  def with_(learner, kv_cache, path=""):
    c = learner.config
    rollout = dataclasses.replace(c.rollout, kv_cache=kv_cache)
    data = dataclasses.replace(c.data, path=path)
    return dataclasses.replace(learner, config=dataclasses.replace(c, rollout=rollout, data=data))

  plain = make_learner(advantage=Advantage(whiten=False))
  state = learners.init_state(plain, {"params": params}, {})
  batch = stacked(fakes.padded(batching.pack(trajectories(), 64), 2), 2)
  batch = batch._replace(behaviour_logprobs=batch.behaviour_logprobs - 4.0)
  (before, figures), (after, more) = (
    jitted(with_(plain, kv_cache))[0](state, batch, batch.tokens.shape[0])
    for kv_cache in ("auto", "int8")
  )
  gap = np.where(batch.action_mask, before.old_logprobs - batch.behaviour_logprobs, 0.0)
  weights = np.minimum(np.exp(gap), 2.0)
  assert (weights == 2.0).any()
  assert (weights < 0.5).any()
  np.testing.assert_allclose(after.advantages, before.advantages * weights, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(after.old_logprobs, before.old_logprobs)
  assert set(more) - set(figures) == {"importance", "importance_cut"}
  mean = np.abs(gap).sum() / np.asarray(batch.action_mask).sum()
  np.testing.assert_allclose(figures["sampler_gap_mean"], mean, rtol=1e-5)
  assert figures["sampler_gap"] == np.abs(gap).max()
  # Stored trajectories are nothing that this engine has sampled.
  stored = functools.partial(preparation.prepare, with_(plain, "int8", "stored"))
  assert set(jax.eval_shape(stored, state, batch, 1)[1]) == set(figures)


def off_reference(learner, params):
  """A state whose reference is another policy, with V = 0."""
  head = jax.tree.map(jnp.zeros_like, params["value_head"])
  params = params | {"value_head": head}
  state = learners.init_state(learner, {"params": params}, {})
  return state._replace(reference=jax.tree.map(lambda x: 1.3 * x, state.reference))


def test_the_kl_penalty_in_the_reward_by_hand(params):
  """r - coefficient * log(pi / ref) a token, and the metric in nats per trajectory."""
  advantage = Advantage(gamma=0.0, lam=0.8, level="token", whiten=False)
  learner = make_learner(advantage=advantage)
  state = off_reference(learner, params)
  group = trajectories()
  batch = stacked(fakes.padded(batching.pack(group, 64), 2), 2)
  prepared, metrics = jitted(learner)[0](state, batch, batch.tokens.shape[0])
  mask = np.asarray(batch.action_mask)
  gap = np.asarray(prepared.old_logprobs - prepared.ref_logprobs)
  assert np.abs(gap[mask]).min() > 1e-6, "an empty comparison"
  expected = (np.asarray(batch.rewards) - 0.3 * gap) * mask  # gamma 0, V 0: the reward itself
  np.testing.assert_allclose(prepared.advantages, expected, atol=1e-6)
  np.testing.assert_allclose(metrics["kl"], gap[mask].sum() / len(group), rtol=1e-4)
  np.testing.assert_allclose(metrics["advantage_std"], expected[mask].std(), rtol=1e-4)
  assert (np.asarray(prepared.ref_logprobs)[~mask] == 0).all()


def test_prepare_whitens_under_the_losss_own_weights(params):
  """Whitened over tokens, the advantages that a loss over steps sums up would lean to one side."""
  loss = Loss(kl="none", aggregation="step", logprob_chunk=16)
  learner = make_learner(loss=loss)
  state = learners.init_state(learner, {"params": params}, {})
  batch = stacked(fakes.padded(batching.pack(trajectories(), 64), 2), 2)
  prepared, _ = jitted(learner)[0](state, batch, batch.tokens.shape[0])
  flat = jax.tree.map(lambda x: x.reshape(-1, 64), prepared)
  mean = {
    unit: float(np.divide(*losses.weighted(flat.advantages, losses.action_weights(flat, unit))))
    for unit in ("step", "token")
  }
  assert abs(mean["step"]) < 1e-5
  assert abs(mean["token"]) > 0.01, "both are the same here: an empty comparison"


def test_the_kl_penalty_in_the_loss_by_hand(params):
  """coefficient * mean k3, and the step moves the policy towards the reference."""
  loss = Loss(kl="loss", kl_coef=0.3, value_coef=0.0, logprob_chunk=16)
  learner = make_learner(loss=loss, optimizer=optax.sgd(0.05))
  state = off_reference(learner, params)
  batch = stacked(fakes.padded(batching.pack(trajectories(), 64), 2), 2)
  count = batch.tokens.shape[0]
  prepare, step = jitted(learner)
  prepared, _ = prepare(state, batch, count)
  mask = np.asarray(batch.action_mask)
  assert (np.asarray(prepared.rewards) == np.asarray(batch.rewards)).all()
  d = np.asarray(prepared.ref_logprobs - prepared.old_logprobs)[mask]
  no_signal = prepared._replace(advantages=jnp.zeros_like(prepared.advantages))
  new, after = step(state, no_signal, count)
  np.testing.assert_allclose(after["kl_loss"], 0.3 * (np.exp(d) - 1 - d).mean(), rtol=1e-4)
  again = step(new, no_signal, count)[1]
  assert float(again["kl_loss"]) < float(after["kl_loss"])


def test_the_reference_of_a_lora_run_is_the_policy_without_adapters(params):
  settings = lora.Lora(rank=2, alpha=8.0, targets=("q", "up"))
  adapters = jax.tree.map(lambda x: x + 0.2, lora.init_lora(CONFIG, settings, jax.random.key(2)))
  learner = dataclasses.replace(make_learner(), model=lora.with_lora(CONFIG, settings))
  split = lora.split_variables({"params": params, "lora": adapters})
  state = learners.init_state(learner, *split)
  assert state.reference == {}, "nothing is copied"
  batch = stacked(fakes.padded(batching.pack(trajectories(), 64), 2), 2)
  prepared, metrics = jitted(learner)[0](state, batch, batch.tokens.shape[0])
  flat = jax.tree.map(lambda x: x.reshape(-1, 64), batch)
  base = functools.partial(policy_outputs, CONFIG, temperature=1.0, chunk=16)
  expected = jax.jit(base)({"params": params}, flat).logprobs
  np.testing.assert_allclose(prepared.ref_logprobs.reshape(-1, 64), expected, atol=1e-5)
  assert float(jnp.abs(prepared.old_logprobs.reshape(-1, 64) - expected).max()) > 0.01
  assert float(metrics["kl"]) != 0.0


@functools.lru_cache
def jitted(learner):
  prepare = jax.jit(functools.partial(preparation.prepare, learner))
  return prepare, jax.jit(functools.partial(update.update, learner))


def gradient(learner, params, batch, micro):
  """The gradient that one SGD step of rate 1 applies."""
  state = learners.init_state(learner, {"params": params}, {})
  batch = stacked(batch, micro)
  count = batch.tokens.shape[0]
  prepare, step = jitted(learner)
  prepared, _ = prepare(state, batch, count)
  new, metrics = step(state, prepared, count)
  return jax.tree.map(jnp.subtract, state.trainable, new.trainable), metrics


@pytest.mark.parametrize("name", ["sft", "steptool", "steptool_no_step_grained"])
def test_gradient_accumulation_equals_the_full_batch(params, name):
  learner = make_learner(name, optimizer=optax.sgd(1.0))
  batch = fakes.padded(batching.pack(trajectories(), 48), 4)
  whole, metrics = gradient(learner, params, batch, batch.tokens.shape[0])
  parts, part_metrics = gradient(learner, params, batch, 1)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  for key in metrics:
    np.testing.assert_allclose(metrics[key], part_metrics[key], atol=1e-4)


def test_only_counted_micro_batches_are_read(params):
  """After `count` there may be anything: here real rows, which must not reach the gradient."""
  learner = make_learner("sft", optimizer=optax.sgd(1.0))
  state = learners.init_state(learner, {"params": params}, {})
  batch = stacked(fakes.padded(batching.pack(trajectories(), 48), 2), 1)
  _, step = jitted(learner)
  half = batch.tokens.shape[0] // 2
  other = jax.tree.map(lambda x: jnp.concatenate([x[:half], x[:1], x[half + 1 :]]), batch)
  results = [step(state, b, half)[0].trainable for b in (batch, other)]
  for a, b in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_array_equal(a, b)
  everything = step(state, batch, batch.tokens.shape[0])[0].trainable
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), everything, results[0])
  assert max(jax.tree.leaves(moved)) > 1e-4


def test_steptool_gradient_equals_a_direct_ppo_loss(params):
  """The first epoch's gradient is that of -sum(A logp)/tokens + value and entropy terms."""
  settings = dataclasses.replace(LOSS, kl="none")
  learner = make_learner(loss=settings, optimizer=optax.sgd(1.0))
  batch = batching.pack(trajectories(), 64).batch
  got, _ = gradient(learner, params, batch, batch.tokens.shape[0])
  state = learners.init_state(learner, {"params": params}, {})
  prepared, _ = jitted(learner)[0](state, stacked(batch, batch.tokens.shape[0]), 1)
  micro = jax.tree.map(lambda x: x[0], prepared)
  mask = np.asarray(micro.action_mask)
  starts = np.zeros_like(mask)
  for row in range(mask.shape[0]):
    seen = set()
    for t in np.flatnonzero(mask[row]):
      key = (int(micro.segment_ids[row, t]), int(micro.step_ids[row, t]))
      starts[row, t] = key not in seen
      seen.add(key)

  def loss(p):
    out = policy_outputs(CONFIG, {"params": p}, micro, temperature=1.0, chunk=512, heads=heads(p))
    policy = -(micro.advantages * out.logprobs * mask).sum() / mask.sum()
    value = 0.5 * (jnp.square(out.values - micro.returns) * starts).sum() / starts.sum()
    entropy = (out.entropy * mask).sum() / mask.sum()
    return policy + 0.1 * value - 0.01 * entropy

  expected = jax.jit(jax.grad(loss))(params)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_observation_and_prompt_tokens_have_no_gradient(params):
  """Another prompt or observation target changes nothing, another sampled one does."""
  batch = jax.tree.map(jnp.asarray, batching.pack(trajectories(count=2), 64).batch)

  @jax.jit
  def total(targets):
    out = policy_outputs(
      CONFIG,
      {"params": params},
      batch._replace(targets=targets),
      temperature=1.0,
      chunk=16,
    )
    return out.logprobs.sum()

  other = (batch.targets + 1) % fakes.VOCAB
  assert total(jnp.where(batch.action_mask, batch.targets, other)) == total(batch.targets)
  assert total(jnp.where(batch.action_mask, other, batch.targets)) != total(batch.targets)


def test_value_and_kl_literals():
  values, old, ret = (jnp.array([[x]]) for x in (2.0, 1.0, 3.0))
  total, _ = losses.clipped_value(values, old, ret, jnp.array([[True]]), 0.2)
  np.testing.assert_allclose(total, 0.5 * (1.2 - 3.0) ** 2, atol=1e-6)
  ones = jnp.ones((1, 1), bool)
  kl = losses.kl_to_reference(jnp.array([[-1.0]]), jnp.array([[-2.0]]), ones)
  np.testing.assert_allclose(kl, [[np.exp(-1.0) - 1 + 1]], atol=1e-6)


def test_masked_infinities_do_not_become_nan():
  x = jnp.array([[1.0, jnp.inf]])
  total, denominator = losses.weighted(x, jnp.array([[1.0, 0.0]]))
  assert (float(total), float(denominator)) == (1.0, 1.0)


def test_adaptive_kl_literals():
  adapt = functools.partial(algorithms.adapt_kl, target=6.0, horizon=10_000.0, trajectories=500)
  np.testing.assert_allclose(adapt(jnp.float32(0.3), jnp.float32(60.0)), 0.3 * 1.01, rtol=1e-6)
  np.testing.assert_allclose(adapt(jnp.float32(0.3), jnp.float32(0.0)), 0.3 * 0.99, rtol=1e-6)
  np.testing.assert_allclose(adapt(jnp.float32(0.3), jnp.float32(6.6)), 0.3 * 1.005, rtol=1e-6)


@pytest.fixture(scope="module")
def guarded(params):
  """(state, prepared batch, count, jitted update)"""
  learner = make_learner(optimizer=optax.adam(1e-3))
  state = learners.init_state(learner, {"params": params}, {})
  batch = stacked(batching.pack(trajectories(), 64).batch, 1)
  count = batch.tokens.shape[0]
  prepare, step = jitted(learner)
  prepared, _ = prepare(state, batch, count)
  return state, prepared, count, step


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
@pytest.mark.parametrize(
  "field",
  [
    "rewards",
    "behaviour_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "values",
    "advantages",
    "returns",
  ],
)
def test_one_number_that_is_not_finite_skips_the_update(guarded, field, value):
  """This loss does not even read some of them, so that no gradient tells."""
  state, prepared, count, step = guarded
  at = tuple(np.argwhere(np.asarray(prepared.action_mask))[3])
  bad = prepared._replace(**{field: getattr(prepared, field).at[at].set(value)})
  skipped(state, *step(state, bad, count))


def test_what_is_not_read_may_be_anything(guarded):
  state, prepared, count, step = guarded
  padding = prepared.segment_ids == 0
  assert padding.any()
  filled = prepared._replace(advantages=jnp.where(padding, jnp.nan, prepared.advantages))
  new, metrics = step(state, filled, count)
  assert float(metrics["skipped"]) == 0.0
  assert float(jnp.abs(new.trainable["params"]["embed"]["embedding"]).sum()) > 0


@pytest.mark.parametrize("part", ["term", "metric"])
def test_a_nan_in_the_loss_with_a_finite_gradient_skips_the_update(params, part):
  def loss(outputs, batch, config):
    terms, metrics = algorithms.ALGORITHMS["sft"].loss(outputs, batch, config)
    hidden = {"hidden": (jnp.float32(jnp.nan) * jax.lax.stop_gradient(outputs.logprobs.sum()), 1.0)}
    return (terms | hidden, metrics) if part == "term" else (terms, metrics | hidden)

  learner = make_learner("sft", optimizer=optax.adam(1e-3))
  algorithm = dataclasses.replace(learner.algorithm, loss=loss)
  learner = dataclasses.replace(learner, algorithm=algorithm)
  state = learners.init_state(learner, {"params": params}, {})
  batch = stacked(batching.pack(trajectories(), 64).batch, 1)
  new, metrics = jitted(learner)[1](state, batch, batch.tokens.shape[0])
  assert np.isfinite(metrics["grad_norm"]), "or the case is not the hidden one"
  skipped(state, new, metrics)


def skipped(state, new, metrics):
  """The update was skipped and left everything as it was."""
  assert float(metrics["skipped"]) == 1.0
  for a, b in zip(
    jax.tree.leaves((state.trainable, state.opt_state)),
    jax.tree.leaves((new.trainable, new.opt_state)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


def test_unknown_algorithm_lists_the_valid_ones():
  with pytest.raises(ValueError, match=r"no 'pppo'.*steptool"):
    algorithms.get_algorithm("pppo")


def test_the_reference_is_stored_in_the_compute_dtype_and_says_the_same(params):
  """float32 weights, bfloat16 products: half the memory, and the KL to itself is exactly 0."""
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  learner = dataclasses.replace(make_learner(), model=config)
  state = learners.init_state(learner, {"params": params}, {})
  layers = state.reference["params"]["layers"]
  assert layers["q"]["kernel"].dtype == jnp.bfloat16
  assert layers["attn_norm"]["scale"].dtype == jnp.float32
  assert state.reference["params"]["value_head"]["kernel"].dtype == jnp.float32
  batch = stacked(fakes.padded(batching.pack(trajectories(), 64), 2), 2)
  prepare, step = jitted(learner)
  prepared, metrics = prepare(state, batch, batch.tokens.shape[0])
  assert float(metrics["kl"]) == 0.0
  # Gradients of bfloat16 matrices still move float32 ones.
  state, _ = step(state, prepared, batch.tokens.shape[0])
  moved = state.trainable["params"]["layers"]["q"]["kernel"]
  assert moved.dtype == jnp.float32
  assert np.any(moved != params["layers"]["q"]["kernel"])
