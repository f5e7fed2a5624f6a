"""steptool_jax: an update (PPO with a value head, or GRPO) and a rollout."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from common import CLIP, GAMMA, KL, LAM, RATE, VALUE_COEF, serve, versions, xla_compilations


def _trajectory(number: int, t: dict) -> Any:
  from steptool_jax import types

  steps = tuple(
    types.Step(
      np.array(s["sampled"], np.int32),
      np.zeros(len(s["sampled"]), np.float32),
      types.Finish(""),
      None,
      np.array(s["observed"], np.int32),
      reward=s["reward"],
    )
    for s in t["steps"]
  )
  prompt = np.array(t["prompt"], np.int32)
  return types.Trajectory(str(t["task"]), number, prompt, steps, types.Status.ANSWERED)


def _config(algorithm: str, epochs: int, row_tokens: int, share: bool) -> Any:
  from configs import steptool_offline
  from steptool_jax.validation import validate

  config = steptool_offline.get_config(algorithm)
  config.model.dtype = config.model.param_dtype = "float32"
  config.model.remat, config.lora.rank, config.data.behaviour = "none", 0, "current"
  config.train.epochs, config.train.micro_rows = epochs, 1
  config.train.row_tokens = config.rollout.max_tokens = row_tokens
  if "share_prompts" in config.train:  # an older checkout (peers.py --before) cannot
    config.train.share_prompts = share
  if algorithm == "grpo":  # as TRL has it: clipped gradients, and no KL
    config.loss.kl, config.train.optimizer.max_grad_norm = "none", 1.0
  config = validate(config)
  loss, advantage = config.loss, config.advantage
  settings = (loss.clip_low, loss.clip_high, config.train.optimizer.learning_rate)
  assert settings == (CLIP, CLIP, RATE), settings
  if algorithm != "grpo":
    settings = (advantage.gamma, advantage.lam, loss.value_coef, loss.kl_coef)
    assert settings == (GAMMA, LAM, VALUE_COEF, KL), settings
  return config


def _row_tokens(trajectories: list, pack: Callable) -> int:
  """Positions in a row, at least those of the longest trajectory: a power of two; for groups the
  multiple of 512, up to 8,192, with which they take the fewest positions."""
  from steptool_jax.learning import batching

  longest = max(batching.packed_length(t) for t in trajectories)
  if len({t.task_id for t in trajectories}) == len(trajectories):
    return 1 << (longest - 1).bit_length()
  sizes = range(-(-longest // 512) * 512, 8193, 512)
  return min(sizes, key=lambda size: pack(trajectories, size).batch.tokens.size)


def update(work: dict, folder: pathlib.Path, algorithm: str, share: bool) -> None:
  """share: a task's samples stand behind their prompt."""
  import jax

  from steptool_jax.learning import batching
  from steptool_jax.learning.programs import update as update_lib
  from steptool_jax.policy.formats import hfconfig, hub
  from steptool_jax.run.training import setup

  trajectories = [_trajectory(n, t) for n, t in enumerate(work["trajectories"])]
  pack = functools.partial(batching.pack, share=True) if share else batching.pack
  epochs, size = work["epochs"], _row_tokens(trajectories, pack)
  config = _config(algorithm, epochs, size, share)
  architecture, _ = hfconfig.load_config(folder / "model")
  variables = {"params": hub.load_params(folder / "model", architecture)}
  learner = setup.build_learner(config, architecture, algorithm, 1)
  prepare, step = update_lib.compile_programs(learner)
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
  state = setup.start_phase(config, mesh, learner, variables)

  def action(repetition: int) -> dict[str, Any]:
    nonlocal state
    batch = pack(trajectories, size).batch
    rows = batch.tokens.shape[0]
    prepared, _ = prepare(state, setup.to_device(batch, 1, len(trajectories), mesh), np.int32(rows))
    every = []
    for epoch in range(epochs):
      for minibatch, count in setup.minibatches(prepared, rows, 1, 1, (0, epoch)):
        state, metrics = step(state, minibatch, np.int32(count))
        every.append(jax.device_get(metrics))
    logprobs = prepared.old_logprobs * prepared.action_mask
    return {
      "logprob": float(logprobs.sum() / batch.action_mask.sum()),
      "grad_norm": [float(m["grad_norm"]) for m in every],
      "rows": list(batch.tokens.shape),
      "padding": float(1 - (batch.segment_ids > 0).mean()),
    }

  with jax.set_mesh(mesh):
    compiled = xla_compilations()
    serve(action, lambda: compiled() | {"versions": versions("jax", "flax")})


def rollout(work: dict, folder: pathlib.Path) -> None:
  from steptool_jax.policy import engine as engine_lib
  from steptool_jax.policy.formats import hfconfig, hub

  config, _ = hfconfig.load_config(folder / "model")
  variables = {"params": hub.load_params(folder / "model", config)}
  slots = len(work["prompts"])
  engine = engine_lib.make_engine(config, slots, work["size"], max(work["answers"]))

  def action(repetition: int) -> dict[str, Any]:
    state, tokens = engine.init(), 0
    seeds = {slot: np.array([repetition, slot], np.uint32) for slot in range(slots)}
    for news, answer in zip(work["turns"], work["answers"], strict=True):
      pieces = {slot: np.array(new, np.int32) for slot, new in enumerate(news)}
      state = engine.append(variables, state, pieces)
      limits = dict.fromkeys(range(slots), answer)
      state, decoded = engine.decode(variables, state, limits, seeds, (), 1.0)
      tokens += int(decoded.count.sum())
    return {"tokens": tokens}

  serve(action, xla_compilations())
