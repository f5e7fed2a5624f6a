import concurrent.futures
import json
import os
import pathlib
import re
import sys
import time
import types

import pytest
from mcp_plain_server import HttpServer

from steptool_jax.simulators import mcp as mcp_lib
from steptool_jax.simulators.functions import Toolbox
from steptool_jax.simulators.mcp import McpServer
from steptool_jax.types import Code, ToolCall

PLAIN = pathlib.Path(__file__).with_name("mcp_plain_server.py")
SERVER = pathlib.Path(__file__).with_name("mcp_server.py")


@pytest.fixture(scope="module")
def server():
  pytest.importorskip("mcp", reason="the optional package mcp is missing")
  with McpServer(command=[sys.executable, str(SERVER)], timeout_s=10) as server:
    yield server


def test_tools_are_listed_with_valid_names_and_schemas(server):
  specs = {spec.name: spec for spec in server.specs}
  assert {"add", "get_weather", "get_weather_2", "fail", "data"} <= set(specs)
  assert all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in specs)
  assert specs["add"].description == "Adds two integers."
  assert set(specs["add"].parameters["required"]) == {"a", "b"}
  assert specs["add"].parameters["type"] == "object"


def test_calls_come_back_as_observations(server):
  added = server.call(ToolCall("add", {"a": 2, "b": 3}))
  assert (added.code, added.value, added.text) == (Code.OK, 5, "5")
  cleaned = server.call(ToolCall("get_weather", {"city": "Zürich"}))
  assert cleaned.text == "sunny in Zürich"
  assert server.call(ToolCall("get_weather_2", {"city": "Bern"})).text == "rain in Bern"
  data = server.call(ToolCall("data", {}))
  assert data.value == {"list": [1, None], "ok": True}
  assert server.call(ToolCall("data", {})).text == '{"list":[1,null],"ok":true}'


def test_what_goes_wrong_has_its_code(server):
  failed = server.call(ToolCall("fail", {"reason": "no such city"}))
  assert failed.code == Code.TOOL_ERROR
  assert "no such city" in failed.text
  assert server.call(ToolCall("add", {"a": 2})).code == Code.BAD_ARGUMENTS
  assert server.call(ToolCall("add", {"a": "x", "b": 1})).code == Code.BAD_ARGUMENTS
  assert server.call(ToolCall("nothing", {})).code == Code.UNKNOWN_TOOL
  assert len(server.call(ToolCall("long", {})).text) == 1024


def test_the_tools_fit_into_a_toolbox(server):
  box = Toolbox([tool for tool in server.tools if tool.spec.name == "add"])
  assert box.call(ToolCall("add", {"a": 1, "b": 1})).value == 2


def test_many_threads_share_the_connection(server):
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    calls = [ToolCall("slow_double", {"a": i}) for i in range(32)]
    started = time.monotonic()
    assert [o.value for o in pool.map(server.call, calls)] == [2 * i for i in range(32)]
  assert time.monotonic() - started < 4  # one after the other: 6.4


@pytest.fixture
def plain():
  """Starts bare servers: quicker, and of an older protocol version."""
  pytest.importorskip("mcp", reason="the optional package mcp is missing")
  servers = []

  def plain(**settings):
    servers.append(McpServer(command=[sys.executable, str(PLAIN)], **settings))
    return servers[-1]

  yield plain
  for server in servers:
    server.close()


def test_a_hanging_tool_is_infrastructure_and_the_rest_goes_on(plain):
  server = plain(timeout_s=0.5)
  started = time.monotonic()
  assert server.call(ToolCall("hang", {})).code == Code.INFRASTRUCTURE
  assert time.monotonic() - started < 5
  assert server.call(ToolCall("double", {"a": 2})).text == "4"


def test_an_older_server_with_pages_plain_text_and_protocol_errors(plain):
  server = plain()
  names = "double environment picture refuse break hang die"
  assert [spec.name for spec in server.specs] == names.split()
  assert server.call(ToolCall("picture", {})).text == "a map\n<image>"
  refused = server.call(ToolCall("refuse", {}))
  assert refused.code == Code.TOOL_ERROR  # the arguments are to blame
  assert "a must be even" in refused.text
  broken = server.call(ToolCall("break", {}))
  assert broken.code == Code.INFRASTRUCTURE
  assert "out of order" in broken.text


