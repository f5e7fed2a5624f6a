"""Client of a StableToolBench server: POST /virtual, pooled, retried, behind a circuit breaker.

What the API says, errors included, is an answer. What goes wrong between here and the server
(no connection, time-out, status 429 or 5xx, prose in place of JSON) is tried again and is an
InfrastructureError in the end.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from steptool_jax.simulators.posting import (
  Failed,
  Patience,
  Poster,
  Reply,
  check_address,
  clean_key,
)
from steptool_jax.toolbench.simulators.virtual import VirtualRequest, VirtualResponse, read_response

_NOT_JSON = (json.JSONDecodeError, UnicodeDecodeError)
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
# The server is well and asks for patience: no reason to open the breaker.
_PATIENCE = frozenset({425, 429})


class Breaker:
  """Opens after `threshold` failures in a row; after `cooldown_s` one attempt may try, and its
  end closes the breaker or opens it for another `cooldown_s`. Thread-safe.
  """

  def __init__(
    self, threshold: int, cooldown_s: float, clock: Callable[[], float] = time.monotonic
  ):
    if threshold < 1:
      raise ValueError(f"threshold is {threshold}: must be at least 1 failure")
    if not cooldown_s >= 0:
      raise ValueError(f"cooldown_s is {cooldown_s}: must not be negative")
    self._threshold, self._cooldown_s, self._clock = threshold, cooldown_s, clock
    self._lock = threading.Lock()
    self._failures = 0
    self._opened: float | None = None  # when; None = closed
    self._probing = False

  @property
  def is_open(self) -> bool:
    return self._opened is not None

  def admit(self) -> bool:
    """Whether an attempt may start; then exactly one of `report` or `release` must follow."""
    with self._lock:
      if self._opened is None:
        return True
      if self._probing or self._clock() - self._opened < self._cooldown_s:
        return False
      self._probing = True
      return True

  def report(self, well: bool) -> None:
    with self._lock:
      self._probing = False
      if well:
        self._failures, self._opened = 0, None
        return
      self._failures += 1
      # Attempts that were under way when it opened must not prolong it.
      waited = self._opened is None or self._clock() - self._opened >= self._cooldown_s
      if self._failures >= self._threshold and waited:
        self._opened = self._clock()

  def release(self) -> None:
    """The attempt says nothing about the server's health."""
    with self._lock:
      self._probing = False


class HttpSimulator:
  """A Simulator behind POST {url}, `url` being the full address, e.g. http://host:8080/virtual.

  timeout_s: seconds for one attempt, from the connection to the last byte. retries: further
  attempts, after backoff_s, 2 backoff_s, ... at most max_backoff_s (each times a random 0.5 to
  1.5), and not before a Retry-After, of which at most max_wait_s are granted. max_in_flight:
  requests at the same time, further ones wait. max_body_bytes: a longer answer is given up as soon
  as that much has come. failures_to_open, cooldown_s: the circuit breaker, which counts attempts.
  """

  def __init__(
    self,
    url: str,
    *,
    timeout_s: float = 60.0,
    retries: int = 4,
    backoff_s: float = 0.5,
    max_backoff_s: float = 20.0,
    max_wait_s: float = 60.0,
    max_in_flight: int = 64,
    max_body_bytes: int = 4 << 20,
    failures_to_open: int = 16,
    cooldown_s: float = 30.0,
  ):
    check_address(url, "url", "http://host:port/virtual")
    self.breaker = Breaker(failures_to_open, cooldown_s)
    self._poster = Poster(
      url,
      Patience(retries, backoff_s, max_backoff_s, max_wait_s),
      timeout_s=timeout_s,
      max_in_flight=max_in_flight,
      max_body_bytes=max_body_bytes,
    )

  def answer(self, request: VirtualRequest) -> VirtualResponse:
    """Blocks until there is an answer; InfrastructureError when the attempts are used up."""
    try:
      content = json.dumps(_body(request))
    except (TypeError, ValueError, RecursionError) as error:
      raise ValueError(f"tool_input of {request.api_name} is not JSON data: {error}") from None
    key = clean_key(request.toolbench_key, "toolbench_key")
    headers = {"toolbench_key": key}

    def attempt() -> VirtualResponse:
      with self._poster.slots, self._guarded():
        return _read(self._poster.post(content, headers))

    return self._poster.persist(attempt, hidden=(key,))

  def close(self) -> None:
    self._poster.close()

  @contextlib.contextmanager
  def _guarded(self) -> Iterator[None]:
    if not self.breaker.admit():
      raise Failed("the circuit breaker is open, the last attempts all failed", again=False)
    try:
      yield
    except Failed as failure:
      if failure.broken:
        self.breaker.report(well=False)
      else:
        self.breaker.release()
      raise
    except BaseException:
      self.breaker.release()
      raise
    self.breaker.report(well=True)


def _body(request: VirtualRequest) -> dict[str, Any]:
  tool_input = request.tool_input
  return {
    "category": request.category,
    "tool_name": request.tool_name,
    "api_name": request.api_name,
    "tool_input": tool_input if isinstance(tool_input, str) else dict(tool_input),
    "strip": request.strip,
    "toolbench_key": request.toolbench_key,
  }


def _read(reply: Reply) -> VirtualResponse:
  """The answer in a reply; Failed when the reply is none."""
  try:
    response, wrong = read_response(reply.body), ""
  except ValueError as error:  # also of text that is no JSON or no UTF-8
    wrong = f"is not JSON ({error})" if isinstance(error, _NOT_JSON) else str(error)
  if reply.status == 200:
    if wrong:
      raise Failed(f"the reply is no {{error, response}}, it {wrong}: {reply.start}")
    return response
  if reply.status in _RETRIED:
    raise Failed(
      f"status {reply.status}: {reply.start}",
      broken=reply.status not in _PATIENCE,
      wait_s=reply.wait_s,
    )
  # Other errors in the contract's form are the API's own, e.g. 404 from a thin proxy.
  if 400 <= reply.status < 500 and not wrong and response.error:
    return response
  raise Failed(
    f"status {reply.status}, not retried; check the url and the server's version: {reply.start}",
    again=False,
    broken=False,
  )
