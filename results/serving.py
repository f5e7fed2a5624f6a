"""The policy's server beside rollouts without one: tokens per second of 32 conversations at once.

    python results/serving.py [--rounds=5] [--agent=lean|openai] [--where=process|harness]

The quickstart's model and shop. A round samples the same 96 conversations by chain.rollout and by
clients of the server that call their tools themselves, one after the other, so that the machine's
mood hits both; the medians of the ratios count, and both must have sampled the same tokens.
`process` puts the clients into a process of their own, `harness` into that of the engine, as
environment 'harness' does. `lean` is a client of a few lines over one connection each: what is
measured is the server. `openai` (pip install openai) is the official client, its own time included.
"""

import argparse
import asyncio
import dataclasses
import functools
import json
import multiprocessing
import pathlib
import statistics
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "configs")]

TASKS, SLOTS = 96, 32


@functools.cache
def quickstart():
  import quickstart as config_file

  from steptool_jax import validation

  config = config_file.get_config()
  config.rollout.slots, config.environment.num_train, config.hang_after = SLOTS, 8 * TASKS, 0.0
  return validation.validate(config)


@functools.cache
def shop():
  from steptool_jax.environments import nested_api
  from steptool_jax.simulators.runner import ToolRunner

  environment = nested_api.from_config(quickstart(), None)
  tasks = {task.id: task for task in environment.tasks("train")}
  return environment, tasks, ToolRunner(workers=8)


def tools_of(task):
  return [
    {
      "type": "function",
      "function": {"name": t.name, "description": t.description, "parameters": dict(t.parameters)},
    }
    for t in task.tools
  ]


