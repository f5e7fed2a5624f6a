import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steptool_jax.dialogue import parser
from steptool_jax.types import Finish, Malformed, ToolCall, ToolCalls

READERS = {
  "react": lambda payload: parser.parse_react(f"Thought: t\nAction: f\nAction Input: {payload}"),
  "hermes": lambda payload: parser.parse_tool_call(
    '<tool_call>\n{"name": "f", "arguments": ' + payload + "}\n</tool_call>"
  ),
  "compact": lambda payload: parser.parse_compact(f"f {payload}"),
}

TEXT = st.text(max_size=20).map(lambda s: s.encode("utf-8", "replace").decode())
VALUES = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats(allow_nan=False, allow_infinity=False)
  | TEXT
  | st.sampled_from(["5", "</tool_call>", "\nAction: x", '"', "<think>", "null"]),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
  max_leaves=6,
)
ARGUMENTS = st.dictionaries(TEXT, VALUES, max_size=3)
NAMES = st.from_regex(r"[a-zA-Z][a-z0-9_.\-]{0,15}", fullmatch=True).filter(
  lambda name: name not in ("Finish", "answer", "give_up")
)
THOUGHTS = TEXT.filter(lambda t: "\nAction:" not in "\n" + t and "<" not in t)


def actions(thoughts):
  calls = st.builds(ToolCall, name=NAMES, arguments=ARGUMENTS, thought=thoughts)
  return calls | st.builds(Finish, answer=TEXT, gave_up=st.booleans(), thought=thoughts)


@settings(max_examples=100, deadline=None)
@given(action=actions(THOUGHTS))
def test_react_round_trip(action):
  assert parser.parse_react(parser.write_react(action)) == action


@settings(max_examples=100, deadline=None)
@given(action=actions(THOUGHTS), think=st.booleans())
def test_hermes_round_trip(action, think):
  assert parser.parse_tool_call(parser.write_tool_call(action, think)) == action


@settings(max_examples=100, deadline=None)
@given(action=actions(st.just("")))
def test_compact_round_trip(action):
  assert parser.parse_compact(parser.write_compact(action)) == action


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
  ("payload", "reason"),
  [
    ('{"a": 1, "a": 2}', '"a" appears twice'),
    ('{"b": {"a": 1, "a": 1}}', "appears twice"),
    ('{"' + "k" * 999 + '": 1, "' + "k" * 999 + '": 1}', "appears twice"),
    ('{"a": NaN}', "NaN is not JSON"),
    ('{"a": -Infinity}', "Infinity is not JSON"),
    ('{"a": 1e999}', "too large"),
    ('{"a": ' + "9" * 5000 + "}", "too many digits"),
    ('{"a": "\\ud800"}', "surrogate"),
    ("[1]", "must be a JSON object {…}, found a list"),
    ("null", "found null"),
    ("true", "found a boolean"),
    ('"x"', "found a string"),
    ("{'a': 1}", "Python literal"),
    ('{"a": True}', "Python literal"),
    ('{"a": None}', "Python literal"),
    ('{"a": 1', "not valid JSON"),
    ('{"a": 1,}', "not valid JSON"),
    ('{"a" 1}', "not valid JSON"),
    ("```json\n{}\n```", "code fence|not valid JSON"),
    ("__import__('os').system('x')", "not valid JSON|Python literal"),
    ("[" * 500 + "]" * 500, "deeper than 64"),
    ("[" * 40_000, "deeper than 64|not valid JSON"),
    ('{"a":' * 65 + "1" + "}" * 65, "deeper than 64"),
    ('{"a": "' + "x" * 200_000 + '"}', "longer than 100000"),
  ],
)
def test_what_is_not_strict_json_is_refused_with_a_reason(reader, payload, reason):
  action = READERS[reader](payload)
  assert isinstance(action, Malformed), payload[:60]
  assert re.search(reason, action.reason), action.reason
  assert len(action.reason) < 300  # it goes back into the context


