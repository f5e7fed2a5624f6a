"""POST to one address: pooled, bounded in time and size, tried again with back-off.

What the clients of endpoints and of /virtual servers share; what a reply means is theirs to say.
No text of an error shows a key: they reach logs, files and the clients of --mode=serve.
"""

import asyncio
import dataclasses
import datetime
import email.utils
import functools
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import httpx

from steptool_jax.simulators import background
from steptool_jax.simulators.errors import InfrastructureError

T = TypeVar("T")
# A line for each request would drown what a run says.
logging.getLogger("httpx").setLevel(logging.WARNING)

_GRACE_S = 5.0  # for the loop to end what its own limit has cancelled


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
  hidden: tuple[str, ...] = ()  # keys that the server may have repeated

  @property
  def start(self) -> str:
    """The start of the body, for error texts."""
    text = redact(self.body.decode(errors="replace"), self.hidden)
    return repr(text[:200]) + ("..." if len(text) > 200 else "")

  @property
  def wait_s(self) -> float:
    return retry_after_s(self.headers.get("retry-after", ""))


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

  def pause_s(self, number: int, asked_s: float) -> float:
    backoff_s = min(self.backoff_s * 2**number, self.max_backoff_s) * random.uniform(0.5, 1.5)
    return max(backoff_s, min(asked_s, self.max_wait_s))


class Poster:
  """A pool of connections to `url`, which must have passed `check_address`.

  timeout_s: seconds for one attempt, from the look-up of the host to the last byte.
  max_body_bytes: a longer reply is given up as soon as that much has come. slots: max_in_flight
  places; whoever posts holds one. key: sent as a bearer token; ValueError if no header can hold it.
  """

  def __init__(
    self,
    url: str,
    patience: Patience,
    *,
    timeout_s: float,
    max_in_flight: int,
    max_body_bytes: int,
    key: str = "",
  ):
    if not timeout_s > 0:
      raise ValueError(f"timeout_s is {timeout_s}: must be above 0 seconds")
    if max_in_flight < 1:
      raise ValueError(f"max_in_flight is {max_in_flight}: must be at least 1")
    if max_body_bytes < 1:
      raise ValueError(f"max_body_bytes is {max_body_bytes}: must be at least 1")
    self._url, self._patience = url, patience
    self._timeout_s, self._max_body_bytes = timeout_s, max_body_bytes
    self._key = clean_key(key, "the key")
    self.shown = shown(url)
    self.slots = threading.BoundedSemaphore(max_in_flight)
    # A compressed body could unpack to far more than the limit.
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    make = functools.partial(
      httpx.AsyncClient,
      timeout=None,  # the limit of an attempt is for all of it
      limits=httpx.Limits(max_connections=1, keepalive_expiry=30),
      headers=headers | ({"authorization": f"Bearer {self._key}"} if self._key else {}),
      verify=httpx.create_ssl_context(),
    )
    # A client for each connection: in a pool of many, each request looks at all of them.
    self._make_client = make
    self._free: list[httpx.AsyncClient] = []

  def post(self, content: str, headers: Mapping[str, str] | None = None) -> Reply:
    """One attempt, whatever its status; Failed when no whole reply comes."""
    try:
      return background.run(self._exchange(content, headers or {}), self._timeout_s + _GRACE_S)
    except TimeoutError:
      raise Failed(f"no complete reply after {self._timeout_s:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
      raise Failed(f"{type(error).__name__}: {error}") from None

  async def _exchange(self, content: str, headers: Mapping[str, str]) -> Reply:
    client = self._free.pop() if self._free else self._make_client()
    posting = client.stream("POST", self._url, content=content, headers=headers)
    try:
      async with asyncio.timeout(self._timeout_s), posting as reply:
        body = bytearray()
        async for chunk in reply.aiter_raw():
          body += chunk
          if len(body) > self._max_body_bytes:
            reason = f"a reply of more than {self._max_body_bytes} bytes, given up"
            raise Failed(reason, again=False, broken=False)
    finally:
      self._free.append(client)
    return Reply(reply.status_code, reply.headers, bytes(body), (self._key, *headers.values()))

  def persist(self, attempt: Callable[[], T], where: str = "", hidden: tuple[str, ...] = ()) -> T:
    """The first attempt that does not raise Failed; InfrastructureError when all are used up.

    where: said after the address. hidden: what its text must not show besides the key.
    """
    for number in range(self._patience.retries + 1):
      try:
        return attempt()
      except Failed as failure:
        reason = redact(f"{self.shown}{where}: {failure}", (self._key, *hidden))
        if not failure.again:
          raise InfrastructureError(reason) from None
        pause_s = self._patience.pause_s(number, failure.wait_s)
      if number < self._patience.retries:
        time.sleep(pause_s)
    raise InfrastructureError(f"{reason} (tried {self._patience.retries + 1} times)")

  def close(self) -> None:
    while self._free:
      background.run(self._free.pop().aclose(), _GRACE_S)


def check_address(url: str, name: str, form: str) -> None:
  """ValueError for what is no http address, or has a user name or password in it."""
  if re.match(r"[^/?#]*(//)?[^/?#]*@", url):
    # A configuration is stored and shown; and no text shows it here.
    raise ValueError(
      f"{name}: the address holds a user name or a password; leave them out, put the server's key "
      "into an environment variable and name that"
    )
  if not url.startswith(("http://", "https://")):
    raise ValueError(f"{name} is {url!r}: give {form}")
  try:
    httpx.URL(url)
  except httpx.InvalidURL as error:
    raise ValueError(f"{name} is {shown(url)!r}: {error}; give {form}") from None


def shown(url: str) -> str:
  """An address for texts: without its query, which may hold a key."""
  return url.partition("?")[0]


def clean_key(key: str, name: str) -> str:
  """Without the line end that mounted secrets have; ValueError for what no header can hold."""
  key = key.strip()
  if not all("!" <= c <= "~" for c in key):
    raise ValueError(f"{name} holds a blank, a line end or a character that is not ASCII")
  return key


def redact(text: str, hidden: tuple[str, ...]) -> str:
  """`text` with [key] in the place of all that is hidden."""
  for secret in hidden:
    # What is shorter is no secret ("EMPTY"), and may be a part of any word.
    text = text.replace(secret, "[key]") if len(secret) >= 8 else text
  return text


def retry_after_s(value: str) -> float:
  """Seconds of a Retry-After header (a number or a date); 0 without a readable one."""
  try:
    if value.strip()[:1].isdigit():
      return max(0.0, float(value))
    when = email.utils.parsedate_to_datetime(value)
    if when.tzinfo is None:
      when = when.replace(tzinfo=datetime.UTC)
    return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())
  except (TypeError, ValueError, OverflowError):  # the year 10,000 among them
    return 0.0
