"""JSON schemas of tools, checked once: nothing is fetched, and no pattern runs without end."""

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
import referencing
import referencing.exceptions
import regex
from referencing.jsonschema import DRAFT202012

from steptool_jax.types import ToolSpec

MATCH_S = 1.0  # seconds for a pattern; one like (a+)+$ would hold the interpreter for years
_DATA = ("const", "enum", "default", "examples", "example")  # what they hold is no schema


def matches(pattern: str, text: str, *, whole: bool = False) -> bool:
  """Whether the text has (whole: is) a match. TimeoutError after MATCH_S, regex.error of a bad
  pattern."""
  find = regex.fullmatch if whole else regex.search
  return find(pattern, text, timeout=MATCH_S, concurrent=True) is not None


def validator(spec: ToolSpec) -> jsonschema.protocols.Validator:
  """The validator of spec.parameters, made once for equal schemas.

  Raises ValueError that names the tool for a schema that is none, that has a pattern which is none,
  or that refers to another document or to a place that it lacks: nothing is ever retrieved.
  """
  try:
    return _compile(json.dumps(spec.parameters))
  except jsonschema.SchemaError as error:
    raise ValueError(f"tool {spec.name!r}: invalid JSON schema: {error.message}") from error
  except (TypeError, ValueError, RecursionError) as error:
    raise ValueError(f"tool {spec.name!r}: its schema is not JSON: {error}") from error


# Sessions are opened by the thousand with the same specs; compiling a schema is the slow part.
@functools.lru_cache(maxsize=4096)
def _compile(schema: str) -> jsonschema.protocols.Validator:
  parsed = json.loads(schema)
  jsonschema.Draft202012Validator.check_schema(parsed)
  registry = referencing.Registry()
  resolver = registry.with_resource("", DRAFT202012.create_resource(parsed)).resolver()
  for keyword, text in _strings(parsed):
    if keyword == "pattern":
      try:
        regex.compile(text)
      except regex.error as error:
        raise jsonschema.SchemaError(f"pattern {text!r:.80}: {error}") from None
      continue
    if not text.startswith("#"):
      raise jsonschema.SchemaError(f"{keyword} {text!r:.80} is another document; none is fetched")
    try:
      resolver.lookup(text)
    except referencing.exceptions.Unresolvable:
      raise jsonschema.SchemaError(f"{keyword} {text!r:.80} is not in the schema") from None
  return _Validator(parsed, registry=registry)


def _strings(schema: Any) -> Iterator[tuple[str, str]]:
  """(keyword, text) of every reference and pattern in a schema."""
  if isinstance(schema, Mapping):
    for keyword, value in schema.items():
      if keyword in ("$ref", "$dynamicRef", "pattern") and isinstance(value, str):
        yield keyword, value
      elif keyword == "patternProperties" and isinstance(value, Mapping):
        yield from (("pattern", pattern) for pattern in value)
        yield from _strings(list(value.values()))
      elif keyword not in _DATA:
        yield from _strings(value)
  elif isinstance(schema, list):
    for entry in schema:
      yield from _strings(entry)


_Errors = Iterator[jsonschema.ValidationError]


def _found(pattern: str, text: str) -> bool:
  try:
    return matches(pattern, text)
  except TimeoutError:
    return False


def _pattern(validator: Any, pattern: str, value: Any, schema: Any) -> _Errors:
  if isinstance(value, str) and not _found(pattern, value):
    yield jsonschema.ValidationError(f"{value!r:.80} does not match {pattern!r:.80}")


def _pattern_properties(validator: Any, patterns: Any, value: Any, schema: Any) -> _Errors:
  if isinstance(value, Mapping):
    for pattern, inner in patterns.items():
      for name in filter(functools.partial(_found, pattern), value):
        yield from validator.descend(value[name], inner, path=name, schema_path=pattern)


def _additional(validator: Any, inner: Any, value: Any, schema: Any) -> _Errors:
  if "patternProperties" not in schema:
    yield from jsonschema.Draft202012Validator.VALIDATORS["additionalProperties"](
      validator, inner, value, schema
    )
  elif isinstance(value, Mapping):
    known = schema.get("properties", {})
    for name in value:
      if name not in known and not any(_found(p, name) for p in schema["patternProperties"]):
        yield from validator.descend(value[name], inner, path=name)


_Validator = jsonschema.validators.extend(
  jsonschema.Draft202012Validator,
  {
    "pattern": _pattern,
    "patternProperties": _pattern_properties,
    "additionalProperties": _additional,
  },
)
