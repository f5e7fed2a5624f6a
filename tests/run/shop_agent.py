"""An agent for environment 'harness': the shop's tasks over HTTP, its tools called by the client.

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


async def run(task, base_url, api_key):
  environment, tasks, runner = shop()
  spec = tasks[task["id"]]
  session = environment.open(spec, 0)
  messages, steps = [{"role": "user", "content": spec.query}], []
  headers, status, answer = {"Authorization": f"Bearer {api_key}"}, None, None
  async with httpx.AsyncClient(base_url=base_url, headers=headers, timeout=60) as client:
    while status is None:
      request = {"model": "any", "messages": messages, "tools": tools_of(spec), "temperature": 0}
      reply = (await client.post("chat/completions", json=request)).json()
      if "error" in reply:
        status = BUDGETS[reply["error"]["code"]]
        break
      message = reply["choices"][0]["message"]
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
