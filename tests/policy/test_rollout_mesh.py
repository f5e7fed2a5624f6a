"""Rollouts on their own mesh, forks between chips, and the kernels' cache in the engine."""

import types

import fakes
import jax
import numpy as np
import pytest

from steptool_jax.policy import engine, headcache, kv_slots, length_classes, model, sharding
from steptool_jax.run.parts import build

CONFIG = fakes.tiny_config(vocab_size=64)
SIZES = {"key-value heads": 2, "of vocab_size": 64}


def make_variables():
  return {"params": model.init_params(CONFIG, jax.random.key(0))}


def conversations(eng, variables, training=None):
  """Prompts, forks, turns and observations: what an iteration does; (tokens, log-probs and what is
  recorded) said."""
  rng = np.random.default_rng(0)
  if training is not None:
    variables = jax.device_put(variables, sharding.shardings(variables, training))
  weights = eng.lay_out(variables)
  state = eng.init()
  prompts = {s: rng.integers(0, 60, 20 + 7 * s).astype(np.int32) for s in (0, 3, 6)}
  state = eng.append(weights, state, prompts)
  state = eng.fork(state, {1: 0, 7: 0, 4: 3, 5: 3})
  said = []
  for turn in range(2):
    slots = range(turn, 8 - turn)
    seeds = {s: np.array([s, turn], np.uint32) for s in slots}
    state, out = eng.decode(weights, state, dict.fromkeys(slots, 6), seeds, (), 1.0)
    recorded = [x for x in (out.values, out.hidden) if x is not None]
    said.append((out.count.tolist(), out.tokens.tolist(), out.logprobs, *recorded))
    state = eng.rewind(state, {6: 21})
    state = eng.append(weights, state, {s: rng.integers(0, 60, 9).astype(np.int32) for s in (4, 6)})
  return said, np.asarray(state.length).tolist()


def assert_same(found, expected):
  for (count, tokens, *floats), (count_, tokens_, *floats_) in zip(
    found[0], expected[0], strict=True
  ):
    assert (count, tokens) == (count_, tokens_)
    np.testing.assert_allclose(floats[0], floats_[0], atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), floats[1:], floats_[1:])
  assert found[1] == expected[1]


def of_one_device(variables, **made):
  eng = engine.make_engine(CONFIG, slots=8, size=160, chunk=8, **made)
  return conversations(eng, variables)


def test_tokens_are_those_of_one_device():
  """On training's mesh and on one of their own, where slots are forked from chip to chip; with an
  int8 cache, scales go with their keys."""
  assert "8 devices say the same" in fakes.on_devices(8, __file__).stdout


def _on_eight_devices(variables, expected, tensor, **made):
  training = sharding.make_mesh(1, 4, 2)
  where = sharding.rollout_mesh(training, tensor, SIZES)
  assert dict(where.shape) == {"data": 4 if tensor else 1, "fsdp": 1 if tensor else 4, "tensor": 2}
  with jax.set_mesh(training):
    eng = engine.make_engine(*(CONFIG, 8, 160, 8), mesh=where, copied=where is not training, **made)
    assert_same(conversations(eng, variables, training), expected)
    placed = jax.device_put(variables, sharding.shardings(variables, training))
    up = eng.lay_out(placed)["params"]["layers"]["up"]["kernel"]
  # Laid out for rollouts a chip has half of a matrix; in training an eighth.
  assert up.addressable_shards[0].data.shape == ((2, 32, 24) if tensor else (2, 8, 24))


def test_the_kernels_cache_says_the_same(monkeypatch):
  """Interpreted: a prompt as tiles of two calls, a fork, the fused write, an observation."""
  config = fakes.tiny_config(vocab_size=64, num_layers=1)
  variables = {"params": model.init_params(config, jax.random.key(0))}
  rng = np.random.default_rng(0)
  prompt, observation = (rng.integers(0, 60, n).astype(np.int32) for n in (70, 9))
  seeds = {s: np.array([s, 1], np.uint32) for s in range(2)}

  def turns(eng):
    state = eng.fork(eng.append(variables, eng.init(), {0: prompt}), {1: 0})
    said = []
    for _ in range(2):
      state, out = eng.decode(variables, state, {0: 3, 1: 2}, seeds, (), 1.0)
      said.append((out.count.tolist(), out.tokens.tolist(), out.logprobs))
      state = eng.append(variables, state, {1: observation})
    return said, np.asarray(state.length).tolist()

  expected = turns(engine.make_engine(config, slots=2, size=128, chunk=4))
  monkeypatch.setattr(headcache, "suits", lambda head_dim: True)
  monkeypatch.setattr(headcache, "MOST_TILES", 2)
  eng = engine.make_engine(config, slots=2, size=128, chunk=4)
  assert eng.tiled
  assert (eng.buckets, eng.append_programs) == ((), ())
  assert_same(turns(eng), expected)


def moving(eng, variables, long):
  """Two conversations in short slots, of which one goes on in the slot `long`; what they say."""
  rng = np.random.default_rng(0)
  prompts = {s: rng.integers(0, 60, 30 + s).astype(np.int32) for s in (0, 3)}
  state = eng.append(variables, eng.init(), prompts)
  said = []
  for turn, slots in enumerate(((0, 3), (0, long))):
    seeds = {s: np.array([n, turn], np.uint32) for n, s in enumerate(slots)}
    state, out = eng.decode(variables, state, dict.fromkeys(slots, 6), seeds, (), 1.0)
    said += [(out.tokens[s].tolist(), out.logprobs[s]) for s in slots]
    if not turn:
      state = eng.fork(state, {long: 3})
      state = eng.append(variables, state, {long: rng.integers(0, 60, 70).astype(np.int32)})
  return said


