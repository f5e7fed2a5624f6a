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
from raw_server import DRIPS, RawServer

from steptool_jax.simulators import mcp as mcp_lib
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.functions import Toolbox
from steptool_jax.simulators.mcp import McpServers
from steptool_jax.simulators.runner import ToolRunner
from steptool_jax.types import Code, ToolCall

PLAIN = pathlib.Path(__file__).with_name("mcp_plain_server.py")
SERVER = pathlib.Path(__file__).with_name("mcp_server.py")


@pytest.fixture(scope="module")
def server():
  pytest.importorskip("mcp", reason="the optional package mcp is missing")
  command = [sys.executable, str(SERVER)]
  with McpServers(command=command, shared=True, timeout_s=10) as servers:
    yield Toolbox(servers.open().tools, 1024)


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


def test_a_result_that_breaks_its_own_schema_is_the_tools_failure(server):
  """It was taken for a lost connection: a shared server was ended, and the call repeated."""
  with ToolRunner(timeout_s=20) as runner:
    broken = runner.submit(server, ToolCall("pay", {"amount": 5})).result()
  assert broken.code is Code.TOOL_ERROR
  assert "structured content" in broken.text
  assert server.call(ToolCall("paid_so_far", {})).value == 1


def test_text_in_a_resource_is_text(server):
  assert server.call(ToolCall("read_file", {})).text == "the notes"


def test_many_threads_share_the_connection(server):
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    calls = [ToolCall("slow_double", {"a": i}) for i in range(32)]
    started = time.monotonic()
    assert [o.value for o in pool.map(server.call, calls)] == [2 * i for i in range(32)]
  assert time.monotonic() - started < 4  # one after the other: 6.4


def lent(servers):
  return Toolbox(servers.open().tools)


@pytest.fixture
def plain():
  """Starts bare servers: quicker, and of an older protocol version."""
  pytest.importorskip("mcp", reason="the optional package mcp is missing")
  servers = []

  def plain(**settings):
    settings = {"command": [sys.executable, str(PLAIN)], "shared": True, **settings}
    servers.append(McpServers(**settings))
    return servers[-1]

  yield plain
  for server in servers:
    server.close()


def test_a_hanging_tool_is_infrastructure_and_the_rest_goes_on(plain):
  server = lent(plain(timeout_s=0.5))
  started = time.monotonic()
  assert server.call(ToolCall("hang", {})).code == Code.INFRASTRUCTURE
  assert time.monotonic() - started < 5
  assert server.call(ToolCall("double", {"a": 2})).text == "4"


def test_an_older_server_with_pages_plain_text_and_protocol_errors(plain):
  server = lent(plain())
  names = "double environment picture refuse break hang die count"
  assert [spec.name for spec in server.specs] == names.split()
  assert server.call(ToolCall("picture", {})).text == "a map\n<image>"
  refused = server.call(ToolCall("refuse", {}))
  assert refused.code == Code.TOOL_ERROR  # the arguments are to blame
  assert "a must be even" in refused.text
  broken = server.call(ToolCall("break", {}))
  assert broken.code == Code.INFRASTRUCTURE
  assert "out of order" in broken.text


def test_a_call_that_kills_its_server_twice_is_infrastructure_and_the_rest_goes_on(plain, tmp_path):
  servers = plain(timeout_s=5, env={"STEPTOOL_STARTS": str(tmp_path / "starts")})
  server = lent(servers)
  died = server.call(ToolCall("die", {}))
  assert died.code == Code.INFRASTRUCTURE
  assert "tool die" in died.text
  assert (tmp_path / "starts").read_text() == "xx"  # asked once more, by a new server, and no more
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    calls = [ToolCall("double", {"a": i}) for i in range(8)]
    assert [o.value for o in pool.map(server.call, calls)] == [str(2 * i) for i in range(8)]
  assert (tmp_path / "starts").read_text() == "xxx"  # one new server for all of them
  servers.close()
  assert server.call(ToolCall("double", {"a": 1})).code == Code.INFRASTRUCTURE
  assert (tmp_path / "starts").read_text() == "xxx"
  servers.close()  # again


def test_a_server_that_does_not_come_back_is_infrastructure(plain, tmp_path):
  server = lent(plain(timeout_s=5, env={"STEPTOOL_STARTS": str(tmp_path / "starts")}))
  (tmp_path / "starts").write_text("no more")
  died = server.call(ToolCall("die", {}))
  assert died.code == Code.INFRASTRUCTURE
  assert "did not start or answer" in died.text
  (tmp_path / "starts").write_text("")
  assert server.call(ToolCall("double", {"a": 1})).text == "2"


def test_close_ends_the_server_process(plain):
  servers = plain(env={"STEPTOOL_TEST": "given"})
  found = json.loads(lent(servers).call(ToolCall("environment", {})).text)
  assert found["given"] == "given"
  os.kill(found["pid"], 0)
  servers.close()
  with pytest.raises(ProcessLookupError):
    os.kill(found["pid"], 0)


class Own:
  """Servers of one conversation each, and what they keep apart."""

  def __init__(self, plain, **settings):
    self.servers = plain(timeout_s=5, **{"shared": False, **settings})

  def count(self, session):
    return Toolbox(session.tools).call(ToolCall("count", {})).text

  def pid(self, session):
    return json.loads(Toolbox(session.tools).call(ToolCall("environment", {})).text)["pid"]


