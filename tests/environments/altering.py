"""Gold calls made wrong, for verdicts that are compared with a benchmark's own."""

import dataclasses
import random

from steptool_jax.types import ToolCall

KINDS = ("drop", "twice", "order", "value", "nowhere")


def alter(calls: list[ToolCall], k: int, kind: str, rng: random.Random) -> None:
  """Changes the list: call k left out, made twice, made of a tool that is none, made with another
  value (where it has arguments), or all in another order."""
  call = calls[k]
  if kind == "drop":
    del calls[k]
  elif kind == "twice":
    calls.insert(k, call)
  elif kind == "order":
    rng.shuffle(calls)
  elif kind == "nowhere":
    calls[k] = ToolCall("no_such_tool", {})
  elif call.arguments:
    name = rng.choice([*call.arguments])
    value = rng.choice(["zz", 3, None])
    calls[k] = dataclasses.replace(call, arguments=dict(call.arguments) | {name: value})
