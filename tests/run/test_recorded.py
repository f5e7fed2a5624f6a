"""Runs that learn from what their sampler recorded (rollout.reuse), beside today's; refusals."""

import time

import jax
import numpy as np
import pytest
import tiny
from resuming import assert_same_run, crash

from steptool_jax.environments import generated
from steptool_jax.run import train
from steptool_jax.run.training import phase
from steptool_jax.run.workdir.outputs import read_jsonl

CHANGES = {
  "rollout__reuse": 1e-2,
  "train__micro_rows": 1,
  "train__iterations": 2,
  "environment__faults__timeout": 0.3,
  "environment__faults__not_found": 0.3,
}


@pytest.fixture(scope="module")
def config(compiled):
  return tiny.make("calls", compilation_cache=compiled, **CHANGES)


def prepared_in(config, folder):
  """(metrics, what `prepare` made in each iteration) of a run."""
  found, real = [], phase.Phase.prepare

  def noted(self, packed):
    prepared, figures = real(self, packed)
    found.append(jax.device_get(prepared))
    return prepared, figures

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(phase.Phase, "prepare", noted)
    train.run(config, folder)
  return [r for r in read_jsonl(folder / "metrics.jsonl") if "train/kl" in r], found


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  return folder, *prepared_in(config, folder)


def test_an_iteration_is_that_of_today_but_for_rounding(config, whole, tmp_path):
  """Groups, faults, a KL penalty, ridge: a state that is not the one in front of its step, or a
  reference that was not computed, would be learnt from unseen."""
  _, found, (mine, *_) = whole
  once = tiny.replace(config, rollout__reuse=0.0, train__iterations=1)
  (today,), (theirs,) = prepared_in(once, tmp_path)
  assert [r["train/reused"] for r in found] == [1.0, 1.0]
  assert "train/reused" not in today
  rows = mine.action_mask.any(-1).sum()
  assert rows > 2, "one micro-batch: all of it is computed"
  mask = mine.action_mask
  np.testing.assert_array_equal(mine.targets, theirs.targets)
  np.testing.assert_array_equal(mine.old_logprobs[mask], mine.behaviour_logprobs[mask])
  np.testing.assert_allclose(mine.old_logprobs, theirs.old_logprobs, atol=1e-4)
  np.testing.assert_allclose(mine.ref_logprobs, theirs.ref_logprobs, atol=1e-5)
  assert np.ptp(theirs.values[mask]) > 0.05, "an empty comparison"
  np.testing.assert_allclose(mine.values[mask], theirs.values[mask], atol=1e-3)
  np.testing.assert_allclose(mine.advantages, theirs.advantages, atol=1e-2)  # over a deviation
  for name in ("train/kl", "train/entropy", "train/explained_variance", "train/policy_loss"):
    assert found[0][name] == pytest.approx(today[name], abs=2e-3), name


def test_a_run_that_is_killed_goes_on_bit_equal(config, whole, tmp_path, monkeypatch):
  """The sampler's log-probs and states are learnt from: they must not depend on how soon a tool
  answers, and nothing of an iteration that ended may be needed by the next one."""
  call = generated.SerialSession.call

  def slow(self, given):
    time.sleep(0.05)
    return call(self, given)

  crash(config, tmp_path, done=1)
  monkeypatch.setattr(generated.SerialSession, "call", slow)
  train.run(config, tmp_path)
  assert_same_run(tmp_path, whole[0])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data__path": "rows.jsonl", "sft__steps": 0}, "does not learn from rollouts.*leave it at 0"),
    ({"algorithm": "sft"}, "does not learn from rollouts here; leave it at 0"),
    ({"rollout__lag": 1}, "rollout.lag = 1 there are.*set it to 0, or rollout.lag to 0"),
    ({"rollout__carry": 2}, "rollout.carry = 2 there are.*or rollout.carry to 0"),
    ({"algorithm": "archer"}, "'archer' reads states of.*critic.kind to 'ridge'"),
    (
      {"rollout__engine": "http", "rollout__http__servers": ("http://a:1",)},
      "a vLLM server records what the critic .'ridge'. reads; .*critic.kind to 'group'$",
    ),
    (
      {"environment__name": "harness", "rollout__samples": 1},
      "a harness records.*'group', with rollout.samples of 2",
    ),
    ({"advantage__bootstrap": ("step_budget",)}, "wants the value of.*advantage.bootstrap empty$"),
    (
      {"algorithm": "ppo", "advantage__bootstrap": ("token_budget",)},
      "critic .'value'.; .*bootstrap empty$",
    ),
    ({"rollout__reuse": -1.0}, "must not be negative"),
  ],
)
def test_what_cannot_be_recorded_is_refused(changes, message):
  with pytest.raises(ValueError, match=rf"config\.rollout\.reuse: .*{message}"):
    tiny.make(**({"rollout__reuse": 0.01} | changes))


@pytest.mark.parametrize(
  "changes",
  [
    {"rollout__engine": "http", "rollout__http__servers": ("http://a:1",), "algorithm": "grpo"},
    {"algorithm": "archer", "critic__kind": "ridge"},
    {"rollout__fold": 2},
    {"algorithm": "rft"},
  ],
)
def test_the_nearest_valid_choices_are_valid(changes):
  tiny.make(rollout__reuse=0.01, **changes)