def assert_moves(variables, config=CONFIG, **made):
  """A conversation that moves into a larger slot says what one says that was there all along."""

  def make(slots, size):
    return engine.make_engine(config, slots, size, chunk=8, **made)

  classes = length_classes.of_sizes(make, ((8, 60), (8, 160)))
  assert classes.classes == ((8, 60), (8, 160))
  found = moving(classes, variables, 8 + 5)
  for (tokens, logprobs), (same, expected) in zip(
    found, moving(make(8, 160), variables, 5), strict=True
  ):
    assert tokens == same
    np.testing.assert_allclose(logprobs, expected, atol=2e-5)


@pytest.mark.parametrize(
  ("tiled", "kv_cache"),
  [(False, "auto"), pytest.param(True, "int8", marks=pytest.mark.campaign)],  # interpreted: slow
)
def test_a_conversation_moves_into_a_larger_slot(tiled, kv_cache, monkeypatch):
  config = fakes.tiny_config(vocab_size=64, num_layers=1)
  monkeypatch.setattr(headcache, "suits", lambda head_dim: tiled)
  variables = {"params": model.init_params(config, jax.random.key(0))}
  assert_moves(variables, config, kv_cache=kv_cache)


def test_a_move_by_hand():
  """Only the named slot changes, and only by what the other one holds."""
  origin, target = (kv_slots.init_state(CONFIG, 2, size) for size in (4, 6))
  origin = origin._replace(
    tokens=origin.tokens + 7,
    length=origin.length + 3,
    cache=jax.tree.map(np.ones_like, origin.cache),
  )
  target = target._replace(tokens=target.tokens + 1, length=target.length + 5)
  moved = kv_slots.move(origin, target, np.array([-1, 0], np.int32))
  assert moved.length.tolist() == [5, 3]
  assert moved.tokens.tolist() == [[1] * 6, [7, 7, 7, 7, 1, 1]]
  assert moved.cache.k[:, 0].sum() == 0
  assert moved.cache.k[:, 1, :, :3].min() == 1


def test_tiles_of_a_call(monkeypatch):
  """An observation costs its own tiles; what is too long for a call goes on in the next one."""
  monkeypatch.setattr(headcache, "MOST_TILES", 8)
  ids = np.arange(1, 2001, dtype=np.int32)
  ((tokens, count, tiles),) = headcache.calls({5: ids[:60]}, 8, 4)
  assert tiles == 2
  assert tokens.reshape(4, -1)[2, :60].tolist() == ids[:60].tolist()
  assert count.tolist() == [0, 0, 0, 0, 0, 60, 0, 0]
  calls = list(headcache.calls({0: ids[:900], 1: ids[:30], 7: ids[:100]}, 8, 4))
  assert [c.tolist() for _, c, _ in calls] == [
    [448, 0, 0, 0, 0, 0, 0, 100],
    [448, 0, 0, 0, 0, 0, 0, 0],
    [4, 30, 0, 0, 0, 0, 0, 0],
  ]
  assert [t for *_, t in calls] == [8, 8, 8]
  assert calls[1][0].reshape(4, -1)[0, :448].tolist() == ids[448:896].tolist()
  for tokens, count, tiles in calls:
    shards = count.reshape(4, 2)
    assert all(sum(headcache.rows_needed(n) for n in s if n) <= tiles for s in shards)
    assert tokens.shape == (4 * tiles * headcache.TILE,)


def test_bad_splits_are_refused_with_the_nearest_valid_one():
  mesh = types.SimpleNamespace(size=8)
  assert sharding.rollout_mesh(mesh, 0, SIZES) is mesh
  for tensor, badly, nearest in (
    (4, "2 key-value heads", 2),
    (3, "8 devices, 2 key-value heads", 2),
  ):
    with pytest.raises(
      ValueError, match=rf"rollout\.tensor: {tensor} does not divide {badly}.*nearest: {nearest}, "
    ):
      sharding.rollout_mesh(mesh, tensor, SIZES)


def test_a_mesh_that_splits_heads_is_refused_before_work():
  """Split within a head, 8 chips would each compute all heads of attention, and nobody be told."""
  mesh = types.SimpleNamespace(size=8, shape={"tensor": 4})
  sharding.check_heads(8, mesh)
  with pytest.raises(ValueError, match=r"mesh\.tensor: 4 does not divide 2 .* 2, valid: 1, 2$"):
    sharding.check_heads(2, mesh)
  config = types.SimpleNamespace(rollout=None)
  policy = types.SimpleNamespace(model=types.SimpleNamespace(num_kv_heads=6))
  with pytest.raises(ValueError, match=r"mesh\.tensor: 4 does not divide 6 .* nearest: 2"):
    build.build_engine(config, policy, mesh)


if __name__ == "__main__":
  weights = make_variables()
  of_one_int8 = of_one_device(weights, kv_cache="int8")
  _on_eight_devices(weights, of_one_int8, 2, kv_cache="int8")
  weights["params"]["value_head"]["kernel"] = jax.random.normal(jax.random.key(1), (32, 1))
  of_one = {record: of_one_device(weights, record=record) for record in ("hidden", "values")}
  for ways, record in ((0, "hidden"), (2, "values"), (-1, "values")):
    assert all(np.abs(turn[3]).max() > 0.1 for turn in of_one[record][0])
    _on_eight_devices(weights, of_one[record], ways, record=record)
  with jax.set_mesh(sharding.make_mesh(1, 4, 2)) as mesh:
    assert_moves(weights, mesh=mesh)
  print("8 devices say the same")
