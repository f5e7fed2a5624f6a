"""The TPU's cache kernels, interpreted, against NumPy and XLA; compiled where libtpu is."""

import subprocess
import sys
from importlib import util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steptool_jax.policy import attention, headcache
from steptool_jax.policy.kernels import cached

LAYERS, SLOTS, SIZE, HEADS, GROUP, WIDTH = 2, 4, 256, 2, 3, 128
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-3}


def oracle(q_Hh, k_SKh, v_SKh, position):
  """float64 attention of one token over the positions 0..position."""
  q, k, v = (np.asarray(x, np.float64) for x in (q_Hh, k_SKh, v_SKh))
  out = np.zeros(q.shape)
  for head in range(len(q)):
    kv = head // (len(q) // k.shape[1])
    scores = k[: position + 1, kv] @ q[head] / np.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max())
    out[head] = weights / weights.sum() @ v[: position + 1, kv]
  return out


def arrays(dtype, *shapes):
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def heads_first(x_LNSKh):
  return x_LNSKh.swapaxes(2, 3)


@pytest.fixture
def small_blocks(monkeypatch):
  """Two blocks a slot, so that the running softmax and the choice of blocks are at work."""
  monkeypatch.setattr(cached, "STEP_BYTES", 2**16)
  assert cached.block_of(SIZE, HEADS, WIDTH, 2) == 128


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_decode_equals_the_oracle_and_writes_its_token(small_blocks, dtype):
  """A block's edge (128), an empty slot, a slot at its end, one that takes no part."""
  row = (LAYERS, SLOTS, SIZE, HEADS, WIDTH)
  one = (SLOTS, 1, HEADS, WIDTH)
  q, k, v, new_k, new_v = arrays(dtype, (SLOTS, 1, HEADS * GROUP, WIDTH), row, row, one, one)
  cache = headcache.HeadCache(heads_first(k), heads_first(v))
  position, active = jnp.array([128, 0, 255, 77]), jnp.array([True, True, True, False])
  plan = headcache.one_token(position, active, cache)
  out, after = jax.jit(plan.step)(q, new_k, new_v, jnp.int32(1), cache)
  writes = jnp.where(active, position, SIZE)[:, None]
  written = [
    attention.write_cache(heads_first(x), y, jnp.int32(1), writes)
    for x, y in ((k, new_k), (v, new_v))
  ]
  for n in (0, 1, 2):
    seen = [np.asarray(heads_first(x)[1, n], np.float64) for x in written]
    expected = oracle(q[n, 0], *seen, int(position[n]))
    np.testing.assert_allclose(out[n, 0].astype(float), expected, atol=8 * TOLERANCE[dtype])
  xla = attention.attend_cache(
    *(q, attention.KVCache(*written), HEADS, jnp.int32(1), position[:, None]),
    attention.cache_blocks(position, SIZE),
  )
  gap = jnp.abs(out[:3].astype(jnp.float32) - xla[:3].astype(jnp.float32))
  # A bfloat16 near 1 has steps of 8e-3: the two may round to neighbours.
  assert float(jnp.mean(gap)) < TOLERANCE[dtype]
  assert np.isfinite(out.astype(float)).all()
  for x, y in zip(after.arrays, written, strict=True):
    x, y = (np.asarray(heads_first(z).astype(jnp.float32)) for z in (x, y))
    np.testing.assert_array_equal(x[0], y[0])  # another layer
    np.testing.assert_array_equal(x[1, 3], y[1, 3])  # a slot that takes no part
    for n in (0, 1, 2):
      end = int(position[n]) + 1
      np.testing.assert_array_equal(x[1, n, :end], y[1, n, :end])


