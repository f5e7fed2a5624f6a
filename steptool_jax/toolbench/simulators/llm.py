"""Simulated API answers from a language model, in two styles.

"gpt": any chat model, shown the API's documentation and recorded examples, in JSON mode.
"mirror": a model trained as an API simulator (MirrorAPI), shown documentation and request in the
form that it was trained on. An answer counts when it is a valid {error, response}.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from steptool_jax.simulators.asking import ask
from steptool_jax.simulators.endpoint import Endpoint, Reply
from steptool_jax.toolbench.simulators.virtual import (
  NOT_PARSED,
  VirtualRequest,
  VirtualResponse,
  failure_in,
  locate,
  parse_arguments,
  read_response,
)

Style = Literal["gpt", "mirror"]
MAX_EXAMPLES = 5
MAX_EXAMPLE_CHARS = 2048
ATTEMPTS = 3
_MAX_TOKENS = {"gpt": 1024, "mirror": 2048}

GPT_PROMPT = """\
You play the server of a web API. You are given the documentation of the API, sometimes a few of \
its recorded answers, and the input of one request. Write the answer that the API would give.

Reply with one JSON object and nothing else:
{"error": "", "response": <the answer>}

- The response holds concrete, plausible data for exactly this input, in the shape of the recorded \
answers and of the documentation, in about 100 to 200 words.
- Recorded answers that are empty or only report errors are no model to follow.
- error stays empty unless the input itself is wrong; then it says briefly what is wrong."""

MIRROR_PROMPT = """\
You are the server of a web API. From the documentation and the request, reply with what the API \
answers, as one JSON object and nothing else:
{"error": "", "response": "<the answer>"}

Fill response with rich, specific content that fits the request. When the request is wrong or \
cannot be served, say in error how the API would put it."""


class LlmSimulator:
  """A Simulator that asks a model.

  examples: recorded (arguments text, {error, response}) of the request's API, e.g. Cache.examples;
  used by the style "gpt" only. Without documentation in the request there is no answer (None) from
  style "mirror"; "gpt" then goes by the names.
  """

  def __init__(
    self,
    endpoint: Endpoint,
    style: Style = "gpt",
    *,
    examples: Callable[[VirtualRequest], Sequence[tuple[str, Mapping[str, Any]]]] | None = None,
  ):
    if style not in _MAX_TOKENS:
      raise ValueError(f"style {style!r} does not exist: use gpt or mirror")
    if style == "mirror" and examples is not None:
      raise ValueError("style mirror uses no examples: leave them out, or use style gpt")
    self._endpoint, self._style, self._examples = endpoint, style, examples

  def answer(self, request: VirtualRequest) -> VirtualResponse | None:
    """Blocks; InfrastructureError when three replies in a row are no {error, response}."""
    try:
      arguments = parse_arguments(request.tool_input)
    except ValueError:
      return NOT_PARSED
    gpt = self._style == "gpt"
    if not gpt and request.documentation is None:
      return None
    system = GPT_PROMPT if gpt else MIRROR_PROMPT
    prompt = self._gpt(request, arguments) if gpt else _mirror(request, arguments)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]

    def chat(messages: list[dict], attempt: int, accept: Callable[[Reply], None]) -> Reply:
      # `sample`: a second draw of the same request is another one, for the endpoint's cache too.
      return self._endpoint.chat(
        messages,
        json_mode=gpt,
        max_tokens=_MAX_TOKENS[self._style],
        sample=attempt,
        accept=accept,
      )

    def correction(text: str, reason: str) -> list[dict]:
      if not gpt:
        return []
      # At temperature 0 the same question would bring the same reply.
      note = f"That reply {reason}. Reply with the JSON object only."
      return [
        {"role": "assistant", "content": text[:MAX_EXAMPLE_CHARS] or "-"},
        {"role": "user", "content": note},
      ]

    return ask(
      chat,
      messages,
      lambda reply: parse_reply(reply.text, lenient=not gpt),
      correction,
      ATTEMPTS,
      f"simulated answer for {request.api_name} of {request.tool_name}: no valid reply in "
      f"{ATTEMPTS} attempts",
    )

  def _gpt(self, request: VirtualRequest, arguments: Mapping[str, Any]) -> str:
    category, tool, api = locate(request.category, request.tool_name, request.api_name)
    documentation = request.documentation or {"category": category, "tool": tool, "api": api}
    recorded = list(self._examples(request))[:MAX_EXAMPLES] if self._examples else []
    # Whole examples as long as they fit; a single long one is cut.
    while len(recorded) > 1 and len(str(recorded)) > MAX_EXAMPLE_CHARS:
      recorded.pop()
    return (
      f"API documentation: {_json(documentation)}\n"
      f"Recorded answers: {str(recorded)[:MAX_EXAMPLE_CHARS]}\n"
      f"Input: {_json(arguments)}\n"
    )


def _mirror(request: VirtualRequest, arguments: Mapping[str, Any]) -> str:
  known = request.documentation or {}
  category, tool, api = locate(request.category, request.tool_name, request.api_name)
  # These keys in this order, printed as Python does: the form that MirrorAPI was trained on.
  documentation = {
    "api_name": api,
    "api_description": known.get("api_description") or known.get("description") or "",
    "required_parameters": known.get("required_parameters", []),
    "optional_parameters": known.get("optional_parameters", []),
    "tool_description": known.get("tool_description", ""),
    "tool_name": tool,
    "tool_category": category,
  }
  asked = {name: value for name, value in arguments.items() if name != "toolbench_key"}
  return f"API doc:\n{documentation}\n\nRequest:\n{asked}"


def parse_reply(text: str, lenient: bool = False) -> VirtualResponse:
  """The {error, response} of a model's reply, with or without a Markdown fence around it.

  lenient also takes a response whose inner quotes are not escaped, as trained simulators write
  it. ValueError says what is wrong, worded to follow "the reply".
  """
  fenced = re.fullmatch(r"\s*```(?:json)?\s*\n?(.*?)\s*```\s*", text, re.DOTALL)
  body = (fenced.group(1) if fenced else text).strip()
  try:
    return read_response(body)
  except json.JSONDecodeError as error:
    response = _read_loosely(body) if lenient else None
    if response is None:
      raise ValueError(f"is not JSON ({error})") from None
  wrong = failure_in(response)
  if wrong:
    raise ValueError(wrong)
  return response


_LOOSE = re.compile(
  r'"error"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"response"\s*:\s*"(.*)"\s*\}\s*', re.DOTALL
)


def _read_loosely(body: str) -> VirtualResponse | None:
  found = _LOOSE.search(body)
  if found is None or found.end() != len(body):
    return None
  error, response = found.groups()
  # A reply that the token limit cut off may end in the "} of its own data: half an answer is none.
  if any(response.count(a) != response.count(b) for a, b in ("{}", "[]")):
    return None
  return VirtualResponse(_unescaped(error), _unescaped(response))


def _unescaped(text: str) -> str:
  try:
    return json.loads(f'"{text}"', strict=False)
  except ValueError:  # loose quotes inside: as it is
    return text


def _json(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False, default=str)
