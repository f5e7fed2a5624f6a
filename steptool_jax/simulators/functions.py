"""Python functions as tools: schema from the signature, validated arguments, bounded observations.

`tool` derives the ToolSpec, `Toolbox` answers a call with an Observation and never raises for what
a tool does. `ToolRunner` (simulators/runner.py) adds threads, time-outs and retries.
"""

import dataclasses
import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, Union

import jsonschema

from steptool_jax.simulators.errors import (
  InfrastructureError,
  NotFound,
  RateLimited,
  Unavailable,
  code_of,
)
from steptool_jax.simulators.render import as_json, clean_text, render
from steptool_jax.simulators.runner import ToolRunner
from steptool_jax.types import Code, Observation, ToolCall, ToolSpec

__all__ = [
  "InfrastructureError",
  "NotFound",
  "RateLimited",
  "Result",
  "Tool",
  "ToolRunner",
  "Toolbox",
  "Unavailable",
  "tool",
]


@dataclasses.dataclass(frozen=True)
class Result:
  """What a tool returns when it wants to say that it changed the state."""

  value: Any
  changed: bool = False


class Tool(NamedTuple):
  spec: ToolSpec
  function: Callable[..., Any]


_BASIC = {
  str: {"type": "string"},
  int: {"type": "integer"},
  float: {"type": "number"},
  bool: {"type": "boolean"},
  list: {"type": "array"},
  dict: {"type": "object"},
  type(None): {"type": "null"},
  Any: {},
}


def _schema_of(hint: Any) -> dict[str, Any]:
  """JSON schema of one type hint; TypeError when there is none."""
  if isinstance(hint, typing.Hashable) and hint in _BASIC:
    return dict(_BASIC[hint])
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Literal:
    if not all(isinstance(a, (str, int, bool, type(None))) for a in args):
      raise TypeError("Literal of something else than str, int, bool, None")
    return {"enum": list(args)}
  if origin in (Union, types.UnionType):
    return {"anyOf": [_schema_of(a) for a in args]}
  if origin is list:
    return {"type": "array", "items": _schema_of(args[0])}
  if origin is dict:
    if args[0] is not str:
      raise TypeError("dict keys must be str")
    return {"type": "object", "additionalProperties": _schema_of(args[1])}
  raise TypeError(f"no JSON type for {hint!r}")


_SECTION = re.compile(r"^(Args|Arguments|Returns?|Raises|Yields|Examples?|Notes?):\s*$")
_ARGUMENT = re.compile(r"^(\w+)(?:\s*\([^)]*\))?:\s*(.*)$")


def _read_docstring(doc: str) -> tuple[str, dict[str, str]]:
  """(description, {parameter: text}) of a Google-style docstring."""
  description: list[str] = []
  arguments: dict[str, str] = {}
  section, indent, current = "", 0, ""
  for line in doc.splitlines():
    heading = _SECTION.match(line.strip())
    if heading and line == line.lstrip():
      section, indent, current = heading.group(1), 0, ""
    elif not section:
      description.append(line.strip())
    elif section in ("Args", "Arguments") and line.strip():
      depth = len(line) - len(line.lstrip())
      indent = indent or depth
      match = _ARGUMENT.match(line.strip())
      if depth <= indent and match:
        current = match.group(1)
        arguments[current] = match.group(2)
      elif current:
        arguments[current] = f"{arguments[current]} {line.strip()}".strip()
  return " ".join(filter(None, description)), arguments


def tool(function: Callable[..., Any]) -> Tool:
  """(ToolSpec, function) with the JSON schema of the signature.

  Hints may be str, int, float, bool, list[...], dict[str, ...], Literal, Optional / unions of
  these. Raises ValueError naming the function and the parameter when no schema can be derived.
  """
  name = getattr(function, "__name__", "")
  where = f"tool {name or function!r}"
  if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
    raise ValueError(f"{where}: needs a plain ASCII name; write it as a named function (def)")
  if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
    raise ValueError(f"{where}: is async; tools run in threads, write a plain function")
  try:
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function)
  except (TypeError, ValueError, NameError) as error:
    raise ValueError(f"{where}: signature cannot be read: {error}") from error
  description, texts = _read_docstring(inspect.getdoc(function) or "")
  unknown = sorted(set(texts) - set(signature.parameters))
  if unknown:
    raise ValueError(f"{where}: docstring describes {unknown[0]!r}, which is no parameter")
  properties, required = {}, []
  for parameter in signature.parameters.values():
    at = f"{where}, parameter {parameter.name!r}"
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
      raise ValueError(f"{at}: * and ** have no schema; name every parameter")
    if parameter.kind is parameter.POSITIONAL_ONLY:
      raise ValueError(f"{at}: is positional-only; tools are called by keyword")
    if parameter.name not in hints:
      raise ValueError(f"{at}: has no type hint; add one")
    try:
      schema = _schema_of(hints[parameter.name])
    except TypeError as error:
      raise ValueError(f"{at}: {error}; use str, int, float, bool, list, dict, Literal") from error
    if texts.get(parameter.name):
      schema["description"] = texts[parameter.name]
    if parameter.default is parameter.empty:
      required.append(parameter.name)
    else:
      try:
        schema["default"] = json.loads(json.dumps(parameter.default, allow_nan=False))
      except (TypeError, ValueError) as error:
        raise ValueError(f"{at}: its default is not JSON: {error}") from error
    properties[parameter.name] = schema
  parameters = {
    "type": "object",
    "properties": properties,
    "required": required,
    "additionalProperties": False,
  }
  return Tool(ToolSpec(name, description, parameters), function)


