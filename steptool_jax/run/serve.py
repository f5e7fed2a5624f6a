"""--mode=serve: POST /virtual over any simulator, by the official contract.

Other tools use a cache offline with it.

Status codes as the official server gives them: 200 with {error, response}, 404 and 405 for other
paths and methods, 422 with {detail} for a body that is no request. Added: 503 with Retry-After
when the simulator failed itself (never an answer, so that no client scores it), 411 and 413.
"""

import contextlib
import json
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from absl import logging

from steptool_jax.config import Config
from steptool_jax.run.parts import services
from steptool_jax.run.workdir import outputs
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.toolbench.simulators.virtual import NOT_WORKING, Simulator, VirtualRequest

_MAX_REQUEST_BYTES = 1 << 20
_TEXTS = ("category", "tool_name", "api_name", "strip", "toolbench_key")


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Serves config.simulator until SIGTERM or Ctrl-C.

  summary.json is there from the start (with the address; "running" true), and again at the end
  with what was answered. ValueError or OSError, before it serves, for what the config lacks.
  """
  with (
    services.open_answering(config) as answering,
    serve(answering.simulator, config.serve.host, config.serve.port) as server,
  ):
    summary = {"mode": "serve", "url": f"http://{server.host}:{server.port}/virtual"}
    run_forever(server, lambda: outputs.write_summary(workdir, summary | {"running": True}))
    summary |= {"running": False, "requests": server.requests} | answering.report()
  outputs.write_summary(workdir, summary)
  return summary


class Server:
  """A running server; `port` is the real one when 0 was asked for."""

  def __init__(self, simulator: Simulator, host: str, port: int):
    try:
      self._http = _Http((host, port), _Handler)
    except OSError as error:
      raise OSError(f"cannot listen on {host}:{port}: {error}; choose another port") from error
    self._http.simulator = simulator
    self.host, self.port = host, self._http.server_address[1]
    self._thread = threading.Thread(target=self._http.serve_forever, args=(0.1,), daemon=True)
    self._closed = False
    self._thread.start()

  @property
  def requests(self) -> int:
    """POST requests so far."""
    return self._http.requests

  def close(self, grace_s: float = 10.0) -> bool:
    """Takes no new connection, lets the requests under way end; True when all of them did."""
    if self._closed:
      return True
    self._closed = True
    self._http.stopping = True
    self._http.shutdown()
    self._thread.join()
    done = self._http.wait_until_idle(grace_s)
    self._http.server_close()
    return done

  def __enter__(self) -> "Server":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def serve(simulator: Simulator, host: str = "127.0.0.1", port: int = 8080) -> Server:
  """Starts to serve in threads of its own and returns at once; OSError when the port is taken."""
  return Server(simulator, host, port)


def run_forever(server: Server, listening: Callable[[], None] = lambda: None) -> None:
  """Blocks until SIGINT or SIGTERM, then closes the server. To be called in the main thread.

  listening: called once, as soon as a signal ends the server and not the process.
  """
  stop = threading.Event()
  before = {}
  for number in (signal.SIGINT, signal.SIGTERM):
    before[number] = signal.signal(number, lambda *_: stop.set())
  try:
    listening()
    logging.info("serving http://%s:%d/virtual", server.host, server.port)
    # Without a time-out a signal would wait for the wait to end.
    while not stop.wait(0.5):
      pass
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
    if not server.close():
      logging.warning("closed with requests still under way")


class _Http(ThreadingHTTPServer):
  daemon_threads = True  # idle keep-alive connections must not hold the process back
  block_on_close = False
  request_queue_size = 256  # many clients connect at once
  simulator: Simulator
  stopping = False

  def __init__(self, *args: Any):
    self._under_way = self.requests = 0
    self._idle = threading.Condition()
    super().__init__(*args)

  @contextlib.contextmanager
  def request_under_way(self):
    with self._idle:
      self._under_way += 1
      self.requests += 1
    try:
      yield
    finally:
      with self._idle:
        self._under_way -= 1
        self._idle.notify_all()

  def wait_until_idle(self, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    with self._idle:
      return self._idle.wait_for(lambda: not self._under_way, max(0.0, deadline - time.monotonic()))

  def handle_error(self, request: Any, client_address: Any) -> None:
    """A client that went away is no reason for a traceback."""
    logging.debug("connection of %s ended early", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"  # keep-alive
  timeout = 120.0  # seconds without a byte from the client
  disable_nagle_algorithm = True
  wbufsize = -1  # head and body in one packet
  server: _Http

  def do_POST(self) -> None:
    with self.server.request_under_way():
      self._reply(*self._answer())

  def do_GET(self) -> None:
    known = self.path.partition("?")[0] == "/virtual"
    self.close_connection = self.close_connection or "content-length" in self.headers
    self._reply(*((405, {"detail": "Method Not Allowed"}) if known else _NOT_FOUND))

  do_PUT = do_DELETE = do_PATCH = do_GET

  def _answer(self) -> tuple[int, Mapping[str, Any]]:
    # What is left unread of a refused body would be taken for the next request.
    length = self.headers.get("content-length")
    if length is None or not length.isdigit():
      self.close_connection = True
      return 411, {"detail": "Content-Length is missing"}
    if int(length) > _MAX_REQUEST_BYTES:
      self.close_connection = True
      return 413, {"detail": f"a request has at most {_MAX_REQUEST_BYTES} bytes"}
    body = self.rfile.read(int(length))
    if self.path.partition("?")[0] != "/virtual":
      return _NOT_FOUND
    try:
      request = read_request(json.loads(body))
    except RecursionError:
      return 422, {"detail": "the body is nested too deeply"}
    except ValueError as error:
      return 422, {"detail": str(error)}
    try:
      response = self.server.simulator.answer(request) or NOT_WORKING
      json.dumps(response.as_dict())  # a simulator's foreign object must not end the connection
      return 200, response.as_dict()
    except InfrastructureError as error:
      logging.warning("no answer for %s: %s", request.api_name, error)
      return 503, {"detail": str(error)}
    except Exception as error:
      logging.exception("the simulator broke on %s", request.api_name)
      return 500, {"detail": f"{type(error).__name__}: {error}"}

  def _reply(self, status: int, content: Mapping[str, Any]) -> None:
    body = json.dumps(content).encode()
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    if status == 503:
      self.send_header("Retry-After", "1")
    if self.close_connection or self.server.stopping:
      self.close_connection = True
      self.send_header("Connection", "close")
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, format: str, *args: Any) -> None:
    logging.debug(format, *args)


_NOT_FOUND = (404, {"detail": "Not Found"})


def read_request(data: Any) -> VirtualRequest:
  """The request in parsed JSON, with exactly the official fields required; ValueError else."""
  if not isinstance(data, Mapping):
    raise ValueError("the body is no JSON object")
  for field in _TEXTS:
    if not isinstance(data.get(field), str):
      raise ValueError(f"field {field} is missing or no text")
  if not isinstance(data.get("tool_input"), (str, Mapping)):
    raise ValueError("field tool_input is missing, or neither a text nor an object")
  return VirtualRequest(**{name: data[name] for name in (*_TEXTS, "tool_input")})
