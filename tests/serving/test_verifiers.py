"""verifiers: its environment runs the agent and says the reward; ours records and pays it.

Over a stand-in with the package's interface, and over the package where it is installed.
"""

import asyncio
import contextlib
import dataclasses
import importlib
import importlib.util
import os
import pathlib
import re
import sys
import threading
import types

import fakes
import httpx
import pytest

from steptool_jax.combinations import environment as combination
from steptool_jax.config import Config, Environment, Limits
from steptool_jax.dialogue import compact
from steptool_jax.dialogue.codec import Codec
from steptool_jax.dialogue.template import get_format
from steptool_jax.rollout.setting import Sampling, Setting
from steptool_jax.serving import harness, verifiers
from steptool_jax.serving.decoding import Decoder
from steptool_jax.serving.server import PolicyServer
from steptool_jax.types import Finish, Status, ToolCall

HERE = pathlib.Path(__file__).parent
LIMITS = Limits(max_steps=4, max_step_tokens=24, max_tokens=240, max_invalid=2)
FILE = '[env.taskset]\nid = "doubling_world"\n[env.agent.runtime]\ntype = "subprocess"\n'
real = pytest.mark.skipif(
  importlib.util.find_spec("verifiers") is None, reason="the optional package verifiers is missing"
)


@pytest.fixture(scope="module")
def chat_format(tmp_path_factory):
  out = tmp_path_factory.mktemp("tokenizer")
  compact.build_tokenizer(["echo {} answer 7 double 1 2 3 4 5 6 8 9 0"] * 50, 300, out)
  return get_format("compact", Codec.load(out))


def policy(text):
  """Echoes k % 3 times, then doubles what is even; of 7 it has never enough."""
  k = int(re.search(r"double (\d)", text)[1])
  said = text.count("<|result|>")
  if said < (9 if k == 7 else k % 3):
    return ToolCall("echo", {})
  return Finish(str(2 * k if k % 2 == 0 else 1))


def rolled(environment, chat_format, repeat=1):
  tasks = [*environment.tasks("train"), *environment.tasks("heldout")]
  engine = fakes.ScriptedEngine(chat_format, policy, slots=3, size=300)
  setting = Setting(engine, None, environment, chat_format, LIMITS, None, Sampling(0, 0, 1.0))
  trajectories, stats = harness.rollout(setting, [(t, 0) for t in tasks])
  return {t.task_id: t for t in trajectories}, stats


# --- over a stand-in ---------------------------------------------------------------------------


class Played:
  """The stand-in's environment: an agent that asks until it has an answer, and a reward."""

  up = 0

  def __init__(self, config):
    self.config, self.taskset = config, self
    self.bounded = config.taskset["id"] != "endless"

  def select(self, config):
    return self

  def __iter__(self):
    for k, number in enumerate((*range(9), 0)):
      data = types.SimpleNamespace(idx=k, prompt_text=f"double {number}", number=number)
      fields = {"idx": k, "number": number}
      data.model_dump = lambda mode, exclude, fields=fields: {
        name: value for name, value in fields.items() if name not in exclude
      }
      yield types.SimpleNamespace(data=data)

  @contextlib.asynccontextmanager
  async def serving(self):
    Played.up += 1
    try:
      yield
    finally:
      Played.up -= 1

  async def run_episode(self, task, context):
    assert Played.up == 1  # its servers stand once for all runs
    await asyncio.sleep(0)
    messages = [{"role": "user", "content": task.data.prompt_text}]
    headers, traces = {"Authorization": f"Bearer {context.client.key()}"}, []
    agent = types.SimpleNamespace(config=types.SimpleNamespace(client=context.client))
    trace = types.SimpleNamespace(agent=agent, reward=0.0, errors=[])
    async with httpx.AsyncClient(headers=headers, timeout=20) as client:
      for turns in range(1, 9):
        body = {"messages": messages, "tools": [ECHO]}
        reply = await client.post(f"{context.client.base_url}/chat/completions", json=body)
        if reply.status_code != 200:
          trace.errors = [types.SimpleNamespace(type="ProviderError", message=reply.text)]
          break
        message = reply.json()["choices"][0]["message"]
        messages.append(message)
        if not message.get("tool_calls"):
          right = message["content"] == str(2 * task.data.number)
          trace.reward = float(right) + 0.5 * (turns < 3)
          break
        called = message["tool_calls"][0]["id"]
        messages.append({"role": "tool", "tool_call_id": called, "content": "seven"})
    if task.data.number == 4:
      trace.errors = [types.SimpleNamespace(type="TaskError", message="the rubric is down")]
    traces += [trace] * (2 if task.data.number == 5 else 1)
    return types.SimpleNamespace(ok=not trace.errors, errors=[], traces=traces)


