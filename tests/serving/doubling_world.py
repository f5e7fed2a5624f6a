"""A taskset of verifiers with an agent of its own, which asks in-process; tests/serving's alone."""

import httpx
import verifiers.v1 as vf

ECHO = {"type": "function", "function": {"name": "echo", "parameters": {"type": "object"}}}


class Data(vf.TaskData):
  want: int


class DoubleTask(vf.Task[Data]):
  @vf.reward
  async def right(self, trace) -> float:
    return float(trace.last_reply == str(self.data.want))

  @vf.reward(weight=0.5)
  async def brief(self, trace) -> float:
    return float(trace.num_turns < 3)


class Doubles(vf.Taskset[DoubleTask]):
  def load(self):
    for k in (*range(9), 0):
      yield DoubleTask(Data(prompt=f"double {k}", want=2 * k))


class Loop(vf.Harness):
  NEEDS_CONTAINER = EXECUTES_CODE = False

  async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
    messages = [{"role": "user", "content": data.prompt}]
    headers = {"Authorization": f"Bearer {secret}"}
    async with httpx.AsyncClient(headers=headers, timeout=20) as client:
      while True:
        body = {"model": ctx.model, "messages": messages, "tools": [ECHO]}
        reply = await client.post(f"{endpoint}/chat/completions", json=body)
        reply.raise_for_status()
        message = reply.json()["choices"][0]["message"]
        messages.append({k: v for k, v in message.items() if v is not None})
        if not message.get("tool_calls"):
          return vf.ProgramResult(exit_code=0, stdout="", stderr="")
        called = message["tool_calls"][0]["id"]
        messages.append({"role": "tool", "tool_call_id": called, "content": "seven"})


__all__ = ["Doubles", "Loop"]
