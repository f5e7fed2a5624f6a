"""Sampling one update behind (rollout.lag = 1): what is learnt from what, and stops of any kind."""

import time

import numpy as np
import pytest
import tiny
from resuming import assert_same_run, crash_and_go_on, records

from steptool_jax.environments import generated
from steptool_jax.run import train
from steptool_jax.run.parts import build, opening, rollouts
from steptool_jax.run.training import iteration, order, phase


@pytest.fixture
def config(compiled):
  return tiny.make("calls", compilation_cache=compiled, rollout__lag=1, checkpoint__every=2)


def rolled(monkeypatch):
  """What was rolled out so far: (version of the keys, of the weights, updates done then)."""
  seen, updates, real, update = [], [], rollouts.roll, phase.Phase.update

  def roll(parts, variables, work, version, *args, **options):
    if version >= 0:
      seen.append((version, options["policy"], len(updates)))
    return real(parts, variables, work, version, *args, **options)

  def counted(self, *args):
    updates.append(1)
    return update(self, *args)

  monkeypatch.setattr(rollouts, "roll", roll)
  monkeypatch.setattr(phase.Phase, "update", counted)
  return seen


def test_the_next_conversations_are_sampled_before_the_update(config, tmp_path, monkeypatch):
  seen = rolled(monkeypatch)
  train.run(config, tmp_path)
  assert seen == [(0, 0, 0), (1, 0, 0), (2, 1, 1)]
  found = [r for r in records(tmp_path) if "train/staleness" in r]
  assert [r["train/staleness"] for r in found] == [0.0, 1.0, 1.0]
  # The first batch is that of the policy that learns, but for rounding; the later ones are not.
  assert found[0]["train/importance"] == pytest.approx(1.0, abs=1e-3)
  assert abs(found[1]["train/importance"] - 1.0) > 1e-4
  assert all(0 <= r["train/importance_cut"] < 0.5 for r in found)


def test_without_a_lag_nothing_is_said_of_it(config, tmp_path):
  train.run(tiny.replace(config, rollout__lag=0, train__iterations=1), tmp_path)
  (record,) = [r for r in records(tmp_path) if "train/kl" in r]
  assert not [name for name in record if "importance" in name or "staleness" in name]


@pytest.mark.parametrize("done", [1, 2])
def test_a_run_that_is_killed_goes_on_bit_equal(done, config, tmp_path):
  """Conversations that were sampled ahead are in the checkpoint, log-probs included; killed in
  iteration 1 the run begins anew, in iteration 2 it goes on from the checkpoint."""
  crash_and_go_on(config, tmp_path, done)


def test_updates_fill_the_gaps_and_change_nothing(config, tmp_path, monkeypatch):
  """A slow tool leaves all slots idle; the update must not reach the weights that sample."""
  train.run(config, tmp_path / "quick")
  gaps, step = [], iteration.Pieces.step
  rolling, collect = [], iteration._collect

  def noted(self):
    gaps.append(bool(rolling))
    return step(self)

  def collecting(*args, **options):
    rolling.append(1)
    try:
      return collect(*args, **options)
    finally:
      rolling.pop()

  monkeypatch.setattr(iteration.Pieces, "step", noted)
  monkeypatch.setattr(iteration, "_collect", collecting)
  _slow(monkeypatch)
  train.run(config, tmp_path / "slow")
  assert any(gaps), "no gap was filled"
  assert_same_run(tmp_path / "slow", tmp_path / "quick")


def _slow(monkeypatch):
  call = generated.SerialSession.call

  def slow(self, given):
    time.sleep(0.05)
    return call(self, given)

  monkeypatch.setattr(generated.SerialSession, "call", slow)


@pytest.mark.parametrize("begun", [False, True])
def test_a_stop_while_sampling_ahead_goes_on_bit_equal(begun, config, tmp_path, monkeypatch):
  """Half an update is no state to go on from: before it the stop is at once, in it after it."""
  train.run(config, tmp_path / "whole")
  ahead = iteration._sample_ahead

  def stopping(parts, *args):
    parts.stop.request()
    if begun:
      args[-1].step()
    return ahead(parts, *args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(iteration, "_sample_ahead", stopping)
    assert train.run(config, tmp_path / "cut")["interrupted"] is True
  assert train.run(config, tmp_path / "cut")["interrupted"] is False
  assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"algorithm": "eto"}, "use 'rloo'"),
    ({"algorithm": "rft"}, "use 'rloo'"),
    ({"algorithm": "sft"}, "use 'steptool'"),
    ({"data__path": "rows.jsonl"}, "not rolled out; leave it at 0"),
    ({"rollout__correction": "tokens"}, "did you mean 'token'"),
  ],
)
def test_what_cannot_be_corrected_is_refused(changes, message):
  with pytest.raises(ValueError, match=r"config\.rollout\.(lag|correction): ") as error:
    tiny.make(rollout__lag=1, sft__steps=0 if "data__path" in changes else 2, **changes)
  assert message in str(error.value)


def test_log_probs_of_a_lagging_sampler_do_not_depend_on_the_clock(config, tmp_path, monkeypatch):
  """They are trained on: by whichever row bucket was at hand, no run would repeat another."""
  found = []
  for name in ("quick", "slow"):
    if name == "slow":
      _slow(monkeypatch)
    folder = tmp_path / name
    folder.mkdir()
    with opening.open_parts(config, folder, opening.Stop()) as parts:
      variables = build.initial_variables(config, parts.policy, parts.mesh)
      work = order.jobs(config, parts.environment.tasks("train"), 0)
      trajectories, _ = rollouts.roll(parts, variables, work, 0, 1.0, "test")
    found.append(np.concatenate([s.logprobs for t in trajectories for s in t.steps]))
  np.testing.assert_array_equal(*found)
