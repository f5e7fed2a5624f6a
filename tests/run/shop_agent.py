"""An agent for environment 'harness': the shop's tasks over HTTP, its tools called by the client.

It speaks through the official client where that is installed (extra `openai`), else as that does.
It does what a chain does: a malformed turn is told its mistake, a call its result and what became
of it. Rewards by call are those of the rules, from the client's own record.
"""

import asyncio
import functools
import json

import httpx
import tiny

from steptool_jax.environments import nested_api
from steptool_jax.rewards import assembly
from steptool_jax.simulators.runner import ToolRunner
from steptool_jax.types import (
  Code,
  Finish,
  Malformed,
  Observation,
  Status,
  Step,
  ToolCall,
  Trajectory,
)

try:
  import openai
except ImportError:
  openai = None

CONFIG = tiny.make("calls")
BUDGETS = {
  "step_budget": Status.STEP_BUDGET,
  "context_length_exceeded": Status.TOKEN_BUDGET,
  "gave_up": Status.GAVE_UP,
}


@functools.cache
def shop():
  environment = nested_api.from_config(CONFIG, None)
  tasks = {t.id: t for split in ("train", "heldout") for t in environment.tasks(split)}
  return environment, tasks, ToolRunner(timeout_s=30, workers=4)


def lines(split):
  """The tasks file of a split."""
  return [json.dumps({"id": t.id, "split": split}) for t in shop()[0].tasks(split)]


def tools_of(task):
  return [
    {
      "type": "function",
      "function": {"name": t.name, "description": t.description, "parameters": dict(t.parameters)},
    }
    for t in task.tools
  ]


async def ask_by_hand(client, request):
  """(the model's message, None), or (None, the error's code)."""
  reply = (await client.post("chat/completions", json={"model": "any", **request})).json()
  if "error" in reply:
    return None, reply["error"]["code"]
  return reply["choices"][0]["message"], None


async def ask_officially(client, request):
  """The same, of openai.AsyncOpenAI."""
  try:
    reply = await client.chat.completions.create(model="any", **request)
  except openai.BadRequestError as error:
    return None, error.code
  return reply.choices[0].message.model_dump(exclude_none=True), None


def connected(base_url, api_key):
  """(client, how it is asked)."""
  if openai is not None:
    given = {"base_url": base_url, "api_key": api_key, "timeout": 60, "max_retries": 0}
    return openai.AsyncOpenAI(**given), ask_officially
  headers = {"Authorization": f"Bearer {api_key}"}
  return httpx.AsyncClient(base_url=base_url, headers=headers, timeout=60), ask_by_hand


async def run(task, base_url, api_key):
  environment, tasks, runner = shop()
  spec = tasks[task["id"]]
  session = environment.open(spec, 0)
  messages, steps = [{"role": "user", "content": spec.query}], []
  status, answer = None, None
  client, ask = connected(base_url, api_key)
  async with client:
    while status is None:
      request = {"messages": messages, "tools": tools_of(spec), "temperature": 0}
      message, refused = await ask(client, request)
      if refused is not None:
        status = BUDGETS[refused]
        break
      messages.append(message)
      kind = message["action"]["kind"]
      if kind == "malformed":
        reason = message["action"]["reason"]
        text = json.dumps({"error": f"malformed action: {reason}"}, ensure_ascii=False)
        steps.append((Malformed(reason), Observation(text, Code.MALFORMED)))
        messages.append({"role": "user", "content": text})
      elif kind == "call":
        (called,) = message["tool_calls"]
        function = called["function"]
        call = ToolCall(function["name"], json.loads(function["arguments"]))
        observation = await asyncio.wrap_future(runner.submit(session, call))
        steps.append((call, observation))
        shown = {"content": observation.text, "code": observation.code}
        messages.append({"role": "tool", "tool_call_id": called["id"]} | shown)
      else:
        answer = message["content"] if kind == "answer" else None
        steps.append((Finish(message["content"], kind == "gave_up"), None))
        status = Status.ANSWERED if kind == "answer" else Status.GAVE_UP
  solved = session.grade(answer)
  taken = tuple(Step((), (), *step) for step in steps)
  done = Trajectory(spec.id, 0, (), taken, status, solved)
  (paid,) = assembly.pay([spec], [done], CONFIG.rewards)
  return {"solved": solved, "rewards": [step.reward for step in paid.steps]}
