"""An int8 cache: the numbers themselves, both caches' attention, the kernels, whole engines."""

import dataclasses
import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steptool_jax.policy import attention, engine, headcache, kv_slots, model, sharding
from steptool_jax.policy.attention import Window
from steptool_jax.policy.kernels import cached, int8


def quantised(x):
  """(integers, scales) in NumPy, a row after the other."""
  x = np.asarray(x, np.float32)
  whole, scales = np.zeros(x.shape, int), np.zeros(x.shape[:-1], np.float32)
  for at in np.ndindex(scales.shape):
    if x[at].any():
      scales[at] = max(x[at].max(), -x[at].min()) / np.float32(127)
      whole[at] = np.rint(x[at] / scales[at])
  return whole, scales


def read_back(x):
  """What a reader of the int8 cache sees of x, float64."""
  whole, scales = quantised(x)
  return whole * scales[..., None].astype(np.float64)


def dequantise(whole, scale):
  return whole.astype(jnp.float32) * scale[..., None]


def normal(seed, *shapes, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def no_halves(x):
  """x without numbers so near to a half that two ways to divide round them differently."""
  whole, scales = quantised(x)
  left = np.clip(np.asarray(x) / np.maximum(scales, 1e-9)[..., None] - whole, -0.4, 0.4)
  return jnp.asarray((whole + left) * scales[..., None], jnp.float32)


def seen_by_one(q_Hh, k_SKh, v_SKh):
  """float64 attention of one token over all of these positions."""
  q = np.asarray(q_Hh, np.float64)
  out = np.zeros(q.shape)
  for head in range(len(q)):
    kv = head // (len(q) // k_SKh.shape[1])
    scores = k_SKh[:, kv] @ q[head] / np.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max())
    out[head] = weights / weights.sum() @ v_SKh[:, kv]
  return out


def test_numbers_by_hand_and_by_the_oracle():
  """A scale of the wrong row, or a rounding towards zero, would be a policy of its own."""
  whole, scale = int8.quantise(jnp.array([[1.27, -0.634, 0.004, 0.0], [-2.54, 1.0, 0.011, 2.0]]))
  np.testing.assert_allclose(scale, [0.01, 0.02], rtol=1e-6)
  assert whole.tolist() == [[127, -63, 0, 0], [-127, 50, 1, 100]]
  assert whole.dtype == jnp.int8
  x = no_halves(normal(0, (3, 5, 2, 16))[0]).at[1, 2].set(0.0)
  whole, scale = int8.quantise(x)
  expected, scales = quantised(x)
  np.testing.assert_array_equal(whole, expected)
  np.testing.assert_allclose(scale, scales, rtol=1e-6)
  assert float(jnp.abs(dequantise(whole, scale) - x).max()) <= float(scale.max()) / 2 * 1.001
  assert not np.isfinite(int8.quantise(jnp.array([jnp.nan, 1.0]))[1])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("reach", [None, 3])
def test_xla_attention_equals_dense_over_the_same_numbers(platform, reach, monkeypatch):
  """A prompt and a decoded token in two slots of other lengths; on a TPU rows are whole tiles."""
  monkeypatch.setattr(attention, "platform", lambda: platform)
  monkeypatch.setattr(attention, "CACHE_BLOCK", 4)
  monkeypatch.setattr(attention, "TPU_CACHE_BLOCK", 4)
  layers, slots, size, heads, width = 2, 2, 10, 2, 8
  q, *new = normal(1, (slots, 8, 4, width), (slots, 8, heads, width), (slots, 8, heads, width))
  k, v = map(no_halves, new)
  cache = attention.init_cache(layers, slots, heads, size, width, "int8")
  assert (cache.k.dtype, cache.k_scale.shape) == (jnp.int8, (layers, slots, heads, 1, size))
  window = None if reach is None else Window(reach, jnp.array(True))
  lengths = np.array([7, 4])
  seen_k, seen_v = read_back(k), read_back(v)

  @jax.jit
  def step(q, k, v, positions, valid, cache):
    writes = jnp.where(valid, positions, size)
    blocks = attention.cache_blocks(positions, size)
    plan = attention.Positions(positions, writes, blocks, jnp.min(positions))
    return plan.step(q, k, v, jnp.int32(1), cache, window)

  def check(out, n, token, position):
    first = 0 if reach is None else max(position - reach + 1, 0)
    at = slice(first, position + 1)
    expected = seen_by_one(q[n, token], seen_k[n, at], seen_v[n, at])
    np.testing.assert_allclose(out, expected, atol=2e-6)

  positions = jnp.tile(jnp.arange(7), (slots, 1))
  out, cache = step(q[:, :7], k[:, :7], v[:, :7], positions, positions < lengths[:, None], cache)
  for n in range(slots):
    for t in range(lengths[n]):
      check(out[n, t], n, t, t)
  # The next token of each slot, at a position that no block of four begins with.
  one = [jnp.stack([x[n, lengths[n]] for n in range(slots)])[:, None] for x in (q, k, v)]
  out, cache = step(*one, jnp.asarray(lengths)[:, None], jnp.ones((slots, 1), bool), cache)
  for n in range(slots):
    check(out[n, 0], n, lengths[n], lengths[n])
  expected, scales = quantised(k[0])
  rows = jnp.moveaxis(cache.k, attention.positions_axis(), 2)[1, 0, :8]
  rows = rows.reshape(8, -1)[:, : heads * width]
  np.testing.assert_array_equal(rows, expected.reshape(8, -1))
  np.testing.assert_allclose(cache.k_scale[1, 0, :, 0, :8], scales.T, rtol=1e-6)
  assert not cache.v_scale[0].any()  # another layer
  assert not cache.v_scale[1, 1, :, 0, 5:].any()  # a slot that is not as long


