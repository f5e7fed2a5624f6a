import dataclasses
import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steptool_jax.policy import engine, model, sampling

CONFIG = fakes.tiny_config()
STOP = 7


@pytest.fixture(scope="module")
def variables():
  return {"params": model.init_params(CONFIG, jax.random.key(0))}


@pytest.fixture(scope="module")
def shared():
  return engine.make_engine(CONFIG, slots=4, size=64, chunk=8)


@jax.jit
def forward(variables, ids):
  positions = jnp.arange(ids.shape[1])[None]
  hidden = model.forward(CONFIG, variables, ids, positions, jnp.ones_like(ids))
  return model.project_logits(CONFIG, variables, hidden)


def full_logits(variables, ids):
  """[n, V] of one sequence; causal, so zeros after it change nothing."""
  padded = np.zeros((1, 128), np.int32)
  padded[0, : len(ids)] = ids
  return np.asarray(forward(variables, padded))[0, : len(ids)]


def seed(*numbers):
  return np.array([sum(numbers), len(numbers)], np.uint32)


def run_turn(shared, variables, state, slots, limit=8, temperature=1.0, stop=(STOP,), salt=0):
  return shared.decode(
    variables,
    state,
    dict.fromkeys(slots, limit),
    {s: seed(s, salt) for s in slots},
    stop,
    temperature,
  )


def test_logprobs_equal_the_full_forward_over_turns(shared, variables):
  """Sampler log-probs equal trainer log-probs, over appends, chunks and turns of a live cache."""
  rng = np.random.default_rng(0)
  state, history = shared.init(), {0: [], 2: []}
  for turn in range(4):
    pieces = {s: rng.integers(0, 60, 3 + 5 * turn if s else 2).astype(np.int32) for s in history}
    state = shared.append(variables, state, pieces)
    for s in history:
      history[s].extend(pieces[s])
    state, out = run_turn(shared, variables, state, history, limit=5, salt=turn, stop=())
    assert out.count.tolist() == [5, 0, 5, 0]
    for s, ids in history.items():
      sampled = out.tokens[s, :5]
      logits = full_logits(variables, [*ids, *sampled])
      logp = np.asarray(jax.nn.log_softmax(logits))
      at = np.arange(len(ids) - 1, len(ids) + 4)
      np.testing.assert_allclose(out.logprobs[s, :5], logp[at, sampled], atol=1e-5)
      ids.extend(sampled)
      assert np.asarray(state.tokens)[s, : len(ids)].tolist() == ids


def test_stop_and_padding_ids_in_a_prompt_are_tokens_like_any_other(shared, variables):
  """Masks go by length; an end-of-turn or padding id is seen, and ends nothing."""
  prompt = [STOP, 0, 5, STOP, 0, 0, 9, STOP]
  state = shared.append(variables, shared.init(), {1: np.array(prompt, np.int32)})
  state, out = run_turn(shared, variables, state, [1], limit=4, stop=(60,))
  assert out.count[1] == 4
  ids = [*prompt, *out.tokens[1, :4]]
  logp = np.asarray(jax.nn.log_softmax(full_logits(variables, ids)))
  expected = logp[np.arange(7, 11), ids[8:]]
  np.testing.assert_allclose(out.logprobs[1, :4], expected, atol=5e-5)
  # A stop token that is forced, as the last one or in front of it, ends no turn.
  state = shared.append(variables, shared.init(), {1: np.array(prompt, np.int32)})
  _, again = run_turn(shared, variables, state, [1], limit=4, stop=(STOP, 60))
  first = again.tokens[1, : again.count[1]].tolist()
  assert first == out.tokens[1, : len(first)].tolist()
  assert len(first) == 4 or first[-1] == STOP


def test_greedy_equals_argmax_and_stop_token_is_kept(shared, variables):
  prompt = np.array([5, 9, 11], np.int32)
  ids = prompt.tolist()
  for _ in range(6):
    ids.append(int(full_logits(variables, ids)[-1].argmax()))
  state = shared.append(variables, shared.init(), {1: prompt})
  _, out = run_turn(shared, variables, state, [1], limit=6, temperature=0.0, stop=())
  assert out.tokens[1, :6].tolist() == ids[3:]
  assert out.logprobs[1].tolist() == [0.0] * 8
  stop = ids[5]
  first = ids[3:].index(stop)
  state = shared.append(variables, shared.init(), {1: prompt})
  state, out = run_turn(shared, variables, state, [1], limit=6, temperature=0.0, stop=(stop,))
  assert out.stopped[1]
  assert out.count[1] == first + 1
  assert out.tokens[1, first] == stop
  assert state.length[1] == 3 + first + 1


