"""The official /virtual contract as an HTTP server over any simulator.

Status codes as the official server gives them: 200 with {error, response}, 404 and 405 for other
paths and methods, 422 with {detail} for a body that is no request. Added: 503 with Retry-After
when the simulator failed itself (never an answer, so that no client scores it), and those of
serving/guards.py.
"""

import asyncio
import dataclasses
import hmac
import json
from collections.abc import Mapping
from typing import Any

from absl import logging
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from steptool_jax.serving import guards
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.posting import clean_key
from steptool_jax.toolbench.simulators.virtual import (
  MAX_NAME,
  NOT_WORKING,
  Simulator,
  VirtualRequest,
)

_MAX_REQUEST_BYTES = 1 << 20
_DRAINED_BYTES = 4 << 20
_THREADS = 64  # requests that the simulator answers at the same time; further ones wait
_NAMES = ("category", "tool_name", "api_name", "strip")


class Server:
  """A server that runs in a thread of its own; `port` is the real one when 0 was asked for.

  key: what clients must send, as a bearer token or in the official field toolbench_key; "" = none.
  """

  def __init__(self, simulator: Simulator, host: str, port: int, key: str = ""):
    """Starts to serve and returns at once; OSError when the address cannot be had."""
    self._app = _App(simulator, host, key)
    self._listener = guards.Listener(
      *(host, port, [Route("/virtual", self._app.virtual, methods=["POST"])]),
      {HTTPException: _refusal},
    )
    self.host, self.port, self.root = host, self._listener.port, self._listener.root

  @property
  def requests(self) -> int:
    """POST requests so far."""
    return self._app.requests

  def close(self, grace_s: float = 10.0) -> bool:
    """Takes no new connection, lets the requests under way end; True when all of them did."""
    self._listener.close(grace_s)
    return not self._app.cut_off

  def __enter__(self) -> "Server":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class _App:
  def __init__(self, simulator: Simulator, host: str, key: str):
    self._simulator, self._host, self._key = simulator, host, key
    self._threads = asyncio.Semaphore(_THREADS)
    self.requests, self.cut_off = 0, False

  async def virtual(self, http: Request) -> Response:
    self.requests += 1
    try:
      given = guards.bearer(http)
      if given is None:
        given = http.headers.get("toolbench_key", "")
      guards.check_sender(http, self._host, self._key, given)
      body = await guards.read_body(http, _MAX_REQUEST_BYTES, _DRAINED_BYTES)
      async with self._threads:
        return await guards.in_thread(lambda: self._answer(body))
    except asyncio.CancelledError:
      self.cut_off = True
      raise

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


def _refusal(request: Request, error: Exception) -> Response:
  return _json(error.status_code, {"detail": error.detail}, error.headers)


def _json(
  status: int, content: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> Response:
  return Response(json.dumps(content), status, headers, media_type="application/json")
