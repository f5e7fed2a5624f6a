"""The official /virtual contract of StableToolBench: a request, an answer, simulators in order.

A simulator answers with what the API says, which may well be an error of the API; what fails on
the simulator's own side is an InfrastructureError, never an answer.
"""

import dataclasses
import functools
import json
import math
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

from steptool_jax.simulators.errors import InfrastructureError


@dataclasses.dataclass(frozen=True)
class VirtualRequest:
  """One call of one API. `tool_input` is the arguments, or the text that should hold them."""

  category: str
  tool_name: str
  api_name: str
  tool_input: Mapping[str, Any] | str
  strip: str = "filter"
  toolbench_key: str = ""
  documentation: Mapping[str, Any] | None = None  # for simulated answers; never sent to a server


@dataclasses.dataclass(frozen=True)
class VirtualResponse:
  """The official {error, response}."""

  error: str
  response: Any  # text mostly; JSON data where the API answered with data

  def as_dict(self) -> dict[str, Any]:
    return {"error": self.error, "response": self.response}

  @property
  def text(self) -> str:
    """The observation as the official environment prints it, before it is cut."""
    return json.dumps(self.as_dict())


# Official texts. The first one is environment code 6, the second counts as code 0 officially.
NOT_WORKING = VirtualResponse("API not working error...", "")
NOT_PARSED = VirtualResponse("Tool input parse error...\n", "")
# What an API (or the service in front of it) says when it did not get as far as an answer: codes
# 5 to 10. The next attempt may end differently, so these are not kept.
PASSING_ERRORS = frozenset(
  {
    "Timeout error...",
    "API not working error...",
    "Unauthorized error...",
    "Unsubscribed error...",
    "Too many requests error...",
    "Rate limit per minute error...",
  }
)
# The official server writes this into its cache when its own language model failed.
SIMULATOR_FAILED = "Failed to generate fake response"
_OWN_FAILURE = re.compile(
  rf"{SIMULATOR_FAILED}\W*|(HTTP )?(error )?(5\d\d\W*)?"
  r"(internal server error|bad gateway|service unavailable|gateway time-?out)\W*",
  re.IGNORECASE,
)


class Simulator(Protocol):
  def answer(self, request: VirtualRequest) -> VirtualResponse | None:
    """None when this simulator has no answer (the next one is tried); blocks; thread-safe.

    Raises InfrastructureError when the simulator itself failed.
    """
    ...


class FirstAnswer:
  """Simulators in order; the first answer counts.

  One that fails is passed over like one without an answer. When none answers: InfrastructureError
  if one of them failed (it might have known), else the official "API not working error...".
  """

  def __init__(self, simulators: Sequence[Simulator]):
    if not simulators:
      raise ValueError("simulators is empty: name at least one")
    self._simulators = tuple(simulators)

  def answer(self, request: VirtualRequest) -> VirtualResponse:
    failures = []
    for simulator in self._simulators:
      try:
        found = simulator.answer(request)
      except InfrastructureError as error:
        failures.append(error)
        continue
      if found is not None:
        return found
    if len(failures) == 1:
      raise failures[0]
    if failures:
      reasons = "; ".join(str(error) for error in failures)
      raise InfrastructureError(f"{len(failures)} simulators failed: {reasons}") from failures[-1]
    return NOT_WORKING


def response_of(data: Any) -> VirtualResponse:
  """The response in parsed JSON; ValueError says what is wrong with it."""
  if not isinstance(data, Mapping):
    raise ValueError(f"is a {type(data).__name__}, expected an object with error and response")
  missing = [field for field in ("error", "response") if field not in data]
  if missing:
    raise ValueError(f"has no field {' and no field '.join(missing)}")
  error = data["error"]
  if not (error is None or isinstance(error, str)):
    raise ValueError(f"its field error is a {type(error).__name__}, expected a text")
  return VirtualResponse(error or "", data["response"])


def failure_in(response: VirtualResponse) -> str:
  """How it shows that a live simulator failed itself and sent that as its answer; "" for an answer.

  Worded to follow "the reply". Recorded answers may well be empty: those are the API's own.
  """
  error, value = response.error.strip(), response.response
  for text in (error, value):
    if isinstance(text, str) and _OWN_FAILURE.fullmatch(text.strip()):
      return f"is the simulator's own failure, {text!r}"
  nothing = value is None or value != value or (isinstance(value, str) and not value.strip())
  return "has neither an error nor a response" if nothing and not error else ""


def read_response(text: str | bytes) -> VirtualResponse:
  """What a live simulator sent. ValueError, worded to follow "the reply", if it is no answer."""
  try:
    data = json.loads(text, parse_constant=_not_finite, parse_float=_finite)
  except RecursionError:
    raise ValueError("is nested too deeply") from None
  response = response_of(data)
  wrong = failure_in(response)
  if wrong:
    raise ValueError(wrong)
  return response


def _not_finite(text: str) -> NoReturn:
  raise ValueError(f"holds {text:.20}, which is no JSON number")


def _finite(text: str) -> float:
  value = float(text)
  return value if math.isfinite(value) else _not_finite(text)


def parse_arguments(tool_input: Mapping[str, Any] | str) -> dict[str, Any]:
  """The arguments object; "" means none. ValueError for a text that is no JSON object."""
  if isinstance(tool_input, Mapping):
    return tool_input if type(tool_input) is dict else dict(tool_input)
  if not tool_input:
    return {}
  try:
    parsed = json.loads(tool_input)
  except RecursionError:
    raise ValueError("tool_input is nested too deeply") from None
  except ValueError as error:
    raise ValueError(f"tool_input is not JSON: {error}") from None
  if not isinstance(parsed, dict):
    raise ValueError(f"tool_input is a JSON {type(parsed).__name__}, expected an object")
  return parsed


_FORBIDDEN = re.compile(r"[^\u4e00-\u9fa5a-zA-Z0-9_^]")
_RESERVED = frozenset({"from", "class", "return", "false", "true", "id", "and"})


MAX_NAME = 512  # characters of a name that a server's client may send; real ones have 85


# So these caches stay below some 10 MB each, whatever the clients ask for.
@functools.lru_cache(maxsize=1 << 13)
def standardize(name: str) -> str:
  """The official rule for names of tools, APIs and parameters; "" when nothing is left."""
  name = re.sub(r"_+", "_", _FORBIDDEN.sub("_", name)).lower().strip("_")
  return f"get_{name}" if name[:1].isdigit() else name


def change_name(name: str) -> str:
  """Keeps a standardized name off Python's reserved words."""
  return f"is_{name}" if name in _RESERVED else name


@functools.lru_cache(maxsize=1 << 10)
def standardize_category(category: str) -> str:
  """Folder name of a category, e.g. "News, Media" -> "News_Media"."""
  return re.sub(r"_+", "_", re.sub(r"[ ,/]", "_", urllib.parse.unquote(category)))


@functools.lru_cache(maxsize=1 << 13)
def locate(category: str, tool_name: str, api_name: str) -> tuple[str, str, str]:
  """(category, tool, api) by the official rules, the tool without its "_for_<category>"."""
  category = standardize_category(category)
  tool = standardize(tool_name.removesuffix(f"_for_{category}"))
  api = change_name(standardize(api_name))
  # The model knows an API as <api>_for_<tool>; both forms mean the same one.
  return category, tool, api.split(f"_for_{tool}")[0] if tool else api
