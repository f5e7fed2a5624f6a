"""What an agent's function may do to a rollout: nothing that others notice or that is learnt."""

import asyncio
import dataclasses
import json
import re
import sys
import textwrap
import threading
import time

import fakes
import httpx
import pytest
from thinker import contexts

from steptool_jax.config import Limits
from steptool_jax.rollout.chain import Interrupted
from steptool_jax.rollout.setting import Sampling, Setting, step_seed
from steptool_jax.serving import harness
from steptool_jax.types import Finish, Status, ToolCall

ECHO = {"type": "function", "function": {"name": "echo", "parameters": {"type": "object"}}}
LIMITS = Limits(max_steps=3, max_step_tokens=24, max_tokens=200, max_invalid=2)


@pytest.fixture(scope="module")
def chat_format(tmp_path_factory):
  return fakes.echo_format(tmp_path_factory.mktemp("tokenizer"))


async def converse(base_url, api_key, query="say seven", turns=9, end=True):
  """The agent: calls until the model answers; returns how many calls it made."""
  messages, calls = [{"role": "user", "content": query}], 0
  headers = {"Authorization": f"Bearer {api_key}"}
  async with httpx.AsyncClient(base_url=base_url, headers=headers, timeout=20) as client:
    for _ in range(turns):
      reply = await client.post("chat/completions", json={"messages": messages, "tools": [ECHO]})
      reply.raise_for_status()
      message = reply.json()["choices"][0]["message"]
      messages.append(message)
      if not message.get("tool_calls"):
        break
      calls += 1
      called = message["tool_calls"][0]["id"]
      messages.append({"role": "tool", "tool_call_id": called, "content": "seven"})
  return calls


@pytest.fixture
def roll(chat_format, tmp_path):
  """roll(run, names, …) -> (trajectories, stats, engine) of a task for each name."""

  def rolled(run, names=("a",), timeout_s=20.0, slots=2, policy=None, limits=LIMITS, **kwargs):
    def calls_twice(text):
      return Finish("7") if text.count("<|result|>") == 2 else ToolCall("echo", {})

    environment = harness.Harness.__new__(harness.Harness)
    environment.run, environment.timeout_s = run, timeout_s
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(json.dumps({"id": n, "split": "train"}) for n in names))
    tasks = harness._read(path, 0.0)["train"]
    engine = fakes.ScriptedEngine(chat_format, policy or calls_twice, slots=slots, size=300)
    sampling = Sampling(0, 3, 1.0)
    setting = Setting(engine, None, environment, chat_format, limits, None, sampling)
    return *harness.rollout(setting, [(t, 0) for t in tasks], **kwargs), engine

  return rolled


def test_rewards_of_every_form_reach_their_steps(roll):
  """A number is the outcome; a list has an entry for every call of the model."""
  forms = {
    "number": 0.5,
    "list": [-1, 0.25, 1],
    "both": {"solved": 0.5, "rewards": [3, 2, 1.5]},
    "bool": True,
  }

  async def run(task, base_url, api_key):
    assert await converse(base_url, api_key) == 2
    return forms[task["id"]]

  trajectories, stats, _ = roll(run, tuple(forms))
  assert not stats.failures
  assert [t.policy_version for t in trajectories] == [3] * 4
  paid = {t.task_id: ([s.reward for s in t.steps], t.solved) for t in trajectories}
  assert paid == {
    "number": ([0, 0, 0.5], 0.5),
    "list": ([-1, 0.25, 1], 1.0),
    "both": ([3, 2, 1.5], 0.5),
    "bool": ([0, 0, 1], 1.0),
  }
  assert trajectories[1].reward_parts == {"harness": 0.25}
  outcome = harness.outcome_only(trajectories[1])
  assert [s.reward for s in outcome.steps] == [0, 0, 1]


async def _raises(task, base_url, api_key):
  await converse(base_url, api_key)
  raise KeyError("no such tool")


async def _exits(task, base_url, api_key):
  await converse(base_url, api_key)
  sys.exit(3)


async def _exits_beside(task, base_url, api_key):
  async def other():
    sys.exit(4)

  beside = asyncio.create_task(other())
  await asyncio.sleep(0.1)
  raise LookupError("its helper is gone") from beside.exception()


async def _hangs(task, base_url, api_key):
  await converse(base_url, api_key)
  await asyncio.sleep(60)


