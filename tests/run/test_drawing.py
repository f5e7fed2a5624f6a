"""Dynamic sampling: what is drawn, kept and counted, and that a run goes on alike."""

import dataclasses
import json
import types

import numpy as np
import pytest
import tiny
from resuming import crash_and_go_on, records, saved

from steptool_jax.rollout.carrying import Carried
from steptool_jax.rollout.setting import Stats
from steptool_jax.run.data.order import Order
from steptool_jax.run.parts import rollouts
from steptool_jax.run.training import drawing
from steptool_jax.types import Finish, Status, Step, Trajectory


def trajectory(task, sample, reward, status=Status.ANSWERED):
  step = Step(np.array([1], np.int32), np.zeros(1, np.float32), Finish("x"), reward=reward)
  return Trajectory(task.id, sample, np.array([5], np.int32), (step,), status, reward)


class World:
  """Stands in for a run's parts and rollouts: `pays` says what a (task number, sample) is paid;
  None is an infrastructure error."""

  def __init__(self, monkeypatch, pays, size=40, **changes):
    self.config = tiny.make(**changes)
    self.all = [types.SimpleNamespace(id=f"t{n}") for n in range(size)]
    self.environment = types.SimpleNamespace(tasks=lambda split: self.all)
    self.rolled, self.pays = [], pays  # jobs of each round
    monkeypatch.setattr(rollouts, "roll", self.roll)
    monkeypatch.setattr(rollouts, "judge", lambda parts, tasks, rolled: rolled)
    monkeypatch.setattr(rollouts, "reward", lambda parts, tasks, rolled, scheme, marked: rolled)

  def roll(self, parts, variables, jobs, version, temperature, label, some=False, **options):
    assert some == bool(self.rolled), "a few odd conversations would end the run"
    self.rolled.append([(int(task.id[1:]), sample) for task, sample in jobs])
    out = []
    for task, sample in jobs:
      reward = self.pays(int(task.id[1:]), sample)
      status = Status.INFRASTRUCTURE_ERROR if reward is None else Status.ANSWERED
      out.append(trajectory(task, sample, reward or 0.0, status))
    return out, Stats(sampled_tokens=len(jobs))

  def draw(self, done=0, redrawn=0):
    self.rolled = []
    progress = types.SimpleNamespace(done=done, redrawn=redrawn)
    phase = types.SimpleNamespace(variables=dict, progress=progress, scorer=None, carried=Carried())
    return drawing.draw(self, phase, done)

  def places(self, *positions):
    order = Order(len(self.all), self.config.seed)
    return [order[p] for p in positions]


ROUNDS = {"rollout__tasks": 4, "rollout__samples": 2, "rollout__rounds": 3}


def drawn_tasks(world):
  return [[task for task, sample in jobs if sample % 2 == 0] for jobs in world.rolled]


def test_tasks_without_contrast_are_drawn_again_in_the_runs_order(monkeypatch):
  """Places 1 and 2 of the order, and 4 of those drawn for them, pay the same to both samples."""
  world = World(monkeypatch, lambda task, sample: 0.0, **ROUNDS)
  even = set(world.places(1, 2, 4))
  world.pays = lambda task, sample: 1.0 if task in even else float(sample % 2)
  found = world.draw()
  assert drawn_tasks(world) == [world.places(0, 1, 2, 3), world.places(4, 5), world.places(6)]
  kept = [int(t.task_id[1:]) for t in found.kept]
  assert kept == [task for task in world.places(0, 3, 5, 6) for _ in range(2)]
  assert len(found.trajectories) == 14, "a conversation that was not counted"
  assert found.figures["rounds"] == 3
  assert found.figures["without_contrast"] == pytest.approx(3 / 7)
  assert found.figures["dropped_even"] == 6
  assert (found.redrawn, found.stats.sampled_tokens) == (3, 14)
  # The next iteration begins behind what was drawn again.
  world.pays = lambda task, sample: float(sample % 2)
  world.draw(done=1, redrawn=3)
  assert drawn_tasks(world) == [world.places(7, 8, 9, 10)]


def test_rounds_are_bounded(monkeypatch):
  """A policy that solves all, or nothing, would be drawn for without an end."""
  world = World(monkeypatch, lambda task, sample: 1.0, **ROUNDS)
  found = world.draw()
  assert [len(jobs) for jobs in world.rolled] == [8, 8, 8]
  assert (found.kept, found.redrawn) == ([], 8)
  assert found.figures["without_contrast"] == 1.0