LAYERS, SLOTS, SIZE, HEADS, GROUP, WIDTH = 2, 4, 256, 2, 3, 128


def kernels_cache(seed):
  """(an int8 cache that is full in layer 1, its keys and values [SLOTS, SIZE, HEADS, WIDTH])."""
  k, v = map(no_halves, normal(seed, *[(SLOTS, SIZE, HEADS, WIDTH)] * 2))
  cache = headcache.init(LAYERS, SLOTS, HEADS, SIZE, WIDTH, "int8")
  arrays = [x for pair in zip(*map(int8.quantise, (k, v)), strict=True) for x in pair]
  layer = [arrays[0].swapaxes(1, 2), arrays[1].swapaxes(1, 2)]
  layer += [x.swapaxes(1, 2)[:, :, None] for x in arrays[2:]]
  return headcache.HeadCache(*(x.at[1].set(y) for x, y in zip(cache, layer, strict=True))), [k, v]


def check_cache(after, before, written, untouched):
  """The integers and scales of layer 1 are those of `written`; the rest is as before."""
  for at, values in enumerate(written):
    whole, scales = (np.asarray(x).swapaxes(1, 2) for x in map(np.asarray, quantised(values)))
    for n, end in untouched.items():
      np.testing.assert_array_equal(after[at][1, n, :, :end], whole[n, :, :end])
      np.testing.assert_allclose(after[2 + at][1, n, :, 0, :end], scales[n, :, :end], rtol=1e-6)
  for x, y in zip(after, before, strict=True):
    np.testing.assert_array_equal(x[0], y[0])


def test_the_decode_kernel_equals_dense_over_the_same_numbers(monkeypatch):
  """A block's edge (128), an empty slot, a slot at its end, one that takes no part."""
  monkeypatch.setattr(cached, "STEP_BYTES", 2**15)
  assert cached.block_of(SIZE, HEADS, WIDTH, 1) == 128
  cache, (k, v) = kernels_cache(2)
  q, *new = normal(3, (SLOTS, 1, HEADS * GROUP, WIDTH), *[(SLOTS, 1, HEADS, WIDTH)] * 2)
  new_k, new_v = map(no_halves, new)
  position, active = jnp.array([128, 0, 255, 77]), jnp.array([True, True, True, False])
  plan = headcache.one_token(position, active, cache)
  out, after = jax.jit(plan.step)(q, new_k, new_v, jnp.int32(1), cache)
  written = [np.array(x) for x in (k, v)]
  for x, new in zip(written, (new_k, new_v), strict=True):
    for n in (0, 1, 2):
      x[n, int(position[n])] = new[n, 0]
  for n in (0, 1, 2):
    at = slice(0, int(position[n]) + 1)
    expected = seen_by_one(q[n, 0], *(read_back(x[n, at]) for x in written))
    np.testing.assert_allclose(out[n, 0], expected, atol=2e-5)
  assert np.isfinite(out).all()
  check_cache(after, cache, written, {0: 129, 1: 1, 2: 256, 3: 256})


def test_the_append_kernels_equal_dense_over_the_same_numbers(monkeypatch):
  """Two tiles that share a row of scales (0 and 64), one that begins inside of a tile, padding."""
  monkeypatch.setattr(cached, "STEP_BYTES", 2**15)
  cache, (k, v) = kernels_cache(4)
  tile, rows = headcache.TILE, 8
  slot = jnp.array([1, 1, 1, 3, *[3] * 4])
  base = jnp.array([0, 64, 128, 192, *[192] * 4])
  first = jnp.array([5, 0, 0, 10, *[10] * 4])
  end = jnp.array([64, 64, 9, 30, *[10] * 4])
  q, *new = normal(5, (rows, tile, HEADS * GROUP, WIDTH), *[(rows, tile, HEADS, WIDTH)] * 2)
  new_k, new_v = map(no_halves, new)
  plan = headcache.tiles(slot, base, first, end, cache)
  out, after = jax.jit(plan.step)(q, new_k, new_v, jnp.int32(1), cache)
  written = [np.array(x) for x in (k, v)]
  for r in range(4):
    a, b, at, n = (int(x[r]) for x in (first, end, base, slot))
    for x, new in zip(written, (new_k, new_v), strict=True):
      x[n, at + a : at + b] = new[r, a:b]
  seen = [read_back(x) for x in written]
  for r, t in ((0, 5), (0, 63), (1, 0), (1, 40), (2, 8), (3, 29)):
    n, at = int(slot[r]), slice(0, int(base[r]) + t + 1)
    expected = seen_by_one(q[r, t], *(x[n, at] for x in seen))
    np.testing.assert_allclose(out[r, t], expected, atol=2e-5)
  check_cache(after, cache, written, dict.fromkeys(range(SLOTS), SIZE))