def _reason(error: jsonschema.ValidationError) -> str:
  path = ".".join(str(p) for p in error.absolute_path)
  message = clean_text(error.message, 160)  # it quotes the argument itself, which may be huge
  return f"{path}: {message}" if path else message


class Toolbox:
  """Named tools that answer calls. Holds no state of its own: thread-safe if the tools are."""

  def __init__(self, tools: Iterable[Tool], max_observation_chars: int = 1024):
    """ValueError for two tools of one name or an invalid schema."""
    if max_observation_chars < 8:
      raise ValueError(f"max_observation_chars is {max_observation_chars}: must be at least 8")
    self._limit = max_observation_chars
    self._tools: dict[str, tuple[Callable[..., Any], Any]] = {}
    specs = []
    for spec, function in tools:
      if spec.name in self._tools:
        raise ValueError(f"two tools are named {spec.name!r}: rename one")
      self._tools[spec.name] = (function, _validator(spec))
      specs.append(spec)
    self.specs: tuple[ToolSpec, ...] = tuple(specs)

  def call(self, call: ToolCall) -> Observation:
    """Validates, runs and renders one call; always answers, never raises."""
    if call.name not in self._tools:
      return self._failure(Code.UNKNOWN_TOOL, f"no tool named {call.name}")
    function, validator = self._tools[call.name]
    if not isinstance(call.arguments, Mapping):
      return self._failure(Code.BAD_ARGUMENTS, "arguments must be an object")
    arguments = dict(call.arguments)
    try:
      wrong = jsonschema.exceptions.best_match(validator.iter_errors(arguments))
    except RecursionError:
      return self._failure(Code.BAD_ARGUMENTS, "arguments are nested too deeply")
    if wrong is not None:
      return self._failure(Code.BAD_ARGUMENTS, _reason(wrong))
    try:
      result = function(**arguments)
      changed = isinstance(result, Result) and result.changed
      value = as_json(result.value if isinstance(result, Result) else result, self._limit)
      # A procedure without a result still did something: an empty answer would look like a no-op.
      value = "ok" if value is None else value
      text = render(value, self._limit)
    # SystemExit: a tool that calls sys.exit() must not take its worker along.
    except (Exception, SystemExit) as error:
      return self._failure(code_of(error), _message(error))
    return Observation(text, Code.OK, value, changed)

  def _failure(self, code: Code, reason: str) -> Observation:
    return Observation(clean_text(f"error: {reason}", self._limit), code)


# Sessions are opened by the thousand with the same specs; compiling a schema is the slow part.
@functools.lru_cache(maxsize=4096)
def _compile(schema: str) -> Any:
  parsed = json.loads(schema)
  jsonschema.Draft202012Validator.check_schema(parsed)
  return jsonschema.Draft202012Validator(parsed)


def _validator(spec: ToolSpec) -> Any:
  try:
    return _compile(json.dumps(spec.parameters))
  except jsonschema.SchemaError as error:
    raise ValueError(f"tool {spec.name!r}: invalid JSON schema: {error.message}") from error
  except (TypeError, ValueError) as error:
    raise ValueError(f"tool {spec.name!r}: its schema is not JSON: {error}") from error


def _message(error: BaseException) -> str:
  try:
    text = str(error)
  except Exception:  # an exception whose __str__ raises
    text = ""
  if code_of(error) is not Code.TOOL_ERROR and text:
    return text
  return f"{type(error).__name__}: {text}" if text else type(error).__name__