def test_one_round_is_what_it_was(monkeypatch):
  """Off: no group is left out, nothing is drawn again, no figure is added."""
  world = World(monkeypatch, lambda task, sample: 1.0, **ROUNDS | {"rollout__rounds": 1})
  found = world.draw(done=2)
  assert drawn_tasks(world) == [world.places(8, 9, 10, 11)]
  assert found.kept == found.trajectories
  assert found.redrawn == 0
  assert set(found.figures) == {"dropped_malformed", "dropped_unfinished", "dropped_even"}


def test_rounding_and_broken_tools_are_no_contrast(monkeypatch):
  """.1 + .2 and .3 differ in a last bit; of a pair one of which broke down nothing can be told."""
  world = World(monkeypatch, lambda task, sample: 0.0, **ROUNDS | {"rollout__rounds": 2})
  rounding, broken = world.places(0, 1)

  def pays(task, sample):
    if task == rounding:
      return 0.3 if sample else 0.1 + 0.2
    if task == broken:
      return None if sample else 1.0
    return float(sample % 2)

  world.pays = pays
  world.draw()
  assert drawn_tasks(world) == [world.places(0, 1, 2, 3), world.places(4, 5)]


def test_a_task_that_comes_twice_has_other_samples_and_is_a_group_of_its_own(monkeypatch):
  """Five tasks: the second round comes to tasks of the first. Its pair is not joined with the old
  one, whose equals would seem to have contrast and would overfill the batch."""
  world = World(monkeypatch, lambda task, sample: float(sample // 2), size=5, **ROUNDS)
  found = world.draw()
  jobs = [job for part in world.rolled for job in part]
  assert len(set(jobs)) == len(jobs) == 24, "the same key twice"
  assert not found.kept


def test_no_usable_conversation_is_an_error(monkeypatch):
  world = World(monkeypatch, lambda task, sample: None, **ROUNDS)
  with pytest.raises(RuntimeError, match="no conversation of this iteration can be trained on"):
    world.draw()


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"rollout__samples": 1}, r"rollout\.rounds: 2, but .*samples = 1 no task has contrast"),
    ({"algorithm": "sft"}, r"rollout\.rounds: 2, but algorithm 'sft' rolls nothing out"),
    ({"data__path": "x.jsonl"}, r"rollout\.rounds: 2, but stored trajectories are not drawn"),
  ],
)
def test_rounds_that_nothing_would_read_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    tiny.make(rollout__rounds=2, **changes)


def test_a_run_that_draws_again_goes_on_bit_equal(tmp_path, compiled, monkeypatch):
  """A run killed in its second iteration would draw other tasks after a resume, were those drawn
  again not counted in the checkpoint."""
  reward = rollouts.reward

  def paid(*args, **options):
    """Random weights solve nothing: every second task pays its first sample."""
    out = []
    for t in reward(*args, **options):
      solved = float(t.sample % 2 == 0 and sum(map(ord, t.task_id)) % 2)
      steps = (*t.steps[:-1], dataclasses.replace(t.steps[-1], reward=solved)) if t.steps else ()
      out.append(dataclasses.replace(t, steps=steps, solved=solved))
    return out

  monkeypatch.setattr(rollouts, "reward", paid)
  config = tiny.make(
    algorithm="grpo",
    compilation_cache=compiled,
    sft__steps=0,
    train__iterations=2,
    rollout__rounds=3,
    rollout__max_steps=2,
    rollout__max_step_tokens=12,
    evaluation__tasks=1,
    evaluation__samples=2,
    evaluation__sampled_tasks=2,
    evaluation__temperature=1.0,
  )
  meta, _ = crash_and_go_on(config, tmp_path, 1)
  assert meta["redrawn"] > 0, "nothing was drawn again: the comparison would be empty"
  found = [r for r in records(tmp_path / "whole") if "train/rounds" in r]
  assert any(r["train/rounds"] > 1 for r in found)
  summary = json.loads((tmp_path / "cut" / "summary_train.json").read_text())
  tried = [f"pass_at_{k}_{moment}" for moment in ("start", "end") for k in (1, 2)]
  assert all(summary[name] == 0.0 for name in tried), "the tries were lost with the crash"
  redrawn = saved(tmp_path / "whole")[1]["redrawn"]
  assert found[-1]["train/conversations"] == 2 * 8 + 2 * redrawn