ECHO = {"type": "function", "function": {"name": "echo", "parameters": {"type": "object"}}}


@pytest.fixture
def stand_in(monkeypatch):
  """The part of verifiers.v1 that is used."""

  @dataclasses.dataclass
  class Client:
    base_url: str
    api_key_var: str

    def key(self):
      return os.environ[self.api_key_var]

  def seat(client=None, retries=0):
    again = types.SimpleNamespace(max_retries=retries, rules=[])
    return types.SimpleNamespace(client=client, retries=again)

  def resolve(data):
    if data["taskset"]["id"] == "absent":
      raise ModuleNotFoundError("taskset 'absent' not found")
    seats = {name: seat(**fields) for name, fields in data.get("seats", {"agent": {}}).items()}
    return types.SimpleNamespace(
      taskset=data["taskset"],
      env_id=data["taskset"]["id"],
      seats=seats,
      retries=seat().retries,
    )

  package = types.ModuleType("verifiers.v1")
  package.resolve_env_config, package.load_environment = resolve, Played
  package.SelectConfig = package.ModelContext = types.SimpleNamespace
  package.EvalClientConfig = Client
  agents = types.ModuleType("verifiers.v1.configs.agent")
  agents.agent_config_fields = lambda config: config.seats
  for module in (package, agents):
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_the_reward_of_an_episode_is_paid_as_it_is(stand_in, chat_format):
  """Its rubric is what is to be learnt: 1.5 must not become 1, nor an error a reward of 0."""
  environment = verifiers.Verifiers("doubling", 0.4, 20.0)
  found, stats = rolled(environment, chat_format)
  assert Played.up == 0  # the package's servers are down when the rollout is over
  paid = {name.split("/")[1]: [s.reward for s in t.steps] for name, t in found.items()}
  assert (paid["0"], paid["1"], paid["2"], paid["6"]) == ([1.5], [0, 0.5], [0, 0, 1.0], [1.5])
  assert {n: t.solved for n, t in found.items()}["doubling/0"] == 1.0  # a share of 1
  assert found["doubling/7"].status is Status.STEP_BUDGET
  assert paid["7"] == [0.0] * 4  # the policy's own doing, so it is learnt from
  marked = {n for n, t in found.items() if t.status is Status.INFRASTRUCTURE_ERROR}
  assert marked == {"doubling/4", "doubling/5"}
  assert any("TaskError: the rubric is down" in why for why in stats.failures)
  assert any("asked for 2 traces" in why for why in stats.failures)


def test_equal_tasks_lie_in_one_split(stand_in):
  """Tasks 0 and 9 ask the same: trained on the one, the other is no test."""
  for share in (0.1, 0.3, 0.5, 0.7, 0.9):
    environment = verifiers.Verifiers("doubling", share, 20.0)
    ids = [{t.id for t in environment.tasks(split)} for split in ("train", "heldout")]
    assert not ids[0] & ids[1]
    assert len(ids[0] | ids[1]) == 10
    assert ({"doubling/0", "doubling/9"} <= ids[0]) != ({"doubling/0", "doubling/9"} <= ids[1])


