"""The decoder: masks, cache, rope, heads. Parity with transformers is in test_hub.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import tiny_config

from steptool_jax.policy import attention, families, model
from steptool_jax.policy.families import RopeScaling

CONFIG = tiny_config(family="qwen3", qk_norm=True, qkv_bias=True)


@functools.cache
def params():
  tree = model.init_params(CONFIG, jax.random.key(0))
  rng = np.random.default_rng(1)  # norms, biases and value head too
  return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), tree)


FORWARD = jax.jit(model.forward, static_argnums=0)


def run(tokens, positions, segments, config=CONFIG):
  return FORWARD(config, {"params": params()}, tokens, positions, segments)


def tokens_of(shape, seed=2):
  return jax.random.randint(jax.random.key(seed), shape, 0, CONFIG.vocab_size)


def test_packed_equals_unpacked():
  a, b = tokens_of((1, 7)), tokens_of((1, 5), 3)
  packed = run(
    jnp.concatenate([a, b, jnp.zeros((1, 4), jnp.int32)], 1),
    jnp.array([[*range(7), *range(5), 0, 0, 0, 0]]),
    jnp.array([[1] * 7 + [2] * 5 + [0] * 4]),
  )
  alone_a = run(a, jnp.arange(7)[None], jnp.ones((1, 7), int))
  alone_b = run(b, jnp.arange(5)[None], jnp.ones((1, 5), int))
  np.testing.assert_allclose(packed[:, :7], alone_a, atol=2e-5)
  np.testing.assert_allclose(packed[:, 7:12], alone_b, atol=2e-5)
  assert np.isfinite(packed).all()


@pytest.mark.parametrize("block", [128, 4])
def test_gradients_are_causal_and_stay_in_their_segment(block, monkeypatch):
  monkeypatch.setattr(attention, "CPU_BLOCK", block)
  # Every token id occurs once, so that row i of the embedding's gradient belongs to token i.
  length, cut = 11, 5
  segments = jnp.array([[1] * cut + [2] * (length - cut - 2) + [0] * 2])
  positions = jnp.where(jnp.arange(length) < cut, jnp.arange(length), jnp.arange(length) - cut)

  @jax.jit
  @jax.grad
  def gradient(embedding, t):
    tree = {**params(), "embed": {"embedding": embedding}}
    tokens = jnp.arange(length)[None]
    hidden = model.forward(CONFIG, {"params": tree}, tokens, positions[None], segments)
    return hidden[0, t] @ jnp.arange(1.0, 1 + CONFIG.hidden_size)

  embedding = params()["embed"]["embedding"]
  rows = [np.abs(gradient(embedding, t)).max(axis=-1) > 0 for t in range(length)]
  reach = np.stack(rows)[:, :length]  # [t, t'] : does out[t] depend on t'?
  segment = np.asarray(segments[0])
  expected = np.tril(np.ones((length, length), bool)) & (segment[:, None] == segment)
  np.testing.assert_array_equal(reach, expected)


@pytest.mark.parametrize("block", [128, 8, 7])
def test_cached_equals_full_over_chunks(block, monkeypatch):
  monkeypatch.setattr(attention, "CACHE_BLOCK", block)
  tokens = tokens_of((2, 20))
  positions = jnp.tile(jnp.arange(20), (2, 1))
  full = run(tokens, positions, jnp.ones_like(tokens))
  cache = model.init_cache(CONFIG, 2, 22)
  step = jax.jit(functools.partial(model.forward_cached, CONFIG))
  out = []
  for start, stop in ((0, 7), (7, 8), (8, 9), (9, 20)):
    part = slice(start, stop)
    hidden, cache = step(
      {"params": params()},
      tokens[:, part],
      positions[:, part],
      jnp.ones((2, stop - start), bool),
      cache,
    )
    out.append(hidden)
  np.testing.assert_allclose(jnp.concatenate(out, 1), full, atol=2e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_slots_at_different_lengths_and_invalid_tokens(platform, monkeypatch):
  """On a TPU the cache has rows of whole tiles."""
  tokens = tokens_of((3, 9))
  full = run(tokens, jnp.tile(jnp.arange(9), (3, 1)), jnp.ones_like(tokens))
  monkeypatch.setattr(attention, "platform", lambda: platform)
  cache = model.init_cache(CONFIG, 3, 9)
  rest = {"cpu": (CONFIG.num_kv_heads, 9, CONFIG.head_dim), "tpu": (9, 128)}
  assert cache.k.shape == (CONFIG.num_layers, 3, *rest[platform])
  counts = jnp.array([9, 4, 0])
  positions = jnp.tile(jnp.arange(9), (3, 1))
  step = jax.jit(functools.partial(model.forward_cached, CONFIG, {"params": params()}))
  hidden, cache = step(tokens, positions, positions < counts[:, None], cache)
  np.testing.assert_allclose(hidden[1, :4], full[1, :4], atol=2e-5)
  assert np.isfinite(hidden).all()
  there = np.abs(np.moveaxis(cache.k, attention.positions_axis(), 2)).reshape(2, 3, 9, -1)
  written = there.max(axis=(0, 3)) > 0
  np.testing.assert_array_equal(written, np.arange(9) < np.array([9, 4, 0])[:, None])
  # Slot 0 is full: a token after the end writes nothing; slots 1 and 2 go on at 4 and 0.
  before = cache
  at = jnp.array([[9], [4], [0]])
  hidden, cache = step(
    jnp.stack([tokens[0, 0], tokens[1, 4], tokens[2, 0]])[:, None],
    at,
    jnp.ones((3, 1), bool),
    cache,
  )
  np.testing.assert_allclose(hidden[1, 0], full[1, 4], atol=2e-5)
  np.testing.assert_allclose(hidden[2, 0], full[2, 0], atol=2e-5)
  np.testing.assert_array_equal(cache.k[:, 0], before.k[:, 0])


def test_stale_cache_after_a_rewind_is_not_seen():
  tokens = tokens_of((1, 8))
  positions = jnp.arange(8)[None]
  step = jax.jit(functools.partial(model.forward_cached, CONFIG, {"params": params()}))
  cache = model.init_cache(CONFIG, 1, 16)
  first, cache = step(tokens, positions, jnp.ones((1, 8), bool), cache)
  again, _ = step(tokens[:, 3:5], positions[:, 3:5], jnp.ones((1, 2), bool), cache)
  np.testing.assert_allclose(again, first[:, 3:5], atol=2e-5)


def test_decoding_copies_no_cache():
  config = tiny_config(num_layers=3)
  tree = model.abstract_params(config)
  slots, size = 4, 1000

  def decode(variables, cache, limit):
    def body(state):
      i, token, cache = state
      at = jnp.full((slots, 1), i)
      ok = jnp.ones((slots, 1), bool)
      hidden, cache = model.forward_cached(config, variables, token[:, None], at, ok, cache)
      return i + 1, model.project_logits(config, variables, hidden[:, 0]).argmax(-1), cache

    return jax.lax.while_loop(lambda s: s[0] < limit, body, (0, jnp.zeros(slots, int), cache))

  cache = jax.eval_shape(lambda: model.init_cache(config, slots, size))
  compiled = jax.jit(decode, donate_argnums=1).lower({"params": tree}, cache, 5).compile()
  whole = 2 * np.prod(cache.k.shape) * 4
  assert compiled.memory_analysis().temp_size_in_bytes < whole / 3
  shape = ",".join(map(str, cache.k.shape))
  copies = [x for x in compiled.as_text().splitlines() if f"f32[{shape}]" in x and " copy(" in x]
  assert not copies


@pytest.mark.parametrize("remat", ["full", "dots", "attention"])
def test_remat_changes_nothing(remat):
  tokens = tokens_of((2, 12))
  positions = jnp.tile(jnp.arange(12), (2, 1))

  def loss(tree, config):
    hidden = model.forward(config, {"params": tree}, tokens, positions, jnp.ones_like(tokens))
    return jnp.sum(jnp.sin(hidden))

  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  plain = gradient(params(), CONFIG)
  other = gradient(params(), dataclasses.replace(CONFIG, remat=remat))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), plain, other)


def test_bfloat16_is_near_float32():
  tokens, positions = tokens_of((1, 16)), jnp.arange(16)[None]
  half = run(
    tokens, positions, jnp.ones_like(tokens), dataclasses.replace(CONFIG, dtype="bfloat16")
  )
  full = run(tokens, positions, jnp.ones_like(tokens))
  assert half.dtype == jnp.bfloat16
  assert np.abs(half.astype(jnp.float32) - full).max() < 0.15
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  assert model.project_logits(config, {"params": params()}, half).dtype == jnp.float32


def test_value_head_starts_at_zero_in_float32():
  config = tiny_config(param_dtype="bfloat16")
  tree = model.init_params(config, jax.random.key(0))
  assert tree["layers"]["q"]["kernel"].dtype == jnp.bfloat16
  assert tree["value_head"]["kernel"].dtype == jnp.float32
  hidden = jnp.ones((2, 3, config.hidden_size))
  np.testing.assert_array_equal(model.project_values({"params": tree}, hidden), np.zeros((2, 3)))
  tree["value_head"] = {"kernel": jnp.full((config.hidden_size, 1), 0.5), "bias": jnp.ones(1)}
  np.testing.assert_allclose(model.project_values({"params": tree}, hidden), np.full((2, 3), 17.0))


def test_nothing_is_initialised_to_zero_but_biases_and_value_head():
  tree = model.init_params(CONFIG, jax.random.key(0))
  zero = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if not np.any(leaf)
  }
  biases = {f"layers/{name}/bias" for name in "qkv"}
  assert zero == biases | {"value_head/kernel", "value_head/bias"}
  first, second = tree["layers"]["up"]["kernel"]
  assert not np.allclose(first, second)


def test_rope_frequencies_by_hand():
  # theta = 100, h = 4: 1 and 0.1 radians a position, wavelengths 6.28 and 62.8.
  config = tiny_config(head_dim=4, num_heads=4, rope_theta=100.0)
  np.testing.assert_allclose(model.inverse_frequencies(config), [1.0, 0.1], rtol=1e-6)
  linear = dataclasses.replace(config, rope_scaling=RopeScaling("linear", 4.0))
  np.testing.assert_allclose(model.inverse_frequencies(linear), [0.25, 0.025], rtol=1e-6)
  # 100 positions seen in training: long waves are those over 100 / 1, short ones under 100 / 4;
  # 62.8 lies between: smooth = (100 / 62.83 - 1) / 3 = 0.19718; (1 - s) * .1 / 8 + s * .1.
  llama = dataclasses.replace(config, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 100))
  np.testing.assert_allclose(model.inverse_frequencies(llama), [1.0, 0.029753], rtol=1e-4)


def test_useful_flops_by_hand():
  # A layer: q 32*32, k and v 32*16, o 32*32, MLP 3*32*48 = 7680; two layers, head 32*61.
  assert families.useful_flops(tiny_config()) == 2 * (2 * 7680 + 32 * 61)
  # 10 visible tokens: 2 products * 2 FLOPs * 4 heads * 8 * 10 in each of 2 layers.
  assert families.useful_flops(tiny_config(), 10) - families.useful_flops(tiny_config()) == 2560


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"family": "gpt2"}, "family: 'gpt2'.*qwen3"),
    ({"dtype": "float16"}, "dtype: 'float16'.*bfloat16"),
    ({"remat": "some"}, "remat: 'some'.*dots"),
    ({"num_kv_heads": 3}, "num_kv_heads: 3 does not divide num_heads = 4"),
    ({"head_dim": 7}, "head_dim: 7 must be even"),
    ({"num_layers": 0}, "num_layers: must be an integer of 1"),
  ],
)
def test_bad_configs(change, words):
  with pytest.raises(ValueError, match=words):
    tiny_config(**change)
  with pytest.raises(ValueError, match=r"rope_scaling.type: 'yarn'.*linear"):
    RopeScaling("yarn", 2.0)
