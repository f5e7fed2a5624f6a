"""What a ToolBench model is shown: function names, JSON schemas and the system text.

Names and schemas follow the official rules (also the cut at 64 characters), with three repairs:
two APIs never share a function name, optional parameters are kept where none is required, and a
parameter's type is matched in any case.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steptool_jax.dialogue.parser import FINISH_TOOL
from steptool_jax.toolbench.simulators.virtual import change_name, standardize
from steptool_jax.types import ToolSpec

_NAME_CHARS = 64
_DESCRIPTION_CHARS = 256
_TOOL_DESCRIPTION_CHARS = 512
_TYPES = {"number": "integer", "string": "string", "boolean": "boolean"}  # all others: string

SYSTEM = """\
You help a user by calling functions of web APIs. At each step say in a few sentences what is
known and what to do next, then call one function; its result is shown to you before the next step.
A step cannot be undone. Your output should follow this format:
Thought:
Action
Action Input:

Use only the functions listed below, by their full names. When you know enough, call Finish with
give_answer and everything the user asked for: only that text reaches the user. When the functions
keep failing or cannot help, call Finish with give_up_and_restart.
You have these tools:
{tools}
Specifically, you have access to the following APIs: {apis}"""


@dataclasses.dataclass(frozen=True)
class Prompts:
  """The texts around the facts. A checkpoint does best with the ones that it was trained on.

  system: "{tools}" becomes the numbered tools with their descriptions, "{apis}" the functions with
  their JSON schemas (as a Python literal, as officially), "{names}" the list of function names.
  function: a function's description from "{tool}" and "{description}".
  """

  system: str = SYSTEM
  function: str = 'A function of the tool "{tool}": {description}'

  def __post_init__(self):
    if not any(place in self.system for place in ("{apis}", "{names}")):
      raise ValueError("prompts.system: must contain {apis} or {names}, the place of the functions")


@dataclasses.dataclass(frozen=True)
class Api:
  """One API of a query, as the query file or the tool environment describes it."""

  category: str
  tool: str
  name: str
  description: str
  required: tuple[Mapping[str, Any], ...]  # {name, type, description, default}
  optional: tuple[Mapping[str, Any], ...]
  document: Mapping[str, Any]  # the whole entry

  @property
  def standard_tool(self) -> str:
    return standardize(self.tool)

  @property
  def standard_name(self) -> str:
    """The API's name as the server and the cache know it."""
    return change_name(standardize(self.name))

  @property
  def full_name(self) -> str:
    return f"{self.standard_name}_for_{self.standard_tool}"


def function_names(apis: Sequence[Api]) -> list[str]:
  """The function name of each API, all different.

  Officially the last 64 characters of <api>_for_<tool>; APIs that differ in front of them share a
  name there, and all calls reach the first. Here the first keeps the official name, and a later
  one gets its whole name, or a number where that is taken as well.
  """
  names: list[str] = []
  for api in apis:
    name = api.full_name[-_NAME_CHARS:]
    if name in names:
      name = api.full_name
    number = 2
    while name in names:
      name = f"{api.full_name}_{number}"
      number += 1
    names.append(name)
  return names


def tool_spec(api: Api, name: str, prompts: Prompts) -> ToolSpec:
  """The function as the model sees it; `example_value` holds a parameter's default."""
  text = api.description.strip()
  if api.name:
    text = text.replace(api.name, name)
  described = prompts.function.replace("{tool}", api.standard_tool)
  description = described.replace("{description}", text[:_DESCRIPTION_CHARS] or "None")
  properties: dict[str, Any] = {}
  listed: dict[str, list[str]] = {"required": [], "optional": []}
  for kind, parameters in (("required", api.required), ("optional", api.optional)):
    for parameter in parameters:
      key = change_name(standardize(parameter["name"]))
      if key in properties:
        continue
      properties[key] = {
        "type": _TYPES.get(str(parameter.get("type", "")).lower(), "string"),
        "description": str(parameter.get("description") or "")[:_DESCRIPTION_CHARS],
      }
      default = parameter.get("default")
      if default is not None and str(default):
        properties[key]["example_value"] = default
      listed[kind].append(key)
  return ToolSpec(name, description, {"type": "object", "properties": properties, **listed})


def system_text(
  prompts: Prompts, tools: Iterable[tuple[str, str]], functions: Sequence[ToolSpec]
) -> str:
  """The whole system text. tools: (standard name, description), repeated ones count once."""
  lines = []
  for number, (name, description) in enumerate(dict(tools).items(), start=1):
    short = description[:_TOOL_DESCRIPTION_CHARS].replace("\n", "").strip() or "None"
    lines.append(f"{number}.{name}: {short}\n")
  listed = (*functions, FINISH_TOOL)
  apis = [
    {"name": f.name, "description": f.description, "parameters": dict(f.parameters)} for f in listed
  ]
  parts = {
    "{tools}": "".join(lines),
    "{apis}": str(apis),
    "{names}": str([f.name for f in listed]),
  }
  # In one pass: a description may hold a placeholder's text.
  return re.sub(r"\{(tools|apis|names)\}", lambda match: parts[match.group()], prompts.system)
