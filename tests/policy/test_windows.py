"""Layers with a sliding window: attention, packed rows, cache, TPU kernel; and the logit cap."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree, token_by_token
from fakes import tiny_config

from steptool_jax.learning import vocabulary
from steptool_jax.policy import attention, engine, families, model, sharding, splash
from steptool_jax.policy.attention import Window

CONFIG = tiny_config(
  family="gemma3_text",
  qk_norm=True,
  num_layers=3,
  num_kv_heads=1,
  sliding_window=4,
  sliding_layers=(True, False, True),
  rope_local_theta=100.0,
  query_scalar=10,
  final_logit_cap=2.0,
)


@functools.cache
def params():
  tree = model.init_params(CONFIG, jax.random.key(0))
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), tree)


def run(tokens, positions, segments):
  return jax.jit(functools.partial(model.forward, CONFIG))(
    {"params": params()}, tokens, positions, segments
  )


def oracle(size):
  """Token by token: its own segment, itself and the size - 1 tokens before it."""
  return token_by_token(lambda segments, b, t, s: t - s < size and segments[b, s] == segments[b, t])


@pytest.mark.parametrize(
  ("size", "here", "block"), [(3, True, 128), (1, True, 4), (3, True, 4), (3, False, 4)]
)
def test_values_and_gradients(size, here, block, monkeypatch):
  """One token too many or too few was seen; blocks before the window were still worked on."""
  monkeypatch.setattr(attention, "CPU_BLOCK", block)
  keys = jax.random.split(jax.random.key(0), 4)
  q, weight = (jax.random.normal(key, (2, 10, 4, 6)) for key in keys[:2])
  k, v = (jax.random.normal(key, (2, 10, 2, 6)) for key in keys[2:])
  segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 10])
  window = Window(size, jnp.array(here))
  ours = functools.partial(attention.attend, window=window)
  assert_agree(ours, oracle(size if here else 99), (q, k, v), segments, weight)


def test_blocks_seen_by_hand():
  """Blocks of two tokens, one path, 3 tokens seen: query 4 sees keys 2 to 4, query 6 4 to 6."""
  rows = jnp.full((4, 1, 2), 8), jnp.arange(8).reshape(4, 1, 2)
  seen = np.tril(attention._blocks_seen(rows, 3)).astype(int)
  assert seen.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_a_window_reaches_back_along_the_path():
  """A branch whose prompt stands before another branch is as near to it as if it came first."""
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, (1, 8, 2, 6)) for key in keys)
  # A prompt of three, a branch of three, a branch of two; a window of three tokens.
  until = jnp.array([[8, 8, 8, 6, 6, 6, 8, 8]])
  tree = attention.Tree(until, jnp.array([[0, 1, 2, 3, 4, 5, 3, 4]]))
  window = Window(3, jnp.array(True))
  out = attention.attend(q, k, v, jnp.ones_like(until), tree, window)
  alone = [0, 1, 2, 6, 7]
  parts = (x[:, jnp.array(alone)] for x in (q, k, v))
  expected = attention.attend(*parts, jnp.ones((1, 5), jnp.int32), window=window)
  np.testing.assert_allclose(out[:, 6:], expected[:, 3:], atol=1e-5)


def test_the_tpu_kernel_sees_the_same():
  keys = jax.random.split(jax.random.key(0), 4)
  q, weight = (jax.random.normal(key, (1, 256, 2, 32)) for key in keys[:2])
  k, v = (jax.random.normal(key, (1, 256, 1, 32)) for key in keys[2:])
  segments = np.array([[1] * 150 + [2] * 80 + [0] * 26], np.int32)
  kernel = functools.partial(splash.attend, window=40, interpret=True)
  ours = functools.partial(attention.attend, window=Window(40, jnp.array(True)))
  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    assert_agree(kernel, ours, (q, k, v), segments, weight)


def test_packed_equals_unpacked():
  """The window of a trajectory reached into the one before it, or positions did not restart."""
  a, b = (jax.random.randint(jax.random.key(n), (1, 7 - n), 0, 61) for n in (0, 1))
  packed = run(
    jnp.concatenate([a, b, jnp.zeros((1, 3), jnp.int32)], 1),
    jnp.array([[*range(7), *range(6), 0, 0, 0]]),
    jnp.array([[1] * 7 + [2] * 6 + [0] * 3]),
  )
  for part, alone in ((packed[:, :7], a), (packed[:, 7:13], b)):
    length = alone.shape[1]
    expected = run(alone, jnp.arange(length)[None], jnp.ones((1, length), int))
    np.testing.assert_allclose(part, expected, atol=2e-5)


@pytest.mark.parametrize("block", [128, 3])
def test_cached_equals_full_over_chunks_and_slots(block, monkeypatch):
  """A decoded token saw more or less of the cache than in training; slot 1 is 5 tokens behind and
  slot 2 idle, whose position 0 must not decide what is read."""
  monkeypatch.setattr(attention, "CACHE_BLOCK", block)
  tokens = jax.random.randint(jax.random.key(2), (3, 20), 0, 61)
  positions = jnp.tile(jnp.arange(20), (3, 1))
  full = run(tokens, positions, jnp.ones_like(tokens))
  cache = model.init_cache(CONFIG, 3, 22)
  step = jax.jit(functools.partial(model.forward_cached, CONFIG, {"params": params()}))
  behind = jnp.array([0, 5, 20])[:, None]
  for start, stop in ((0, 7), (7, 8), (8, 9), (9, 20)):
    at = positions[:, start:stop] - behind
    fed = jnp.take_along_axis(tokens, jnp.maximum(at, 0), axis=1)
    hidden, cache = step(fed, at, at >= 0, cache)
    assert np.isfinite(hidden).all()
    np.testing.assert_allclose(hidden[0], full[0, start:stop], atol=2e-5)
    there = np.asarray(at[1] >= 0)
    np.testing.assert_allclose(hidden[1][there], full[1][np.asarray(at[1])[there]], atol=2e-5)


def test_the_engine_samples_with_the_trainers_log_probs():
  """Forced and sampled tokens beyond the window, through append, decode and rewind."""
  variables = {"params": params()}
  lines = engine.make_engine(CONFIG, slots=4, size=32, chunk=6)
  prompt = np.arange(9, dtype=np.int32)
  state = lines.append(variables, lines.init(), {2: prompt})
  seed = {2: np.array([1, 2], np.uint32)}
  state, first = lines.decode(variables, state, {2: 3}, seed, [60], 1.0)
  state = lines.rewind(state, {2: 9})
  _, out = lines.decode(variables, state, {2: 6}, seed, [60], 1.0)
  count = int(out.count[2])
  assert out.tokens[2, :2].tolist() == first.tokens[2, :2].tolist()
  whole = jnp.asarray(np.concatenate([prompt, out.tokens[2, :count]]))[None]
  hidden = run(whole, jnp.arange(whole.shape[1])[None], jnp.ones_like(whole))
  logits = model.project_logits(CONFIG, variables, hidden)
  assert float(jnp.abs(logits).max()) < 2.0  # the cap
  logprobs = jax.nn.log_softmax(logits)[0, 8:-1]
  expected = jnp.take_along_axis(logprobs, whole[0, 9:, None], axis=1)[:, 0]
  np.testing.assert_allclose(out.logprobs[2, :count], expected, atol=2e-5)


def test_log_probs_and_gradients_under_the_cap():
  """The chunked log-probs have a backward pass of their own, which left the cap's slope out."""
  variables = {"params": params()}
  hidden = 3.0 * jax.random.normal(jax.random.key(3), (2, 6, CONFIG.hidden_size))
  targets = jax.random.randint(jax.random.key(4), (2, 6), 0, 61)
  mask = jnp.arange(12).reshape(2, 6) % 4 > 0

  def chunked(hidden, variables):
    logprobs, entropy = vocabulary.action_logprobs(CONFIG, variables, hidden, targets, mask, 0.7, 4)
    return jnp.sum(jnp.sin(logprobs) + 0.3 * entropy)

  def plain(hidden, variables):
    logprobs = jax.nn.log_softmax(model.project_logits(CONFIG, variables, hidden) / 0.7)
    entropy = -(jnp.exp(logprobs) * logprobs).sum(axis=-1)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(mask, jnp.sin(chosen) + 0.3 * entropy, 0.0))

  one, other = (jax.value_and_grad(f)(hidden, variables) for f in (chunked, plain))
  np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
  np.testing.assert_allclose(one[1], other[1], atol=1e-5)


def test_flops_of_a_window_by_hand():
  # 10 visible tokens in one layer and 4 in two: 2 products * 2 FLOPs * 4 heads * 8 each.
  extra = families.useful_flops(CONFIG, 10) - families.useful_flops(CONFIG)
  assert extra == 4 * 4 * 8 * (10 + 2 * 4)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"sliding_layers": (True,)}, "sliding_layers: 1 of num_layers = 3"),
    ({"sliding_window": None}, "sliding_layers: gemma3_text has none, or sliding_window"),
    ({"family": "llama"}, "sliding_layers: llama has none"),
    ({"final_logit_cap": 0.0}, "final_logit_cap: must be a number above 0"),
  ],
)
def test_bad_configs(change, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(CONFIG, **change)
