"""Text -> ToolCall | Finish | Malformed(reason), and back. Strict; nothing is ever evaluated.

A reason is written for the model: it says what was wrong and what to write instead. Every writer
is inverted exactly by its reader; what could not be read back is refused with ValueError.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from steptool_jax.types import Action, Finish, Malformed, ToolCall, ToolCalls, ToolSpec

MAX_JSON_CHARS = 100_000
MAX_JSON_DEPTH = 64
MAX_CALLS = 8  # of one turn
FINISH = "Finish"
GIVE_ANSWER = "give_answer"
GIVE_UP = "give_up_and_restart"

FINISH_TOOL = ToolSpec(
  name=FINISH,
  description="Ends the task: with the final answer for the user, or by giving up.",
  parameters={
    "type": "object",
    "properties": {
      "return_type": {"type": "string", "enum": [GIVE_ANSWER, GIVE_UP]},
      "final_answer": {
        "type": "string",
        "description": f"Everything the user asked for; needed with {GIVE_ANSWER}.",
      },
    },
    "required": ["return_type"],
  },
)


class _Refused(Exception):
  """Carries the reason of a Malformed."""


def _refusing(parse: Callable[[str], Action]) -> Callable[[str], Action]:
  """A parser that gives a Malformed where it raises _Refused."""

  @functools.wraps(parse)
  def answer(text: str) -> Action:
    try:
      return parse(text)
    except _Refused as refused:
      return Malformed(str(refused))

  return answer


def dump_json(value: Any, compact: bool = False) -> str:
  """JSON text that a parser reads back as it is; ValueError for what JSON cannot say."""
  separators = (",", ":") if compact else (", ", ": ")
  try:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=separators)
    if _scan(text, 0, "the arguments")[0] != value:
      raise ValueError("they would be read back differently (use string keys, lists, no tuples)")
  except (TypeError, ValueError, RecursionError, _Refused) as error:
    raise ValueError(f"arguments cannot be written as JSON: {error}") from error
  return text


# --- ReAct: Thought / Action / Action Input --------------------------------------------------


def write_react(action: Action) -> str:
  """The text that `parse_react` reads back; ValueError where there is none."""
  name, arguments, thought = _call_of(action)
  if "\nAction:" in "\n" + thought:
    raise ValueError("thought: a line starts with 'Action:', which would end the thought")
  _check_name(name)
  return f"Thought: {thought}\nAction: {name}\nAction Input: {dump_json(arguments)}"


@_refusing
def parse_react(text: str) -> Action:
  """`[Thought: …\\n]Action: <name>\\nAction Input: <json object>`; Finish ends the task.

  The thought may be missing (the released ToolLLaMA data often has none). Blanks and newlines in
  front of it, which many models sample after the turn's header, do not matter.
  """
  text = text.lstrip(_BLANK)
  if text.startswith("Thought:"):
    thought, found, rest = text.removeprefix("Thought:").partition("\nAction:")
    if not found:
      raise _Refused("no line 'Action: <tool name>' behind the thought")
    thought = thought.removeprefix(" ")
  elif text.startswith("Action:"):
    thought, rest = "", text.removeprefix("Action:")
  else:
    raise _Refused("the turn must start with 'Thought: ' or 'Action: '")
  name, found, rest = rest.partition("\nAction Input:")
  if not found:
    raise _Refused("no line 'Action Input: <JSON object>' directly below the 'Action: ' line")
  if "\n" in name.strip(_BLANK):
    raise _Refused("'Action Input: ' must be the line directly below 'Action: '")
  value, end = _scan(rest, 0, "Action Input")
  tail = rest[end:].strip(_BLANK)
  if re.search(r"^(Thought|Action|Action Input):", tail, re.MULTILINE):
    raise _Refused("one action a turn: stop behind the first Action Input")
  if tail:
    raise _Refused(f"Action Input: text behind the JSON object: {_short(tail)}")
  return _action(name.strip(_BLANK), value, thought, "Action Input")


# --- Hermes: <tool_call> JSON ----------------------------------------------------------------

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_THINK, _UNTHINK = "<think>", "</think>"


def write_tool_call(action: Action, think: bool) -> str:
  """The text that `parse_tool_calls` reads back. think: the thought goes into a `<think>` block."""
  thought = "" if isinstance(action, Malformed) else action.thought
  for tag in (_OPEN, _CLOSE, _THINK, _UNTHINK):
    if tag in thought:
      raise ValueError(f"thought: contains {tag!r}, which has a meaning in this format")
  calls = action.calls if isinstance(action, ToolCalls) else (action,)
  if isinstance(action, ToolCalls) and (
    not 2 <= len(calls) <= MAX_CALLS
    or not all(isinstance(call, ToolCall) and not call.thought for call in calls)
  ):
    raise ValueError(f"calls of one turn: 2 to {MAX_CALLS} without thoughts of their own")
  text = "\n".join(map(_tool_call, calls))
  if think:
    return f"{_THINK}\n{thought}\n{_UNTHINK}\n\n{text}"
  return f"{thought}\n{text}" if thought else text


def _tool_call(action: Action) -> str:
  name, arguments, _ = _call_of(action)
  _check_name(name)
  return f"{_OPEN}\n{dump_json({'name': name, 'arguments': arguments})}\n{_CLOSE}"


@_refusing
def parse_tool_call(text: str) -> Action:
  """`<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>`, one a turn.

  The thought is the `<think>` block where there is one, else the text in front of the call.
  """
  return _tool_calls(text, 1)


@_refusing
def parse_tool_calls(text: str) -> Action:
  """The same with up to MAX_CALLS such blocks a turn; Finish stands alone."""
  return _tool_calls(text, MAX_CALLS)


def _tool_calls(text: str, most: int) -> Action:
  thought, block = "", text.lstrip(_BLANK)
  if block.startswith(_THINK):
    inner, found, rest = block.removeprefix(_THINK).partition(_UNTHINK)
    if not found:
      raise _Refused(f"{_THINK} is never closed by {_UNTHINK}")
    thought = inner.removeprefix("\n").removesuffix("\n")
    before, found, rest = rest.partition(_OPEN)
    if found and before.strip(_BLANK):
      thought = f"{thought}\n{before.strip(_BLANK)}" if thought else before.strip(_BLANK)
  else:
    before, found, rest = text.partition(_OPEN)
    thought = before.removesuffix("\n")
  if not found:
    raise _Refused(
      f'no tool call: write {_OPEN}\\n{{"name": …, "arguments": {{…}}}}\\n{_CLOSE}; '
      f"to answer, call {FINISH}"
    )
  values = []
  while True:
    value, end = _scan(rest, 0, "the tool call")
    rest = rest[end:].lstrip(_BLANK)
    if not rest.startswith(_CLOSE):
      raise _Refused(f"{_CLOSE} must follow the JSON object, found: {_short(rest)}")
    rest = rest.removeprefix(_CLOSE).strip(_BLANK)
    values.append(value)
    if most == 1 and _OPEN in rest:
      raise _Refused(f"one call a turn: stop behind the first {_CLOSE}")
    if not rest.startswith(_OPEN):
      break
    if len(values) == most:
      raise _Refused(f"at most {most} calls a turn")
    rest = rest.removeprefix(_OPEN)
  if rest:
    raise _Refused(f"text behind {_CLOSE}: {_short(rest)}")
  if len(values) == 1:
    return _block(values[0], thought)
  actions = [_block(value, "") for value in values]
  if not all(isinstance(action, ToolCall) for action in actions):
    raise _Refused(f"{FINISH} ends the task: call it alone, when the other results are there")
  return ToolCalls(tuple(actions), thought)


def _block(value: Any, thought: str) -> Action:
  """The action of one <tool_call> block."""
  if not isinstance(value, dict):
    raise _Refused("the tool call must be a JSON object with 'name' and 'arguments'")
  if set(value) != {"name", "arguments"}:
    raise _Refused(
      "the tool call must have exactly the keys 'name' and 'arguments', found "
      + _short(", ".join(sorted(value)))
    )
  if not isinstance(value["name"], str):
    raise _Refused("'name' must be a string")
  return _action(value["name"], value["arguments"], thought, "'arguments'")


# --- compact: name {json} | answer text | give_up --------------------------------------------

ANSWER_WORD = "answer"
GIVE_UP_WORD = "give_up"


def write_compact(action: Action) -> str:
  """The text that `parse_compact` reads back, without the thought."""
  if isinstance(action, Finish):
    word = GIVE_UP_WORD if action.gave_up else ANSWER_WORD
    return word if action.gave_up and not action.answer else f"{word} {action.answer}"
  if not isinstance(action, ToolCall):
    raise ValueError("a malformed action cannot be written")
  check_compact_name(action.name)
  return f"{action.name} {dump_json(dict(action.arguments), compact=True)}"


def check_compact_name(name: str) -> None:
  """ValueError for a tool name that the compact format cannot carry."""
  _check_name(name)
  if " " in name or name in (ANSWER_WORD, GIVE_UP_WORD):
    raise ValueError(f"tool name {name!r}: the compact format needs one word that is not reserved")


@_refusing
def parse_compact(text: str) -> Action:
  """`<name> <json object>`, `answer <text>` or `give_up[ <text>]`; no thoughts in this format."""
  name, found, rest = text.partition(" ")
  if name == GIVE_UP_WORD:
    return Finish(answer=rest, gave_up=True)
  if name == ANSWER_WORD:
    if not found:
      raise _Refused(f"'{ANSWER_WORD}' must be followed by the answer's text")
    return Finish(answer=rest)
  if name and not found:
    raise _Refused("no arguments: write the tool name, a space and a JSON object, {} if none")
  value, end = _scan(rest, 0, "the arguments")
  if rest[end:].strip(_BLANK):
    raise _Refused(f"one call a turn: text behind the JSON object: {_short(rest[end:])}")
  return _action(name, value, "", "the arguments", finish=False)


# --- shared ----------------------------------------------------------------------------------

_BLANK = " \t\r\n"


def _call_of(action: Action) -> tuple[str, Mapping[str, Any], str]:
  if isinstance(action, ToolCall):
    if action.name == FINISH:
      raise ValueError(f"tool name {FINISH!r} is reserved: use types.Finish")
    return action.name, dict(action.arguments), action.thought
  if isinstance(action, Finish):
    kind = GIVE_UP if action.gave_up else GIVE_ANSWER
    return FINISH, {"return_type": kind, "final_answer": action.answer}, action.thought
  if isinstance(action, ToolCalls):
    raise ValueError("several calls of one turn: this chat format has one a turn")
  raise ValueError("a malformed action cannot be written")


def _check_name(name: str) -> None:
  if not name or name != name.strip(_BLANK) or "\n" in name or "\r" in name:
    raise ValueError(f"tool name {name!r}: must be one line, not empty, no spaces at its ends")


def _action(name: str, value: Any, thought: str, what: str, finish: bool = True) -> Action:
  if not name:
    raise _Refused("the tool name is empty: name one of the tools")
  if not isinstance(value, dict):
    raise _Refused(f"{what} must be a JSON object {{…}}, found {_kind(value)}")
  if not finish or name != FINISH:
    return ToolCall(name=name, arguments=value, thought=thought)
  unknown = sorted(set(value) - {"return_type", "final_answer"})
  if unknown:
    raise _Refused(f"{FINISH} takes return_type and final_answer, not {_short(', '.join(unknown))}")
  kind = value.get("return_type")
  if kind not in (GIVE_ANSWER, GIVE_UP):
    raise _Refused(f"{FINISH}: return_type must be '{GIVE_ANSWER}' or '{GIVE_UP}'")
  if kind == GIVE_ANSWER and "final_answer" not in value:
    raise _Refused(f"{FINISH}: final_answer is missing")
  answer = value.get("final_answer", "")
  if not isinstance(answer, str):
    raise _Refused(f"{FINISH}: final_answer must be a string, found {_kind(answer)}")
  return Finish(answer=answer, gave_up=kind == GIVE_UP, thought=thought)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  out: dict[str, Any] = {}
  for key, value in pairs:
    if key in out:
      raise _Refused(f"the key {_short(key)} appears twice")
    out[key] = value
  return out


def _no_constant(name: str) -> Any:
  raise _Refused(f"{name} is not JSON: write a number or null")


def _finite(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    raise _Refused(f"the number {text[:40]} is too large")
  return value


_DECODER = json.JSONDecoder(
  object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
)


def _scan(text: str, start: int, what: str) -> tuple[Any, int]:
  """One JSON value from `start`, blanks skipped -> (value, end). Raises _Refused."""
  while start < len(text) and text[start] in _BLANK:
    start += 1
  if start == len(text):
    raise _Refused(f"{what}: empty, write a JSON object ({{}} if there is nothing to pass)")
  if len(text) - start > MAX_JSON_CHARS:
    raise _Refused(f"{what}: longer than {MAX_JSON_CHARS} characters")
  try:
    value, end = _DECODER.raw_decode(text, start)
  except _Refused as refused:
    raise _Refused(f"{what}: {refused}") from None
  except RecursionError:
    raise _Refused(f"{what}: nested deeper than {MAX_JSON_DEPTH} levels") from None
  except json.JSONDecodeError as error:
    raise _Refused(f"{what}: {_explain(text[start:], error)}") from None
  except ValueError:  # Python's limit on the digits of an integer
    raise _Refused(f"{what}: a number has too many digits") from None
  if _depth_exceeds(value, MAX_JSON_DEPTH):
    raise _Refused(f"{what}: nested deeper than {MAX_JSON_DEPTH} levels")
  try:
    json.dumps(value, ensure_ascii=False).encode("utf-8")
  except UnicodeEncodeError:
    raise _Refused(f"{what}: a lone surrogate \\u escape is not text") from None
  except ValueError:
    raise _Refused(f"{what}: a number has too many digits") from None
  return value, end


def _explain(text: str, error: json.JSONDecodeError) -> str:
  if error.doc[error.pos :].lstrip(_BLANK).startswith(("'", "True", "False", "None")):
    return "this is a Python literal, not JSON: use double quotes, true, false and null"
  if text.startswith("```"):
    return "no code fence: write the JSON object alone"
  return f"not valid JSON: {error.msg} at character {error.pos - (len(error.doc) - len(text))}"


def _depth_exceeds(value: Any, limit: int) -> bool:
  level = [value]
  for _ in range(limit + 1):
    level = [
      child
      for node in level
      if isinstance(node, dict | list)
      for child in (node.values() if isinstance(node, dict) else node)
    ]
    if not level:
      return False
  return True


def _kind(value: Any) -> str:
  if value is None:
    return "null"
  names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
  return names.get(type(value), "an object")


def _short(text: str) -> str:
  text = text.strip(_BLANK)
  return json.dumps(text if len(text) <= 40 else text[:40] + "…", ensure_ascii=False)
