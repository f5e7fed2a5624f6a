"""Tools and the task in words: what the first turns of a prompt say, whatever spells them."""

import dataclasses
import json

from steptool_jax.dialogue import parser
from steptool_jax.dialogue.signatures import signature
from steptool_jax.types import ToolSpec

Tools = tuple[ToolSpec, ...]

TASK = (
  "You solve the user's task by calling tools. Think first, then make exactly one call and wait "
  f"for its result. When you know the answer, or know that there is none, call {parser.FINISH}."
)
TASK_PARALLEL = (
  "You solve the user's task by calling tools. Think first, then make a call, or several calls "
  "that do not need one another's results, and wait for what they return. When you know the "
  f"answer, or know that there is none, call {parser.FINISH}, alone."
)
_REACT_RULES = (
  "Your output should follow this format:\nThought:\nAction\nAction Input:\n\n"
  "Action is the name of one tool, Action Input a JSON object with its arguments."
)
_SHORT_RULES = (
  "Your output should follow this format:\nThought: your thoughts\nAction: name of one tool\n"
  "Action Input: JSON object with its arguments"
)
# What Finish is for stands in the task: here it only has to be called right.
_SHORT_FINISH = dataclasses.replace(
  parser.FINISH_TOOL,
  description="Ends the task.",
  parameters={
    **parser.FINISH_TOOL.parameters,
    "properties": {
      **parser.FINISH_TOOL.parameters["properties"],
      "final_answer": {"type": "string", "description": f"needed with {parser.GIVE_ANSWER}"},
    },
  },
)


def with_finish(tools: Tools, finish: ToolSpec = parser.FINISH_TOOL) -> Tools:
  """The tools and Finish; ValueError where one of them has its name."""
  if any(tool.name == parser.FINISH for tool in tools):
    raise ValueError(
      f"tools: the name {parser.FINISH!r} is reserved, the chat format adds that tool itself"
    )
  return (*tools, finish)


def function(tool: ToolSpec) -> dict:
  """A tool's JSON schema as published models were trained on it."""
  return {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}


def signatures(tools: Tools) -> str:
  """A line a tool, Finish at last."""
  return "\n".join(map(signature, with_finish(tools, _SHORT_FINISH)))


def react_system(system: str | None, tools: Tools, tool_list: str = "json") -> str:
  """The system text of the ReAct formats: task, tools, output format; every tool once."""
  task = TASK if system is None else system
  if tool_list == "signature":
    return f"{task}\n\nTools:\n{signatures(tools)}\n\n{_SHORT_RULES}"
  schemas = json.dumps([function(t) for t in with_finish(tools)], ensure_ascii=False)
  return f"{task}\n\n{_REACT_RULES}\n\nTools, as JSON schemas: {schemas}"
