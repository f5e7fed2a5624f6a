"""OpenAI's chat requests, read strictly: what is wrong with one is said by field, in OpenAI's form.

Messages are reduced to what a model can see of them, so that one that a client has sent through its
own types and back is the same message.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from steptool_jax.types import Code, ToolSpec

MOST_TOOLS, MOST_STOPS = 512, 16
_TEXT = "this policy reads text only"


class ApiError(Exception):
  """A request that is not answered. kind and code: as OpenAI names them."""

  def __init__(
    self,
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    kind: str = "invalid_request_error",
  ):
    super().__init__(message)
    self.status, self.message, self.param, self.code, self.kind = status, message, param, code, kind

  def document(self) -> dict[str, Any]:
    error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
    return {"error": error}


def _bad(param: str, message: str) -> ApiError:
  return ApiError(400, f"{param}: {message}", param)


@dataclasses.dataclass(frozen=True)
class Call:
  """A tool call of an assistant's message. What a client may write in another way is not compared:
  the id, which only ties results to calls, and the text of the arguments.
  """

  name: str
  meaning: str  # the arguments as JSON text with sorted keys
  arguments: str = dataclasses.field(compare=False)  # JSON text
  id: str = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Message:
  """role: system, user, assistant or tool. Outer white space of the text is left out."""

  role: str
  text: str
  calls: tuple[Call, ...] = ()
  # Of a tool's result: what became of the call, for clients that know (field `code`, ours).
  code: Code = dataclasses.field(default=Code.OK, compare=False)
  whole: str = dataclasses.field(default="", compare=False)  # the text as it was sent


@dataclasses.dataclass(frozen=True)
class ChatRequest:
  messages: tuple[Message, ...]
  tools: tuple[ToolSpec, ...] = ()
  tools_key: str = ""  # the tools as JSON text, to compare
  model: str = ""
  stream: bool = False
  usage_in_stream: bool = False
  logprobs: bool = False
  max_tokens: int | None = None
  temperature: float | None = None
  stops: tuple[str, ...] = ()
  seed: int | None = None
  calls_allowed: bool = True  # tool_choice is not "none"
  named: str = ""  # the tool that tool_choice asks for
  several_calls: bool = True  # a turn may have more than one: parallel_tool_calls


def parse_request(body: bytes, top_p: float = 1.0) -> ChatRequest:
  """The request of a body; ApiError 400 for what is wrong with it.

  top_p: of the sampler, the only one that may be asked for besides 1.
  """
  data = _json_object(body)
  _refuse_what_is_not_there(data, top_p)
  tools = _tools(data)
  messages = _messages(data.get("messages"))
  calls_allowed, named = _tool_choice(data.get("tool_choice"), tools)
  stop = data.get("stop")
  stops = [stop] if isinstance(stop, str) else stop or []
  if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
    raise _bad("stop", "must be a text, or a list of texts, none of them empty")
  if len(stops) > MOST_STOPS:
    raise _bad("stop", f"at most {MOST_STOPS} texts")
  most = [data[n] for n in ("max_completion_tokens", "max_tokens") if data.get(n) is not None]
  options = data.get("stream_options") or {}
  if not isinstance(options, Mapping):
    raise _bad("stream_options", "must be an object")
  return ChatRequest(
    messages=messages,
    tools=tools,
    tools_key=json.dumps(data.get("tools") or [], sort_keys=True),
    model=_typed(data, "model", str, ""),
    stream=_typed(data, "stream", bool, False),
    usage_in_stream=bool(options.get("include_usage")),
    logprobs=_typed(data, "logprobs", bool, False),
    max_tokens=_number("max_tokens", most[0], 1, 2**31 - 1, int) if most else None,
    temperature=_number("temperature", data.get("temperature"), 0, 2, float),
    stops=tuple(stops),
    seed=_number("seed", data.get("seed"), -(2**63), 2**63 - 1, int),
    calls_allowed=calls_allowed,
    named=named,
    several_calls=_typed(data, "parallel_tool_calls", bool, True),
  )


def _json_object(body: bytes) -> dict[str, Any]:
  try:
    data = json.loads(body)
  except (ValueError, RecursionError) as error:
    what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    raise ApiError(400, f"the body is no JSON: {what}") from None
  if not isinstance(data, dict):
    raise ApiError(400, "the body is no JSON object")
  return data


def _refuse_what_is_not_there(data: Mapping[str, Any], top_p: float) -> None:
  """What would change the answer and cannot be done is refused, never passed over."""
  if data.get("n") not in (None, 1):
    raise _bad("n", "one choice an answer; send the request several times")
  if data.get("top_logprobs") not in (None, 0):
    raise _bad("top_logprobs", "only the sampled tokens' log-probs are known; leave it out, or 0")
  if data.get("top_p") not in (None, 1, top_p):
    raise _bad("top_p", f"this sampler has {top_p:g}; leave it out (rollout.top_p sets it)")
  for name in ("presence_penalty", "frequency_penalty"):
    if data.get(name) not in (None, 0):
      raise _bad(name, "the sampler has no penalties; leave it out, or 0")
  for name in ("logit_bias", "audio", "prediction", "web_search_options"):
    if data.get(name):
      raise _bad(name, "is not offered; leave it out")
  for name in ("functions", "function_call"):
    if data.get(name):
      raise _bad(name, "is the old form; use tools and tool_choice")
  form = data.get("response_format")
  if form is not None and (not isinstance(form, Mapping) or form.get("type") != "text"):
    raise _bad("response_format", "only {'type': 'text'}: the sampler has no grammar")
  if data.get("modalities") not in (None, ["text"]):
    raise _bad("modalities", "only text")


def _typed(data: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
  value = data.get(name)
  if value is not None and not isinstance(value, kind):
    raise _bad(name, f"must be of type {kind.__name__}")
  return default if value is None else value


def _number(name: str, value: Any, least: float, most: float, kind: type) -> Any:
  if value is None:
    return None
  wrong = isinstance(value, bool) or not isinstance(value, (int, float))
  if wrong or (kind is int and not isinstance(value, int)) or not least <= value <= most:
    raise _bad(name, f"must be {'an integer' if kind is int else 'a number'}, {least} to {most}")
  return kind(value)


def _tools(data: Mapping[str, Any]) -> tuple[ToolSpec, ...]:
  given = data.get("tools") or []
  if not isinstance(given, list) or len(given) > MOST_TOOLS:
    raise _bad("tools", f"must be a list of at most {MOST_TOOLS} tools")
  out: list[ToolSpec] = []
  for k, entry in enumerate(given):
    at = f"tools[{k}]"
    function = entry.get("function") if isinstance(entry, Mapping) else None
    if not isinstance(function, Mapping) or entry.get("type") != "function":
      raise _bad(at, "must be {'type': 'function', 'function': {…}}")
    name, schema = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
      raise _bad(f"{at}.function.name", "must be a text")
    if schema is None:
      schema = {"type": "object", "properties": {}}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
      raise _bad(f"{at}.function.parameters", "must be a JSON schema of type object")
    if not isinstance(schema.get("properties", {}), Mapping):
      raise _bad(f"{at}.function.parameters.properties", "must be an object")
    out.append(ToolSpec(name, str(function.get("description") or ""), schema))
  return tuple(out)


def _tool_choice(choice: Any, tools: Sequence[ToolSpec]) -> tuple[bool, str]:
  """(calls are allowed, the tool that is asked for or "")."""
  if choice is None or choice == "auto":
    return True, ""
  if choice == "none":
    return False, ""
  if choice == "required":
    if len(tools) != 1:
      raise _bad(
        "tool_choice",
        "'required' can be kept with one tool only, the sampler has no grammar; name a tool, or "
        "use 'auto'",
      )
    return True, tools[0].name
  function = choice.get("function") if isinstance(choice, Mapping) else None
  name = function.get("name") if isinstance(function, Mapping) else None
  if not isinstance(name, str):
    raise _bad("tool_choice", "must be 'auto', 'none', 'required' or name a function")
  if name not in [tool.name for tool in tools]:
    raise _bad("tool_choice", f"there is no tool {name!r} in tools")
  return True, name


def _messages(given: Any) -> tuple[Message, ...]:
  if not isinstance(given, list) or not given:
    raise _bad("messages", "must be a list of at least one message")
  out: list[Message] = []
  open_calls: dict[str, int] = {}  # id of a call that waits for a result -> its place in the turn
  places: list[int] = []  # of the calls of this turn that have results, as these came
  for k, entry in enumerate(given):
    at = f"messages[{k}]"
    if not isinstance(entry, Mapping):
      raise _bad(at, "must be an object")
    role = entry.get("role")
    if role == "developer":
      role = "system"
    if role not in ("system", "user", "assistant", "tool"):
      raise _bad(f"{at}.role", f"{role!r} is not one of system, user, assistant, tool")
    if role == "tool":
      name = entry.get("tool_call_id")
      if not isinstance(name, str) or name not in open_calls:
        raise _bad(
          f"{at}.tool_call_id",
          "answers no call of the assistant's message in front of it that is still open",
        )
      places.append(open_calls.pop(name))
    elif open_calls:
      raise _bad(at, f"the calls {', '.join(open_calls)} have no result yet (role tool)")
    message = _message(entry, role, at)
    open_calls |= {call.id: place for place, call in enumerate(message.calls)}
    out.append(message)
    if places and not open_calls:
      # In the order of the calls, whatever came first: chat formats have no ids.
      results = sorted(zip(places, out[-len(places) :], strict=True), key=lambda pair: pair[0])
      out[-len(places) :] = [result for _, result in results]
      places = []
  if open_calls or out[-1].role == "assistant":
    raise _bad("messages", "the last one must be of a user, or the results of all calls")
  first = next((m.role for m in out if m.role != "system"), "none")
  if first != "user":
    raise _bad("messages", f"a conversation begins with a user's message, this one with {first}")
  return tuple(out)


def _message(entry: Mapping[str, Any], role: str, at: str) -> Message:
  calls = entry.get("tool_calls") or []
  if calls and role != "assistant":
    raise _bad(f"{at}.tool_calls", f"belong to an assistant's message, not to role {role}")
  if not isinstance(calls, list):
    raise _bad(f"{at}.tool_calls", "must be a list")
  content = entry.get("content")
  if content is None and role != "assistant":
    raise _bad(f"{at}.content", "is missing")
  code = entry.get("code", Code.OK) if role == "tool" else Code.OK
  if code not in list(Code):
    raise _bad(f"{at}.code", f"{code!r} is not one of {', '.join(Code)}")
  parsed = tuple(_call(call, f"{at}.tool_calls[{k}]") for k, call in enumerate(calls))
  if len({call.id for call in parsed}) != len(parsed):
    raise _bad(f"{at}.tool_calls", "two calls have one id")
  text = _text(content, at)
  return Message(role, text.strip(), parsed, Code(code), text)


def _text(content: Any, at: str) -> str:
  if content is None:
    return ""
  if isinstance(content, str):
    return content
  if not isinstance(content, list):
    raise _bad(f"{at}.content", "must be a text, or a list of parts of type text")
  texts = []
  for k, part in enumerate(content):
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str) or part.get("type", "text") != "text":
      raise _bad(f"{at}.content[{k}]", f"must be of type text: {_TEXT}")
    texts.append(text)
  return "".join(texts)


def _call(call: Any, at: str) -> Call:
  function = call.get("function") if isinstance(call, Mapping) else None
  if not isinstance(function, Mapping) or not isinstance(call.get("id"), str):
    raise _bad(at, "must be {'id': …, 'type': 'function', 'function': {…}}")
  name, text = function.get("name"), function.get("arguments")
  if not isinstance(name, str) or not name or not isinstance(text, str):
    raise _bad(f"{at}.function", "name and arguments must be texts")
  try:
    arguments = json.loads(text)
  except (ValueError, RecursionError):
    raise _bad(f"{at}.function.arguments", "are no JSON text") from None
  if not isinstance(arguments, dict):
    raise _bad(f"{at}.function.arguments", "must be a JSON object")
  return call_of(name, arguments, call["id"])


def call_of(name: str, arguments: Mapping[str, Any], name_of_call: str) -> Call:
  meaning = json.dumps(arguments, sort_keys=True, ensure_ascii=False)
  return Call(name, meaning, json.dumps(arguments, ensure_ascii=False), name_of_call)
