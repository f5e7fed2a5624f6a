"""Tools as lines of text that cost a fraction of their JSON schemas and say the same.

    get_stock(id: str) -> Stock and warehouse of a product.
    find(query: str "what to look for", limit?: int = 10, sort?: "price" | "name") -> Search.
    book(guest: {name: str, age?: int}, nights: list[int(minimum=1)])

`?`: may be left out; `= value`: what is taken then; a text in quotes behind a type describes it,
quoted values before it are the choices. `{a: str, ...}` takes other keys, too. A keyword without a
short form stands in brackets behind its type. References are written out where they end; a schema
that has no short form (a recursive one, a union with keywords of its own) stays JSON.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from steptool_jax.types import ToolSpec

TYPES = {"string": "str", "integer": "int", "number": "num", "boolean": "bool", "null": "null"}
_NAME = re.compile(r"[A-Za-z_$][\w$.\-]*")
# What a signature has a place for; the rest of a schema goes into brackets.
_PLACED = {"type", "enum", "const", "description", "default", "items", "properties", "required"}
_PLACED |= {"additionalProperties", "anyOf", "oneOf", "$defs", "definitions"}
_DROPPED = {"title", "$schema", "$id", "$comment"}  # say nothing that a caller needs

Chain = tuple[str, ...]  # references that were followed to come here


class _NoShortForm(Exception):
  """This schema has to stay JSON."""


class _Endless(_NoShortForm):
  """A reference leads back to itself: what holds the first of them has to stay JSON."""


def signature(tool: ToolSpec) -> str:
  """One line: `name(parameters) -> description`; no line break in it."""
  schema = dict(tool.parameters)
  try:
    said = set(schema) - _DROPPED
    # A choice between whole lists of parameters has no place in one list.
    if said - _PLACED | said & {"anyOf", "oneOf"} or schema.get("type", "object") != "object":
      raise _NoShortForm
    inner = _parameters(schema, schema, ())
  except _NoShortForm:
    inner = _json(schema)
  described = " ".join(tool.description.split())
  return f"{_name(tool.name)}({inner})" + (f" -> {described}" if described else "")


def _parameters(schema: Mapping[str, Any], root: Mapping[str, Any], chain: Chain) -> str:
  """`a: T, b?: T = value`, and `...` where other keys are taken."""
  properties, required = schema.get("properties", {}), schema.get("required", [])
  if not isinstance(properties, Mapping) or not isinstance(required, list):
    raise _NoShortForm
  if set(required) - set(properties):
    raise _NoShortForm  # required, but not described: a line of names would lose it
  parts = []
  for name, part in properties.items():
    parts.append(f"{_name(name)}{'' if name in required else '?'}: {_part(part, root, chain)}")
  more = schema.get("additionalProperties", False)
  if more is not False:
    parts.append("..." if more in (True, {}) else f"...: {_part(more, root, chain)}")
  return ", ".join(parts)


def _part(schema: Any, root: Mapping[str, Any], chain: Chain) -> str:
  """A type, its description in quotes, and `= default`."""
  whole = schema
  try:
    schema, below = _followed(schema, root, chain)
    text = _type(schema, root, below)
  except _NoShortForm as reason:
    if chain and isinstance(reason, _Endless):
      raise
    return "json " + _json(_with_definitions(whole, root))
  if schema.get("description"):
    text += " " + _json(" ".join(str(schema["description"]).split()))
  if "default" in schema:
    text += f" = {_json(schema['default'])}"
  return text


def _type(schema: Mapping[str, Any], root: Mapping[str, Any], chain: Chain) -> str:
  choices = next((schema[key] for key in ("enum", "anyOf", "oneOf") if key in schema), None)
  alone = set(schema) - {"description", "default"} - _DROPPED
  if "const" in schema:
    if alone - {"const", "type"}:
      raise _NoShortForm
    return _json(schema["const"])
  if "enum" in schema:
    # The type of an enumeration is that of its values.
    if not isinstance(choices, list) or not choices or alone - {"enum", "type"}:
      raise _NoShortForm
    return " | ".join(map(_json, choices))
  if choices is not None:
    if not isinstance(choices, list) or not choices or len(alone) > 1:
      raise _NoShortForm
    return " | ".join(_part(_bare(x), root, chain) for x in choices)
  kinds = schema.get("type", "any")
  if isinstance(kinds, list):
    if not kinds or alone - {"type"}:
      raise _NoShortForm
    return " | ".join(_of_kind(kind, {}, root, chain) for kind in kinds)
  rest = {key: value for key, value in schema.items() if key not in _PLACED | _DROPPED}
  if {"not", "allOf", "if", "$ref", "patternProperties"} & set(rest):
    raise _NoShortForm
  text = _of_kind(kinds, schema, root, chain)
  return text + (f"({', '.join(f'{k}={_json(v)}' for k, v in rest.items())})" if rest else "")


def _of_kind(kind: Any, schema: Mapping[str, Any], root: Mapping[str, Any], chain: Chain) -> str:
  inside = {"array": {"items"}, "object": {"properties", "required", "additionalProperties"}}
  found = {"items", "properties", "required", "additionalProperties"} & set(schema)
  if not isinstance(kind, str) or found - inside.get(kind, set()):
    raise _NoShortForm
  if kind == "array":
    return f"list[{_part(schema['items'], root, chain)}]" if "items" in schema else "list"
  if kind == "object":
    return "{" + _parameters(schema, root, chain) + "}" if found else "object"
  if kind != "any" and kind not in TYPES:
    raise _NoShortForm
  return TYPES.get(kind, "any")


def _bare(schema: Any) -> Any:
  """One of a union's members: a description or default of its own would look like the union's."""
  if isinstance(schema, Mapping) and {"description", "default"} & set(schema):
    raise _NoShortForm
  return schema


def _followed(
  schema: Any, root: Mapping[str, Any], chain: Chain
) -> tuple[Mapping[str, Any], Chain]:
  """The schema behind references into the tool's own definitions; beside them may stand texts."""
  while True:
    if not isinstance(schema, Mapping):
      raise _NoShortForm
    if "$ref" not in schema:
      return schema, chain
    reference = str(schema["$ref"])
    if reference in chain:
      raise _Endless
    chain = (*chain, reference)
    beside = {key: value for key, value in schema.items() if key != "$ref"}
    target: Any = root
    for key in reference.removeprefix("#/").split("/"):
      target = target.get(key) if isinstance(target, Mapping) else None
    if not isinstance(target, Mapping) or set(beside) - {"description", "default"} - _DROPPED:
      raise _NoShortForm
    schema = {**target, **beside}


def _with_definitions(schema: Any, root: Mapping[str, Any]) -> Any:
  if not isinstance(schema, Mapping) or "$ref" not in _json(schema):
    return schema
  return {**schema, **{key: root[key] for key in ("$defs", "definitions") if key in root}}


def _name(name: str) -> str:
  return name if _NAME.fullmatch(name) else _json(name)


def _json(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False)
