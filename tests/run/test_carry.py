"""Conversations that go on in the next iteration (rollout.carry): stops, groups, refusals."""

from unittest import mock

import numpy as np
import pytest
import tiny
from resuming import assert_same_run, crash

from steptool_jax.rollout import carrying
from steptool_jax.rollout.carrying import Carried
from steptool_jax.rollout.setting import Stats
from steptool_jax.run import train
from steptool_jax.run.parts import rollouts
from steptool_jax.run.training import carrying as training_carrying
from steptool_jax.run.training import drawing, sources
from steptool_jax.run.training.progress import Progress
from steptool_jax.run.workdir.outputs import read_jsonl
from steptool_jax.types import Status, Task, Trajectory


@pytest.fixture(scope="module")
def config(compiled):
  changes = {"rollout__carry": 1, "train__iterations": 4, "checkpoint__every": 2}
  return tiny.make("calls", compilation_cache=compiled, **changes)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  """(workdir of a run that nobody stopped, what each iteration carried on)."""
  folder = tmp_path_factory.mktemp("whole")
  seen, real = [], carrying.complete_groups

  def noted(*args):
    found = real(*args)
    seen.append(found)
    return found

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(training_carrying, "complete_groups", noted)
    train.run(config, folder)
  return folder, seen


def trained(folder):
  return [r for r in read_jsonl(folder / "metrics.jsonl") if "train/carried" in r]


def test_every_conversation_is_learnt_from_once(whole):
  folder, seen = whole
  begun = [
    (k, t.task_id, t.sample) for k, (trajectories, _) in enumerate(seen) for t in trajectories
  ]
  assert len(begun) == len({b[1:] for b in begun}) == 4 * 8, "4 iterations of 4 tasks x 2 samples"
  assert seen[0][1].unfinished, "nothing was carried: the test would be empty"
  assert not seen[-1][1].unfinished, "the last iteration leaves nothing undone"
  assert not seen[-1][1].waiting
  found = trained(folder)
  assert [r["train/carried"] for r in found] == [len(c.unfinished) for _, c in seen]
  ages = [[k - t.policy_version for t in trajectories] for k, (trajectories, _) in enumerate(seen)]
  assert max(map(max, filter(None, ages))) > 0
  assert any(r.get("train/staleness", 0) > 0 for r in found)
  corrected = [r for r in found if "train/importance" in r]
  assert corrected
  assert all(0.2 < r["train/importance"] < 2 for r in corrected)


def test_a_run_that_is_killed_goes_on_bit_equal(config, whole, tmp_path):
  """What goes on and what waits for it is in the checkpoint; sessions are repeated."""
  meta = crash(config, tmp_path, done=2)
  assert meta["unfinished"] == len(whole[1][1][1].unfinished) > 0
  assert meta["waiting"] == len(whole[1][1][1].waiting)
  train.run(config, tmp_path)
  assert_same_run(tmp_path, whole[0])


def test_recorded_logprobs_are_those_of_the_whole_conversation(tmp_path, compiled):
  """With weights that (almost) stand still, what was sampled in two iterations has the log-probs
  that the trainer finds for the joined trajectory: its ids are what the slots held."""
  still = {"train__optimizer__learning_rate": 1e-12, "rollout__carry": 1, "train__iterations": 2}
  train.run(tiny.make("calls", compilation_cache=compiled, **still), tmp_path)
  gaps = [r["train/sampler_gap"] for r in trained(tmp_path) if "train/sampler_gap" in r]
  assert gaps
  assert max(gaps) < 1e-3


@pytest.mark.parametrize("more", [True, False])
def test_groups_that_all_failed_are_no_end_while_others_go_on(more, config, monkeypatch):
  """Those that fail come to their end first: one task without a session must not end the run."""
  tasks = [Task(name, "shop", "", (), {}) for name in "ab"]
  failed = Trajectory("a", 0, np.zeros(0, np.int32), (), Status.INFRASTRUCTURE_ERROR)
  going_on = Carried((Trajectory("b", 0, None, (), Status.STEP_BUDGET),) if more else ())
  parts, phase_ = mock.Mock(config=config), mock.Mock(carried=Carried(), progress=Progress())
  parts.environment.tasks.return_value = tasks
  rolled = (tasks[:1], [failed], Stats(), going_on)
  monkeypatch.setattr(training_carrying, "roll", lambda *args: rolled)
  monkeypatch.setattr(rollouts, "judge", lambda parts, tasks, found: found)
  monkeypatch.setattr(rollouts, "reward", lambda parts, tasks, found, *args, **options: found)
  monkeypatch.setattr(sources, "mark", lambda parts, phase, tasks, found: (found, {}))
  if more:
    drawn = drawing.draw(parts, phase_, 0)
    assert (drawn.kept, drawn.figures["carried"]) == ([], 1.0)
  else:
    with pytest.raises(RuntimeError, match="no conversation of this iteration"):
      drawing.draw(parts, phase_, 0)


def test_a_task_that_is_drawn_again_gets_other_samples():
  tasks = [Task(name, "shop", "", (), {}) for name in "abc"]
  unfinished = Trajectory("b", 3, None, (), Status.STEP_BUDGET)
  seen = training_carrying.drawn_before(tasks, Carried((unfinished,), ()), 2)
  assert dict(seen) == {1: 2}, "samples 2 and 3 are of the second place; the next are 4 and 5"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"algorithm": "eto"}, "use 'rloo'"),
    ({"algorithm": "sft"}, "use 'steptool'"),
    ({"data__path": "rows.jsonl"}, "not rolled out; set it to 0"),
    ({"rollout__lag": 1}, "rollout.lag = 1"),
    ({"rollout__rounds": 2}, "rollout.rounds = 2"),
    ({"rollout__fold": 1}, "rollout.fold"),
  ],
)
def test_what_cannot_go_on_is_refused(changes, message):
  with pytest.raises(ValueError, match=r"config\.rollout\.carry: 2, but ") as error:
    tiny.make(rollout__carry=2, sft__steps=0 if "data__path" in changes else 2, **changes)
  assert message in str(error.value)
