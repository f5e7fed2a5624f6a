r"""8 fake devices (mesh 2x2x2) prepare and update as one device does: groups, pairs, critic.

Every algorithm of the table, by hand:

    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 PJRT_NPROC=32 \
      PYTHONPATH=.:tests:tests/learning python tests/learning/test_sharded.py all
"""

import functools
import sys

import numpy as np

KINDS = ("grpo", "eto", "archer", "ridge", "recorded")


def test_eight_devices_equal_one():
  import fakes

  assert fakes.on_devices(8, __file__, *KINDS).stdout.split() == list(KINDS)


def _batch(name):
  import fakes
  import samples

  from steptool_jax.learning import batching
  from steptool_jax.learning.selection import PAIRS
  from steptool_jax.types import TRUNCATED

  trajectories, _ = samples.random_samples(3, tasks=8)
  if name == "eto":
    solved = [_solved(t, n % 2) for n, t in enumerate(trajectories)]
    return fakes.padded(batching.pack_units(PAIRS.pick(solved), 40), 8)
  if name in ("ridge", "recorded"):
    return fakes.padded(batching.pack(trajectories, 40, TRUNCATED), 8)
  units = [(t,) for t in trajectories]
  if name == "archer":
    past = trajectories[12:]
    packed = batching.pack_units(units[:12], 40, replayed=past, whole_actions=True)
    return fakes.padded(packed, 8)
  return fakes.padded(batching.pack_units(units, 40), 8)


def _table(name):
  """The step table of the batch of a critic in closed form."""
  import fakes
  import samples

  from steptool_jax.learning import batching
  from steptool_jax.types import TRUNCATED

  if name not in ("ridge", "recorded"):
    return None
  trajectories, _ = samples.random_samples(3, tasks=8)
  packed = batching.pack(trajectories, 40, TRUNCATED)
  return fakes.padded_table(packed, 8)


def _recorded(name):
  """Hidden states [R, K, D] of the table's entries, as if an engine had recorded them."""
  if name != "recorded":
    return None
  table = _table(name)
  hidden = np.random.default_rng(0).normal(size=(*table.position.shape, 32)).astype(np.float32)
  return np.where(table.position[..., None] >= 0, hidden, 0.0).astype(np.float32)


def _solved(trajectory, solved):
  import dataclasses

  return dataclasses.replace(trajectory, solved=float(solved))


def _updated(name, mesh):
  """(the updated policy and critic, advantages or None) after one step of plain SGD."""
  import fakes
  import jax
  import optax

  from steptool_jax.config import Config, Critic, Loss, Rollout
  from steptool_jax.learning import algorithms
  from steptool_jax.learning.programs import learners, update
  from steptool_jax.policy import lora, model, sharding

  fitted = name in ("ridge", "recorded")
  row = algorithms.get_algorithm("steptool" if fitted else name)
  config = fakes.tiny_config(vocab_size=64)
  kind = "ridge" if fitted else ""
  loss = Loss(value_coef=1.0, kl_coef=0.1, logprob_chunk=16)
  # Any log-probs are close enough: what is recorded is taken.
  rollout = Rollout(reuse=100.0 if name == "recorded" else 0.0)
  settings = Config(loss=loss, critic=Critic(kind=kind), rollout=rollout)
  learner = learners.Learner(
    model=config,
    algorithm=row,
    config=algorithms.resolve(row, settings),
    optimizer=optax.sgd(1.0),
  )
  with jax.set_mesh(mesh):
    params = model.init_params(config, jax.random.key(0))
    split = lora.split_variables({"params": params}, train_values=False)
    make = functools.partial(learners.init_state, learner)
    layout = sharding.shardings(jax.eval_shape(make, *split), mesh)
    state = jax.jit(make, out_shardings=layout)(*split)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, sharding.ROWS))
    batch, table, recorded = jax.tree.map(
      lambda x: jax.device_put(x.reshape(-1, 4, *x.shape[1:]), rows),
      (_batch(name), _table(name), _recorded(name)),
    )
    count = batch.tokens.shape[0]
    prepare, step = update.compile_programs(learner)
    prepared, _ = prepare(state, batch, count, table, recorded)
    signal = jax.device_get(prepared.advantages)
    new, _ = step(state, prepared, count)
    if mesh.size > 1:
      kernel = new.trainable["params"]["layers"]["up"]["kernel"]
      assert kernel.addressable_shards[0].data.shape == (2, 16, 24), "not sharded"
    return jax.device_get((new.trainable, new.target)), signal, jax.device_get(params)


def _main(names):
  import jax

  from steptool_jax.learning import algorithms
  from steptool_jax.policy import sharding

  assert jax.device_count() == 8
  for name in algorithms.ALGORITHMS if names == ["all"] else names:
    one = _updated(name, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    eight = _updated(name, sharding.make_mesh(2, 2, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, eight)
    moved = np.abs(one[0][0]["params"]["embed"]["embedding"] - one[2]["embed"]["embedding"]).max()
    assert moved > 1e-3, "an empty comparison"
    print(name, flush=True)


if __name__ == "__main__":
  _main(sys.argv[1:])