async def _never_calls(task, base_url, api_key):
  return 1.0


async def _returns_nothing(task, base_url, api_key):
  await converse(base_url, api_key)


async def _returns_too_much(task, base_url, api_key):
  await converse(base_url, api_key)
  return 7


async def _returns_too_few(task, base_url, api_key):
  await converse(base_url, api_key)
  return [1]


async def _is_wrong(task, base_url, api_key):
  async with httpx.AsyncClient() as client:
    reply = await client.post(f"{base_url}/chat/completions", json={"messages": []})
    reply.raise_for_status()


async def _tools_fail(task, base_url, api_key):
  message = {"role": "user", "content": "x"}
  headers = {"Authorization": f"Bearer {api_key}"}
  async with httpx.AsyncClient(base_url=base_url, headers=headers) as client:
    said = (
      await client.post("chat/completions", json={"messages": [message], "tools": [ECHO]})
    ).json()
    said = said["choices"][0]["message"]
    down = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "down"}
    messages = [message, said, down | {"code": "infrastructure"}]
    await client.post("chat/completions", json={"messages": messages, "tools": [ECHO]})
  return 0.0


@pytest.mark.parametrize(
  ("bad", "why"),
  [
    (_raises, "KeyError"),
    (_exits, r"sys.exit\(3\)"),
    (_exits_beside, "its helper is gone"),
    (_hangs, "takes longer than 2 s"),
    (_never_calls, "never had an answer"),
    (_returns_nothing, "returned None"),
    (_returns_too_much, "in \\[0, 1\\]"),
    (_returns_too_few, "1 rewards, but had 3 LLM calls"),
    (_is_wrong, "401"),
    (_tools_fail, "infrastructure failed"),
  ],
)
def test_a_run_that_fails_is_marked_and_stops_no_other(roll, bad, why):
  """Its reward is unknown; scored 0, the policy would learn from a broken harness."""

  async def run(task, base_url, api_key):
    if task["id"] == "bad":
      return await bad(task, base_url, api_key)
    await converse(base_url, api_key)
    return 1.0

  (failed, *others), stats, _ = roll(run, ("bad", "b", "c"), 2.0 if bad is _hangs else 20.0)
  assert failed.status is Status.INFRASTRUCTURE_ERROR
  assert failed.solved == 0.0
  assert [t.solved for t in others] == [1.0, 1.0]
  (said,) = stats.failures
  assert re.search(why, said), said


def test_a_run_that_blocks_its_thread_loses_that_thread_only(roll, monkeypatch):
  """Nothing can cancel it, so that the others of its loop are marked too; later ones run."""
  monkeypatch.setattr(harness, "_GRACE_S", 0.1)
  free = threading.Event()

  async def run(task, base_url, api_key):
    if task["id"] == "bad":
      free.wait(20)
    await converse(base_url, api_key)
    return 1.0

  trajectories, stats, _ = roll(run, ("bad", "b", "c", "d"), timeout_s=1.5)
  free.set()
  assert trajectories[0].status is Status.INFRASTRUCTURE_ERROR
  assert trajectories[-1].solved == 1.0
  assert "does not await" in stats.failures[0]


def test_a_budget_is_the_policys_doing_and_no_failure(roll):
  """An agent that knows nothing of budgets raises where its session is over: that is data."""
  (trajectory,), stats, _ = roll(_unaware, policy=lambda text: ToolCall("echo", {}))
  assert not stats.failures
  assert (trajectory.status, trajectory.solved) == (Status.STEP_BUDGET, 0.0)
  assert len(trajectory.steps) == 3
  assert len(trajectory.steps[-1].observation_tokens) > 0  # the state that values bootstrap from


async def _unaware(task, base_url, api_key):
  await converse(base_url, api_key)
  return 1.0


def test_keys_are_those_of_a_chain(roll):
  """The same (task, sample, step) samples the same tokens, whoever asks."""
  seen = []

  async def run(task, base_url, api_key):
    return float(await converse(base_url, api_key) == 2)

  whole = fakes.ScriptedEngine.decode

  def decode(self, variables, state, limits, seeds, *rest):
    seen.extend(tuple(seed) for seed in seeds.values())
    return whole(self, variables, state, limits, seeds, *rest)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(fakes.ScriptedEngine, "decode", decode)
    roll(run)
  wanted = [tuple(step_seed(Sampling(0, 3, 1.0), "a", 0, k)) for k in range(3)]
  assert list(dict.fromkeys(seen)) == wanted


