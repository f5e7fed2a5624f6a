import json
import sys
from typing import Any, Dict, List, Literal, Tuple  # noqa: UP035

import pytest

from steptool_jax.simulators.functions import (
  InfrastructureError,
  NotFound,
  RateLimited,
  Result,
  Tool,
  Toolbox,
  Unavailable,
  tool,
)
from steptool_jax.types import Code, ToolCall, ToolSpec


def book(
  name: str,
  seats: int,
  kind: Literal["window", "aisle"] = "aisle",
  note: str | None = None,
  extras: list[str] | None = None,
  price: float = 1.5,
  options: dict[str, Any] | None = None,
  fast: bool = False,
) -> dict:
  """Book seats.

  On a train.

  Args:
    name: Who travels,
      in full.
    seats (int): How many.

  Returns:
    seats: not a parameter text
  """
  return {"name": name, "seats": seats, "kind": kind}


def test_schema_of_a_signature():
  spec = tool(book).spec
  assert spec.name == "book"
  assert spec.description == "Book seats. On a train."
  assert spec.parameters == {
    "type": "object",
    "properties": {
      "name": {"type": "string", "description": "Who travels, in full."},
      "seats": {"type": "integer", "description": "How many."},
      "kind": {"enum": ["window", "aisle"], "default": "aisle"},
      "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
      "extras": {
        "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
        "default": None,
      },
      "price": {"type": "number", "default": 1.5},
      "options": {
        "anyOf": [{"type": "object", "additionalProperties": {}}, {"type": "null"}],
        "default": None,
      },
      "fast": {"type": "boolean", "default": False},
    },
    "required": ["name", "seats"],
    "additionalProperties": False,
  }


def stars(*values: int): ...
def keywords(**values: int): ...
def unhinted(value): ...
def positional(value: int, /): ...
def foreign(value: object): ...
def keyed(value: dict[int, str]): ...
def unresolved(value: "Nowhere"): ...  # noqa: F821
async def waits(value: int): ...


def default_not_json(value: int = float("nan")): ...  # type: ignore[assignment]


def misdescribed(value: int):
  """Does it.

  Args:
    valeu: a typo
  """


@pytest.mark.parametrize(
  ("function", "names"),
  [
    (stars, ["stars", "'values'"]),
    (keywords, ["keywords", "'values'"]),
    (unhinted, ["unhinted", "'value'", "type hint"]),
    (positional, ["positional", "'value'", "keyword"]),
    (foreign, ["foreign", "'value'"]),
    (keyed, ["keyed", "'value'", "keys"]),
    (unresolved, ["unresolved", "Nowhere"]),
    (waits, ["waits", "async"]),
    (default_not_json, ["default_not_json", "'value'"]),
    (misdescribed, ["misdescribed", "'valeu'"]),
    (lambda x: x, ["<lambda>", "def"]),
  ],
)
def test_underivable_schema_names_function_and_parameter(function, names):
  with pytest.raises(ValueError, match="tool") as caught:
    tool(function)
  for name in names:
    assert name in str(caught.value)


@pytest.mark.parametrize(
  ("arguments", "reason"),
  [
    ({"name": "a"}, "'seats' is a required property"),
    ({"name": "a", "seats": "two"}, "seats: 'two' is not of type 'integer'"),
    ({"name": "a", "seats": True}, "seats: True is not of type 'integer'"),
    ({"name": "a", "seats": 1, "kind": "roof"}, "kind: 'roof' is not one of"),
    ({"name": "a", "seats": 1, "colour": 1}, "'colour' was unexpected"),
    ("name", "arguments must be an object"),
  ],
)
def test_bad_arguments_do_not_run_the_tool(arguments, reason):
  ran = []

  def book(name: str, seats: int, kind: Literal["window", "aisle"] = "aisle") -> None:
    ran.append(name)

  observation = Toolbox([tool(book)]).call(ToolCall("book", arguments))
  assert observation.code == Code.BAD_ARGUMENTS
  assert reason in observation.text
  assert ran == []


def test_ok_call_gives_compact_json_and_value():
  observation = Toolbox([tool(book)]).call(ToolCall("book", {"name": "ä", "seats": 2}))
  assert observation.text == '{"name":"ä","seats":2,"kind":"aisle"}'
  assert observation.value == {"name": "ä", "seats": 2, "kind": "aisle"}
  assert (observation.code, observation.changed) == (Code.OK, False)


