"""Non-finite numbers from the sampler, Eq. 2 in training, and groups that are left out."""

import dataclasses

import numpy as np
import pytest
import tiny
from scripted import bare_phase, scripted

from steptool_jax.run.parts import rollouts
from steptool_jax.types import Status

PRICES = {"environment__market__prices": True}


def test_log_probs_of_the_sampler_that_are_not_finite_skip_the_update(tmp_path):
  with scripted(tiny.make(train__max_skipped=3), tmp_path) as iterations:
    decode = iterations.parts.engine.decode

    def broken(*args):
      state, decoded = decode(*args)
      decoded.logprobs[0, 1] = np.nan
      return state, decoded

    iterations.parts.engine.decode = broken
    assert iterations.run() == iterations.run() == {"skipped": 1.0}
    with pytest.raises(
      RuntimeError, match=r"3 updates .* because of .*sampler's log-probs are not"
    ):
      iterations.run()
    assert iterations.learnt == []
    assert iterations.phase.progress.skipped == 3
    iterations.parts.engine.decode = decode
    iterations.run()
  assert len(iterations.learnt) == 8


def test_a_finite_update_ends_a_row_of_skipped_ones():
  guard = bare_phase(tiny.make(train__max_skipped=2))
  for skipped in (True, False, True, False):
    guard.count_skipped(skipped, "x")
  guard.count_skipped(True, "x")
  assert guard.progress.skipped == 3
  with pytest.raises(RuntimeError, match="2 updates in a row were skipped, .* because of x"):
    guard.count_skipped(True, "x")


# --- Eq. 2 and filters after the rollout ---


@pytest.mark.parametrize(
  ("algorithm", "scheme"), [("ppo", "orchestra"), ("steptool", "orchestra_steps")]
)
def test_eq_2_is_paid_for_the_last_step_in_training(algorithm, scheme, tmp_path):
  """Latencies 10 and 20, equal outcome and cost: 1.0 and 0.0, times the weight."""
  config = tiny.make(
    algorithm=algorithm,
    rewards__scheme=scheme,
    rewards__shaping="sum",
    rewards__orchestra__latency=0.8,
    **PRICES,
  )
  costs = {0: (0.5, 10.0), 1: (0.5, 20.0)}
  with scripted(config, tmp_path, costs=costs) as iterations:
    figures = iterations.run()
    tasks = iterations.parts.environment.tasks("heldout")[:2]
    _, evaluated = rollouts.evaluate_policy(iterations.parts, {}, tasks, "", 1.0)
  learnt = iterations.learnt
  assert [t.steps[-1].reward for t in learnt] == pytest.approx([0.8, 0.0] * 4)
  assert all((t.steps[0].reward > 0) == (algorithm == "steptool") for t in learnt)
  assert figures["reward_latency"] == pytest.approx(0.4)
  assert figures["reward_outcome"] == figures["reward_cost"] == 0.0
  assert figures["latency_per_task"] == 15.0
  assert "reward_solved" not in figures
  # One sample says nothing under Eq. 2: evaluations are paid as ever.
  assert [t.steps[-1].reward for t in evaluated] == [1.0, 1.0]


def test_a_group_with_a_missing_rollout_keeps_its_scale(tmp_path):
  config = tiny.make(
    algorithm="ppo",
    rewards__scheme="orchestra",
    rewards__orchestra__latency=1.0,
    rollout__samples=3,
    **PRICES,
  )
  costs = {0: (0.0, 10.0), 1: (9.0, 90.0), 2: (0.0, 20.0)}
  with scripted(config, tmp_path, {1}, costs) as iterations:
    iterations.run()
  rewards = [(t.sample, t.steps[-1].reward) for t in iterations.learnt]
  assert rewards == [(0, 1.0), (2, 0.0)] * 4


def test_the_users_wish_stands_in_place_of_the_configured_weights(tmp_path):
  config = tiny.make(algorithm="ppo", rewards__scheme="orchestra", **PRICES)
  costs = {0: (0.0, 20.0), 1: (1.0, 10.0)}
  with scripted(config, tmp_path, costs=costs) as iterations:
    tasks = [
      dataclasses.replace(t, metadata={**t.metadata, "preference": {"cost": 1.0, "latency": 0.5}})
      for t in iterations.parts.environment.tasks("train")
    ]
    iterations.parts.environment.tasks = lambda split: tasks
    iterations.run()
  assert [t.steps[-1].reward for t in iterations.learnt] == pytest.approx([1.0, 0.5] * 4)


def test_groups_that_do_not_deviate_reach_no_update(tmp_path):
  config = tiny.make(algorithm="ppo", rewards__filters__min_deviation=0.1)
  with scripted(config, tmp_path) as iterations:
    figures = iterations.run()
  assert iterations.learnt == []
  assert (figures["dropped_even"], figures["pass_rate"]) == (8.0, 1.0)
  assert iterations.phase.progress.tokens == 0
  assert iterations.phase.progress.conversations == 8


def test_the_deviation_is_that_of_eq_2(tmp_path):
  config = tiny.make(
    algorithm="ppo", rewards__scheme="orchestra", rewards__filters__min_deviation=0.1, **PRICES
  )
  costs = {0: (0.0, 10.0), 1: (0.0, 20.0)}
  with scripted(config, tmp_path, costs=costs) as iterations:
    figures = iterations.run()
  assert len(iterations.learnt) == 8
  assert all(t.status is Status.ANSWERED for t in iterations.learnt)
  assert figures["dropped_even"] == 0.0


def test_shares_of_an_iterations_time_add_up(tmp_path):
  with scripted(tiny.make(), tmp_path) as iterations:
    figures = iterations.run()
  shares = [figures[f"{name}_share"] for name in ("host", "device", "tool")]
  assert sum(shares) == pytest.approx(1.0)
  assert min(shares) >= 0