@pytest.mark.parametrize("reader", READERS)
def test_deep_json_does_not_crash_near_the_recursion_limit(reader):
  limit = sys.getrecursionlimit()
  for depth in (63, 500, limit - 60, limit, 20_000):
    action = READERS[reader]('{"a":' + "[" * depth + "]" * depth + "}")
    assert isinstance(action, ToolCall if depth == 63 else Malformed)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("Thought: a\nAction: f\nAction Input: {}", ToolCall("f", {}, "a")),
    ("Thought:\nAction: f\nAction Input: {}\n", ToolCall("f", {}, "")),
    (
      'Thought: a\nb\n\nAction: f\nAction Input: {\n "x": 1\n}\n',
      ToolCall("f", {"x": 1}, "a\nb\n"),
    ),
    # The official parser cuts 8 characters here and looks for a function "et_weather".
    ("Action: get_weather\nAction Input: {}", ToolCall("get_weather", {}, "")),
    # The official parser matches by suffix: this is not Finish, and "" is no function.
    ("Thought: a\nAction: my_Finish\nAction Input: {}", ToolCall("my_Finish", {}, "a")),
    ("Thought: a\nAction: inish\nAction Input: {}", ToolCall("inish", {}, "a")),
    (
      'Thought: a\nAction: Finish\nAction Input: {"return_type":"give_answer","final_answer":"7"}',
      Finish("7", False, "a"),
    ),
    (
      'Thought: a\nAction: Finish\nAction Input: {"return_type": "give_up_and_restart"}',
      Finish("", True, "a"),
    ),
  ],
)
def test_react_reads(text, expected):
  assert parser.parse_react(text) == expected


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("get_weather\nAction Input: {}", "must start with 'Thought: '"),
    ("Thought: I am done, it is 7.", "no line 'Action: <tool name>'"),
    ("Thought: a\nAction: f", "no line 'Action Input"),
    ("Thought: a\nAction: f\nwhy\nAction Input: {}", "directly below"),
    ("Thought: a\nAction: \nAction Input: {}", "tool name is empty"),
    ("Thought: a\nAction: f\nAction Input: ", "empty, write a JSON object"),
    ("Thought: a\nAction: f\nAction Input: {} done", 'text behind the JSON object: "done"'),
    (
      "Thought: a\nAction: f\nAction Input: {}\nThought: b\nAction: g\nAction Input: {}",
      "one action a turn",
    ),
    ('Thought: a\nAction: Finish\nAction Input: {"final_answer": "7"}', "return_type must be"),
    ('Thought: a\nAction: Finish\nAction Input: {"return_type": "give_answer"}', "is missing"),
    (
      'Thought: a\nAction: Finish\nAction Input: {"return_type": "give_answer", "final_answer": 7}',
      "must be a string, found a number",
    ),
    (
      'Thought: a\nAction: Finish\nAction Input: {"return_type": "give_answer", '
      '"final_answer": "7", "sure": true}',
      'not "sure"',
    ),
  ],
)
def test_react_refuses(text, reason):
  refused = parser.parse_react(text).reason
  assert re.search(reason, refused), refused


CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    (CALL, ToolCall("f", {})),
    ("I look it up.\n" + CALL, ToolCall("f", {}, "I look it up.")),
    ("<think>\nhm\n</think>\n\n" + CALL, ToolCall("f", {}, "hm")),
    ("<think>\n\n</think>\n\n" + CALL, ToolCall("f", {})),
    ("<think>\n<tool_call>?\n</think>\nnow\n" + CALL, ToolCall("f", {}, "<tool_call>?\nnow")),
    (
      '<tool_call>{"name":"f","arguments":{"x":"</tool_call>"}}</tool_call>',
      ToolCall("f", {"x": "</tool_call>"}),
    ),
  ],
)
def test_hermes_reads(text, expected):
  assert parser.parse_tool_call(text) == expected


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("The answer is 7.", "no tool call"),
    ("<think>\nhm " + CALL, "never closed"),
    (CALL + "\n" + CALL, "one call a turn"),
    (CALL + " done", 'text behind </tool_call>: "done"'),
    ('<tool_call>\n{"name": "f", "arguments": {}}', "</tool_call> must follow"),
    ('<tool_call>{"name": "f"}</tool_call>', r"exactly the keys 'name' and 'arguments'"),
    ('<tool_call>{"name": "f", "arguments": {}, "id": 1}</tool_call>', "exactly the keys"),
    ('<tool_call>{"name": "f", "' + "k" * 999 + '": 1}</tool_call>', "exactly the keys"),
    ('<tool_call>{"name": 1, "arguments": {}}</tool_call>', "'name' must be a string"),
    ('<tool_call>{"name": "", "arguments": {}}</tool_call>', "tool name is empty"),
    ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "found a string"),
    ("<tool_call></tool_call>", "not valid JSON"),
    ("<tool_call>[]</tool_call>", "must be a JSON object"),
  ],
)
def test_hermes_refuses(text, reason):
  refused = parser.parse_tool_call(text).reason
  assert re.search(reason, refused), refused
  assert len(refused) < 300


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ('find {"a":"x y"}', ToolCall("find", {"a": "x y"})),
    ("answer 7", Finish("7")),
    ("answer  two words \n", Finish(" two words \n")),
    ("answer ", Finish("")),
    ("give_up", Finish("", gave_up=True)),
    ("give_up nothing fits", Finish("nothing fits", gave_up=True)),
    ("answers {}", ToolCall("answers", {})),
  ],
)
def test_compact_reads(text, expected):
  assert parser.parse_compact(text) == expected


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("find", "no arguments"),
    ('find{"a":1}', "no arguments"),
    ("answer", "must be followed by the answer's text"),
    (" {}", "tool name is empty"),
    ("find {} find {}", "one call a turn"),
  ],
)
def test_compact_refuses(text, reason):
  refused = parser.parse_compact(text).reason
  assert re.search(reason, refused), refused


