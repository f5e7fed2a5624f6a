"""The tools of an MCP server: listed once, and a server of its own for each conversation.

A conversation changes the state of its server, which nobody else may see. So each one gets a server
process (a session, where the server is at an address) that ends with it. Where a server keeps no
state, `shared` is one connection for all: it is made anew for a call that finds it lost, which is
then asked once more, so that a tool may run twice. A server of one conversation is not: what it
knew is gone, and the conversation with it (an infrastructure failure).

Needs the optional package `mcp` (extra "mcp"), version 2. What a tool says is data, no command.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import importlib
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio

from steptool_jax.simulators import background
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.functions import Tool
from steptool_jax.simulators.posting import check_address, shown
from steptool_jax.types import ToolSpec

_MAX_PAGES = 100
_INVALID_PARAMS = -32602  # JSON-RPC: the arguments are to blame
_CLOSED = -32000  # the package's code for a connection that ended
_CLOSE_S = 15.0  # the package itself ends a stubborn server process after about 6 seconds
_AHEAD = 4  # servers that are started before a conversation asks for one


class ToolFailed(Exception):
  """The tool ran and said that it failed."""


class _Lost(Exception):
  """The connection has ended."""


class McpServers:
  """Lends the tools of a server to conversations; `tools` describe them and cannot be called.

  command: argument list that starts a server on stdin and stdout (never a shell), with `env` added
  to the few variables that the package passes on; or url: of a streamable HTTP server. Exactly one
  of them. shared: one connection for all conversations. timeout_s: seconds for one call.
  start_timeout_s: for the connection and the list of tools. Names become valid ones ("get-weather"
  -> "get_weather"), numbered when two collide. Raises ImportError without the package, OSError when
  the server does not start or answer.
  """

  def __init__(
    self,
    *,
    command: Sequence[str] | None = None,
    url: str | None = None,
    env: Mapping[str, str] | None = None,
    shared: bool = False,
    timeout_s: float = 30.0,
    start_timeout_s: float = 30.0,
  ):
    if (command is None) == (url is None):
      raise ValueError("an MCP server needs either a command or a url")
    if command is not None and (isinstance(command, str) or not command):
      raise ValueError("command must be a non-empty list of arguments, not one text")
    if env is not None and command is None:
      raise ValueError("env goes with a command only")
    if not min(timeout_s, start_timeout_s) > 0:
      raise ValueError("timeout_s and start_timeout_s must be above 0 seconds")
    if url is not None:
      check_address(url, "url", "http://host:port/mcp")
    self.timeout_s, self.shared = timeout_s, shared
    client_class = _package("mcp").Client
    target = url if url is not None else _stdio(command, env)
    where = shown(url) if url is not None else command[0]
    self._start = lambda: _Connection(lambda: client_class(target), where, start_timeout_s)
    self._lock, self.closed = threading.RLock(), False
    self._all: set[_Connection] = set()
    self._spare: collections.deque[_Connection] = collections.deque()
    first = self._started()
    self.named = tuple(
      (entry.name, ToolSpec(name, entry.description or "", _schema(entry.input_schema)))
      for name, entry in _named(first.listed())
    )
    self.tools = tuple(Tool(spec, _unlent) for _, spec in self.named)
    self._session = McpSession(self, first) if shared else None
    self._spare.append(first)

  def open(self) -> "McpSession":
    """A server for one conversation; blocks until it has started, InfrastructureError if not."""
    if self._session is not None:
      return self._session
    try:
      with self._lock:
        connection = self._spare.popleft() if self._spare else self._started()
        while len(self._spare) < _AHEAD:
          self._spare.append(self._started())
      connection.listed()
      if connection.lost:  # it died while it waited
        connection = self._started()
        connection.listed()
    except OSError as error:
      raise InfrastructureError(str(error)) from error
    return McpSession(self, connection)

  def renewed(self, old: "_Connection") -> "_Connection":
    """The connection in the place of a lost one."""
    old.close()
    try:
      connection = self._started()
      connection.listed()
    except OSError as error:
      raise InfrastructureError(f"{error}, after it was lost") from error
    return connection

  def close(self) -> None:
    """Ends all connections and server processes; harmless when repeated."""
    with self._lock:
      self.closed, connections = True, tuple(self._all)
    for connection in connections:
      connection.close()
    deadline = time.monotonic() + _CLOSE_S
    for connection in connections:
      connection.wait(deadline - time.monotonic())

  def __enter__(self) -> "McpServers":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _started(self) -> "_Connection":
    with self._lock:
      if self.closed:
        raise OSError("the connection to the MCP server is closed")
      connection = self._start()
      self._all = {connection, *(c for c in self._all if not c.ended)}
      return connection


class McpSession:
  """`tools` of one server, for a Toolbox; they may be called from any thread."""

  def __init__(self, servers: McpServers, connection: "_Connection"):
    self._servers, self._connection = servers, connection
    self._renewing = threading.Lock()
    self.tools = tuple(
      Tool(spec, functools.partial(self._ask, name)) for name, spec in servers.named
    )

  def close(self) -> None:
    """Ends the server, if it is of this conversation only; returns at once."""
    if not self._servers.shared:
      self._connection.close()

  def _ask(self, name: str, /, **arguments: Any) -> Any:
    connection, timeout_s = self._connection, self._servers.timeout_s
    try:
      try:
        result = connection.ask(name, arguments, timeout_s)
      except _Lost as lost:
        if not self._servers.shared:
          raise
        result = self._renewed(connection, lost).ask(name, arguments, timeout_s)
    except _Lost as lost:
      where = f"MCP server {connection.where}, tool {name}"
      raise InfrastructureError(f"{where}: {lost}") from lost
    value = _value(result)
    if result.is_error:
      raise ToolFailed(value if isinstance(value, str) else str(value))
    return value

  def _renewed(self, old: "_Connection", lost: _Lost) -> "_Connection":
    """Another connection than `old`: made here, or by another thread meanwhile."""
    with self._renewing:
      if self._servers.closed:
        raise lost
      if self._connection is old:
        self._connection = self._servers.renewed(old)
      return self._connection


class _Connection:
  """One life of a connection, on the background loop."""

  def __init__(self, connect: Callable[[], Any], where: str, start_timeout_s: float):
    """Begins to connect, and returns at once."""
    self.where, self._start_timeout_s = where, start_timeout_s
    self._client: Any = None
    self._stop = asyncio.Event()
    self._ready: concurrent.futures.Future[list[Any]] = concurrent.futures.Future()
    self._life = asyncio.run_coroutine_threadsafe(self._live(connect), background.loop())

  @property
  def lost(self) -> bool:
    return self._client is None

  @property
  def ended(self) -> bool:
    return self._life.done()

  def listed(self) -> list[Any]:
    """The server's tools, once it has started; OSError when it does not."""
    try:
      # What its own limit has cancelled may take its time to end.
      return self._ready.result(self._start_timeout_s + _CLOSE_S)
    except TimeoutError:
      raise OSError(f"MCP server {self.where} did not start or answer, and does not end") from None

  def ask(self, name: str, arguments: dict[str, Any], timeout_s: float) -> Any:
    """The package's result of a call; _Lost when the connection has ended."""
    client = self._client
    if client is None:
      raise _Lost("the connection is closed or lost")
    try:
      # A little more than the package's own limit, which ends the request on the wire.
      return background.run(
        client.call_tool(name, arguments, read_timeout_seconds=timeout_s), timeout_s + 1
      )
    except (concurrent.futures.CancelledError, Exception) as error:
      code = getattr(error, "code", None)
      if code == _INVALID_PARAMS:
        raise ToolFailed(str(error.message)) from error
      if isinstance(error, RuntimeError) and "structured content" in str(error):
        # The call was made and the connection is well: the result is not what the tool declares.
        raise ToolFailed(_reason(error)) from error
      if code == _CLOSED or not (code or isinstance(error, TimeoutError)):
        raise _Lost(_reason(error)) from error
      # The protocol: a tool's own failure is a result.
      raise InfrastructureError(
        f"MCP server {self.where}, tool {name}: {_reason(error)}"
      ) from error

  def close(self) -> None:
    """Begins to end it, and returns at once."""
    self._client = None
    background.loop().call_soon_threadsafe(self._stop.set)

  def wait(self, seconds: float) -> None:
    """Until it has ended."""
    with contextlib.suppress(Exception, concurrent.futures.CancelledError):
      self._life.result(max(0.0, seconds))

  async def _live(self, connect: Callable[[], Any]) -> None:
    """The whole life of the connection in one task, as the package's scopes demand."""
    try:
      # One scope around all, which the package's own nest in: asyncio.timeout would also cut off
      # what ends the process of a server that has failed to start.
      with anyio.CancelScope(deadline=anyio.current_time() + self._start_timeout_s) as life:
        async with connect() as client:
          listed = await _list_tools(client)
          life.deadline = math.inf
          self._client = client
          self._ready.set_result(listed)
          await self._stop.wait()
      if not self._ready.done():
        raise TimeoutError
    except BaseException as error:
      # Once it was ready, the calls under way say what was lost.
      if not self._ready.done():
        reason = f"MCP server {self.where} did not start or answer: {_reason(error)}"
        self._ready.set_exception(OSError(reason))
    finally:
      self._client = None


