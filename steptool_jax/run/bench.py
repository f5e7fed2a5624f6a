"""--mode=bench: how fast the update and the engine are, as ratios measured in one process.

update   useful FLOP/s of an optimizer step over the float32 matrix-product rate on the same sizes
engine   tokens/s of multi-turn decoding over the same model that prefills its history every turn
packing  padding of packed batches on the lengths of the configured environment's demonstrations
"""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from steptool_jax.config import Config
from steptool_jax.learning import batching, steptable
from steptool_jax.learning.programs import learners, update
from steptool_jax.policy import engine as engine_lib
from steptool_jax.policy import families, lora, model
from steptool_jax.rollout.replaying import replay_actions
from steptool_jax.run.parts import opening
from steptool_jax.run.training import setup
from steptool_jax.run.workdir import outputs
from steptool_jax.types import TRUNCATED, Finish, Status, Step, Trajectory

# The decoder that update and engine run.
ARCHITECTURE = model.ModelConfig(
  family="llama",
  vocab_size=2048,
  hidden_size=768,
  intermediate_size=2048,
  num_layers=4,
  num_heads=12,
  num_kv_heads=12,
  head_dim=64,
  tie_embeddings=True,
  max_position_embeddings=2048,
)
TRAJECTORIES, TOKENS = 8, 512  # of the update's batch, and of each
SLOTS, TURNS = 16, 6  # of the engine's workload
PROMPT, OBSERVATIONS, ANSWER = 256, (17, 60), 16  # its tokens
PACKED = 400  # demonstrations whose packing is measured


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Measures, logs and returns the summary."""
  with opening.open_parts(config, workdir, opening.Stop()) as parts:
    padding = _packing(parts)
    single = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), parts.mesh.axis_names)
  with jax.set_mesh(single):
    summary = {"device": jax.devices()[0].device_kind}
    summary |= _update(config) | _engine(config.bench.repeats)
  summary |= {"padding_share": padding, "peak_rss_gib": outputs.peak_rss_gib()}
  return outputs.write_summary(workdir, "bench", summary)


def _median(action: Callable[[], Any], repeats: int) -> float:
  """Seconds of the median repetition; the first one, which compiles, is not counted."""
  jax.block_until_ready(action())
  seconds = []
  for _ in range(repeats):
    started = time.perf_counter()
    jax.block_until_ready(action())
    seconds.append(time.perf_counter() - started)
  return statistics.median(seconds)


# --- update ---


def _update(config: Config) -> dict[str, Any]:
  repeats = config.bench.repeats
  learner = setup.build_learner(config, ARCHITECTURE, "steptool")
  params = model.init_params(ARCHITECTURE, jax.random.key(0))
  state = learners.init_state(learner, *lora.split_variables({"params": params}))
  parameters = sum(x.size for x in jax.tree.leaves(params))
  packed = make_batch()
  batch, table = (
    jax.tree.map(lambda x: jnp.asarray(x)[None], part)
    for part in (packed.batch, steptable.build(packed))
  )
  prepare, step = update.compile_programs(learner)
  prepared, _ = prepare(state, batch, 1, table if learner.fits is not None else None)

  def action():
    nonlocal state
    state, metrics = step(state, prepared, 1)
    return metrics

  rate_before = _matmul_rate(repeats)
  seconds = _median(action, repeats)
  rate = (rate_before + _matmul_rate(repeats)) / 2  # the machine's mood, on both sides
  tokens = int((packed.batch.segment_ids > 0).sum())
  actions = int(packed.batch.action_mask.sum())
  head = 2.0 * ARCHITECTURE.hidden_size * ARCHITECTURE.vocab_size
  body = families.useful_flops(ARCHITECTURE, context=TOKENS / 2) - head
  flops = 3.0 * (tokens * body + actions * head)
  logging.info("update: %.0f GFLOP/s, matrix products %.0f", flops / seconds / 1e9, rate / 1e9)
  return {
    "update_parameters": parameters,
    "update_seconds": seconds,
    "update_gflops": flops / seconds / 1e9,
    "matmul_gflops": rate / 1e9,
    "update_over_matmul": flops / seconds / rate,
    "update_tokens_per_second": tokens / seconds,
  }


def make_batch() -> batching.Packed:
  """The update's batch, packed: each of its rows is one trajectory."""
  rng = np.random.default_rng(0)
  return batching.pack([_make_trajectory(rng) for _ in range(TRAJECTORIES)], TOKENS)