@pytest.mark.parametrize(
  ("write", "action", "reason"),
  [
    (parser.write_react, Malformed("x"), "malformed"),
    (parser.write_compact, Malformed("x"), "malformed"),
    (parser.write_react, ToolCall("Finish", {}), "reserved"),
    (parser.write_react, ToolCall("", {}), "not empty"),
    (parser.write_react, ToolCall("a\nb", {}), "one line"),
    (parser.write_react, ToolCall("f", {}, "a\nAction: b"), "thought"),
    (parser.write_react, ToolCall("f", {"x": float("nan")}), "JSON"),
    (parser.write_react, ToolCall("f", {"x": (1, 2)}), "no tuples"),
    (parser.write_react, ToolCall("f", {"x": {1: 2}}), "string keys"),
    (parser.write_react, ToolCall("f", {"x": "\ud800"}), "JSON"),
    (lambda a: parser.write_tool_call(a, True), ToolCall("f", {}, "</think>"), "thought"),
    (lambda a: parser.write_tool_call(a, False), ToolCall("f", {}, CALL), "thought"),
    (parser.write_compact, ToolCall("answer", {}), "reserved"),
    (parser.write_compact, ToolCall("two words", {}), "one word"),
  ],
)
def test_what_could_not_be_read_back_is_not_written(write, action, reason):
  with pytest.raises(ValueError, match=reason):
    write(action)


@pytest.mark.parametrize("front", [" ", "\n", "\n\n ", "\t"])
def test_a_blank_in_front_of_a_react_turn_does_not_matter(front):
  """Models sample a blank or a newline after the turn's header; the call was refused for it."""
  turn = "Thought: a\nAction: f\nAction Input: {}"
  assert parser.parse_react(front + turn) == ToolCall("f", {}, "a")


PAIR = ToolCalls((ToolCall("a", {"x": 1}), ToolCall("b", {})), "both")


@pytest.mark.parametrize("think", [False, True])
def test_several_calls_round_trip_where_they_are_allowed(think):
  text = parser.write_tool_call(PAIR, think)
  assert parser.parse_tool_calls(text) == PAIR
  assert parser.parse_tool_call(text).reason.startswith("one call a turn")
  single = ToolCall("a", {}, "t")
  assert parser.parse_tool_calls(parser.write_tool_call(single, think)) == single


def test_several_calls_are_refused_where_they_make_no_sense():
  """Finish among calls ends before their results are there; more calls than anybody needs flood."""
  block = '<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>\n'
  finish = parser.write_tool_call(Finish("1"), False)
  assert "call it alone" in parser.parse_tool_calls(block + finish).reason
  assert "at most 8 calls" in parser.parse_tool_calls(block * 9).reason
  assert len(parser.parse_tool_calls(block * 8).calls) == 8
  with pytest.raises(ValueError, match="2 to 8"):
    parser.write_tool_call(ToolCalls((ToolCall("a", {}),)), False)
  for write in (parser.write_react, parser.write_compact):
    with pytest.raises(ValueError, match="one a turn|malformed"):
      write(PAIR)
