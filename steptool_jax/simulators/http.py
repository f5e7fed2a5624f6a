"""Client of a StableToolBench server: POST /virtual, pooled, retried, behind a circuit breaker.

What the API says, errors included, is an answer. What goes wrong between here and the server
(no connection, time-out, status 429 or 5xx, prose in place of JSON) is tried again and is an
InfrastructureError in the end.
"""

import contextlib
import datetime
import email.utils
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.virtual import VirtualRequest, VirtualResponse, response_of

_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
# The server is well and asks for patience: no reason to open the breaker.
_PATIENCE = frozenset({425, 429})


class _Failed(Exception):
  """One attempt that got no answer. `wait_s`: what the server asked for (Retry-After)."""

  def __init__(self, reason: str, again: bool = True, broken: bool = True, wait_s: float = 0.0):
    super().__init__(reason)
    self.again, self.broken, self.wait_s = again, broken, wait_s


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
    headers: Mapping[str, str] | None = None,
  ):
    if not url.startswith(("http://", "https://")):
      raise ValueError(f"url is {url!r}: give http://host:port/virtual")
    if not timeout_s > 0:
      raise ValueError(f"timeout_s is {timeout_s}: must be above 0 seconds")
    if retries < 0 or not min(backoff_s, max_backoff_s, max_wait_s) >= 0:
      raise ValueError("retries, backoff_s, max_backoff_s and max_wait_s must not be negative")
    if max_in_flight < 1 or max_body_bytes < 1:
      raise ValueError("max_in_flight and max_body_bytes must be at least 1")
    self._url, self._timeout_s, self._retries = url, timeout_s, retries
    self._backoff_s, self._max_backoff_s, self._max_wait_s = backoff_s, max_backoff_s, max_wait_s
    self._max_body_bytes = max_body_bytes
    self.breaker = Breaker(failures_to_open, cooldown_s)
    self._slots = threading.BoundedSemaphore(max_in_flight)
    self._client = httpx.Client(
      timeout=httpx.Timeout(timeout_s, pool=None),
      limits=httpx.Limits(
        max_connections=max_in_flight, max_keepalive_connections=max_in_flight, keepalive_expiry=30
      ),
      # A compressed body could unpack to far more than the limit.
      headers={"accept-encoding": "identity", **(headers or {})},
    )

  def answer(self, request: VirtualRequest) -> VirtualResponse:
    """Blocks until there is an answer; InfrastructureError when the attempts are used up."""
    try:
      content = json.dumps(_body(request))
    except (TypeError, ValueError, RecursionError) as error:
      raise ValueError(f"tool_input of {request.api_name} is not JSON data: {error}") from None
    headers = {"content-type": "application/json", "toolbench_key": request.toolbench_key}
    for attempt in range(self._retries + 1):
      try:
        with self._slots, self._guarded():
          return self._attempt(content, headers)
      except _Failed as failure:
        reason = f"{self._url}: {failure}"
        if not failure.again:
          raise InfrastructureError(reason) from None
        wait_s = self._wait_s(attempt, failure.wait_s)
      if attempt < self._retries:
        time.sleep(wait_s)
    raise InfrastructureError(f"{reason} (tried {self._retries + 1} times)")

  def close(self) -> None:
    self._client.close()

  def _wait_s(self, attempt: int, asked_s: float) -> float:
    backoff_s = min(self._backoff_s * 2**attempt, self._max_backoff_s) * random.uniform(0.5, 1.5)
    return max(backoff_s, min(asked_s, self._max_wait_s))

  @contextlib.contextmanager
  def _guarded(self) -> Iterator[None]:
    if not self.breaker.admit():
      raise _Failed("the circuit breaker is open, the last attempts all failed", again=False)
    try:
      yield
    except _Failed as failure:
      if failure.broken:
        self.breaker.report(well=False)
      else:
        self.breaker.release()
      raise
    except BaseException:
      self.breaker.release()
      raise
    self.breaker.report(well=True)

  def _attempt(self, content: str, headers: Mapping[str, str]) -> VirtualResponse:
    deadline = time.monotonic() + self._timeout_s
    try:
      with self._client.stream("POST", self._url, content=content, headers=headers) as reply:
        body = bytearray()
        for chunk in reply.iter_raw():
          body += chunk
          if len(body) > self._max_body_bytes:
            raise _Failed(
              f"answer of more than {self._max_body_bytes} bytes, given up; raise max_body_bytes "
              "if it is meant to be so long",
              again=False,
              broken=False,
            )
          # httpx limits the wait for each piece, not for all of them.
          if time.monotonic() > deadline:
            raise _Failed(f"no complete answer after {self._timeout_s:g} s")
    except httpx.TimeoutException:
      raise _Failed(f"no answer after {self._timeout_s:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
      raise _Failed(f"{type(error).__name__}: {error}") from None
    return _read(reply.status_code, bytes(body), reply.headers)


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


def _read(status: int, body: bytes, headers: Mapping[str, str]) -> VirtualResponse:
  """The answer in a reply; _Failed when the reply is none."""
  try:
    response = response_of(json.loads(body))
    wrong = ""
  except RecursionError:
    wrong = "is nested too deeply"
  except ValueError as error:
    wrong = str(error)
  if status == 200:
    if wrong:
      raise _Failed(f"answer is no {{error, response}}: {wrong}: {_start_of(body)}")
    return response
  if status in _RETRIED:
    raise _Failed(
      f"status {status}: {_start_of(body)}",
      broken=status not in _PATIENCE,
      wait_s=_retry_after_s(headers.get("retry-after", "")),
    )
  # Other errors in the contract's form are the API's own, e.g. 404 from a thin proxy.
  if 400 <= status < 500 and not wrong and response.error:
    return response
  raise _Failed(
    f"status {status}, not retried; check the url and the server's version: {_start_of(body)}",
    again=False,
    broken=False,
  )


def _start_of(body: bytes) -> str:
  text = body[:200].decode(errors="replace")
  return repr(text) + ("..." if len(body) > 200 else "")


def _retry_after_s(value: str) -> float:
  """Seconds of a Retry-After header (a number or a date); 0 without a readable one."""
  try:
    return max(0.0, float(value)) if value.strip()[:1].isdigit() else _seconds_until(value)
  except ValueError:
    return 0.0


def _seconds_until(date: str) -> float:
  try:
    when = email.utils.parsedate_to_datetime(date)
  except (TypeError, ValueError):
    return 0.0
  if when.tzinfo is None:
    when = when.replace(tzinfo=datetime.UTC)
  return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())
