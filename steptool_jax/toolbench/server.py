"""The official /virtual contract as an HTTP server over any simulator.

Status codes as the official server gives them: 200 with {error, response}, 404 and 405 for other
paths and methods, 422 with {detail} for a body that is no request. Added: 503 with Retry-After
when the simulator failed itself (never an answer, so that no client scores it), 401 without the
key, 403 for what a browser's page sends, 408, 411 and 413.
"""

import asyncio
import concurrent.futures
import dataclasses
import hmac
import ipaddress
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import uvicorn
from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.posting import clean_key
from steptool_jax.toolbench.simulators.virtual import (
  MAX_NAME,
  NOT_WORKING,
  Simulator,
  VirtualRequest,
)

T = TypeVar("T")

_MAX_REQUEST_BYTES = 1 << 20
_DRAINED_BYTES = 4 << 20  # read of a body that is refused, so that the client can read the reply
_THREADS = 64  # requests that the simulator answers at the same time; further ones wait
_CONNECTIONS = 512  # a further one is closed at once
_HEAD_S, _BODY_S = 60.0, 30.0  # for a client to send one (a head at most twice as long)
_NAMES = ("category", "tool_name", "api_name", "strip")


class Server:
  """A server that runs in a thread of its own; `port` is the real one when 0 was asked for.

  key: what clients must send, as a bearer token or in the official field toolbench_key; "" = none.
  """

  def __init__(self, simulator: Simulator, host: str, port: int, key: str = ""):
    """Starts to serve and returns at once; OSError when the address cannot be had."""
    if not host:
      raise ValueError("serve.host is empty: name 0.0.0.0 to listen on every address")
    try:
      family = socket.AF_INET6 if ":" in host else socket.AF_INET
      listening = socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
      raise OSError(f"cannot listen on {host}:{port}: {error}; choose another port") from error
    self.host, self.port = host, listening.getsockname()[1]
    self._app = _App(simulator, host, key)
    self._server = uvicorn.Server(
      uvicorn.Config(
        Starlette(
          routes=[Route("/virtual", self._app.virtual, methods=["POST"])],
          exception_handlers={HTTPException: _refusal},
        ),
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
  def requests(self) -> int:
    """POST requests so far."""
    return self._app.requests

  def close(self, grace_s: float = 10.0) -> bool:
    """Takes no new connection, lets the requests under way end; True when all of them did."""
    self._server.config.timeout_graceful_shutdown = grace_s
    self._server.should_exit = True
    self._thread.join()
    return not self._app.cut_off

  def __enter__(self) -> "Server":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


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


class _App:
  def __init__(self, simulator: Simulator, host: str, key: str):
    self._simulator, self._host, self._key = simulator, host, key
    self._threads = asyncio.Semaphore(_THREADS)
    self.requests, self.cut_off = 0, False

  async def virtual(self, http: Request) -> Response:
    self.requests += 1
    try:
      self._check_sender(http)
      body = await _body(http)
      async with self._threads:
        return await _in_thread(lambda: self._answer(body))
    except asyncio.CancelledError:
      self.cut_off = True
      raise

  def _check_sender(self, http: Request) -> None:
    """A page in a browser that runs here must not ask what only this machine may ask."""
    if "origin" in http.headers:
      raise HTTPException(403, "requests of web pages (header Origin) are not answered")
    if self._key:
      kind, _, token = http.headers.get("authorization", "").partition(" ")
      given = token if kind.lower() == "bearer" else http.headers.get("toolbench_key", "")
      if not hmac.compare_digest(given.strip().encode(), self._key.encode()):
        raise HTTPException(401, "the key is missing or wrong: send it as a bearer token")
    elif not _is_own_name(http.headers.get("host", ""), self._host):
      # A foreign name that leads here is how pages reach local servers.
      raise HTTPException(403, "a foreign Host: ask by address, or set serve.key_variable")

  def _answer(self, body: bytes) -> Response:
    request = read_request(body)
    if self._key and hmac.compare_digest(request.toolbench_key, self._key):
      # Ours is not for the servers behind.
      request = dataclasses.replace(request, toolbench_key="")
    try:
      response = self._simulator.answer(request) or NOT_WORKING
      return _json(200, response.as_dict())  # may hold a simulator's foreign object
    except InfrastructureError as error:
      logging.warning("no answer for %s: %s", request.api_name, error)
      return _json(503, {"detail": str(error)}, {"Retry-After": "1"})
    except Exception as error:
      logging.exception("the simulator broke on %s", request.api_name)
      return _json(500, {"detail": f"{type(error).__name__}: {error}"})


def _is_own_name(sent: str, host: str) -> bool:
  """Whether a Host header has an address, or a name that is surely ours; a page must send one."""
  name = re.sub(r":\d*$", "", sent).strip("[]").lower()
  try:
    ipaddress.ip_address(name)
  except ValueError:
    return name in {"", host.lower(), "localhost", socket.gethostname().lower()}
  return True


async def _body(http: Request) -> bytes:
  """HTTPException for a body that is too long, slow or of unknown length."""
  length = http.headers.get("content-length")
  too_long = _closing(413, f"a request has at most {_MAX_REQUEST_BYTES} bytes")
  if length is not None and int(length) > _DRAINED_BYTES:
    raise too_long
  body, size = bytearray(), 0
  try:
    async with asyncio.timeout(_BODY_S):
      async for piece in http.stream():
        size += len(piece)
        if length is not None and size <= _MAX_REQUEST_BYTES:
          body += piece
        elif size > _DRAINED_BYTES:
          break
  except (TimeoutError, ClientDisconnect):
    raise _closing(408, f"the request did not come within {_BODY_S:g} s") from None
  if length is None:
    raise _closing(411, "Content-Length is missing")
  if size > _MAX_REQUEST_BYTES:
    raise too_long
  return bytes(body)


def read_request(body: bytes) -> VirtualRequest:
  """The request, with exactly the official fields required; HTTPException 422 else."""
  try:
    data = json.loads(body)
  except RecursionError:
    raise HTTPException(422, "the body is nested too deeply") from None
  except ValueError as error:
    raise HTTPException(422, str(error)) from None
  if not isinstance(data, Mapping):
    raise HTTPException(422, "the body is no JSON object")
  for field in (*_NAMES, "toolbench_key"):
    if not isinstance(data.get(field), str):
      raise HTTPException(422, f"field {field} is missing or no text")
    if len(data[field]) > MAX_NAME:
      raise HTTPException(422, f"field {field} has more than {MAX_NAME} characters")
  if not isinstance(data.get("tool_input"), (str, Mapping)):
    raise HTTPException(422, "field tool_input is missing, or neither a text nor an object")
  try:
    key = clean_key(data["toolbench_key"], "field toolbench_key")
  except ValueError as error:
    raise HTTPException(422, str(error)) from None
  names = {name: data[name] for name in _NAMES}
  return VirtualRequest(**names, tool_input=data["tool_input"], toolbench_key=key)


async def _in_thread(call: Callable[[], T]) -> T:
  """call() in a thread that does not hold the process back when it hangs."""
  future: concurrent.futures.Future[T] = concurrent.futures.Future()
  future.set_running_or_notify_cancel()

  def work() -> None:
    try:
      future.set_result(call())
    except BaseException as error:
      future.set_exception(error)

  threading.Thread(target=work, name="virtual", daemon=True).start()
  return await asyncio.wrap_future(future)


def _closing(status: int, detail: str) -> HTTPException:
  """What is left unread of a body must not be taken for the next request."""
  return HTTPException(status, detail, {"Connection": "close"})


def _refusal(request: Request, error: Exception) -> Response:
  return _json(error.status_code, {"detail": error.detail}, error.headers)


def _json(
  status: int, content: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> Response:
  return Response(json.dumps(content), status, headers, media_type="application/json")