class Lean:
  """POST over one kept connection."""

  def __init__(self, url, key):
    host, _, self._path = url.removeprefix("http://").partition("/")
    self._host, _, self._port = host.partition(":")
    self._key = key

  async def ask(self, request):
    if not hasattr(self, "_reader"):
      self._reader, self._writer = await asyncio.open_connection(self._host, int(self._port))
    body = json.dumps(request).encode()
    head = (
      f"POST /{self._path}/chat/completions HTTP/1.1\r\nHost: {self._host}\r\n"
      f"Authorization: Bearer {self._key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    self._writer.write(head.encode() + body)
    answered = await self._reader.readuntil(b"\r\n\r\n")
    fields = dict(line.lower().split(": ", 1) for line in answered.decode().split("\r\n")[1:-2])
    return json.loads(await self._reader.readexactly(int(fields["content-length"])))

  async def close(self):
    if hasattr(self, "_writer"):
      self._writer.close()


class Official:
  """The openai client; all of a process share its connections."""

  def __init__(self, url, key):
    self._client = _official().with_options(base_url=url, api_key=key)

  async def ask(self, request):
    import openai

    try:
      return (await self._client.chat.completions.create(**request)).model_dump()
    except openai.BadRequestError as error:
      return {"error": error.body}

  async def close(self):
    pass


@functools.cache
def _official():
  import openai

  return openai.AsyncOpenAI(api_key="", base_url="http://localhost", max_retries=0)


AGENT = Lean


async def run(task, base_url, api_key):
  """The agent: what a chain does, over HTTP."""
  from steptool_jax.types import ToolCall

  environment, tasks, runner = shop()
  spec = tasks[task["id"]]
  session, client = environment.open(spec, 0), AGENT(base_url, api_key)
  messages, tools = [{"role": "user", "content": spec.query}], tools_of(spec)
  answer, kind = None, ""
  while kind not in ("answer", "gave_up"):
    reply = await client.ask({"model": "policy", "messages": messages, "tools": tools})
    if "error" in reply:
      break
    message = reply["choices"][0]["message"]
    messages.append(message)
    kind = message["action"]["kind"]
    if kind == "malformed":
      text = json.dumps({"error": f"malformed action: {message['action']['reason']}"})
      messages.append({"role": "user", "content": text})
    elif kind == "call":
      (called,) = message["tool_calls"]
      function = called["function"]
      call = ToolCall(function["name"], json.loads(function["arguments"]))
      seen = await asyncio.wrap_future(runner.submit(session, call))
      result = {"role": "tool", "tool_call_id": called["id"], "content": seen.text}
      messages.append(result | {"code": str(seen.code)})
    else:
      answer = message["content"] if kind == "answer" else None
  await client.close()
  return session.grade(answer)


def clients(agent, requests, replies):
  """The process of the clients: runs what it is sent."""
  global AGENT
  AGENT = agent
  shop()

  async def serve():
    loop = asyncio.get_running_loop()

    async def one(index, *arguments):
      replies.put((index, await run(*arguments)))

    running = set()
    while (item := await loop.run_in_executor(None, requests.get)) is not None:
      running.add(asyncio.ensure_future(one(*item)))

  asyncio.run(serve())


class Elsewhere:
  """`run` in the process of the clients."""

  def __init__(self, agent):
    context = multiprocessing.get_context("spawn")
    self._requests, self._replies = context.Queue(), context.Queue()
    process = context.Process(
      target=clients, args=(agent, self._requests, self._replies), daemon=True
    )
    process.start()
    self._waiting, self._count = {}, 0
    threading.Thread(target=self._hear, daemon=True).start()

  def _hear(self):
    while True:
      index, reward = self._replies.get()
      loop, future = self._waiting.pop(index)
      loop.call_soon_threadsafe(future.set_result, reward)

  async def run(self, *arguments):
    loop = asyncio.get_running_loop()
    self._count += 1
    self._waiting[self._count] = loop, loop.create_future()
    future = self._waiting[self._count][1]
    self._requests.put((self._count, *arguments))
    return await future


def main():
  global AGENT
  arguments = argparse.ArgumentParser()
  arguments.add_argument("--rounds", type=int, default=5)
  arguments.add_argument("--agent", choices=("lean", "openai"), default="lean")
  arguments.add_argument("--where", choices=("process", "harness"), default="process")
  given = arguments.parse_args()
  AGENT = {"lean": Lean, "openai": Official}[given.agent]

  from steptool_jax.rollout import chain
  from steptool_jax.rollout.setting import Sampling, Setting
  from steptool_jax.run.parts import build, opening
  from steptool_jax.serving import harness

  config = quickstart()
  environment = harness.Harness.__new__(harness.Harness)
  environment.timeout_s = 600.0
  environment.run = Elsewhere(AGENT).run if given.where == "process" else run
  ratios, rates, share = [], [], []
  with (
    tempfile.TemporaryDirectory() as folder,
    opening.open_parts(config, pathlib.Path(folder), opening.Stop()) as parts,
  ):
    variables = build.initial_variables(config, parts.policy, parts.mesh)
    setting = Setting(
      *(parts.engine, variables, parts.environment, parts.policy.chat_format),
      *(parts.limits, parts.runner, Sampling(0, 0, 1.0)),
    )
    tasks = [
      dataclasses.replace(task, metadata=dict(task.metadata) | {"record": {"id": task.id}})
      for task in parts.environment.tasks("train")[:TASKS]
    ]
    served = dataclasses.replace(setting, environment=environment)
    for number in range(-2, given.rounds):  # two that compile
      sampling = Sampling(0, max(number, 0), 1.0)
      jobs = [(task, 0) for task in tasks]
      found, seconds = [], []
      for rollout, with_it in ((chain.rollout, setting), (harness.rollout, served)):
        started = time.monotonic()
        trajectories, stats = rollout(dataclasses.replace(with_it, sampling=sampling), jobs)
        seconds.append(time.monotonic() - started)
        found.append([[s.tokens.tolist() for s in t.steps] for t in trajectories])
        assert not stats.failures, stats.failures[0]
      if number < 0:
        continue
      same = sum(mine == theirs for mine, theirs in zip(*found, strict=True)) / TASKS
      tokens = [sum(len(s) for t in f for s in t) for f in found]
      rate = [t / s for t, s in zip(tokens, seconds, strict=True)]
      ratios.append(rate[1] / rate[0])
      rates.append(rate)
      share.append(same)
      print(
        f"round {number}: chain {rate[0]:.0f} tokens/s, server {rate[1]:.0f}, "
        f"{ratios[-1]:.2f} of it; {stats.device_seconds / seconds[1]:.0%} of the time on the "
        f"device, {stats.tool_wait_seconds / seconds[1]:.0%} waiting; {same:.0%} the same",
        flush=True,
      )
  chain_rate, served_rate = (statistics.median(r[k] for r in rates) for k in (0, 1))
  print(
    f"{given.agent} client in {given.where}: median {statistics.median(ratios):.3f} of "
    f"chain.rollout ({served_rate:.0f} and {chain_rate:.0f} tokens/s)"
  )


if __name__ == "__main__":
  main()
