import time

import pytest

from steptool_jax.simulators.schemas import MATCH_S, matches, validator
from steptool_jax.types import ToolSpec


def spec(**schema):
  return ToolSpec("act", "", {"type": "object", **schema})


@pytest.mark.parametrize(
  ("schema", "reason"),
  [
    ({"$ref": "file:///etc/hostname"}, "another document"),
    ({"properties": {"a": {"$ref": "http://127.0.0.1:1/x"}}}, "another document"),
    ({"properties": {"a": {"items": {"$dynamicRef": "other.json"}}}}, "another document"),
    ({"$id": "http://127.0.0.1:1/x", "$ref": "y.json#/a"}, "another document"),
    ({"properties": {"a": {"$ref": "#/$defs/absent"}}}, "is not in the schema"),
    ({"properties": {"a": {"pattern": "(a"}}}, "regex"),
    ({"patternProperties": {"(a": {}}}, "regex"),
  ],
)
def test_a_schema_is_resolved_within_itself_only(schema, reason):
  """An MCP server's "$ref": "file:///…" was read from the trainer's disk and shown to the model."""
  with pytest.raises(ValueError, match=f"tool 'act'.*{reason}"):
    validator(spec(**schema))


def test_references_within_and_words_that_only_look_like_one():
  schema = spec(
    properties={"a": {"$ref": "#/$defs/n"}, "$ref": {"type": "string", "default": "x"}},
    **{"$defs": {"n": {"type": "integer"}}},
  )
  assert validator(schema).is_valid({"a": 1, "$ref": "file:///x"})
  assert not validator(schema).is_valid({"a": "1"})


def test_a_pattern_without_end_is_no_match_after_a_second():
  """Python's own re holds the interpreter's lock for years on (a+)+$, and the whole run with it."""
  assert not matches("(a+)+$", "a" * 40 + "b")
  slow, text = r"(.*)a(.*)a(.*)a(.*)a(.*)a\1\2\3b", "a" * 300
  started = time.monotonic()
  with pytest.raises(TimeoutError):
    matches(slow, text)
  checked = validator(spec(properties={"a": {"pattern": slow}}))
  assert not checked.is_valid({"a": text})
  assert checked.is_valid({"a": "aaaaab"})
  assert time.monotonic() - started < 10 * MATCH_S


def test_patterns_of_names():
  schema = spec(patternProperties={"^n": {"type": "integer"}}, additionalProperties=False)
  checked = validator(schema)
  assert checked.is_valid({"n1": 1})
  assert not checked.is_valid({"n1": "x"})
  assert not checked.is_valid({"m": 1})
