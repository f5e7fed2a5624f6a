"""What every HTTP server of this package does before it answers: bounds, keys, foreign pages.

Statuses: 401 without the key, 403 for what a browser's page sends, 408, 411 and 413.
"""

import asyncio
import concurrent.futures
import hmac
import ipaddress
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.routing import BaseRoute
from uvicorn.protocols.http.h11_impl import H11Protocol

T = TypeVar("T")

_CONNECTIONS = 512  # a further one is closed at once
_HEAD_S, _BODY_S = 60.0, 30.0  # for a client to send one (a head at most twice as long)


class Listener:
  """A server that runs in a thread of its own; `port` is the real one when 0 was asked for."""

  def __init__(
    self,
    host: str,
    port: int,
    routes: Sequence[BaseRoute],
    exception_handlers: Mapping[Any, Callable],
  ):
    """Starts to serve and returns at once; OSError when the address cannot be had."""
    if not host:
      raise ValueError("serve.host is empty: name 0.0.0.0 to listen on every address")
    try:
      family = socket.AF_INET6 if ":" in host else socket.AF_INET
      listening = socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
      raise OSError(f"cannot listen on {host}:{port}: {error}; choose another port") from error
    self.host, self.port = host, listening.getsockname()[1]
    self._server = uvicorn.Server(
      uvicorn.Config(
        Starlette(routes=list(routes), exception_handlers=dict(exception_handlers)),
        http=_Protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="critical",
        access_log=False,
        timeout_keep_alive=int(2 * _HEAD_S),
      )
    )
    run = {"sockets": [listening]}
    self._thread = threading.Thread(target=self._server.run, kwargs=run, daemon=True)
    self._thread.start()
    while not self._server.started and self._thread.is_alive():
      time.sleep(0.01)

  @property
  def root(self) -> str:
    """http://host:port of it."""
    return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

  def close(self, grace_s: float = 10.0) -> None:
    """Takes no new connection and lets the requests under way end, for so long."""
    self._server.config.timeout_graceful_shutdown = grace_s
    self._server.should_exit = True
    self._thread.join()


class _Protocol(H11Protocol):
  """Bounds what uvicorn does not: connections, and the time that a client takes for a head."""

  _seen: Any = None

  def connection_made(self, transport: asyncio.Transport) -> None:
    super().connection_made(transport)
    if len(self.connections) > _CONNECTIONS:
      transport.abort()
    self.loop.call_later(_HEAD_S, self._look)

  def _look(self) -> None:
    """Closes a connection without a new request since the last look."""
    if self.transport.is_closing():
      return
    answering = self.cycle is not None and not self.cycle.response_complete
    if not answering and self.cycle is self._seen:
      self.transport.close()
    self._seen = self.cycle
    self.loop.call_later(_HEAD_S, self._look)


def check_sender(http: Request, host: str, key: str, given: str | None = None) -> None:
  """HTTPException for a sender without the key, and for a page in a browser that runs here: it
  must not ask what only this machine may ask.

  key: "" = none. given: the key that was sent in another place than as a bearer token.
  """
  if "origin" in http.headers:
    raise HTTPException(403, "requests of web pages (header Origin) are not answered")
  if key:
    if given is None:
      given = bearer(http) or ""
    if not hmac.compare_digest(given.strip().encode(), key.encode()):
      raise HTTPException(401, "the key is missing or wrong: send it as a bearer token")
  elif not _is_own_name(http.headers.get("host", ""), host):
    # A foreign name that leads here is how pages reach local servers.
    raise HTTPException(403, "a foreign Host: ask by address, or set serve.key_variable")


def bearer(http: Request) -> str | None:
  """The bearer token, None where another kind of authorization was sent, or none."""
  kind, _, token = http.headers.get("authorization", "").partition(" ")
  return token if kind.lower() == "bearer" else None


def _is_own_name(sent: str, host: str) -> bool:
  """Whether a Host header has an address, or a name that is surely ours; a page must send one."""
  name = re.sub(r":\d*$", "", sent).strip("[]").lower()
  try:
    ipaddress.ip_address(name)
  except ValueError:
    return name in {"", host.lower(), "localhost", socket.gethostname().lower()}
  return True


async def read_body(http: Request, most: int, drained: int) -> bytes:
  """HTTPException for a body that is too long, slow or of unknown length.

  most: bytes. drained: so much of a body that is refused is read, so that the client can read the
  reply.
  """
  length = http.headers.get("content-length")
  too_long = _closing(413, f"a request has at most {most} bytes")
  if length is not None and int(length) > drained:
    raise too_long
  body, size = bytearray(), 0
  try:
    async with asyncio.timeout(_BODY_S):
      async for piece in http.stream():
        size += len(piece)
        if length is not None and size <= most:
          body += piece
        elif size > drained:
          break
  except (TimeoutError, ClientDisconnect):
    raise _closing(408, f"the request did not come within {_BODY_S:g} s") from None
  if length is None:
    raise _closing(411, "Content-Length is missing")
  if size > most:
    raise too_long
  return bytes(body)


def _closing(status: int, detail: str) -> HTTPException:
  """What is left unread of a body must not be taken for the next request."""
  return HTTPException(status, detail, {"Connection": "close"})


async def in_thread(call: Callable[[], T]) -> T:
  """call() in a thread that does not hold the process back when it hangs."""
  future: concurrent.futures.Future[T] = concurrent.futures.Future()
  future.set_running_or_notify_cancel()

  def work() -> None:
    try:
      future.set_result(call())
    except BaseException as error:
      future.set_exception(error)

  threading.Thread(target=work, name="request", daemon=True).start()
  return await asyncio.wrap_future(future)
