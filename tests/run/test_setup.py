"""The optimizers of a run: rates, and what they store; and what its batches are worth at a cut."""

import dataclasses

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from steptool_jax.config import Optimizer
from steptool_jax.policy import sharding
from steptool_jax.run.training import phase, setup
from steptool_jax.types import TRUNCATED, Status


@pytest.mark.parametrize(
  ("schedule", "at_6"),
  [("constant", 2.0), ("linear", 1.2), ("cosine", 1.2)],  # half way from 2 down to 0.2 * 2
)
def test_a_rate_warms_up_and_falls_to_its_floor(schedule, at_6):
  optimizer = Optimizer(learning_rate=2.0, schedule=schedule, floor=0.2, warmup=0.2)
  rates = setup._schedule(optimizer, optimizer.learning_rate, total_steps=10)
  np.testing.assert_allclose([rates(0), rates(1), rates(2)], [1.0, 2.0, 2.0], rtol=1e-6)
  np.testing.assert_allclose(rates(6), at_6, rtol=1e-6)
  end = 2.0 if schedule == "constant" else 0.4
  np.testing.assert_allclose([rates(10), rates(12)], [end, end], rtol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"muon_rate": 0.1}])
def test_a_critics_heads_learn_at_their_own_rate(fields):
  heads = {"value_head": {"kernel": jnp.ones((2, 1))}}
  params = {
    "params": {"layers": {"q": {"kernel": jnp.ones((1, 2, 2))}}} | heads,
    "critic": {"q1": {"kernel": jnp.ones((2, 1))}},
  }
  found = []
  for rate in (1.0, 8.0):
    optimizer = setup.build_optimizer(Optimizer(learning_rate=0.5, **fields), 10, rate)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    found.append(updates)
  plain, faster = found
  expected = jax.tree_util.tree_map_with_path(
    lambda path, x: x * (1 if "layers" in str(path) else 8), plain
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), faster, expected)
  if not fields:  # AdamW's first step is the rate
    np.testing.assert_allclose(faster["critic"]["q1"]["kernel"], -8 * 0.5, rtol=1e-4)


def test_the_first_moment_can_be_bfloat16():
  """Stored in half the memory; the second moment and the weights stay as they are."""
  weights = {"w": jnp.ones((4, 4))}
  for muon_rate in (0.0, 1e-2):
    optimizer = setup.build_optimizer(Optimizer(first_moment="bfloat16", muon_rate=muon_rate), 10)
    state = optimizer.init(weights)
    updates, state = optimizer.update({"w": jnp.full((4, 4), 1e-3)}, state, weights)
    dtypes = {
      ".".join(str(k) for k in path): x.dtype
      for path, x in jax.tree_util.tree_leaves_with_path(state)
      if x.shape == (4, 4)
    }
    assert sorted(map(str, dtypes.values())) == ["bfloat16", "float32"], dtypes
    assert updates["w"].dtype == jnp.float32


@pytest.mark.parametrize("algorithm", ["steptool", "archer"])
def test_the_config_says_which_spent_budgets_bootstrap(algorithm):
  """A field that the packing of a run does not read would leave all cuts worth 0."""
  rng = np.random.default_rng(0)
  cuts = [fakes.random_trajectory(rng, status=status) for status in sorted(TRUNCATED)]
  for bootstrap in ((), ("step_budget",), ("token_budget",)):
    config = tiny.make(algorithm=algorithm, advantage__bootstrap=bootstrap)
    batches = [setup.pack(config, [cut], (), 0)[0].batch for cut in cuts]
    found = tuple(
      cut.status.value for cut, b in zip(cuts, batches, strict=True) if b.bootstrap.any()
    )
    assert found == bootstrap
  with pytest.raises(ValueError, match=r"advantage\.bootstrap: .*'steps'.*'step_budget'"):
    tiny.make(advantage__bootstrap=("steps",))


def segmented(count: int):
  """Trajectories with a prompt of its own at every second step."""
  rng = np.random.default_rng(0)
  found = []
  for _ in range(count):
    t = fakes.random_trajectory(rng, status=Status.ANSWERED)
    own = np.arange(5, 9, dtype=np.int32)
    steps = [
      dataclasses.replace(s, prompt_tokens=own) if k % 2 else s for k, s in enumerate(t.steps)
    ]
    found.append(dataclasses.replace(t, steps=tuple(steps)))
  return found


def test_an_agent_that_changes_history_meets_its_algorithms_refusal():
  """No config told of it: the first such batch does, in words, and before it is half learnt."""
  config = tiny.make(algorithm="gspo")
  with pytest.raises(ValueError, match=r"config\.loss\.ratio.*history was changed.*use 'step'"):
    setup.pack(config, segmented(6), [], 0)
  packed, _ = setup.pack(tiny.make(algorithm="grpo"), segmented(6), [], 0)
  assert packed.batch.trajectory_ids.max() == 6


def test_segments_find_room_that_follows_from_the_batch_alone():
  """More rows than conversations; a width that went by the batches before would resume otherwise.
  Padding rows must have the fields of the rows that they pad."""
  assert [phase._room(needed, 3) for needed in (0, 3, 4, 7, 13)] == [3, 3, 6, 12, 24]
  packed, _ = setup.pack(tiny.make(), segmented(6), [], 0, segmented=True)
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  on_device = setup.to_device(packed.batch, 2, 4, mesh)
  assert {x.shape for x in jax.tree.leaves(on_device)} == {(4, 2, 320)}
  assert int(on_device.part_ids.max()) == sum(len(t.parts) for t in packed.trajectories)
