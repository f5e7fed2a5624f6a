"""The official codes of an observation, and what they are here.

0  ok                                 OK; with an error text TOOL_ERROR, where the input did
                                      not parse BAD_ARGUMENTS (both count as 0 officially)
1  no such function                   UNKNOWN_TOOL
2  malformed Finish                   MALFORMED (the conversation finds it)
3  answer, 4 give up                  the conversation's end
5  Timeout error...                   TIMEOUT
6  API not working error...           UNAVAILABLE
7  Unauthorized, 8 Unsubscribed       TOOL_ERROR
9  Too many requests, 10 Rate limit   RATE_LIMIT
11 Message error...                   TOOL_ERROR
12 the server failed                  INFRASTRUCTURE, never scored
"""

import json
from collections.abc import Mapping

from steptool_jax.toolbench.simulators.virtual import NOT_PARSED, NOT_WORKING
from steptool_jax.types import Code, Observation

# error text -> (official code, ours)
_ERRORS: Mapping[str, tuple[int, Code]] = {
  "": (0, Code.OK),
  NOT_PARSED.error: (0, Code.BAD_ARGUMENTS),
  "Timeout error...": (5, Code.TIMEOUT),
  NOT_WORKING.error: (6, Code.UNAVAILABLE),
  "Unauthorized error...": (7, Code.TOOL_ERROR),
  "Unsubscribed error...": (8, Code.TOOL_ERROR),
  "Too many requests error...": (9, Code.RATE_LIMIT),
  "Rate limit per minute error...": (10, Code.RATE_LIMIT),
  "Message error...": (11, Code.TOOL_ERROR),
}
_BY_CODE = {
  Code.MALFORMED: 2,
  Code.UNKNOWN_TOOL: 1,
  Code.BAD_ARGUMENTS: 2,
  Code.TIMEOUT: 5,
  Code.INFRASTRUCTURE: 12,
}


def codes_of(error: str) -> tuple[int, Code]:
  """(official environment code, ours) of the error text in a response."""
  return _ERRORS.get(error, (0, Code.TOOL_ERROR))


def official_code(observation: Observation) -> int:
  """The official environment code of an observation: 0, 1, 2, 5 to 12."""
  for error, (number, code) in _ERRORS.items():
    begin = json.dumps({"error": error})[:-1]
    if error and code is observation.code and observation.text.startswith(begin):
      return number
  return _BY_CODE.get(observation.code, 0)