def _unlent(**_: Any) -> None:
  raise InfrastructureError("no server is lent to this conversation: McpServers.open lends one")


def _package(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ImportError("MCP tools need the package mcp: pip install 'steptool-jax[mcp]'") from error


def _stdio(command: Sequence[str], env: Mapping[str, str] | None) -> Any:
  first, *rest = command
  return _package("mcp").StdioServerParameters(
    command=first, args=rest, env=dict(env) if env else None
  )


async def _list_tools(client: Any) -> list[Any]:
  listed, cursor = [], None
  for _ in range(_MAX_PAGES):
    page = await client.list_tools(cursor=cursor)
    listed += page.tools
    cursor = page.next_cursor
    if not cursor:
      return listed
  raise ValueError(f"its list of tools does not end after {_MAX_PAGES} pages")


def _named(listed: Sequence[Any]) -> list[tuple[str, Any]]:
  """(valid name, tool); names that collide after cleaning get _2, _3, ... in listed order."""
  taken = set()
  named = []
  for entry in listed:
    clean = re.sub(r"[^A-Za-z0-9_]+", "_", entry.name).strip("_") or "tool"
    clean = f"tool_{clean}" if clean[0].isdigit() else clean
    name, number = clean, 2
    while name in taken:
      name, number = f"{clean}_{number}", number + 1
    taken.add(name)
    named.append((name, entry))
  return named


def _schema(schema: Mapping[str, Any]) -> dict[str, Any]:
  """The schema with type object, which older servers leave out."""
  return {"properties": {}, **schema, "type": "object"}


def _value(result: Any) -> Any:
  """Structured content where there is some, else the text; other media become a note."""
  if result.structured_content is not None:
    content = result.structured_content
    # Servers wrap plain results as {"result": ...} because older versions allow objects only.
    return (
      content["result"] if isinstance(content, dict) and set(content) == {"result"} else content
    )
  return "\n".join(map(_part, result.content)) or None


def _part(part: Any) -> str:
  if part.type == "text":
    return part.text
  text = getattr(getattr(part, "resource", None), "text", None)
  return f"<{part.type}>" if text is None else text


def _reason(error: BaseException) -> str:
  """The innermost reason: the package raises groups of groups."""
  while isinstance(error, BaseExceptionGroup):
    error = error.exceptions[0]
  # An address in it may have a key in its query.
  text = re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", str(error))
  return f"{type(error).__name__}: {text}" if text else type(error).__name__