def test_changed_is_what_the_tool_says():
  def write(x: int) -> Result:
    return Result({"x": x}, changed=x > 0)

  box = Toolbox([tool(write)])
  assert box.call(ToolCall("write", {"x": 1})).changed
  assert not box.call(ToolCall("write", {"x": 0})).changed


def test_procedure_without_result_counts_as_done():
  def act() -> None: ...

  observation = Toolbox([tool(act)]).call(ToolCall("act", {}))
  assert (observation.text, observation.value) == ("ok", "ok")


class Unprintable(Exception):
  def __str__(self):
    raise ValueError("no text")


@pytest.mark.parametrize(
  ("error", "code", "text"),
  [
    (NotFound("no c9"), Code.NOT_FOUND, "error: no c9"),
    (Unavailable("busy"), Code.UNAVAILABLE, "error: busy"),
    (RateLimited(), Code.RATE_LIMIT, "error: RateLimited"),
    (InfrastructureError("disk"), Code.INFRASTRUCTURE, "error: disk"),
    (KeyError("k"), Code.TOOL_ERROR, "error: KeyError: 'k'"),
    (SystemExit(3), Code.TOOL_ERROR, "error: SystemExit: 3"),
    (RecursionError("deep"), Code.TOOL_ERROR, "error: RecursionError: deep"),
    (Unprintable(), Code.TOOL_ERROR, "error: Unprintable"),
  ],
)
def test_raising_tool_is_an_observation(error, code, text):
  def fails() -> str:
    raise error

  observation = Toolbox([tool(fails)]).call(ToolCall("fails", {}))
  assert (observation.code, observation.text, observation.value) == (code, text, None)


def test_unknown_tool():
  observation = Toolbox([tool(book)]).call(ToolCall("boook", {}))
  assert (observation.code, observation.text) == (Code.UNKNOWN_TOOL, "error: no tool named boook")


def test_huge_argument_and_huge_error_are_bounded():
  def fails(text: str, number: int = 0) -> str:
    raise ValueError(text)

  box = Toolbox([tool(fails)], max_observation_chars=100)
  raised = box.call(ToolCall("fails", {"text": "x" * 10_000_000}))
  assert len(raised.text) == 100
  assert raised.text.endswith("...")
  refused = box.call(ToolCall("fails", {"text": "", "number": "y" * 1_000_000}))
  assert refused.code == Code.BAD_ARGUMENTS
  assert len(refused.text) <= 100


def test_deeply_nested_arguments_are_refused_or_run():
  def keep(value: list) -> int:
    return len(value)

  nested: list = []
  for _ in range(sys.getrecursionlimit() * 2):
    nested = [nested]
  observation = Toolbox([tool(keep)]).call(ToolCall("keep", {"value": nested}))
  assert observation.code in (Code.OK, Code.BAD_ARGUMENTS)


def test_two_tools_of_one_name_and_a_broken_schema_are_refused():
  with pytest.raises(ValueError, match="two tools are named 'book'"):
    Toolbox([tool(book), tool(book)])
  broken = ToolSpec("odd", "", {"type": "thing"})
  with pytest.raises(ValueError, match="tool 'odd': invalid JSON schema"):
    Toolbox([Tool(broken, book)])
  with pytest.raises(ValueError, match="max_observation_chars"):
    Toolbox([tool(book)], max_observation_chars=3)


def test_what_a_tool_does_to_its_arguments_is_not_recorded():
  """`while items: items.pop()` changed the record of the call, and so its rewards."""

  def consume(items: list[int]) -> int:
    total = sum(items)
    while items:
      items.pop()
    items.append(float("nan"))
    return total

  call = ToolCall("consume", {"items": [1, 2]})
  assert Toolbox([tool(consume)]).call(call).value == 3
  assert call.arguments == {"items": [1, 2]}


@pytest.mark.parametrize(
  ("result", "code"),
  [
    ({"error": "no such user"}, Code.TOOL_ERROR),
    ({"error": {"code": 4}}, Code.TOOL_ERROR),
    ({"error": ["no account"]}, Code.TOOL_ERROR),
    ({"error": True, "message": "bad"}, Code.TOOL_ERROR),
    ({"error": [0.1, 0.2]}, Code.OK),
    (json.dumps({"error": "x" * 2000}), Code.TOOL_ERROR),  # longer than what is shown
    ('{"error": "no such user", "data": null}', Code.TOOL_ERROR),
    ({"error": ""}, Code.OK),
    ({"error": None, "data": 1}, Code.OK),
    ({"error": 0.25, "mean": 3}, Code.OK),  # the error of a fit is a value
    ('{"sum": 3}', Code.OK),
  ],
)
def test_a_returned_error_is_a_failed_call(result, code):
  def ask() -> Any:
    return result

  assert Toolbox([tool(ask)]).call(ToolCall("ask", {})).code is code


