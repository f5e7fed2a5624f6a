"""Hostile MCP servers, over stdio and HTTP: at the start, in their list of tools, in a call.

At the start each is refused in time with an OSError or ValueError. A call ends in time with an
observation that is bounded, printable and JSON, or that says that its infrastructure failed.
"""

import collections
import concurrent.futures
import json
import logging
import pathlib
import sys
import time

import figures
import hostile_mcp
import mcp_plain_server
import pytest
from raw_server import RawServer
from test_hostile_http import SERVERS, reply

from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.functions import Toolbox
from steptool_jax.simulators.mcp import McpServers
from steptool_jax.types import Code, ToolCall

pytestmark = pytest.mark.campaign
pytest.importorskip("mcp", reason="the optional package mcp is missing")
SCRIPT = pathlib.Path(hostile_mcp.__file__)
LIMIT_S, START_S, CLOSE_S = 0.5, 1.5, 8.0  # the package ends a stubborn process after 6 s
LENGTH = 300
JSON = (b"200 OK", b"Content-Type: application/json")
STAGES = ("initialize", "tools/list", "tools/call")


class HttpServer(RawServer):
  """Well-behaved but for requests of the method `stage`, which `play` answers."""

  def __init__(self, stage, play):
    super().__init__(None)
    self.stage, self.hostile = stage, play

  def _serve(self, connection):
    with connection:
      try:
        head, _, body = connection.recv(1 << 16).partition(b"\r\n\r\n")
        while len(body) < _length(head):
          body += connection.recv(1 << 16)
        if not head.startswith(b"POST"):
          connection.sendall(reply("", b"405 Method Not Allowed"))
          return
        message = json.loads(body)
        if "id" not in message:
          connection.sendall(reply("", b"202 Accepted"))
        elif message.get("method") == self.stage:
          self.hostile(message, connection.sendall, self.stop)
        else:
          found = mcp_plain_server.reply_to({"method": "", **message})
          if "result" in found:
            found["result"].pop("nextCursor", None)
          connection.sendall(reply(json.dumps(found), *JSON))
      except OSError:
        pass


def _length(head):
  found = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
  return int(found[0].split(b":")[1]) if found else 0


def over_http(play):
  """A server of bytes, for HttpServer."""
  return lambda message, send, stop: play(send, stop)


def body(make):
  return lambda message, send, stop: send(reply(make(message), *JSON))


def cases():
  """(kind, name, stage, what starts it) of every server."""
  texts = {
    "initialize": hostile_mcp.BROKEN,
    "tools/list": hostile_mcp.BROKEN | hostile_mcp.LISTS,
    "tools/call": hostile_mcp.BROKEN | hostile_mcp.ANSWERS,
  }
  for stage in STAGES:
    for name, make in texts[stage].items():
      yield "stdio", name, stage, None
      yield "http", name, stage, body(make)
    for name in hostile_mcp.ACTS:
      yield "stdio", name, stage, None
    if stage == "tools/call":
      for name, play in SERVERS.items():
        yield "http", name, stage, over_http(play)


def met(case) -> tuple[str, str]:
  """(how it ended, what is wrong with that or "")."""
  kind, name, stage, play = case
  started = time.monotonic()
  limits = {"timeout_s": LIMIT_S, "start_timeout_s": START_S if stage != "tools/call" else 20.0}
  try:
    if kind == "http":
      with HttpServer(stage, play) as server, McpServers(url=server.url, **limits) as found:
        return called(name, found)
    with McpServers(command=[sys.executable, str(SCRIPT), stage, name], **limits) as found:
      return called(name, found)
  except (OSError, ValueError) as error:
    seconds = time.monotonic() - started
    if stage == "tools/call":
      return "bad", f"not started: {error}"
    return "refused", "" if seconds < START_S + CLOSE_S else f"takes {seconds:.1f} s"
  except BaseException as error:
    return "bad", f"{type(error).__name__}: {error!s:.200}"


def called(name, servers) -> tuple[str, str]:
  try:
    session = servers.open()
    box = Toolbox(session.tools, LENGTH)
  except InfrastructureError:
    return "refused", ""
  begun = time.monotonic()
  seen = box.call(ToolCall("double", {"a": 1}))
  seconds = time.monotonic() - begun
  json.dumps(seen.value, allow_nan=False)
  wrong = [
    f"takes {seconds:.1f} s" if seconds > 4 else "",
    "" if len(seen.text) <= LENGTH else "flood",
    "" if all(c.isprintable() or c in "\n\t" for c in seen.text) else "unprintable",
    f"accepted {seen!r:.200}" if seen.code is Code.OK and name not in hostile_mcp.ANSWERS else "",
  ]
  return str(seen.code), "; ".join(filter(None, wrong))


def test_hostile_servers(capsys):
  """A server that hangs the run, crashes it, or whose reply is taken for an answer."""
  logging.getLogger("mcp").setLevel(logging.CRITICAL)  # it says what it could not parse
  everything = list(cases())
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(met, everything))
  counts = collections.defaultdict(collections.Counter)
  bad = []
  for (kind, name, stage, _), (outcome, wrong) in zip(everything, found, strict=True):
    counts[kind]["bad" if wrong else outcome] += 1
    bad += [f"{kind}, {stage}, {name}: {wrong}"] if wrong else []
  for kind, outcomes in counts.items():
    figures.add(f"hostile servers, MCP over {kind}", outcomes.total(), outcomes)
  with capsys.disabled():
    for kind, outcomes in counts.items():
      print(f"\nMCP over {kind}: {outcomes.total()} hostile servers, {dict(outcomes)}")
  assert not bad, "\n".join(text[:300] for text in bad)
