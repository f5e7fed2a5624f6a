"""The converted form of answers, which evaluators read: {query id: converted answer}.

Where the official converter draws a chain at random (several tries without an answer, a tree
without an answer and without giving up), this one takes the last.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from steptool_jax.data.reading import Path, field, objects, typed
from steptool_jax.dialogue.parser import FINISH
from steptool_jax.toolbench.formats.judged import Result, StoredStep, Verdict, stored_step

_Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Converted:
  """One entry of a converted file; `chain` is the nested answer_details, from the root down."""

  query_id: str
  query: str
  tools: tuple[Mapping[str, Any], ...]
  method: str
  total_steps: int
  final_answer: str
  chain: tuple[tuple[str, str | StoredStep], ...]  # (role, text or, where role is tool, the call)

  @property
  def tool_names(self) -> tuple[str, ...]:
    return tuple(str(tool.get("function", tool).get("name", "")) for tool in self.tools)

  def judged(self, verdicts: Sequence[Verdict]) -> Result:
    """The answer with its verdicts as the official evaluator notes it: only calls count."""
    steps = tuple(message for _, message in self.chain if isinstance(message, StoredStep))
    final = steps[-1] if steps else StoredStep("", "", "")
    return Result(self.query_id, self.query, self.tool_names, steps, final, tuple(verdicts))


def read_converted(path: Path) -> dict[str, Converted]:
  """A converted file, query id -> Converted; the nested answer must be a chain."""
  out = {}
  for where, query_id, entry in objects(path, ("query", "available_tools", "answer")):
    answer = typed(entry["answer"], dict, f"{where}, field 'answer'")
    chain: list[tuple[str, str | StoredStep]] = []
    level = field(answer, "answer_details", where)
    while level:
      place = f"{where}, answer_details, depth {len(chain)}"
      if not isinstance(level, list) or len(level) != 1:
        raise ValueError(f"{place}: must be a list of one message: a chain, not a tree")
      role, message = field(level[0], "role", place), field(level[0], "message", place)
      if role == "tool":
        chain.append((role, stored_step(message, place)))
      else:
        chain.append((str(role), typed(message, str, place)))
      level = field(level[0], "next", place)
    tools = typed(entry["available_tools"], list, f"{where}, field 'available_tools'")
    for tool in tools:
      place = f"{where}, field 'available_tools'"
      typed(typed(tool, dict, place).get("function", tool), dict, place)
    out[query_id] = Converted(
      query_id,
      typed(entry["query"], str, f"{where}, field 'query'"),
      tuple(tools),
      typed(field(answer, "method", where), str, f"{where}, field 'method'"),
      typed(field(answer, "total_steps", where), int, f"{where}, field 'total_steps'"),
      typed(field(answer, "final_answer", where), str, f"{where}, field 'final_answer'"),
      tuple(chain),
    )
  return out


def convert(answer: Mapping[str, Any], method: str) -> _Json:
  """An answer as answers.py makes it -> {query, available_tools, answer}, as officially."""
  generation = answer["answer_generation"]
  if generation["valid_data"]:
    steps = _of_messages(generation["train_messages"][-1])
  elif "trys" in answer:
    steps = _of_nodes(answer["trys"][-1]["chain"])
  else:
    steps = _of_nodes(_last_path(answer["tree"]["tree"]))
  nodes = [("system", ""), ("user", ""), *steps]
  details: list[_Json] = []
  for role, message in reversed(nodes):
    details = [{"role": role, "message": message, "next": details}]
  return {
    "query": generation["query"],
    "available_tools": generation["function"],
    "answer": {
      "method": method,
      "total_steps": len(nodes),
      "final_answer": generation["final_answer"],
      "answer_details": details,
    },
  }


def _tool(name: str, arguments: Any, response: Any) -> tuple[str, _Json]:
  return "tool", {"name": name, "arguments": arguments, "response": response}


def _of_messages(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
  """Turns of the model: a call with its response (a thought beside it is dropped), or a text."""
  for index, message in enumerate(messages):
    if message["role"] != "assistant":
      continue
    after = messages[index + 1 :]
    if "function_call" in message:
      call = message["function_call"]
      answered = call["name"] != FINISH and bool(after)
      yield _tool(call["name"], call["arguments"], after[0]["content"] if answered else "")
    else:
      yield "assistant", message["content"]


def _of_nodes(nodes: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
  for index, node in enumerate(nodes):
    if node["node_type"] == "Thought":
      yield "assistant", node["description"]
    elif node["node_type"] == "Action":
      given = nodes[index + 1]
      yield _tool(node["description"], given["description"], given["observation"])


def _last_path(root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  out = []
  while root["children"]:
    root = root["children"][-1]
    out.append(root)
  return out
