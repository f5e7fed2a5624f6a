"""annotate.source=monte_carlo: values of states become Con, and are found once."""

import dataclasses
import json

import pytest
import stored
import tiny

from steptool_jax.data.trajectories import (
  AnnotatedTrajectory,
  read_trajectories,
  write_trajectories,
)
from steptool_jax.rewards import rules
from steptool_jax.run import annotate
from steptool_jax.run.evaluating import state_values
from steptool_jax.run.parts import build


@pytest.fixture
def recorded(tmp_path):
  """(config, task, trajectory): a demonstration of two calls."""
  (tmp_path / "out").mkdir()
  path = tmp_path / "t.jsonl"
  config = tiny.make(
    "calls",
    annotate__source="monte_carlo",
    annotate__input=str(path),
    annotate__monte_carlo__samples=2,
    rewards__shaping="sum",
  )
  environment = build.build_environment(config)
  chat_format = build.build_chat_format(config, tmp_path)
  task = next(t for t in environment.tasks("train") if len(t.demonstration) == 3)
  trajectory = stored.recorded(environment, task, task.demonstration, chat_format, 0)
  write_trajectories(path, [AnnotatedTrajectory(trajectory)])
  return config, task, trajectory


@pytest.fixture
def asked(monkeypatch):
  """The states that were gone on from; of the n-th one, outcomes[n]."""
  found = []

  def outcomes(setting, states, attempts, should_stop, on_done):
    assert attempts == 2
    found.append([len(state.path) for state in states])
    return asked_for[: len(states)]

  asked_for = [[0.0, 0.5], [1.0, 0.0], [1.0, 1.0]]
  monkeypatch.setattr(state_values.continuing, "outcomes", outcomes)
  return found, asked_for


@pytest.mark.parametrize(
  ("label", "wanted"), [("value", [0.5, 1.0, 1.0]), ("gain", [0.25, 0.5, 0.0])]
)
def test_values_become_contributions(recorded, asked, label, wanted, tmp_path):
  """V = .25, .5, 1 in front of the three steps, and the outcome 1; SC is that of the rules."""
  config, task, trajectory = recorded
  config = tiny.replace(config, annotate__monte_carlo__label=label)
  summary = annotate.run(config, tmp_path / "out")
  (record,) = read_trajectories(tmp_path / "out" / "annotated.jsonl")
  steps = record.trajectory.steps
  assert [s.contribution for s in steps] == wanted
  expected = rules.annotate(task, trajectory)
  assert [s.success_calling for s in steps] == [s.success_calling for s in expected.steps]
  assert record.trajectory.solved == 1.0
  assert record.metadata["annotation"]["source"] == "monte_carlo"
  assert (summary["samples"], summary["label"], summary["annotated"]) == (2, label, 1)
  assert asked[0] == [[0, 1, 2]]


def test_what_was_found_is_not_rolled_out_again(recorded, asked, tmp_path):
  """Hours of rollouts would be lost at every stop; but more samples are other values."""
  config, *_ = recorded
  annotate.run(config, tmp_path / "out")
  annotate.run(config, tmp_path / "out")
  assert len(asked[0]) == 1
  (line,) = (tmp_path / "out" / "monte_carlo.jsonl").read_text().splitlines()
  assert json.loads(line)["values"] == [0.25, 0.5, 1.0]
  annotate.run(tiny.replace(config, seed=1), tmp_path / "out")
  assert len(asked[0]) == 2
  longer = tiny.replace(config, rollout__max_steps=config.rollout.max_steps + 1)
  annotate.run(longer, tmp_path / "out")
  assert len(asked[0]) == 3


def test_what_is_longer_than_a_slot_is_left_out(recorded, asked, tmp_path):
  """It ended in an IndexError of the engine."""
  config, _, trajectory = recorded
  short = tiny.replace(config, rollout__max_tokens=trajectory.longest - 1)
  summary = annotate.run(short, tmp_path / "out")
  assert (summary["annotated"], summary["left_out"]) == (0, {"too_long": 1})


def test_a_state_without_an_outcome_is_no_value(recorded, asked, tmp_path):
  """0 would call the step bad that led there; the trajectory is left out and counted."""
  config, _, trajectory = recorded
  other = dataclasses.replace(trajectory, sample=1)
  write_trajectories(tmp_path / "t.jsonl", map(AnnotatedTrajectory, (trajectory, other)))
  asked[1].extend([[], [1.0], [1.0]])
  summary = annotate.run(config, tmp_path / "out")
  assert (summary["annotated"], summary["left_out"]) == (1, {"no_value": 1})
  # It is asked for again, and not kept as one that nobody can value.
  asked[1][:3] = [[1.0], [1.0], [1.0]]
  summary = annotate.run(config, tmp_path / "out")
  assert (summary["annotated"], [len(states) for states in asked[0]]) == (2, [6, 3])


def test_one_that_cannot_be_repeated_ends_no_run(recorded, asked, tmp_path):
  """A tool that tells the time answers otherwise for ever; from the first state one can go on."""
  config, *_ = recorded
  asked[1][1:] = [[], []]
  summary = annotate.run(config, tmp_path / "out")
  assert (summary["annotated"], summary["left_out"]) == (0, {"no_value": 1})


def test_tools_that_are_down_end_the_run(recorded, asked, tmp_path):
  """It ended well, with an empty file and the outage on disk for good."""
  config, *_ = recorded
  asked[1][:] = [[], [], []]
  with pytest.raises(RuntimeError, match="all that went on from 1 trajectories.* failed"):
    annotate.run(config, tmp_path / "out")
  assert not (tmp_path / "out" / "annotated.jsonl").exists()


def test_official_files_are_refused(recorded, tmp_path):
  config, *_ = recorded
  changed = tiny.replace(config, annotate__format="converted")
  work = annotate.Work([], 0)
  with pytest.raises(ValueError, match="'monte_carlo' goes on with conversations"):
    annotate.by_monte_carlo(changed, tmp_path, work, lambda: False)