def test_a_conversation_has_a_server_of_its_own(plain):
  """All conversations shared one server's state: what one had bought was gone for the next."""
  own = Own(plain)
  first, second = own.servers.open(), own.servers.open()
  assert [own.count(s) for s in (first, first, second)] == ["1", "2", "1"]
  pids = own.pid(first), own.pid(second)
  started = time.monotonic()
  first.close()
  first.close()
  assert time.monotonic() - started < 0.2  # others do not wait for its end
  assert own.count(second) == "2"
  box = Toolbox(first.tools)
  assert box.call(ToolCall("count", {})).code == Code.INFRASTRUCTURE
  own.servers.close()
  for pid in pids:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)
  with pytest.raises(InfrastructureError, match="closed"):
    own.servers.open()


def test_one_that_dies_is_lost_with_its_state_and_no_other_one(plain):
  own = Own(plain)
  first, second = own.servers.open(), own.servers.open()
  own.count(second)
  box = Toolbox(first.tools)
  assert box.call(ToolCall("die", {})).code == Code.INFRASTRUCTURE
  assert box.call(ToolCall("count", {})).code == Code.INFRASTRUCTURE  # not "1" of a fresh one
  assert own.count(second) == "2"


def test_a_server_that_died_while_it_waited_is_not_lent(plain):
  own = Own(plain)
  own.servers.open().close()
  for spare in list(own.servers._spare):
    spare.listed()
    spare.close()
    spare.wait(10)
  assert own.count(own.servers.open()) == "1"


def test_servers_that_cannot_start_any_more_are_infrastructure(plain, tmp_path):
  starts = tmp_path / "starts"
  own = Own(plain, env={"STEPTOOL_STARTS": str(starts)})
  starts.write_text("no more")
  own.servers.open()  # the one that listed the tools
  with pytest.raises(InfrastructureError, match="did not start or answer"):
    own.servers.open()


@pytest.mark.parametrize("drip", DRIPS)
def test_no_drip_of_bytes_outlives_the_time_limit(drip):
  pytest.importorskip("mcp")
  with RawServer(DRIPS[drip]) as server:
    started = time.monotonic()
    with pytest.raises(OSError, match="did not start or answer"):
      McpServers(url=server.url, start_timeout_s=0.5)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("drip", DRIPS)
def test_no_drip_of_bytes_outlives_the_time_limit_of_a_call(drip):
  """Each byte of a reply's head set the clock of a call back."""
  pytest.importorskip("mcp")
  with (
    HttpServer() as http,
    RawServer(DRIPS[drip]) as dripping,
    McpServers(url=http.url, timeout_s=0.4) as servers,
  ):
    server = lent(servers)
    http.elsewhere = dripping.port
    started = time.monotonic()
    assert server.call(ToolCall("double", {"a": 1})).code == Code.INFRASTRUCTURE
    assert time.monotonic() - started < 3


def test_a_server_that_fails_to_start_is_ended_too(tmp_path):
  """The limit of the start cut off what ends the process: it lived on, one for each try."""
  pytest.importorskip("mcp")
  program = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w', 1)); os.close(1)"
  command = [sys.executable, "-c", f"{program}; time.sleep(300)", str(tmp_path / "pid")]
  with pytest.raises(OSError, match="did not start or answer"):
    McpServers(command=command, start_timeout_s=0.7)
  with pytest.raises(ProcessLookupError):
    os.kill(int((tmp_path / "pid").read_text()), 0)


def test_streamable_http():
  pytest.importorskip("mcp")
  with HttpServer() as http, McpServers(url=http.url, timeout_s=5) as servers:
    server = lent(servers)
    assert server.call(ToolCall("double", {"a": 21})).text == "42"
    assert server.call(ToolCall("refuse", {})).code == Code.TOOL_ERROR
  with pytest.raises(OSError, match=r"127.0.0.1.*did not start or answer"):
    McpServers(url=http.url, start_timeout_s=5)


def test_no_shell_reads_the_command():
  pytest.importorskip("mcp")
  with pytest.raises(OSError, match="did not start or answer"):
    McpServers(command=[f"{sys.executable} {SERVER}"], start_timeout_s=5)


@pytest.mark.parametrize(
  "command",
  [["/nowhere/server"], [sys.executable, "-c", "raise SystemExit(3)"]],
)
def test_a_server_that_does_not_start_is_named(command):
  pytest.importorskip("mcp")
  with pytest.raises(OSError, match=re.escape(command[0])):
    McpServers(command=command, start_timeout_s=10)


def test_a_server_that_says_nothing_is_given_up():
  pytest.importorskip("mcp")
  started = time.monotonic()
  with pytest.raises(OSError, match="did not start or answer"):
    McpServers(command=[sys.executable, "-c", "import time; time.sleep(60)"], start_timeout_s=0.5)
  assert time.monotonic() - started < 10


def test_without_the_package_the_remedy_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "mcp", None)
  with pytest.raises(ImportError, match=r"pip install 'steptool-jax\[mcp\]'"):
    McpServers(url="http://localhost:1/mcp")


@pytest.mark.parametrize(
  ("settings", "wrong"),
  [
    ({}, "either a command or a url"),
    ({"command": ["x"], "url": "http://x"}, "either a command or a url"),
    ({"command": "python server.py"}, "list of arguments"),
    ({"command": []}, "list of arguments"),
    ({"url": "http://x", "env": {}}, "env goes with a command"),
    ({"url": "http://x", "timeout_s": 0}, "above 0 seconds"),
    ({"url": "http://me:secret@x"}, "user name or a password"),
  ],
)
def test_bad_settings(settings, wrong):
  with pytest.raises(ValueError, match=wrong):
    McpServers(**settings)


def test_names_become_valid_and_stay_apart():
  listed = [types.SimpleNamespace(name=n) for n in ("a-b", "a.b", "a_b_2", "a b", "2x", "°", "_")]
  names = "a_b a_b_2 a_b_2_2 a_b_3 tool_2x tool tool_2"
  assert [name for name, _ in mcp_lib._named(listed)] == names.split()
