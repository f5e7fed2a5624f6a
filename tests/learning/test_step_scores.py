r"""The reward model's programs: loss at step ends, exact sums, packing, and eight fake devices."""

import dataclasses
import functools
import sys

import numpy as np


def _trajectories(count=10):
  import fakes

  from steptool_jax.types import Finish, ToolCall

  rng = np.random.default_rng(0)
  made = []
  for _ in range(count):
    t = fakes.random_trajectory(rng)
    last = len(t.steps) - 1
    steps = [
      dataclasses.replace(
        s,
        action=Finish("x") if k == last and not t.truncated else ToolCall("f", {}),
        success_calling=float(rng.uniform()),
        contribution=float(rng.uniform()),
      )
      for k, s in enumerate(t.steps)
    ]
    made.append(dataclasses.replace(t, steps=tuple(steps), solved=float(rng.integers(3) / 2)))
  return made


@functools.cache
def _policy():
  import fakes
  import jax

  from steptool_jax.policy import model

  config = fakes.tiny_config(vocab_size=64)
  return config, model.init_params(config, jax.random.key(0))


def _heads():
  rng = np.random.default_rng(1)
  return {
    "kernel": rng.normal(0, 0.3, (32, 3)).astype(np.float32),
    "bias": rng.normal(0, 1, 3).astype(np.float32),
  }


def _updated(trajectories, rows, micro_rows, mesh):
  """(trunk and heads after one step of plain SGD, metrics)."""
  import jax
  import optax

  from steptool_jax.learning import reward_model
  from steptool_jax.policy import lora, sharding
  from steptool_jax.run.parts import reward_models

  config, params = _policy()
  optimizer = optax.sgd(1.0)
  trainable, frozen = lora.split_variables({"params": params}, train_values=False)
  with jax.set_mesh(mesh):

    def make(trainable, frozen):
      state = reward_model.init_state(optimizer, config.hidden_size, trainable, frozen)
      return state._replace(trainable=state.trainable | {"reward_heads": _heads()})

    layout = sharding.shardings(jax.eval_shape(make, trainable, frozen), mesh)
    state = jax.jit(make, out_shardings=layout)(trainable, frozen)
    batch, _ = reward_models.pack(trajectories, 64, labelled=True)
    on_device, count = reward_models.to_device(batch, micro_rows, rows // micro_rows, mesh)
    step = jax.jit(functools.partial(reward_model.update, config, optimizer))
    state, metrics = step(state, on_device, count)
    return jax.device_get((state.trainable, metrics))


def _close(mine, theirs):
  import jax

  for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


def _one_device():
  import jax

  from steptool_jax.policy import sharding

  return sharding.make_mesh(1, 1, 1, jax.devices()[:1])


def test_loss_by_hand():
  """z = 0: log 2 whatever the label; z = log 3, y = .25: -(.25 log .75 + .75 log .25)."""
  import jax.numpy as jnp

  from steptool_jax.learning import reward_model

  z = jnp.array([[[0.0, np.log(3.0), np.inf], [0.0, 5.0, 1.0]]])
  y = jnp.array([[[1.0, 0.25, 0.0], [0.3, 0.0, 0.0]]])
  w = jnp.array([[[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]])
  sums, counts = reward_model.losses(z, y, w)
  one = -(0.25 * np.log(0.75) + 0.75 * np.log(0.25))
  np.testing.assert_allclose(sums, [2 * np.log(2.0), one, 0.0], rtol=1e-6)
  assert counts.tolist() == [2.0, 1.0, 0.0]


def test_the_loss_is_that_of_each_trajectory_alone():
  """Packed and in micro-batches: what one trajectory says must not depend on its neighbours, nor a
  head's mean on where the labels lie. Each alone, in NumPy, from hidden states at step ends."""
  import jax.numpy as jnp

  from steptool_jax.policy import model
  from steptool_jax.rewards.model import ends, ids, labels

  trajectories = _trajectories()
  _, metrics = _updated(trajectories, 8, 2, _one_device())
  config, params = _policy()
  heads = {name: np.asarray(x, np.float64) for name, x in _heads().items()}
  total, count = np.zeros(3), np.zeros(3)
  for t in trajectories:
    tokens = np.zeros((1, 64), np.int32)  # one shape, one compilation
    tokens[0, : t.num_tokens] = ids(t)
    inside = (np.arange(64) < t.num_tokens).astype(np.int32)[None]
    hidden = model.forward(
      config, {"params": params}, jnp.array(tokens), jnp.arange(64)[None], jnp.array(inside)
    )
    z = np.asarray(hidden, np.float64)[0, ends(t)] @ heads["kernel"] + heads["bias"]
    y, there = labels(t)
    p = 1 / (1 + np.exp(-z))
    total += (-(y * np.log(p) + (1 - y) * np.log(1 - p)) * there).sum(0)
    count += there.sum(0)
  wanted = total / count
  names = ("success_calling_loss", "contribution_loss", "solved_loss")
  np.testing.assert_allclose([metrics[n] for n in names], wanted, atol=1e-5)
  np.testing.assert_allclose(metrics["loss"], wanted.sum(), atol=1e-5)
  assert metrics["skipped"] == 0


def test_micro_batches_are_one_batch():
  """A mean of means would weigh the labels of a short micro-batch more."""
  trajectories = _trajectories()
  _close(
    _updated(trajectories, 8, 2, _one_device())[0], _updated(trajectories, 8, 8, _one_device())[0]
  )


def test_what_is_not_finite_is_skipped():
  """One NaN label would end in every weight."""
  bad = _trajectories()
  bad[3] = dataclasses.replace(bad[3], solved=float("nan"))
  state, metrics = _updated(bad, 8, 2, _one_device())
  assert metrics["skipped"] == 1
  assert np.array_equal(state["reward_heads"]["kernel"], _heads()["kernel"])


def test_scores_come_back_in_order():
  """Rows are filled by length: a trajectory must not get its neighbour's scores."""
  import jax

  from steptool_jax.run.parts import reward_models

  trajectories, mesh = _trajectories(), _one_device()
  config, params = _policy()
  with jax.set_mesh(mesh):
    score = functools.partial(
      reward_models.score,
      *(config, {"params": params}, _heads()),
      row_tokens=64,
      micro_rows=2,
      most=6,
      mesh=mesh,
    )
    together = score(trajectories)
    for t, found in zip(trajectories, together, strict=True):
      assert found.shape == (len(t.steps), 3)
      np.testing.assert_allclose(found, score([t])[0], atol=1e-5)


def test_eight_devices_equal_one():
  """Mesh 2x2x2 learns and scores what one device does: the rules of sharding know the heads."""
  import fakes

  assert fakes.on_devices(8, __file__).stdout.split() == ["equal"]


if __name__ == "__main__":
  from steptool_jax.policy import sharding

  sys.path.insert(0, "tests")
  trajectories_ = _trajectories()
  _close(
    _updated(trajectories_, 8, 4, sharding.make_mesh(2, 2, 2))[0],
    _updated(trajectories_, 8, 4, _one_device())[0],
  )
  print("equal")