KINDS = {
  "llama": {},
  "windows": {
    "family": "gemma3_text",
    "qk_norm": True,
    "num_kv_heads": 1,
    "sliding_window": 4,
    "sliding_layers": (True, False),
    "rope_local_theta": 100.0,
  },
  "kernels": {"num_layers": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_samples_with_the_log_probs_of_the_same_numbers(kind, monkeypatch):
  """Append, fork, decode, rewind, append, decode: a scale that one of them left behind, or took
  from another slot, would show; so would log-probs of keys that were not rounded."""
  config = fakes.tiny_config(vocab_size=64, **KINDS[kind])
  variables = {"params": model.init_params(config, jax.random.key(0))}
  rng = np.random.default_rng(0)
  if kind == "kernels":
    monkeypatch.setattr(headcache, "suits", lambda head_dim: True)
  prompt, observation = (rng.integers(0, 60, n).astype(np.int32) for n in (60, 9))
  seeds = {s: np.array([s, 1], np.uint32) for s in range(2)}

  def conversations(kv_cache):
    """(ids, log-probs of those that were sampled) of two slots."""
    eng = engine.make_engine(config, slots=2, size=128, chunk=4, kv_cache=kv_cache)
    assert eng.tiled == (kind == "kernels")
    eng = dataclasses.replace(eng, buckets=())
    state = eng.fork(eng.append(variables, eng.init(), {0: prompt}), {1: 0})
    state, first = eng.decode(variables, state, {0: 4, 1: 2}, seeds, (), 1.0)
    state = eng.append(variables, eng.rewind(state, {0: 62}), {1: observation})
    _, second = eng.decode(variables, state, {0: 3, 1: 4}, seeds, (), 1.0)
    (a, b), (c, d), (e, f), (g, h) = (
      x for out in (first, second) for x in (out.tokens, out.logprobs)
    )
    ids = [*prompt, *a[:2], *e[:3]], [*prompt, *b[:2], *observation, *f]
    return ids, ([*c[:2], *g[:3]], [*d[:2], *h])

  ids, said = conversations("int8")
  at = [60, 61, 62, 63, 64], [60, 61, 71, 72, 73, 74]
  tokens = np.zeros((2, 75), np.int32)
  for row, of_slot in zip(tokens, ids, strict=True):
    row[: len(of_slot)] = of_slot

  def of_dense(tokens):
    """Log-probs of all tokens, by a forward pass without a cache."""
    positions = jnp.tile(jnp.arange(75), (2, 1))
    hidden = model.forward(config, variables, tokens, positions, jnp.ones_like(tokens))
    return jax.nn.log_softmax(model.project_logits(config, variables, hidden))

  def rounded(q, k, v, *rest):
    return attention.attend(q, *(dequantise(*int8.quantise(x)) for x in (k, v)), *rest)

  exact = np.asarray(jax.jit(lambda tokens: of_dense(tokens))(tokens))
  monkeypatch.setattr(model, "attend", rounded)
  expected = np.asarray(jax.jit(lambda tokens: of_dense(tokens))(tokens))
  for n in range(2):
    where = n, np.array(at[n]) - 1, tokens[n, at[n]]
    np.testing.assert_allclose(said[n], expected[where], atol=1e-4)
    gap = np.abs(said[n] - exact[where])
    assert 1e-4 < gap.max() < 0.05, "near the exact ones, and not the same"
  if kind == "llama":
    assert conversations("auto")[0] == ids, "other tokens"


def test_the_state_is_a_quarter_of_float32_and_lies_as_the_engine_says():
  """Scales that lay elsewhere than their keys would travel for every token."""
  config = fakes.tiny_config(head_dim=32)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  where = kv_slots.state_shardings(config, 4, 64, mesh, "int8")
  assert where.cache.k_scale.spec == jax.P(None, sharding.ROWS, "tensor")
  sizes = {}
  for kv_cache in ("auto", "int8"):
    empty = functools.partial(kv_slots.init_state, config, 4, 64, kv_cache)
    cache = jax.eval_shape(empty).cache
    sizes[kv_cache] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  assert sizes["int8"] / sizes["auto"] == 1 / 4 + 1 / 32
  assert kv_slots.state_shardings(config, 4, 64, mesh).cache.k_scale is None
