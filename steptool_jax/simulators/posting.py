"""POST to one address: pooled, bounded in time and size, tried again with back-off.

What both clients of this room (http.py, endpoint.py) share; what a reply means is theirs to say.
"""

import dataclasses
import datetime
import email.utils
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import httpx

from steptool_jax.simulators.errors import InfrastructureError

T = TypeVar("T")


class Failed(Exception):
  """One attempt that got no answer.

  again: whether another one may help. broken: whether it says that the server is unwell. wait_s:
  what the server asked for (Retry-After).
  """

  def __init__(self, reason: str, again: bool = True, broken: bool = True, wait_s: float = 0.0):
    super().__init__(reason)
    self.again, self.broken, self.wait_s = again, broken, wait_s


@dataclasses.dataclass(frozen=True)
class Reply:
  status: int
  headers: Mapping[str, str]
  body: bytes

  @property
  def start(self) -> str:
    """The start of the body, for error texts."""
    text = self.body[:200].decode(errors="replace")
    return repr(text) + ("..." if len(self.body) > 200 else "")

  @property
  def wait_s(self) -> float:
    return retry_after_s(self.headers.get("retry-after", ""))


class Poster:
  """A pool of connections to `url`.

  timeout_s: seconds for one attempt, from the connection to the last byte. max_body_bytes: a longer
  reply is given up as soon as that much has come. slots: max_in_flight places; whoever posts holds
  one.
  """

  def __init__(
    self,
    url: str,
    *,
    timeout_s: float,
    max_in_flight: int,
    max_body_bytes: int,
    headers: Mapping[str, str],
  ):
    if not timeout_s > 0:
      raise ValueError(f"timeout_s is {timeout_s}: must be above 0 seconds")
    if max_in_flight < 1:
      raise ValueError(f"max_in_flight is {max_in_flight}: must be at least 1")
    if max_body_bytes < 1:
      raise ValueError(f"max_body_bytes is {max_body_bytes}: must be at least 1")
    self.url, self._timeout_s, self._max_body_bytes = url, timeout_s, max_body_bytes
    self.slots = threading.BoundedSemaphore(max_in_flight)
    self._client = httpx.Client(
      timeout=httpx.Timeout(timeout_s, pool=None),
      limits=httpx.Limits(
        max_connections=max_in_flight, max_keepalive_connections=max_in_flight, keepalive_expiry=30
      ),
      # A compressed body could unpack to far more than the limit.
      headers={"content-type": "application/json", "accept-encoding": "identity", **headers},
    )

  def post(self, content: str, headers: Mapping[str, str] | None = None) -> Reply:
    """One attempt, whatever its status; Failed when no whole reply comes."""
    deadline = time.monotonic() + self._timeout_s
    try:
      with self._client.stream("POST", self.url, content=content, headers=headers) as reply:
        body = bytearray()
        for chunk in reply.iter_raw():
          body += chunk
          if len(body) > self._max_body_bytes:
            raise Failed(
              f"a reply of more than {self._max_body_bytes} bytes, given up",
              again=False,
              broken=False,
            )
          # httpx limits the wait for each piece, not for all of them.
          if time.monotonic() > deadline:
            raise Failed(f"no complete reply after {self._timeout_s:g} s")
    except httpx.TimeoutException:
      raise Failed(f"no reply after {self._timeout_s:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
      raise Failed(f"{type(error).__name__}: {error}") from None
    return Reply(reply.status_code, reply.headers, bytes(body))

  def close(self) -> None:
    self._client.close()


@dataclasses.dataclass(frozen=True)
class Patience:
  """`retries` further attempts, after backoff_s, 2 backoff_s, ... at most max_backoff_s (each times
  a random 0.5 to 1.5), and not before a Retry-After, of which at most max_wait_s are granted.
  """

  retries: int
  backoff_s: float
  max_backoff_s: float
  max_wait_s: float

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if not getattr(self, field.name) >= 0:
        raise ValueError(f"{field.name} is {getattr(self, field.name)}: must not be negative")

  def persist(self, attempt: Callable[[], T], where: str) -> T:
    """The first attempt that does not raise Failed; InfrastructureError when all are used up."""
    for number in range(self.retries + 1):
      try:
        return attempt()
      except Failed as failure:
        reason = f"{where}: {failure}"
        if not failure.again:
          raise InfrastructureError(reason) from None
        pause_s = self.pause_s(number, failure.wait_s)
      if number < self.retries:
        time.sleep(pause_s)
    raise InfrastructureError(f"{reason} (tried {self.retries + 1} times)")

  def pause_s(self, number: int, asked_s: float) -> float:
    backoff_s = min(self.backoff_s * 2**number, self.max_backoff_s) * random.uniform(0.5, 1.5)
    return max(backoff_s, min(asked_s, self.max_wait_s))


def retry_after_s(value: str) -> float:
  """Seconds of a Retry-After header (a number or a date); 0 without a readable one."""
  try:
    if value.strip()[:1].isdigit():
      return max(0.0, float(value))
    when = email.utils.parsedate_to_datetime(value)
  except (TypeError, ValueError):
    return 0.0
  if when.tzinfo is None:
    when = when.replace(tzinfo=datetime.UTC)
  return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())