def test_a_trajectory_does_not_depend_on_its_neighbours_or_on_chunking(shared, variables):
  a, b = np.array([3, 4, 5], np.int32), np.arange(20, dtype=np.int32)
  state = shared.append(variables, shared.init(), {0: a})
  _, alone = run_turn(shared, variables, state, [0], stop=())
  state = shared.append(variables, shared.init(), {0: a, 1: b, 3: b[:7]})
  state, first = run_turn(shared, variables, state, [0, 1], limit=3, stop=())
  _, rest = run_turn(shared, variables, state, [0, 3], limit=5, stop=())
  together = np.concatenate([first.tokens[0, :3], rest.tokens[0, :5]])
  assert together.tolist() == alone.tokens[0].tolist()


def test_samples_are_distinct_and_keys_reproduce_them(shared, variables):
  a = np.array([3, 4, 5], np.int32)
  state = shared.append(variables, shared.init(), dict.fromkeys(range(4), a))
  _, out = run_turn(shared, variables, state, range(4), stop=())
  assert len({tuple(row) for row in out.tokens.tolist()}) == 4
  state = shared.append(variables, shared.init(), dict.fromkeys(range(4), a))
  _, again = run_turn(shared, variables, state, range(4), stop=())
  assert again.tokens.tolist() == out.tokens.tolist()


def test_rewind_and_fork_equal_a_fresh_prefill(shared, variables):
  prompt = np.array([3, 4, 5, 9], np.int32)
  fresh = shared.append(variables, shared.init(), {2: prompt})
  _, expected = run_turn(shared, variables, fresh, [2], stop=())
  state = shared.append(variables, shared.init(), {0: prompt})
  state, _ = run_turn(shared, variables, state, [0], salt=9, stop=())
  state = shared.append(variables, state, {0: np.arange(10, dtype=np.int32)})
  state = shared.fork(state, {2: 0})
  state = shared.rewind(state, {2: 4})
  assert state.length.tolist() == [22, 0, 4, 0]
  state, out = run_turn(shared, variables, state, [2], stop=())
  assert out.tokens[2].tolist() == expected.tokens[2].tolist()
  np.testing.assert_allclose(out.logprobs[2], expected.logprobs[2], atol=1e-6)
  assert shared.rewind(state, {0: 60}).length.tolist() == [22, 0, 12, 0]


def test_limits_end_at_the_slot_and_empty_slots_stay_empty(shared, variables):
  state = shared.append(variables, shared.init(), {0: np.ones(60, np.int32)})
  state, out = run_turn(shared, variables, state, [0, 1], stop=())
  assert out.count.tolist() == [4, 0, 0, 0]
  assert state.length.tolist() == [64, 0, 0, 0]


def test_zero_compilations_after_warm_up(variables):
  """Six turns of varied observation lengths and budgets compile nothing new, long ones neither."""
  eng = engine.make_engine(CONFIG, slots=2, size=512, chunk=8)
  state = eng.init()
  for slots in ((0,), (0, 1)):
    state = eng.append(variables, state, dict.fromkeys(slots, np.ones(129, np.int32)))
    state, _ = run_turn(eng, variables, state, slots)
  state = eng.rewind(state, {0: 1, 1: 1})
  programs = [eng.decode_program, *(program for _, program in eng.append_programs)]
  before = [p._cache_size() for p in programs]
  rng = np.random.default_rng(0)
  for turn in range(6):
    ids = rng.integers(0, 60, rng.integers(1, 140 if turn < 2 else 32)).astype(np.int32)
    state = eng.append(variables, state, {0: ids, 1: ids[:3]} if turn % 3 else {1: ids})
    state, _ = run_turn(eng, variables, state, [turn % 2], limit=int(rng.integers(1, 8)))
  assert [p._cache_size() for p in programs] == before == [2, 2, 2]
  assert eng.append_program._cache_size() == 0


@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 130, 200])
def test_appending_in_chunks_is_appending_at_once(variables, length):
  """A token lost or doubled where two chunks meet would be another conversation."""
  rng = np.random.default_rng(length)
  pieces = {n: rng.integers(0, 60, size).astype(np.int32) for n, size in ((0, length), (2, 19))}
  first = {0: np.array([4, 5], np.int32), 1: np.array([6], np.int32)}
  eng = chunked()
  whole = dataclasses.replace(eng, append_programs=())
  results = []
  for one in (eng, whole):
    state = one.append(variables, one.append(variables, one.init(), first), pieces)
    lengths, tokens = np.asarray(state.length), np.asarray(state.tokens)
    results.append((lengths, [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]))
    results[-1] += (eng.decode(variables, state, {0: 4, 2: 4}, SEEDS, (), 1.0)[1],)
  (lengths, tokens, out), (lengths_w, tokens_w, out_w) = results
  assert lengths.tolist() == lengths_w.tolist() == [2 + length, 1, 19, 0]
  assert tokens == tokens_w
  np.testing.assert_array_equal(out.tokens, out_w.tokens)
  np.testing.assert_allclose(out.logprobs, out_w.logprobs, atol=5e-5)


SEEDS = {n: np.array([n, 1], np.uint32) for n in range(8)}


