"""Python functions as tools: schema from the signature, validated arguments, bounded observations.

`tool` derives the ToolSpec, `Toolbox` answers a call with an Observation and never raises for what
a tool does. `ToolRunner` (simulators/runner.py) adds threads, time-outs and retries.
"""

import copy
import dataclasses
import functools
import inspect
import itertools
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, Union

import docstring_parser
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
from steptool_jax.simulators.schemas import validator
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


# What says of which schema the parts of a value are.
_INSIDE = frozenset({"properties", "additionalProperties", "prefixItems", "items"})
_HINTS = "str, int, float, bool, list, tuple, dict, Literal"
_BASIC = {
  str: {"type": "string"},
  int: {"type": "integer"},
  float: {"type": "number"},
  bool: {"type": "boolean"},
  list: {"type": "array"},
  tuple: {"type": "array"},
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
  if origin in (list, dict, tuple) and not args:  # typing.List, typing.Dict, typing.Tuple
    return dict(_BASIC[origin])
  if origin is list:
    return {"type": "array", "items": _schema_of(args[0])}
  if origin is dict:
    if args[0] is not str:
      raise TypeError("dict keys must be str")
    return {"type": "object", "additionalProperties": _schema_of(args[1])}
  if origin is tuple and args[-1] is Ellipsis:
    return {"type": "array", "items": _schema_of(args[0])}
  if origin is tuple:
    items = [_schema_of(a) for a in args]
    return {"type": "array", "prefixItems": items, "minItems": len(args), "maxItems": len(args)}
  raise TypeError(f"no JSON type for {hint!r}")


def _read_docstring(doc: str) -> tuple[str, dict[str, str]]:
  """(description, {parameter: text}) of a docstring in Google's, NumPy's or Sphinx's style."""
  parsed = docstring_parser.parse(doc)
  words = " ".join(filter(None, (parsed.short_description, parsed.long_description)))
  texts = {p.arg_name: " ".join((p.description or "").split()) for p in parsed.params}
  return " ".join(words.split()), texts


def tool(function: Callable[..., Any]) -> Tool:
  """(ToolSpec, function) with the JSON schema of the signature.

  Hints may be str, int, float, bool, list[...], tuple[...], dict[str, ...], Literal, Optional /
  unions of these; a default of None makes any of them optional. Raises ValueError naming the
  function and the parameter when no schema can be derived.
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
  properties, required, tuples = {}, [], {}
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
      raise ValueError(
        f"{at}: {error}; use str, int, float, bool, list, tuple, dict, Literal"
      ) from error
    if (made := _tuples_in(hints[parameter.name])) is not None:
      tuples[parameter.name] = made
    if parameter.default is None and not _accepts(schema, None):
      schema = {"anyOf": [schema, dict(_BASIC[type(None)])]}
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
  if tuples:
    function = _with_tuples(function, tuples)
  return Tool(ToolSpec(name, description, parameters), function)


def _tuples_in(hint: Any) -> Callable[[Any], Any] | None:
  """What makes tuples of a value's lists where the hint has tuples; None where it has none."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is tuple or origin is tuple:
    first = [_tuples_in(a) for a in args if a is not Ellipsis]
    same = not args or args[-1] is Ellipsis
    made = itertools.repeat(first[0] if first else None) if same else first
    return lambda value: (
      tuple(f(v) if f else v for f, v in zip(made, value, strict=False))
      if isinstance(value, list)
      else value
    )
  if origin in (Union, types.UnionType):
    kinds = [(_schema_of(a), f) for a in args if (f := _tuples_in(a)) is not None]

    def chosen(value: Any) -> Any:
      return next((f(value) for schema, f in kinds if _accepts(schema, value)), value)

    return chosen if kinds else None
  inner = _tuples_in(args[-1]) if origin in (list, dict) and args else None
  if inner is None:
    return None
  if origin is list:
    return lambda value: [inner(v) for v in value] if isinstance(value, list) else value
  return lambda value: {k: inner(v) for k, v in value.items()} if isinstance(value, dict) else value


def _with_tuples(
  function: Callable[..., Any], tuples: Mapping[str, Callable[[Any], Any]]
) -> Callable[..., Any]:
  """The function with lists, which is what JSON has, as the tuples that its hints ask for."""

  @functools.wraps(function)
  def called(*args: Any, **arguments: Any) -> Any:
    made = {k: tuples[k](v) if k in tuples else v for k, v in arguments.items()}
    return function(*args, **made)

  return called


def _accepts(schema: Mapping[str, Any], value: Any) -> bool:
  return jsonschema.Draft202012Validator(schema).is_valid(value)


def whole_numbers(checked: Any, value: Any) -> Any:
  """The same valid value with an int where the schema asks for an integer and JSON said 2.0.

  checked: the schema's validator, which knows what its references mean.
  """
  schema = checked.schema
  if not isinstance(schema, Mapping):
    return value

  def below(part: Any, inner: Any) -> Any:
    return whole_numbers(checked.evolve(schema=part), inner) if part is not None else inner

  if isinstance(value, (dict, list)) and not _INSIDE & schema.keys():
    kinds = schema.get("anyOf", ())
    kind = next((k for k in kinds if checked.evolve(schema=k).is_valid(value)), None)
    return below(kind, value)
  if isinstance(value, float) and value.is_integer():
    kinds = [schema, *schema.get("anyOf", ())]
    named = [kind.get("type") for kind in kinds if isinstance(kind, Mapping)]
    wanted = {t for name in named for t in (name if isinstance(name, list) else [name])}
    return int(value) if "integer" in wanted and "number" not in wanted else value
  if isinstance(value, dict):
    known, other = schema.get("properties", {}), schema.get("additionalProperties")
    return {k: below(known.get(k, other), v) for k, v in value.items()}
  if isinstance(value, list):
    first, rest = schema.get("prefixItems", ()), schema.get("items")
    return [below(first[n] if n < len(first) else rest, v) for n, v in enumerate(value)]
  return value


def _says_error(value: Any) -> bool:
  error = value.get("error") if isinstance(value, Mapping) else None
  # Numbers may be a result, as the error of a fit.
  texts = isinstance(error, list) and any(isinstance(e, (str, Mapping)) for e in error)
  return texts or error is True or (isinstance(error, (str, Mapping)) and bool(error))


def _parsed(value: Any) -> Any:
  """What a text of JSON says, where it is an object or a list."""
  if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
    return value
  try:
    return json.loads(value, parse_constant=str)
  except (ValueError, RecursionError):
    return value


def _reason(error: jsonschema.ValidationError) -> str:
  path = ".".join(str(p) for p in error.absolute_path)
  message = clean_text(error.message, 160)  # it quotes the argument itself, which may be huge
  return f"{path}: {message}" if path else message


class Toolbox:
  """Named tools that answer calls. Holds no state of its own: thread-safe if the tools are.

  A tool that raises has failed, and so has one that returns {"error": …} with a text, an object, a
  list of these, or true.
  A text that is a JSON object or list counts as this object or list; the model sees the text.
  digest: of the tools' state, None where it cannot be compared; a call after which it is another
  one has changed the state. A tool that returns a Result says itself whether it did.
  """

  def __init__(
    self,
    tools: Iterable[Tool],
    max_observation_chars: int = 1024,
    digest: Callable[[], bytes | None] = lambda: None,
  ):
    """ValueError for two tools of one name or an invalid schema."""
    self._digest = digest
    if max_observation_chars < 8:
      raise ValueError(f"max_observation_chars is {max_observation_chars}: must be at least 8")
    self._limit = max_observation_chars
    self._tools: dict[str, tuple[Callable[..., Any], Any]] = {}
    specs = []
    for spec, function in tools:
      if spec.name in self._tools:
        raise ValueError(f"two tools are named {spec.name!r}: rename one")
      self._tools[spec.name] = (function, validator(spec))
      specs.append(spec)
    self.specs: tuple[ToolSpec, ...] = tuple(specs)

  def call(self, call: ToolCall) -> Observation:
    """Validates, runs and renders one call; always answers, never raises."""
    if call.name not in self._tools:
      return self._failure(Code.UNKNOWN_TOOL, f"no tool named {call.name}")
    function, schema = self._tools[call.name]
    if not isinstance(call.arguments, Mapping):
      return self._failure(Code.BAD_ARGUMENTS, "arguments must be an object")
    try:
      # A copy: what a tool does to its arguments is not what the policy has sampled.
      arguments = copy.deepcopy(dict(call.arguments))
      wrong = jsonschema.exceptions.best_match(schema.iter_errors(arguments))
    except RecursionError:
      return self._failure(Code.BAD_ARGUMENTS, "arguments are nested too deeply")
    if wrong is not None:
      return self._failure(Code.BAD_ARGUMENTS, _reason(wrong))
    try:
      before = self._digest()
      result = function(**whole_numbers(schema, arguments))
      if not isinstance(result, Result):
        result = Result(result, changed=before is not None and self._digest() != before)
      # A procedure without a result still did something: an empty answer would look like a no-op.
      whole = "ok" if result.value is None else result.value
      text = render(as_json(whole, self._limit), self._limit)
      value = as_json(_parsed(whole), self._limit)  # what is cut is no JSON any more
      if _says_error(value):
        return Observation(text, Code.TOOL_ERROR, changed=result.changed)
    # SystemExit: a tool that calls sys.exit() must not take its worker along.
    except (Exception, SystemExit) as error:
      return self._failure(code_of(error), _message(error))
    return Observation(text, Code.OK, value, result.changed)

  def _failure(self, code: Code, reason: str) -> Observation:
    return Observation(clean_text(f"error: {reason}", self._limit), code)


def _message(error: BaseException) -> str:
  try:
    text = str(error)
  except Exception:  # an exception whose __str__ raises
    text = ""
  if code_of(error) is not Code.TOOL_ERROR and text:
    return text
  return f"{type(error).__name__}: {text}" if text else type(error).__name__