def test_several_conversations_are_one_trajectory(roll):
  """A sub-agent's calls are learnt from too, behind their own prompt, with their own rewards."""

  async def run(task, base_url, api_key):
    await converse(base_url, api_key, "a sub-agent")
    await converse(base_url, api_key, "the main one")
    return [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]

  (trajectory,), stats, engine = roll(run, limits=dataclasses.replace(LIMITS, max_steps=9))
  assert not stats.failures
  assert [s.reward for s in trajectory.steps] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
  assert [(p.start, p.stop) for p in trajectory.parts] == [(0, 3), (3, 6)]
  assert contexts(trajectory) == [seen for seen, _ in engine.turns]


async def _takes_turns(task, base_url, api_key):
  """Two conversations that take turns, and thoughts of one's answers that are taken back."""
  headers = {"Authorization": f"Bearer {api_key}"}
  async with httpx.AsyncClient(base_url=base_url, headers=headers, timeout=20) as client:
    ends = {}
    for name in ("one", "two", "one", "two", "one"):
      messages = ends.setdefault(name, [{"role": "user", "content": name}])
      reply = await client.post("chat/completions", json={"messages": messages, "tools": [ECHO]})
      message = reply.raise_for_status().json()["choices"][0]["message"]
      called = message["tool_calls"][0]["id"]
      messages += [message, {"role": "tool", "tool_call_id": called, "content": name}]
    messages[0] = {"role": "user", "content": "a summary"}  # another history for the last answer
    await client.post("chat/completions", json={"messages": messages, "tools": [ECHO]})
  return 1.0


def test_conversations_that_take_turns(roll):
  """Every step stands behind what the engine saw in front of it, whichever request came between;
  what another conversation was shown must not follow it."""
  limits = dataclasses.replace(LIMITS, max_steps=9, max_invalid=9)
  policy = lambda text: ToolCall("echo", {})  # noqa: E731
  (trajectory,), stats, engine = roll(_takes_turns, limits=limits, policy=policy)
  assert not stats.failures
  assert len(trajectory.parts) == 6
  assert contexts(trajectory) == [seen for seen, _ in engine.turns]
  assert [s.tokens.tolist() for s in trajectory.steps] == [ids for _, ids in engine.turns]
  assert trajectory.steps[-1].reward == 1.0


def test_a_stop_ends_runs_that_are_under_way(roll):
  async def run(task, base_url, api_key):
    await asyncio.sleep(30)

  started = time.monotonic()
  with pytest.raises(Interrupted):
    roll(run, should_stop=lambda: time.monotonic() - started > 0.2)
  assert time.monotonic() - started < 5


def test_the_agent_of_the_page_works_with_the_official_client(chat_format, tmp_path):
  """The page's thirty lines are what users begin with."""
  pytest.importorskip("openai")
  page = (fakes.ROOT / "docs" / "harness.md").read_text()
  agent, lines = (
    textwrap.dedent(block)
    for block in re.findall(r"\n\n((?:    .*\n|\n)+)", page)
    if "async def run" in block or '{"id"' in block
  )
  (tmp_path / "agent.py").write_text(agent)
  (tmp_path / "tasks.jsonl").write_text(lines)
  environment = harness.Harness(str(tmp_path / "agent.py"), tmp_path / "tasks.jsonl", 0.0, 30.0)

  def policy(text):
    task, *results = text.split("<|result|>")
    factors = {"a": 12, "b": 12} if "12" in task else {"a": 7, "b": 8}
    return Finish(results[0].partition("<")[0]) if results else ToolCall("multiply", factors)

  engine = fakes.ScriptedEngine(chat_format, policy, size=400)
  limits = dataclasses.replace(LIMITS, max_step_tokens=60, max_tokens=400)
  setting = Setting(engine, None, environment, chat_format, limits, None, Sampling(0, 0, 1.0))
  tasks = [*environment.tasks("train"), *environment.tasks("heldout")]
  trajectories, stats = harness.rollout(setting, [(task, 0) for task in tasks])
  assert not stats.failures
  assert [(t.task_id, t.solved, len(t.steps)) for t in trajectories] == [("t1", 1, 2), ("t2", 1, 2)]