def test_a_call_that_kills_its_server_twice_is_infrastructure_and_the_rest_goes_on(plain, tmp_path):
  server = plain(timeout_s=5, env={"STEPTOOL_STARTS": str(tmp_path / "starts")})
  died = server.call(ToolCall("die", {}))
  assert died.code == Code.INFRASTRUCTURE
  assert "tool die" in died.text
  assert (tmp_path / "starts").read_text() == "xx"  # asked once more, by a new server, and no more
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    calls = [ToolCall("double", {"a": i}) for i in range(8)]
    assert [o.value for o in pool.map(server.call, calls)] == [str(2 * i) for i in range(8)]
  assert (tmp_path / "starts").read_text() == "xxx"  # one new server for all of them
  server.close()
  assert server.call(ToolCall("double", {"a": 1})).code == Code.INFRASTRUCTURE
  assert (tmp_path / "starts").read_text() == "xxx"
  server.close()  # again


def test_a_server_that_does_not_come_back_is_infrastructure(plain, tmp_path):
  server = plain(timeout_s=5, env={"STEPTOOL_STARTS": str(tmp_path / "starts")})
  (tmp_path / "starts").write_text("no more")
  died = server.call(ToolCall("die", {}))
  assert died.code == Code.INFRASTRUCTURE
  assert "did not start or answer" in died.text
  (tmp_path / "starts").write_text("")
  assert server.call(ToolCall("double", {"a": 1})).text == "2"


def test_close_ends_the_server_process(plain):
  server = plain(env={"STEPTOOL_TEST": "given"})
  found = json.loads(server.call(ToolCall("environment", {})).text)
  assert found["given"] == "given"
  os.kill(found["pid"], 0)
  server.close()
  with pytest.raises(ProcessLookupError):
    os.kill(found["pid"], 0)


def test_streamable_http():
  pytest.importorskip("mcp")
  with HttpServer() as http, McpServer(url=http.url, timeout_s=5) as server:
    assert server.call(ToolCall("double", {"a": 21})).text == "42"
    assert server.call(ToolCall("refuse", {})).code == Code.TOOL_ERROR
  with pytest.raises(OSError, match=r"127.0.0.1.*did not start or answer"):
    McpServer(url=http.url, start_timeout_s=5)


def test_no_shell_reads_the_command():
  pytest.importorskip("mcp")
  with pytest.raises(OSError, match="did not start or answer"):
    McpServer(command=[f"{sys.executable} {SERVER}"], start_timeout_s=5)


@pytest.mark.parametrize(
  "command",
  [["/nowhere/server"], [sys.executable, "-c", "raise SystemExit(3)"]],
)
def test_a_server_that_does_not_start_is_named(command):
  pytest.importorskip("mcp")
  with pytest.raises(OSError, match=re.escape(command[0])):
    McpServer(command=command, start_timeout_s=10)


def test_a_server_that_says_nothing_is_given_up():
  pytest.importorskip("mcp")
  started = time.monotonic()
  with pytest.raises(OSError, match="did not start or answer"):
    McpServer(command=[sys.executable, "-c", "import time; time.sleep(60)"], start_timeout_s=0.5)
  assert time.monotonic() - started < 10


def test_without_the_package_the_remedy_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "mcp", None)
  with pytest.raises(ImportError, match=r"pip install 'steptool-jax\[mcp\]'"):
    McpServer(url="http://localhost:1/mcp")


@pytest.mark.parametrize(
  ("settings", "wrong"),
  [
    ({}, "either a command or a url"),
    ({"command": ["x"], "url": "http://x"}, "either a command or a url"),
    ({"command": "python server.py"}, "list of arguments"),
    ({"command": []}, "list of arguments"),
    ({"url": "http://x", "env": {}}, "env goes with a command"),
    ({"url": "http://x", "timeout_s": 0}, "above 0 seconds"),
  ],
)
def test_bad_settings(settings, wrong):
  with pytest.raises(ValueError, match=wrong):
    McpServer(**settings)


def test_names_become_valid_and_stay_apart():
  listed = [types.SimpleNamespace(name=n) for n in ("a-b", "a.b", "a_b_2", "a b", "2x", "°", "_")]
  names = "a_b a_b_2 a_b_2_2 a_b_3 tool_2x tool tool_2"
  assert [name for name, _ in mcp_lib._named(listed)] == names.split()
