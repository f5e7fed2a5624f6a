"""openenv: sessions of a server, over a stand-in and, where openenv is installed, over its own."""

import dataclasses
import importlib.util
import itertools
import random

import pytest
from environments.openenv_servers import World, serving

from steptool_jax.combinations import environment as combination
from steptool_jax.config import Config, Environment
from steptool_jax.environments import base
from steptool_jax.environments.benchmarks import openenv
from steptool_jax.run.parts.services import NO_SERVICES
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.types import Code, ToolCall

MISSING = [
  name
  for name in ("openenv", "websockets", "fastapi", "fastmcp")
  if importlib.util.find_spec(name) is None
]
real = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
KINDS = ["stand-in", pytest.param("openenv", marks=real)]
COUNTS = {"train": 3, "heldout": 2}


def add(number):
  return ToolCall("add", {"number": number})


def connect(server, sessions=2, counts=COUNTS, seed=0, timeout_s=5.0):
  return openenv.OpenEnv(server.address, counts, seed, sessions, timeout_s, 200)


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_are_resets_and_no_seed_is_in_both_splits(kind, monkeypatch):
  """A held-out task that was trained on would make a figure worthless."""
  with serving(kind, monkeypatch) as server:
    environment = connect(server, seed=5)
    assert server.active == 0  # what was read leaves nothing behind
  seeds = [[t.metadata["seed"] for t in environment.tasks(s)] for s in base.SPLITS]
  assert seeds == [[10, 12, 14], [11, 13]]
  first = environment.tasks("train")[0]
  # What the server says of itself, then what the episode begins with.
  assert first.query == 'ByMcp environment\n\n{"message":"Reach 3."}'
  (tool,) = first.tools
  assert (tool.name, tool.description) == ("add", "Adds a number.")
  assert tool.parameters["required"] == ["number"]


@pytest.mark.parametrize("kind", KINDS)
def test_splits_of_a_task_api_are_the_servers(kind, monkeypatch):
  """A server that says what is to test with must be believed."""
  with serving(kind, monkeypatch, listed=True) as server:
    environment = connect(server, counts={"train": 9, "heldout": 1})
    session = environment.open(environment.tasks("heldout")[0], 0)
    session.close()
  ids = [[t.id for t in environment.tasks(s)] for s in base.SPLITS]
  assert ids == [["openenv/easy/0", "openenv/easy/1", "openenv/easy/2"], ["openenv/hard/0"]]


@pytest.mark.parametrize("kind", KINDS)
def test_calls_are_steps_and_say_what_became_of_them(kind, monkeypatch):
  """The codes are what SC is made of; a call after the end must not change the reward."""
  with serving(kind, monkeypatch) as server:
    environment = connect(server)
    task = environment.tasks("train")[1]  # seed 2: reach 5
    one, other = environment.open(task, 0), environment.open(task, 1)
    calls = [add(2), add(-1), ToolCall("add", {}), ToolCall("sub", {"number": 1}), add(3), add(9)]
    seen = [one.call(call) for call in calls]
    assert [o.code for o in seen] == [
      *(Code.OK, Code.TOOL_ERROR, Code.BAD_ARGUMENTS),
      *(Code.UNKNOWN_TOOL, Code.OK, Code.TOOL_ERROR),
    ]
    assert [seen[0].text, seen[4].text] == ["total 2", "total 5"]
    assert "only positive" in seen[1].text
    assert "the episode is over" in seen[5].text
    assert other.call(add(1)).text == "total 1"  # a world of its own
    assert [one.grade("done"), other.grade("done")] == [1.0, 0.2]
    assert server.active == 2
    one.close()
    one.close()
    assert server.active == 1
    other.close()
    assert server.active == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_action_of_its_own_is_one_tool(kind, monkeypatch):
  """Most OpenEnv environments have no MCP tools: their action's schema is all there is."""
  with serving(kind, monkeypatch, own=True) as server:
    environment = connect(server)
    task = environment.tasks("train")[0]
    (tool,) = task.tools
    assert (tool.name, set(tool.parameters["properties"])) == ("act", {"number"})
    session = environment.open(task, 0)
    calls = [{"number": 1}, {}, {"number": -1}]
    seen = [session.call(ToolCall("act", arguments)) for arguments in calls]
    assert [o.code for o in seen] == [Code.OK, Code.BAD_ARGUMENTS, Code.TOOL_ERROR]
    assert seen[0].value == {"message": "total 1"}
    assert "Field required" in seen[1].text
    assert session.call(ToolCall("step", {})).code is Code.UNKNOWN_TOOL
    assert session.grade("done") == pytest.approx(1 / 3)
    session.close()


