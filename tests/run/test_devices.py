"""8 fake devices (mesh 2x2x2) do what one device does: SFT step, rollout, update; full and LoRA.

LoRA goes without the SFT step, for time, and rolls out on a mesh of its own.
"""

import dataclasses
import pathlib
import sys
import tempfile

import numpy as np
import pytest


# The suite takes adapters, which hold all that full fine-tuning does; its update is test_sharded's.
@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.campaign), "lora"])
def test_eight_devices_equal_one(kind, compiled):
  import fakes

  assert "8 devices agree with 1" in fakes.on_devices(8, __file__, kind, compiled).stdout


def _run(config, workdir, mesh):
  """(parameters and moments after each phase, sampled ids, state, cache) of one SFT step and one RL
  iteration."""
  import jax

  from steptool_jax.run import train
  from steptool_jax.run.parts import build, opening, rollouts
  from steptool_jax.run.training import iteration
  from steptool_jax.run.workdir.checkpoint import Checkpoints

  build.build_mesh = lambda config: mesh
  reward, sampled = rollouts.reward, []

  def recording(parts, tasks, trajectories, scheme="steptool", **options):
    sampled.extend(step.tokens for t in trajectories for step in t.steps)
    return [_paid(t) for t in reward(parts, tasks, trajectories, scheme, **options)]

  rollouts.reward = recording
  workdir.mkdir()
  try:
    with opening.open_parts(config, workdir, opening.Stop()) as parts:
      run = train.Run(parts, Checkpoints(workdir, 1))
      train.warm_up(run)
      after_sft = jax.device_get(run.phase.state.trainable)
      train.enter_rl(run)
      before_rl = jax.device_get(run.phase.state.trainable)
      iteration.run_iteration(parts, run.phase, run.recorder)
      run.checkpoints.close()
      run.writer.close()
      cache = parts.engine.init().cache
      after_rl = jax.device_get(run.phase.state.trainable)
      return after_sft, before_rl, after_rl, sampled, run.phase.state, cache
  finally:
    rollouts.reward = reward


def _paid(trajectory):
  """Rewards what was sampled: a model that knows nothing earns none, and whitening would
  make the rounding noise of the KL penalty the whole signal."""
  steps = tuple(
    dataclasses.replace(step, reward=int(step.tokens.sum()) % 7 / 7) for step in trajectory.steps
  )
  return dataclasses.replace(trajectory, steps=steps)


def _main(kind, compiled):
  import jax
  import tiny

  from steptool_jax.policy import sharding

  assert jax.device_count() == 8
  config = tiny.make(
    "lora" if kind == "lora" else "",
    compilation_cache=compiled,
    sft__steps=1 if kind == "full" else 0,
    train__minibatches=1,
    train__iterations=1,
    rollout__max_steps=3,
  )
  # Adam divides by the gradient's size: where that is rounding noise, so would be the update.
  config = tiny.replace(
    config, train__optimizer__learning_rate=1e-3, sft__optimizer__learning_rate=1e-3
  )
  if kind == "lora":
    config = tiny.replace(config, rollout__max_steps=2, rollout__max_step_tokens=8)
    config = tiny.replace(config, rollout__tensor=-1)
  config = tiny.replace(config, sft__optimizer__eps=1e-3, train__optimizer__eps=1e-3)
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    one = _run(config, folder / "1", sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    eight = _run(config, folder / "8", sharding.make_mesh(2, 2, 2))

  assert len(one[3]) == len(eight[3]) >= 16
  for ours, theirs in zip(one[3], eight[3], strict=True):
    np.testing.assert_array_equal(ours, theirs)
  for phase in range(3):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), eight[phase], one[phase])
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one[1], one[2])
  assert max(jax.tree.leaves(moved)) > 1e-4, "the update moved nothing: an empty comparison"

  # Really sharded: a kernel, its optimizer moment, the slots and heads of the cache.
  state, cache = eight[4], eight[5]
  params = state.frozen["params"] if kind == "lora" else state.trainable["params"]
  kernel = params["layers"]["up"]["kernel"]
  assert kernel.shape == (2, 32, 48)
  assert kernel.addressable_shards[0].data.shape == (2, 16, 24)
  if kind == "full":
    moments = [
      x
      for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
      if sharding.path_string(path).endswith("mu/params/layers/up/kernel")
    ]
    assert [m.addressable_shards[0].data.shape for m in moments] == [(2, 16, 24)]
  assert cache.k.shape == (2, 8, 2, 320, 8)
  assert cache.k.addressable_shards[0].data.shape == (2, 2, 1, 320, 8)
  print("8 devices agree with 1")


if __name__ == "__main__":
  _main(sys.argv[1], sys.argv[2])
