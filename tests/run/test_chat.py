"""--mode=chat, scripted through stdin; and the door `steptool`."""

import io
import pathlib
import tomllib

import fakes
import jax
import numpy as np
import pytest
import tiny

from steptool_jax import main
from steptool_jax.environments import nested_api
from steptool_jax.policy import model
from steptool_jax.run import chat
from steptool_jax.types import Finish, Malformed, Status, Step, ToolCall, Trajectory


def test_one_types_and_watches_every_step(tmp_path, compiled, monkeypatch, capsys):
  """A task is checked and paid as in training; a question of one's own is only answered."""
  c = tiny.make("calls", compilation_cache=compiled, evaluation__temperature=1.0)
  tasks, whole = set(), chat._attempt

  def attempt(parts, variables, task, *args, **kwargs):
    tasks.add(task.id)
    return whole(parts, variables, task, *args, **kwargs)

  monkeypatch.setattr(chat, "_attempt", attempt)
  typed = "/tasks\n/task nothing\n/task {id}\nWhat does Mira Tol owe?\n\n/quit\n/tasks\n"
  first = nested_api.from_config(c, None).tasks("heldout")[1]
  monkeypatch.setattr("sys.stdin", io.StringIO(typed.format(id=first.id)))
  summary = chat.run(c, tmp_path)
  said = capsys.readouterr().out
  assert summary["conversations"] == 2
  assert first.query in said
  assert "there is no '/task nothing'" in said
  assert "What does Mira Tol owe?" in said
  assert said.count("SC  Con  reward   value  action") == 2
  assert said.count("has no checker") == 1
  assert said.count("solved ") == 1
  assert tasks == {first.id}  # the question is asked in the world of the task before it


def test_the_table_of_steps():
  """Figures stand at the step that earned them."""
  nothing = np.zeros(0)
  marks = {"success_calling": 1, "contribution": 0.5, "reward": 0.75}
  steps = (
    Step(nothing, nothing, ToolCall("find", {}), **marks),
    Step(nothing, nothing, Malformed("no JSON")),
    Step(nothing, nothing, Finish("7"), reward=1.0),
  )
  t = Trajectory("t", 0, np.zeros(2, np.int32), steps, Status.ANSWERED, 1.0)
  assert chat.table(t, [0.25, -0.5, 2], True) == [
    "step   SC  Con  reward   value  action",
    "   1    1  0.5   0.750   0.250  find",
    "   2    0    0   0.000  -0.500  malformed: no JSON",
    "   3    0    0   1.000   2.000  answers: 7",
    "answered; solved 1",
  ]


def test_values_belong_to_the_state_before_the_step():
  """V of a later id knows what the step said: the reader would take hindsight for foresight."""
  config = fakes.tiny_config()
  params = model.init_params(config, jax.random.key(0))
  params["value_head"]["kernel"] = jax.random.normal(jax.random.key(1), (32, 1))
  rng = np.random.default_rng(0)
  t = fakes.random_trajectory(rng, max_steps=3, status=Status.STEP_BUDGET)
  values = chat.step_values(config, {"params": params}, t, 64)
  before = t.prompt_tokens
  for k, step in enumerate(t.steps):
    ids = np.asarray(before)[None]
    at = np.arange(ids.shape[1])[None]
    hidden = model.forward(config, {"params": params}, ids, at, np.ones_like(ids))
    alone = model.project_values({"params": params}, hidden)[0, -1]
    assert values[k] == pytest.approx(float(alone), abs=1e-5)
    before = np.concatenate([before, step.tokens, step.observation_tokens])


def test_the_console_script_is_main():
  project = tomllib.loads((pathlib.Path(tiny.ROOT) / "pyproject.toml").read_text())["project"]
  module, _, name = project["scripts"]["steptool"].partition(":")
  assert module == main.__name__
  assert callable(getattr(main, name))