@pytest.mark.parametrize(
  ("which", "named"),
  [
    ("absent", "environment.verifiers: absent: .*'absent' not found"),
    ("endless", r"endless has no last task; bound it: \[select\] limit"),
    ("none.toml", "none.toml"),
    ('model = "x"\n[env.taskset]\nid = "a"', r"has model, env; it must have \[env\].*own fields"),
    ('[env.taskset]\nid = "a"\n[env.seats.a]\n[env.seats.b]', "own are a, b; give the others"),
    ('[env.taskset]\nid = "a"\n[env.seats]\na = {}\nb = {client = 1}\nc = {client = 1}', ""),
    ('[env.taskset]\nid = "a"\n[env.seats.a]\nretries = 2', r"\[env.a.retries\] would put two"),
  ],
)
def test_what_cannot_be_trained_on_is_refused_before_any_work(stand_in, tmp_path, which, named):
  """Two seats of one policy would be one conversation, and a judge's words would be learnt."""
  if "[" in which:
    (tmp_path / "env.toml").write_text(which)
    which = str(tmp_path / "env.toml")
  if not named:
    verifiers.Verifiers(which, 0.4, 20.0)
    return
  with pytest.raises(ValueError, match=named):
    verifiers.Verifiers(which, 0.4, 20.0)


def test_what_is_missing_is_named(monkeypatch):
  """The field, or the package and how it is had; and what an agent's environment cannot have."""
  fields = {"name": "verifiers"}
  config = dataclasses.replace(Config(), environment=dataclasses.replace(Environment(), **fields))
  with pytest.raises(ValueError, match=r"environment\.verifiers: is empty"):
    combination.check(config)
  named = dataclasses.replace(config.environment, verifiers="gsm8k-v1")
  named = dataclasses.replace(config, environment=named)
  with pytest.raises(ValueError, match=r"config\.\S+ is not for environment 'verifiers'"):
    combination.check(dataclasses.replace(named, sft=dataclasses.replace(config.sft, steps=5)))
  monkeypatch.setitem(sys.modules, "verifiers.v1", None)
  with pytest.raises(ValueError, match=r"pip install 'steptool-jax\[verifiers\]'"):
    verifiers.from_config(named, None)


# --- over the package --------------------------------------------------------------------------


@pytest.fixture
def doubling(monkeypatch, tmp_path):
  monkeypatch.syspath_prepend(str(HERE))
  (tmp_path / "env.toml").write_text(FILE + "[select]\nlimit = 9\n")
  return verifiers.Verifiers(str(tmp_path / "env.toml"), 0.4, 30.0)


@real
def test_rewards_are_those_of_the_packages_own_runner(doubling, chat_format, tmp_path):
  """Its own `eval` over the same policy has the same conversations: the same rewards."""
  runner = importlib.import_module("verifiers.v1.cli.eval.runner")
  settings = importlib.import_module("verifiers.v1.configs.cli.eval")
  for _ in range(2):  # a second rollout has an event loop, and servers, of its own
    ours, stats = rolled(doubling, chat_format)
    assert not stats.failures
  engine = fakes.ScriptedEngine(chat_format, policy, slots=3, size=300)
  decoder, over = Decoder(engine, None, chat_format.stop_ids), threading.Event()

  def decode():
    while not over.is_set():
      decoder.step(0.05)

  thread = threading.Thread(target=decode, daemon=True)
  with PolicyServer(decoder, chat_format, everyone=True) as server:
    thread.start()
    client = {"type": "eval", "base_url": server.url, "api_key_var": "NONE"}
    config = settings.EvalConfig(
      env=doubling._config,
      client=client,
      model="policy",
      select={"limit": 7},
      push=False,
      rich=None,
      output_dir=tmp_path / "eval",
    )
    episodes = asyncio.run(runner.run_eval(config))
    over.set()
    thread.join()
  theirs = {f"doubling_world/{e.task.data.idx}": e.traces[0].reward for e in episodes}
  assert sorted(set(theirs.values())) == [0.0, 0.5, 1.0, 1.5]
  assert theirs == {n: sum(s.reward for s in ours[n].steps) for n in theirs}
  assert ours["doubling_world/7"].status is Status.STEP_BUDGET


@real
def test_an_environment_that_is_not_installed_is_named():
  """Its own message names what it tried to import."""
  with pytest.raises(ValueError, match=r"environment\.verifiers: no-such: .*no_such"):
    verifiers.Verifiers("no-such", 0.4, 30.0)
