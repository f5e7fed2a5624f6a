"""Sampling one update behind (rollout.lag = 1): what is learnt from what, and stops of any kind."""

import time

import pytest
import tiny
from resuming import assert_same_run, crash, saved

from steptool_jax.environments import generated
from steptool_jax.run import train
from steptool_jax.run.parts import rollouts
from steptool_jax.run.training import drawing, iteration, phase
from steptool_jax.run.workdir.outputs import read_jsonl


@pytest.fixture(scope="module")
def config(compiled):
  return tiny.make("calls", compilation_cache=compiled, rollout__lag=1, checkpoint__every=2)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  """(workdir of a run that nobody stopped, its rollouts: (version of the keys, of the weights,
  updates before it))."""
  folder = tmp_path_factory.mktemp("whole")
  seen, updates, real, update = [], [], rollouts.roll, phase.Phase.update

  def roll(parts, variables, work, version, *args, **options):
    seen.append((version, options.get("policy", version), len(updates)))
    return real(parts, variables, work, version, *args, **options)

  def counted(self, *args):
    updates.append(1)
    return update(self, *args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(rollouts, "roll", roll)
    patch.setattr(phase.Phase, "update", counted)
    train.run(config, folder)
  return folder, seen


def trained(folder):
  return [r for r in read_jsonl(folder / "metrics.jsonl") if "train/kl" in r]


def test_the_next_conversations_are_sampled_before_the_update(whole):
  folder, seen = whole
  assert seen == [(0, 0, 0), (1, 0, 0), (2, 1, 1)]
  found = trained(folder)
  assert [r["train/staleness"] for r in found] == [0.0, 1.0, 1.0]
  # The first batch is that of the policy that learns, but for rounding; the second one is not.
  assert found[0]["train/importance"] == pytest.approx(1.0, abs=1e-3)
  assert found[0]["train/sampler_gap"] < 1e-3
  assert found[1]["train/sampler_gap"] > 2 * found[0]["train/sampler_gap"]
  assert all(0 <= r["train/importance_cut"] < 0.5 for r in found)


def test_without_a_lag_nothing_is_said_of_it(config, tmp_path):
  train.run(tiny.replace(config, rollout__lag=0, train__iterations=1), tmp_path)
  (record,) = trained(tmp_path)
  assert not [name for name in record if "importance" in name or "staleness" in name]


def test_a_run_that_is_killed_goes_on_bit_equal(config, whole, tmp_path):
  """Conversations that were sampled ahead are in the checkpoint, log-probs included."""
  assert crash(config, tmp_path, done=2)["ahead"] == 8
  train.run(config, tmp_path)
  assert_same_run(tmp_path, whole[0])


def test_updates_fill_the_gaps_and_change_nothing(config, whole, tmp_path, monkeypatch):
  """A slow tool leaves all slots idle. The update must not reach the weights that sample, and the
  sampler's log-probs, which are trained on, must not depend on how soon a tool answers."""
  step, draw = iteration.Pieces.step, drawing.draw
  call = generated.SerialSession.call
  gaps, rolling = [], []

  def noted(self):
    gaps.append(bool(rolling))
    return step(self)

  def collecting(*args, **options):
    rolling.append(1)
    try:
      return draw(*args, **options)
    finally:
      rolling.pop()

  def slow(self, given):
    time.sleep(0.05)
    return call(self, given)

  monkeypatch.setattr(iteration.Pieces, "step", noted)
  monkeypatch.setattr(drawing, "draw", collecting)
  monkeypatch.setattr(generated.SerialSession, "call", slow)
  train.run(config, tmp_path)
  assert any(gaps), "no gap was filled"
  assert_same_run(tmp_path, whole[0])


@pytest.mark.parametrize("begun", [False, True])
def test_a_stop_while_sampling_ahead_goes_on_bit_equal(begun, config, whole, tmp_path):
  """Half an update is no state to go on from: before it the stop is at once, in it after it."""
  ahead = iteration._sample_ahead

  def stopping(parts, learner, done, learning):
    if done == 2:
      parts.stop.request()
      if begun:
        learning.step()
    return ahead(parts, learner, done, learning)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(iteration, "_sample_ahead", stopping)
    assert train.run(config, tmp_path)["interrupted"] is True
  assert saved(tmp_path)[1]["done"] == 1 + begun
  assert train.run(config, tmp_path)["interrupted"] is False
  assert_same_run(tmp_path, whole[0])


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