@real
def test_the_reward_is_that_of_openenvs_own_runner(monkeypatch):
  """Trained on another number than the package reports, a policy would learn another task."""
  pytest.importorskip("openai", reason="openenv's runner needs the package openai")
  from openenv import GenericEnvClient
  from openenv.core.harness import rollout as theirs

  rng = random.Random(0)
  with serving("openenv", monkeypatch) as server:
    environment = connect(server, counts={"train": 8, "heldout": 0})
    for task in environment.tasks("train"):
      calls = [add(rng.choice([-1, 1, 2, 3])) for _ in range(rng.randint(1, 4))]
      session, trace = environment.open(task, 0), []
      official = theirs.StepEnvSessionAdapter(
        GenericEnvClient(base_url=server.address),
        seed=task.metadata["seed"],
        tool_specs=[theirs.Tool(name="add", description="", input_schema={})],
        action_builder=lambda name, args: {
          "type": "call_tool", "tool_name": name, "arguments": args
        },
        initial_messages_builder=lambda result, given: [],
      )  # fmt: skip
      for call in calls:
        session.call(call)
        result = official.call_tool(call.name, dict(call.arguments))
        trace.append(theirs.ToolTraceEntry(call.name, dict(call.arguments), result))
        if result.done:
          break
      rolled = theirs.HarnessRolloutResult(tool_trace=trace)
      assert session.grade("x") == theirs._resolve_env_reward(rolled, official.verify([]))
      session.close()
      official.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_cannot_be_trained_with_is_refused_before_any_work(kind, monkeypatch):
  """OpenEnv's default is one session: all but one conversation of each rollout would be lost."""
  with serving(kind, monkeypatch, room=1) as server:
    with pytest.raises(ValueError, match=r"environment\.openenv: .*capacity.*max_concurrent_envs"):
      connect(server, sessions=2)
    environment = connect(server, sessions=1)
    for _ in range(5):  # the room is free again each time
      environment.open(environment.tasks("train")[0], 0).close()

  class Drawn(World):
    drawn = itertools.count()

  with (
    serving(kind, monkeypatch, world=Drawn) as server,
    pytest.raises(ValueError, match=r"environment\.openenv: .*reset\(.*does not repeat.*seed"),
  ):
    connect(server)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_that_is_no_share_marks_the_conversation(kind, monkeypatch):
  """Clipped without a word, 5 points and 50 would be the same."""

  class Points(World):
    scale = 50.0

  with serving(kind, monkeypatch, world=Points) as server:
    environment = connect(server)
    session = environment.open(environment.tasks("train")[0], 0)
    assert session.grade(None) == 0.0
    session.call(add(3))
    with pytest.raises(InfrastructureError, match=r"last reward is 50; scale it to \[0, 1\]"):
      session.grade("done")
    session.close()


def test_a_late_answer_is_never_taken_for_another_ones(monkeypatch):
  """The answer to a call that timed out would be shown, and paid, for the next call."""
  with serving("stand-in", monkeypatch) as server:
    environment = connect(server)
    session = environment.open(environment.tasks("train")[0], 0)
    server.deaf = True
    with pytest.raises(InfrastructureError, match="TimeoutError"):
      session.call(add(1))
    server.deaf = False
    with pytest.raises(InfrastructureError, match="closed"):
      session.call(add(2))


def test_what_is_missing_is_named(monkeypatch):
  """The remedy is a field, a package or a server; a traceback names none."""

  def config(address):
    fields = {"name": "openenv", "openenv": address}
    return dataclasses.replace(Config(), environment=dataclasses.replace(Environment(), **fields))

  with pytest.raises(ValueError, match=r"environment\.openenv: is empty"):
    combination.check(config(""))
  with pytest.raises(
    ValueError, match=r"environment\.openenv is 'localhost:8000': give http://host:8000"
  ):
    combination.check(config("localhost:8000"))
  away = config("http://127.0.0.1:9")
  combination.check(away)
  for found, named in (
    (None, r"pip install 'steptool-jax\[openenv\]'"),
    (True, r"environment\.openenv: http://127\.0\.0\.1:9: ConnectError.*start an OpenEnv server"),
  ):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
    with pytest.raises(ValueError, match=named):
      openenv.from_config(away, NO_SERVICES)


def test_each_process_asks_a_shared_server_for_its_part_of_the_sessions(monkeypatch):
  """Every host opened as many as all of them need, so that the second one was turned away."""
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
  monkeypatch.setattr(openenv, "OpenEnv", lambda address, counts, seed, sessions, *_: sessions)
  config = dataclasses.replace(Config(), rollout=dataclasses.replace(Config().rollout, slots=10))
  for processes, sessions in ((1, 10), (4, 3)):
    services = dataclasses.replace(NO_SERVICES, processes=processes)
    assert openenv.from_config(config, services) == sessions
