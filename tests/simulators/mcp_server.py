"""A small MCP server on stdin and stdout, made with the official package, for tests."""

import asyncio

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import EmbeddedResource, TextResourceContents

server = MCPServer("test", log_level="CRITICAL")


@server.tool()
def add(a: int, b: int) -> int:
  """Adds two integers."""
  return a + b


@server.tool(name="get-weather")
def get_weather(city: str) -> str:
  return f"sunny in {city}"


@server.tool(name="get.weather")
def get_weather_of_a_like_name(city: str) -> str:
  return f"rain in {city}"


@server.tool()
def fail(reason: str) -> str:
  raise ToolError(reason)


@server.tool()
def data() -> dict[str, object]:
  return {"list": [1, None], "ok": True}


@server.tool()
def long() -> str:
  return "x" * 100_000


@server.tool()
async def slow_double(a: int) -> int:
  await asyncio.sleep(0.2)
  return 2 * a


paid = []


@server.tool()
def pay(amount: int) -> str:
  paid.append(amount)
  return str(len(paid))


@server.tool()
def paid_so_far() -> int:
  return len(paid)


@server.tool()
def read_file() -> list[EmbeddedResource]:
  resource = TextResourceContents(uri="file:///notes", text="the notes")
  return [EmbeddedResource(type="resource", resource=resource)]


# Declares a number and returns a text.
server._tool_manager.get_tool("pay").fn_metadata.output_schema["properties"]["result"] = {
  "type": "integer"
}

server.run("stdio")
