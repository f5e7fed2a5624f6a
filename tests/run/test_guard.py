"""Non-finite numbers from the sampler, Eq. 2 in the trainer, and groups that are left out."""

import dataclasses
import types

import fakes
import numpy as np
import pytest
import tiny
from test_train import scripted

from steptool_jax.run.parts import rollouts
from steptool_jax.run.training import phase
from steptool_jax.run.training.progress import Progress
from steptool_jax.types import Status

PRICES = {"environment__market__prices": True}


def test_log_probs_of_the_sampler_that_are_not_finite_skip_the_update(tmp_path):
  config = tiny.make(train__max_skipped=3)
  trainer, runner = scripted(config, tmp_path, broken=())
  guard = counting(config, trainer.progress)
  trainer.learning.count_skipped = guard.count_skipped
  decode = trainer.parts.engine.decode

  def broken(*args):
    state, decoded = decode(*args)
    decoded.logprobs[0, 1] = np.nan
    return state, decoded

  trainer.parts.engine.decode = broken
  with runner:
    assert trainer._iteration() == trainer._iteration() == {"skipped": 1.0}
    with pytest.raises(
      RuntimeError, match=r"3 updates .* because of .*sampler's log-probs are not"
    ):
      trainer._iteration()
    assert trainer.learnt == []
    assert trainer.progress.skipped == 3
    trainer.parts.engine.decode = decode
    trainer._iteration()
  assert len(trainer.learnt) == 8


def counting(config, progress):
  """A Phase that only counts: without a mesh, a recorder or a state."""
  policy = types.SimpleNamespace(model=fakes.tiny_config())
  return phase.Phase(config, policy, None, None, progress, 1, 8)


def test_a_finite_update_ends_a_row_of_skipped_ones():
  guard = counting(tiny.make(train__max_skipped=2), Progress())
  for skipped in (True, False, True, False):
    guard.count_skipped(skipped, "x")
  guard.count_skipped(True, "x")
  assert guard.progress.skipped == 3
  with pytest.raises(RuntimeError, match="2 updates in a row were skipped, .* because of x"):
    guard.count_skipped(True, "x")


# --- Eq. 2 and filters behind the rollout ---


def costs(trainer, by_sample):
  """Each call of a sample costs and takes what `by_sample` says."""
  inner = trainer.parts.environment

  class Priced:
    name, tasks = inner.name, inner.tasks

    def open(self, task, sample):
      session = inner.open(task, sample)
      call, (cost, latency) = session.call, by_sample[sample]
      session.call = lambda c: dataclasses.replace(call(c), cost=cost, latency=latency)
      return session

  trainer.parts = dataclasses.replace(trainer.parts, environment=Priced())


@pytest.mark.parametrize(
  ("algorithm", "scheme"), [("ppo", "orchestra"), ("steptool", "orchestra_steps")]
)
def test_eq_2_is_paid_for_the_last_step_in_training(algorithm, scheme, tmp_path):
  """Latencies 10 and 20, equal outcome and cost: 1.0 and 0.0, times the weight."""
  config = tiny.make(
    algorithm=algorithm, rewards__scheme=scheme, rewards__orchestra__latency=0.8, **PRICES
  )
  trainer, runner = scripted(config, tmp_path, broken=())
  costs(trainer, {0: (0.5, 10.0), 1: (0.5, 20.0)})
  with runner:
    figures = trainer._iteration()
    task = trainer.parts.environment.tasks("train")[0]
    evaluated, _ = rollouts.collect(
      trainer.parts, {}, [(task, 0), (task, 1)], rollouts.EVALUATION, 1.0, ""
    )
  assert [t.steps[-1].reward for t in trainer.learnt] == pytest.approx([0.8, 0.0] * 4)
  assert all((t.steps[0].reward > 0) == (algorithm == "steptool") for t in trainer.learnt)
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
  trainer, runner = scripted(config, tmp_path, broken={1})
  costs(trainer, {0: (0.0, 10.0), 1: (9.0, 90.0), 2: (0.0, 20.0)})
  with runner:
    trainer._iteration()
  assert [(t.sample, t.steps[-1].reward) for t in trainer.learnt] == [(0, 1.0), (2, 0.0)] * 4


def test_the_users_wish_stands_in_place_of_the_configured_weights(tmp_path):
  config = tiny.make(algorithm="ppo", rewards__scheme="orchestra", **PRICES)
  trainer, runner = scripted(config, tmp_path, broken=())
  costs(trainer, {0: (0.0, 20.0), 1: (1.0, 10.0)})
  tasks = [
    dataclasses.replace(t, metadata={**t.metadata, "preference": {"cost": 1.0, "latency": 0.5}})
    for t in trainer.parts.environment.tasks("train")
  ]
  trainer.parts.environment.tasks = lambda split: tasks
  with runner:
    trainer._iteration()
  assert [t.steps[-1].reward for t in trainer.learnt] == pytest.approx([1.0, 0.5] * 4)


def test_groups_that_do_not_deviate_reach_no_update(tmp_path):
  config = tiny.make(algorithm="ppo", rewards__filters__min_deviation=0.1)
  trainer, runner = scripted(config, tmp_path, broken=())
  with runner:
    figures = trainer._iteration()
  assert trainer.learnt == []
  assert (figures["dropped_even"], figures["pass_rate"]) == (8.0, 1.0)
  assert trainer.progress.tokens == 0
  assert trainer.progress.conversations == 8


def test_the_deviation_is_that_of_eq_2(tmp_path):
  config = tiny.make(
    algorithm="ppo", rewards__scheme="orchestra", rewards__filters__min_deviation=0.1, **PRICES
  )
  trainer, runner = scripted(config, tmp_path, broken=())
  costs(trainer, {0: (0.0, 10.0), 1: (0.0, 20.0)})
  with runner:
    figures = trainer._iteration()
  assert len(trainer.learnt) == 8
  assert all(t.status is Status.ANSWERED for t in trainer.learnt)
  assert figures["dropped_even"] == 0.0


def test_shares_of_an_iterations_time_add_up(tmp_path):
  trainer, runner = scripted(tiny.make(), tmp_path, broken=())
  with runner:
    figures = trainer._iteration()
  shares = [figures[f"{name}_share"] for name in ("host", "device", "tool")]
  assert sum(shares) == pytest.approx(1.0)
  assert min(shares) >= 0