@functools.cache
def chunked():
  return engine.make_engine(CONFIG, slots=4, size=256, chunk=8)


def test_a_call_that_leaves_early_gives_the_same_tokens(variables):
  """What is left goes on with the keys of its positions; half of the slots end a call."""
  prompts = {s: np.arange(3 + s, dtype=np.int32) for s in range(8)}
  limits = {s: 1 + s for s in range(8)}
  found, calls = [], []
  for leave in (1.0, 0.5):
    eng = engine.make_engine(CONFIG, slots=8, size=64, chunk=8, leave=leave)
    state = eng.append(variables, eng.init(), prompts)
    left, tokens, counts = dict(limits), {s: [] for s in limits}, []
    while left:
      state, out = eng.decode(variables, state, left, {s: SEEDS[s] for s in left}, (), 1.0)
      for s in list(left):
        tokens[s] += list(zip(out.tokens[s], out.logprobs[s], strict=True))[: out.count[s]]
        left[s] -= int(out.count[s])
        if not left[s]:
          del left[s]
      counts.append(out.count.tolist())
    found.append(tokens)
    calls.append(counts)
  assert calls[0] == [[1, 2, 3, 4, 5, 6, 7, 8]]
  assert calls[1] == [
    [1, 2, 3, 4, 4, 4, 4, 4],
    [0] * 4 + [1, 2, 2, 2],
    [0] * 6 + [1, 1],
    [0] * 7 + [1],
  ]
  for s in limits:
    ids, logprobs = zip(*found[0][s], strict=True)
    ids_e, logprobs_e = zip(*found[1][s], strict=True)
    assert ids == ids_e
    np.testing.assert_allclose(logprobs, logprobs_e, atol=5e-5)


def test_restrict_literals():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
  assert np.isfinite(sampling.restrict(logits, 2, 1.0)).tolist() == [[True, True, False, False]]
  assert np.isfinite(sampling.restrict(logits, 0, 0.6)).tolist() == [[True, True, False, False]]
  assert np.isfinite(sampling.restrict(logits, 0, 0.01)).tolist() == [[True, False, False, False]]
  assert np.isfinite(sampling.restrict(logits, 0, 1.0)).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.7)])
def test_sample_frequencies_and_logprobs(top_k, top_p):
  """Frequencies of 20,000 draws match exp(log-prob), temperature and restriction included."""
  probs = np.array([0.4, 0.3, 0.2, 0.07, 0.03])
  n, temperature = 20000, 0.7
  logits = jnp.broadcast_to(jnp.log(probs), (n, 5))
  keys = jax.random.split(jax.random.key(1), n)
  draw = jax.jit(functools.partial(sampling.sample, top_k=top_k, top_p=top_p))
  tokens, logprobs = map(np.asarray, draw(logits, keys, jnp.float32(temperature)))
  tempered = probs ** (1 / temperature)
  tempered /= tempered.sum()
  kept = tempered.copy()
  if top_k:
    kept[3:] = 0
  elif top_p < 1:
    kept[2:] = 0  # tempered mass: .51, .34, ...: the nucleus of .7 holds two
  kept /= kept.sum()
  np.testing.assert_allclose(np.bincount(tokens, minlength=5) / n, kept, atol=0.015)
  np.testing.assert_allclose(np.exp(logprobs), kept[tokens], atol=1e-5)


def test_few_slots_take_programs_of_their_own_with_the_same_results(variables):
  """A call for a few of the slots computes only those, and leaves the others as they were."""
  eng = engine.make_engine(CONFIG, slots=8, size=64, chunk=8)
  assert eng.buckets == (1, 2, 4)
  wide = dataclasses.replace(eng, buckets=())
  prompts = {s: np.arange(3 + s, dtype=np.int32) for s in range(8)}
  results = []
  for one in (eng, wide):
    state = one.append(variables, one.init(), prompts)
    state, _ = run_turn(one, variables, state, [7], salt=1, stop=())
    state = one.append(variables, state, {5: np.array([3, 4], np.int32)})
    state, out = run_turn(one, variables, state, [1, 5], salt=2, stop=())
    assert out.count.tolist() == [0, 8, 0, 0, 0, 8, 0, 0]
    state, everything = run_turn(one, variables, state, range(8), limit=4, salt=3, stop=())
    results.append((np.asarray(state.length), np.asarray(state.tokens), out, everything))
  (length, tokens, out, everything), (length_w, tokens_w, out_w, everything_w) = results
  assert length.tolist() == length_w.tolist()
  for s, n in enumerate(length):
    assert tokens[s, :n].tolist() == tokens_w[s, :n].tolist()
  np.testing.assert_array_equal(out.tokens, out_w.tokens)
  np.testing.assert_allclose(out.logprobs, out_w.logprobs, atol=5e-5)
  np.testing.assert_allclose(everything.logprobs, everything_w.logprobs, atol=5e-5)
