"""Official answer files -> the converted form that evaluators read: {query id: converted answer}.

Where the official converter draws a chain at random (several tries without an answer, a tree
without an answer and without giving up), this one takes the last.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steptool_jax.dialogue.parser import FINISH

_Json = dict[str, Any]


def convert(answer: Mapping[str, Any], method: str, where: str = "answer") -> _Json:
  """One answer file's content -> {query, available_tools, answer}, as the official converter.

  Reads function_call and tool_calls messages. ValueError that names `where` and the field.
  """
  try:
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
  except KeyError as error:
    raise ValueError(f"{where}: the field {error} is missing") from None
  except (TypeError, IndexError, AttributeError) as error:
    raise ValueError(f"{where}: is not an official answer ({error})") from None


def convert_folder(folder: str | Path, method: str) -> dict[str, _Json]:
  """{query id: converted answer} of all `<query id>_<method>.json` in a folder, by file name."""
  folder = Path(folder)
  paths = sorted(folder.glob(f"*_{method}.json"))
  if not paths:
    raise FileNotFoundError(f"{folder} holds no answer file *_{method}.json")
  out = {}
  for path in paths:
    try:
      answer = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
      raise ValueError(f"{path} is not valid JSON ({error}): write or fetch it again") from None
    out[path.name.removesuffix(f"_{method}.json")] = convert(answer, method, str(path))
  return out


def _tool(name: str, arguments: Any, response: Any) -> tuple[str, _Json]:
  return "tool", {"name": name, "arguments": arguments, "response": response}


def _of_messages(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
  """Turns of the model: a call with its response (a thought beside it is dropped), or a text."""
  for index, message in enumerate(messages):
    if message["role"] != "assistant":
      continue
    behind = messages[index + 1 :]
    if "function_call" in message:
      call = message["function_call"]
      answered = call["name"] != FINISH and bool(behind)
      yield _tool(call["name"], call["arguments"], behind[0]["content"] if answered else "")
    elif message.get("tool_calls"):
      by_id = {m.get("tool_call_id"): m["content"] for m in behind if m["role"] == "tool"}
      for entry in message["tool_calls"]:
        call = entry["function"]
        if call["name"] == FINISH:
          yield _tool(FINISH, call["arguments"], "")
          break
        if entry["id"] in by_id:
          yield _tool(call["name"], call["arguments"], by_id[entry["id"]])
    else:
      yield "assistant", message["content"]


def _of_nodes(nodes: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
  for index, node in enumerate(nodes):
    if node["node_type"] == "Thought":
      yield "assistant", node["description"]
    elif node["node_type"] == "Action":
      given = nodes[index + 1]
      yield _tool(node["description"], given["description"], given["observation"])
    elif node["node_type"] != "Action Input":
      raise TypeError(f"node_type {node['node_type']!r}")


def _last_path(root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  out = []
  while root["children"]:
    root = root["children"][-1]
    out.append(root)
  return out