def test_one_cached_token_by_hand():
  """Scores 0 and log 3: the new token has three times the weight, (1 * 8 + 3 * 4) / 4 = 5."""
  cache = headcache.HeadCache(*(jnp.zeros((1, 1, 1, 128, 4)) for _ in range(2)))
  cache = cache._replace(v=cache.v.at[0, 0, 0, 0].set(8.0))
  q = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(2.0)
  new_k = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(np.log(3.0))
  plan = headcache.one_token(jnp.array([1]), jnp.array([True]), cache)
  out, after = plan.step(q, new_k, jnp.full((1, 1, 1, 4), 4.0), jnp.int32(0), cache)
  np.testing.assert_allclose(out.ravel(), 5.0, rtol=1e-6)
  assert after.v[0, 0, 0, :3, 0].tolist() == [8.0, 4.0, 0.0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tiles_equal_the_xla_path(small_blocks, dtype):
  """Two pieces (101 tokens that begin inside of a tile, 21 in an empty slot), and padding."""
  tile, rows = headcache.TILE, 8
  count, length = jnp.array([0, 101, 0, 21]), jnp.array([5, 71, 9, 0])
  tokens = jnp.concatenate([jnp.arange(101) + 1000, jnp.arange(21) + 2000, jnp.zeros(390, int)])
  history = jnp.zeros((SLOTS, SIZE), jnp.int32)
  history, fed, *where = headcache.place(tokens.astype(jnp.int32), count, history, length, rows)
  assert history[1, 71:173].tolist() == [*range(1000, 1101), 0]
  assert history[3, :22].tolist() == [*range(2000, 2021), 0]
  slot, base, first, end = where
  # The pending token is fed first, the last new one is left pending.
  assert slot.tolist() == [1, 1, 3, *[3] * 5]
  assert base.tolist() == [64, 128, *[0] * 6]
  assert (first.tolist()[:3], end.tolist()[:3]) == ([6, 0, 0], [64, 43, 20])
  assert first.tolist()[3:] == end.tolist()[3:]
  assert fed[0, 7:].tolist() == list(range(1000, 1057))
  row = (LAYERS, SLOTS, SIZE, HEADS, WIDTH)
  new = (rows, tile, HEADS, WIDTH)
  q, k, v, new_k, new_v = arrays(dtype, (rows, tile, HEADS * GROUP, WIDTH), row, row, new, new)
  cache = headcache.HeadCache(heads_first(k), heads_first(v))
  plan = headcache.tiles(*where, cache)
  out, after = jax.jit(plan.step)(q, new_k, new_v, jnp.int32(1), cache)
  written = [np.array(k.astype(jnp.float32)), np.array(v.astype(jnp.float32))]
  for r in range(3):
    a, b, at = int(first[r]), int(end[r]), int(base[r])
    for x, y in zip(written, (new_k, new_v), strict=True):
      x[1, slot[r], at + a : at + b] = y[r, a:b].astype(jnp.float32)
  for x, y in zip(after.arrays, written, strict=True):
    np.testing.assert_array_equal(heads_first(x).astype(jnp.float32), y)
  seen = attention.KVCache(*(heads_first(jnp.asarray(x, dtype))[:, slot] for x in written))
  positions = base[:, None] + jnp.arange(tile)
  blocks = attention.cache_blocks(positions, SIZE)
  xla = attention.attend_cache(q, seen, HEADS, jnp.int32(1), positions, blocks)
  for r in range(3):
    inside = slice(int(first[r]), int(end[r]))
    gap = jnp.abs(out[r, inside].astype(jnp.float32) - xla[r, inside].astype(jnp.float32))
    assert float(jnp.mean(gap)) < TOLERANCE[dtype]
    assert float(jnp.max(gap)) < 16 * TOLERANCE[dtype]


def test_work_is_what_is_filled():
  """A row costs its own blocks, an empty one a single step; the list repeats its end."""
  row, block, count = cached.steps_of(jnp.array([300, 0, 128]), 512, 128)
  assert int(count) == 3 + 1 + 1
  assert row.tolist() == [0, 0, 0, 1, 2] + [2] * 7
  assert block.tolist() == [0, 1, 2, 0, 0] + [0] * 7
  assert (cached.rounded(300), cached.rounded(600), cached.rounded(2048)) == (384, 1024, 2048)
  assert [headcache.rows_needed(n) for n in (1, 2, 65, 66)] == [1, 2, 2, 3]


COMPILE = """
import itertools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from steptool_jax.policy import headcache, sharding
from steptool_jax.run.compile import open_topology
for topology in ("v5e:2x2", "v6e:2x2"):
  _, devices = open_topology(topology)
  mesh = sharding.make_mesh(2, 1, 2, devices=devices)
  def like(spec, shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
  rows = P(sharding.ROWS)
  with jax.set_mesh(mesh):
    for heads, group, size in ((2, 4, 2048), (8, 1, 640), (2, 7, 8192)):
      spec = headcache.cache_spec(heads, mesh)
      kept = lambda dtype: [like(spec, (2, 8, heads, size, 128), dtype)] * 2
      scales = [like(spec, (2, 8, heads, 1, size), jnp.float32)] * 2
      caches = [headcache.HeadCache(*kept(jnp.bfloat16))]
      if (topology, heads) == ("v5e:2x2", 8):
        caches.append(headcache.HeadCache(*kept(jnp.int8), *scales))
      def decode(q, k, v, position, cache):
        return headcache.one_token(position, position > 0, cache).step(q, k, v, jnp.int32(1), cache)
      def append(q, k, v, slot, base, cache):
        plan = headcache.tiles(slot, base, 0 * base, 0 * base + 64, cache)
        return plan.step(q, k, v, jnp.int32(1), cache)
      for cache, (function, tokens, plan) in itertools.product(
        caches, ((decode, 1, 1), (append, 64, 2))
      ):
        q = like(rows, (8, tokens, heads * group, 128), jnp.bfloat16)
        k = like(rows, (8, tokens, heads, 128), jnp.bfloat16)
        places = [like(rows, (8,), jnp.int32)] * plan
        program = jax.jit(function, donate_argnums=3 + plan).lower(q, k, k, *places, cache)
        compiled = program.compile()
        whole = 2 * cache.k.size * cache.k.dtype.itemsize // 4
        assert compiled.memory_analysis().temp_size_in_bytes < whole / 4, "the cache is copied"
        assert "flash_" in compiled.as_text()
    print(topology, "compiled")
"""


@pytest.mark.skipif(util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)")
def test_the_kernels_compile_for_tpus():
  """Mosaic takes them for v5e and v6e, sharded, and the cache is updated in place."""
  done = subprocess.run(
    [sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=280, check=False
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.split() == ["v5e:2x2", "compiled", "v6e:2x2", "compiled"]