def _make_trajectory(rng: np.random.Generator) -> Trajectory:
  """TOKENS packed tokens: a prompt, then steps of 24 sampled and 40 observed tokens."""

  def ids(n: int) -> np.ndarray:
    return rng.integers(0, ARCHITECTURE.vocab_size, n).astype(np.int32)

  prompt, steps = ids(TOKENS // 4), []
  room = TOKENS + 1 - len(prompt)
  while room > 0:
    sampled = min(24, room)
    observed = min(40, room - sampled)
    room -= sampled + observed
    steps.append(
      Step(ids(sampled), np.full(sampled, -1.0, np.float32), Finish(""), None, ids(observed))
    )
  last = dataclasses.replace(steps[-1], observation_tokens=ids(0), reward=1.0)
  trajectory = Trajectory("bench", 0, prompt, (*steps[:-1], last), Status.ANSWERED)
  missing = TOKENS - batching.packed_length(trajectory)
  return dataclasses.replace(trajectory, prompt_tokens=np.append(prompt, ids(missing)))


def _matmul_rate(repeats: int) -> float:
  """FLOP/s of the products of one layer, forward and both gradients, and nothing else."""
  rows, a = TRAJECTORIES * TOKENS, ARCHITECTURE
  sizes = [
    (a.hidden_size, a.num_heads * a.head_dim),
    (a.hidden_size, a.num_kv_heads * a.head_dim),
    (a.hidden_size, a.intermediate_size),
    (a.intermediate_size, a.hidden_size),
  ]
  seconds = flops = 0.0
  for inner, outer in sizes:
    x, w, y = jnp.ones((rows, inner)), jnp.ones((inner, outer)), jnp.ones((rows, outer))
    for product, left, right in (
      (lambda p, q: p @ q, x, w),
      (lambda p, q: p @ q.T, y, w),
      (lambda p, q: p.T @ q, x, y),
    ):
      program = jax.jit(product)
      seconds += _median(lambda f=program, p=left, q=right: f(p, q), repeats)
      flops += 2.0 * rows * inner * outer
  return flops / seconds


# --- engine ---


def _engine(repeats: int) -> dict[str, Any]:
  variables = {"params": model.init_params(ARCHITECTURE, jax.random.key(0))}
  size = PROMPT + TURNS * (OBSERVATIONS[1] + ANSWER) + ANSWER
  engine = engine_lib.make_engine(ARCHITECTURE, SLOTS, size, ANSWER)
  seeds = {slot: np.array([slot, 1], np.uint32) for slot in range(SLOTS)}

  def turn(state, pieces, answer):
    state = engine.append(variables, state, pieces)
    return engine.decode(variables, state, dict.fromkeys(pieces, answer), seeds, (), 1.0)

  def workload(live: bool, seed: int) -> tuple[int, list[float]]:
    """Sampled tokens and the seconds of each turn; not live: the history is prefilled anew."""
    rng = np.random.default_rng(seed)
    state = engine.init()
    history = {slot: np.zeros(0, np.int32) for slot in range(SLOTS)}
    tokens, seconds = 0, []
    for k in range(TURNS):
      new = {}
      for slot in range(SLOTS):
        length = PROMPT if k == 0 else int(rng.integers(*OBSERVATIONS))
        new[slot] = rng.integers(0, ARCHITECTURE.vocab_size, length).astype(np.int32)
      answer = int(rng.integers(ANSWER // 2, ANSWER + 1))
      started = time.perf_counter()
      pieces = new
      if not live:
        pieces = {slot: np.concatenate([history[slot], new[slot]]) for slot in new}
        state = engine.rewind(state, dict.fromkeys(pieces, 0))
      state, decoded = turn(state, pieces, answer)
      seconds.append(time.perf_counter() - started)
      for slot in range(SLOTS):
        sampled = decoded.tokens[slot, : decoded.count[slot]]
        history[slot] = np.concatenate([history[slot], new[slot], sampled])
        tokens += len(sampled)
    return tokens, seconds

  appends = [program for _, program in engine.append_programs] or [engine.append_program]
  programs = (*appends, engine.decode_program, engine.rewind_program)
  for seed in range(3):  # all power-of-two chunks
    workload(True, seed)
    workload(False, seed)
  before = sum(p._cache_size() for p in programs)
  live, again = [], []
  for seed in range(3, 3 + repeats):  # interleaved, so that the machine's mood hits both
    live.append(workload(True, seed))
    again.append(workload(False, seed))
  compilations = sum(p._cache_size() for p in programs) - before

  def rate(runs):
    return statistics.median(tokens / sum(seconds) for tokens, seconds in runs)

  per_turn = np.median([seconds for _, seconds in live], axis=0)
  later = per_turn[1:]
  return {
    "engine_tokens_per_second": rate(live),
    "engine_over_reprefill": rate(live) / rate(again),
    "engine_compilations_after_warm_up": compilations,
    "engine_turn_seconds": [float(s) for s in per_turn],
    "engine_last_turn_over_second": float(later[-1] / later[0]),
  }


# --- packing ---


def _packing(parts: opening.Parts) -> float:
  trajectories = [
    replay_actions(
      *(parts.environment, task, task.demonstration, parts.policy.chat_format, parts.limits),
      runner=parts.runner,
    )
    for task in parts.environment.tasks("train")[:PACKED]
    if task.demonstration
  ]
  kept = [t for t in trajectories if t.status not in TRUNCATED]
  return batching.padding_share(batching.pack(kept, parts.config.train.row_tokens).batch)
