"""The tools of an MCP server as tools: listed once, called from any thread.

A connection that is lost (the server died) is made anew for the call that finds it so, which is
then asked once more: a tool may have run twice. Its tools are those that were listed at first.

Needs the optional package `mcp` (extra "mcp"), version 2. Its asyncio loop runs in one thread of
its own; what a tool says is data, never a command.
"""

import asyncio
import concurrent.futures
import contextlib
import importlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.functions import Tool, Toolbox
from steptool_jax.types import Observation, ToolCall, ToolSpec

_MAX_PAGES = 100
_INVALID_PARAMS = -32602  # JSON-RPC: the arguments are to blame
_CLOSED = -32000  # the package's code for a connection that ended
_CLOSE_S = 15.0  # the package itself ends a stubborn server process after about 6 seconds


class ToolFailed(Exception):
  """The tool ran and said that it failed."""


class _Lost(Exception):
  """The connection has ended."""


class McpServer:
  """A connection to one MCP server; `tools` go into a Toolbox or an environment, `call` answers.

  command: argument list that starts a server on stdin and stdout (never a shell), with `env` added
  to the few variables that the package passes on; or url: of a streamable HTTP server. Exactly one
  of them. timeout_s: seconds for one call. start_timeout_s: for the connection and the list of
  tools. Names become valid ones ("get-weather" -> "get_weather"), numbered when two collide.
  Raises ImportError without the package, OSError when the server does not start or answer.
  """

  def __init__(
    self,
    *,
    command: Sequence[str] | None = None,
    url: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 30.0,
    start_timeout_s: float = 30.0,
    max_observation_chars: int = 1024,
  ):
    if (command is None) == (url is None):
      raise ValueError("an MCP server needs either a command or a url")
    if command is not None and (isinstance(command, str) or not command):
      raise ValueError("command must be a non-empty list of arguments, not one text")
    if env is not None and command is None:
      raise ValueError("env goes with a command only")
    if not min(timeout_s, start_timeout_s) > 0:
      raise ValueError("timeout_s and start_timeout_s must be above 0 seconds")
    self._where = url or command[0]
    self._timeout_s = timeout_s
    client_class = _package("mcp").Client
    target = url if url is not None else _stdio(command, env)
    self._connect = lambda: _Connection(lambda: client_class(target), self._where, start_timeout_s)
    self._renewing = threading.Lock()
    self._closed = False
    self._connection = self._connect()
    self.tools: tuple[Tool, ...] = tuple(
      self._tool(*entry) for entry in _named(self._connection.listed)
    )
    self._box = Toolbox(self.tools, max_observation_chars)

  @property
  def specs(self) -> tuple[ToolSpec, ...]:
    return tuple(tool.spec for tool in self.tools)

  def call(self, call: ToolCall) -> Observation:
    """Validates and runs one call, like Toolbox.call; a lost server is Code.INFRASTRUCTURE."""
    return self._box.call(call)

  def close(self) -> None:
    """Ends the connection and the server process; harmless when repeated."""
    self._closed = True
    with self._renewing:
      self._connection.close()

  def __enter__(self) -> "McpServer":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _tool(self, name: str, listed: Any) -> Tool:
    spec = ToolSpec(name, listed.description or "", _schema(listed.input_schema))
    return Tool(spec, lambda **arguments: self._ask(listed.name, arguments))

  def _ask(self, name: str, arguments: dict[str, Any]) -> Any:
    connection = self._connection
    try:
      try:
        result = connection.ask(name, arguments, self._timeout_s)
      except _Lost as lost:
        result = self._renewed(connection, lost).ask(name, arguments, self._timeout_s)
    except _Lost as lost:
      raise InfrastructureError(f"MCP server {self._where}, tool {name}: {lost}") from lost
    value = _value(result)
    if result.is_error:
      raise ToolFailed(value if isinstance(value, str) else str(value))
    return value

  def _renewed(self, old: "_Connection", lost: _Lost) -> "_Connection":
    """Another connection than `old`: made here, or by another thread meanwhile."""
    with self._renewing:
      if self._closed:
        raise lost
      if self._connection is old:
        old.close()
        try:
          self._connection = self._connect()
        except OSError as error:
          raise InfrastructureError(f"{error}, after it was lost") from error
      return self._connection


class _Connection:
  """One life of a connection, with an asyncio loop in a thread. OSError when it does not start."""

  def __init__(self, connect: Callable[[], Any], where: str, start_timeout_s: float):
    self._where = where
    self._client: Any = None
    self._loop = asyncio.new_event_loop()
    self._stop = asyncio.Event()
    self._ready: concurrent.futures.Future[list[Any]] = concurrent.futures.Future()
    live = self._live(connect, start_timeout_s)
    self._thread = threading.Thread(target=self._run, args=(live,), name="mcp", daemon=True)
    self._thread.start()
    self.listed = self._ready.result()

  def ask(self, name: str, arguments: dict[str, Any], timeout_s: float) -> Any:
    """The package's result of a call; _Lost when the connection has ended."""
    client = self._client
    if client is None:
      raise _Lost("the connection is closed or lost")
    asked = client.call_tool(name, arguments, read_timeout_seconds=timeout_s)
    try:
      future = asyncio.run_coroutine_threadsafe(asked, self._loop)
    except RuntimeError as error:
      asked.close()
      raise _Lost("the connection is closed") from error
    try:
      # A little more than the package's own limit, which ends the request on the wire.
      return future.result(timeout_s + 1)
    except (concurrent.futures.CancelledError, Exception) as error:
      future.cancel()
      code = getattr(error, "code", None)
      if code == _INVALID_PARAMS:
        raise ToolFailed(str(error.message)) from error
      if code == _CLOSED or not (code or isinstance(error, TimeoutError)):
        raise _Lost(_reason(error)) from error
      # The protocol: a tool's own failure is a result.
      raise InfrastructureError(
        f"MCP server {self._where}, tool {name}: {_reason(error)}"
      ) from error

  def close(self) -> None:
    if self._thread.is_alive():
      with contextlib.suppress(RuntimeError):  # the loop ended meanwhile
        self._loop.call_soon_threadsafe(self._stop.set)
      self._thread.join(_CLOSE_S)

  def _run(self, live: Any) -> None:
    try:
      self._loop.run_until_complete(live)
    finally:
      self._loop.close()

  async def _live(self, connect: Callable[[], Any], start_timeout_s: float) -> None:
    """The whole life of the connection in one task, as the package's scopes demand."""
    try:
      async with contextlib.AsyncExitStack() as stack:
        async with asyncio.timeout(start_timeout_s):
          self._client = await stack.enter_async_context(connect())
          listed = await _list_tools(self._client)
        self._ready.set_result(listed)
        await self._stop.wait()
    except BaseException as error:
      # Once it was ready, the calls under way say what was lost.
      if not self._ready.done():
        self._ready.set_exception(
          OSError(f"MCP server {self._where} did not start or answer: {_reason(error)}")
        )
    finally:
      self._client = None


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
  parts = [part.text if part.type == "text" else f"<{part.type}>" for part in result.content]
  return "\n".join(parts) or None


def _reason(error: BaseException) -> str:
  """The innermost reason: the package raises groups of groups."""
  while isinstance(error, BaseExceptionGroup):
    error = error.exceptions[0]
  return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