def test_text_that_is_json_counts_as_json_and_is_shown_as_it_is():
  def ask() -> str:
    return '{"sum":  3}'

  observation = Toolbox([tool(ask)]).call(ToolCall("ask", {}))
  assert (observation.value, observation.text) == ({"sum": 3}, '{"sum":  3}')


def test_long_json_keeps_its_structure():
  """It was cut before it was read, so that names in it counted for nothing."""

  def ask() -> str:
    return json.dumps([{"name": f"n{k}"} for k in range(200)])

  observation = Toolbox([tool(ask)]).call(ToolCall("ask", {}))
  assert observation.value[0] == {"name": "n0"}
  assert len(observation.text) == 1024


def test_whole_numbers_behind_references_and_choices():
  """As MCP servers write optional models: the reference was looked up without its root."""
  model = {"type": "object", "properties": {"n": {"type": "integer"}}}
  either = {"anyOf": [{"required": ["n"]}, {"required": ["k"]}], **model}
  schema = {
    "type": "object",
    "$defs": {"M": model},
    "properties": {"m": {"anyOf": [{"$ref": "#/$defs/M"}, {"type": "null"}]}, "e": either},
  }
  seen = []
  take = Tool(ToolSpec("take", "", schema), lambda **arguments: seen.append(arguments))
  observation = Toolbox([take]).call(ToolCall("take", {"m": {"n": 2}, "e": {"n": 2.0}}))
  assert observation.code is Code.OK
  assert seen == [{"m": {"n": 2}, "e": {"n": 2}}]
  assert isinstance(seen[0]["e"]["n"], int)


def test_lists_become_the_tuples_that_hints_ask_for():
  """Every call of such a tool failed with an unhashable list."""

  def at(
    point: tuple[int, int],
    also: list[tuple[int, ...]],
    maybe: tuple[str, int] | None = None,
    counts: list[int] | None = None,
    rows: dict[str, tuple] = {},  # noqa: B006
  ) -> str:
    return str([{point: 1}, also, maybe, [type(c).__name__ for c in counts], rows])

  arguments = {"point": [1.0, 2], "also": [[1], [2, 3]], "maybe": ["a", 1], "counts": [2.0]}
  observation = Toolbox([tool(at)]).call(ToolCall("at", {**arguments, "rows": {"k": [1]}}))
  assert observation.text == "[{(1, 2): 1}, [(1,), (2, 3)], ('a', 1), ['int'], {'k': (1,)}]"


def test_hints_without_parameters_and_defaults_of_none():
  """Bare List ended in a traceback; `seats: int = None` refused its own default."""

  def plan(
    cities: List,  # noqa: UP006
    fares: Dict,  # noqa: UP006
    pair: Tuple,  # noqa: UP006
    point: tuple[int, str],
    seats: int = None,  # noqa: RUF013
  ) -> str:
    return f"{point[0]}{seats}"

  spec = tool(plan).spec.parameters["properties"]
  assert spec["cities"] == spec["pair"] == {"type": "array"}
  assert spec["fares"] == {"type": "object"}
  assert spec["seats"] == {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}
  box = Toolbox([tool(plan)])
  arguments = {"cities": [], "fares": {}, "pair": [1], "point": [2.0, "x"], "seats": None}
  assert box.call(ToolCall("plan", arguments)).text == "2None"
  assert box.call(ToolCall("plan", {**arguments, "point": [2]})).code is Code.BAD_ARGUMENTS


def test_a_whole_number_reaches_an_int_as_an_int():
  def take(n: int, many: list[int], free: float, either: int | float) -> str:
    return str([n, many, free, either])

  call = ToolCall("take", {"n": 2.0, "many": [3.0], "free": 4.0, "either": 5.0})
  assert Toolbox([tool(take)]).call(call).text == "[2, [3], 4.0, 5.0]"


def test_docstrings_in_numpy_and_sphinx_style():
  """Their parameter texts were lost, and stood in the description."""

  def first(city: str):
    """Weather of a city.

    Parameters
    ----------
    city : str
        Where,
        in full.
    """

  def second(city: str):
    """Weather of a city.

    :param city: Where, in full.
    :return: its weather
    """

  for function in (first, second):
    spec = tool(function).spec
    assert spec.description == "Weather of a city."
    assert spec.parameters["properties"]["city"]["description"] == "Where, in full."
