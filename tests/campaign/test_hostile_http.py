"""Hostile HTTP servers, each met by the clients of judges, of language models and of /virtual.

A call ends within its limit of time, with an InfrastructureError that names the server; nothing
that a server sends is taken for an answer, and no other address is ever asked.
"""

import json
import time

import figures
import pytest
from raw_server import DRIPS, RawServer, dripping

from steptool_jax.simulators.endpoint import Endpoint
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.toolbench.llm_judges import llm_judge
from steptool_jax.toolbench.simulators.http import HttpSimulator
from steptool_jax.toolbench.simulators.virtual import VirtualRequest

pytestmark = pytest.mark.campaign
LIMIT_S = 0.4
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def sends(*pieces):
  def play(send, stop):
    for piece in pieces:
      send(piece)

  return play


def floods(first, piece):
  def play(send, stop):
    send(first)
    while not stop.is_set():
      send(piece)

  return play


def silent(send, stop):
  stop.wait(20)


def reply(body, status=b"200 OK", *headers):
  body = body.encode() if isinstance(body, str) else body
  lines = [b"HTTP/1.1 " + status, *headers, b"Content-Length: %d" % len(body)]
  return b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body


def says(body, status=b"200 OK", *headers):
  return sends(reply(body, status, *headers))


# What both clients meet: bytes that are no reply, or a reply that is no answer of either kind.
SERVERS = {
  **{f"drips: {name}": play for name, play in DRIPS.items()},
  "drips: header lines": dripping(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n"),
  "drips: body": dripping(HEAD + b"Content-Length: 1000\r\n\r\n", b" "),
  "drips: body in chunks": dripping(CHUNKED, b"1\r\n \r\n"),
  "drips: trailers": dripping(CHUNKED + b"2\r\n{}\r\n0\r\n", b"a: b\r\n"),
  "silent": silent,
  "floods: one header": floods(b"HTTP/1.1 200 OK\r\nx: ", b"a" * 65536),
  "floods: headers": floods(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 4096),
  "floods: 100 Continue": floods(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1024),
  "floods: body": floods(HEAD + b"Content-Length: 999999999999\r\n\r\n", b"x" * 65536),
  "floods: chunks": floods(CHUNKED, b"10000\r\n" + b"x" * 65536 + b"\r\n"),
  "floods: body without a length": floods(HEAD + b"\r\n", b"x" * 65536),
  "closes at once": sends(),
  "closes in the head": sends(b"HTTP/1.1 200 OK\r\nContent-Le"),
  "closes in the body": sends(HEAD + b'Content-Length: 100\r\n\r\n{"error": ""'),
  "closes in a chunk": sends(CHUNKED + b"64\r\n{"),
  "closes before the last chunk": sends(CHUNKED + b"2\r\n{}\r\n"),
  "no HTTP": sends(b"220 smtp.example ESMTP\r\n"),
  "TLS alert": sends(b"\x15\x03\x01\x00\x02\x02\x28"),
  "HTTP/9.9": sends(b"HTTP/9.9 200 OK\r\nContent-Length: 2\r\n\r\n{}"),
  "status 99999": sends(b"HTTP/1.1 99999 OK\r\nContent-Length: 2\r\n\r\n{}"),
  "status with letters": sends(b"HTTP/1.1 2x0 OK\r\n\r\n{}"),
  "status 101": sends(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"),
  "status 204": sends(b"HTTP/1.1 204 No Content\r\n\r\n"),
  "negative length": sends(HEAD + b"Content-Length: -5\r\n\r\n{}"),
  "length in other digits": sends(HEAD + "Content-Length: ²\r\n\r\n{}".encode()),
  "two lengths": sends(HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
  "chunk of negative size": sends(CHUNKED + b"-1\r\n{}\r\n0\r\n\r\n"),
  "chunk of endless size": sends(CHUNKED + b"f" * 400 + b"\r\n{}"),
  "header with NUL": sends(HEAD + b"a: \x00\r\nContent-Length: 2\r\n\r\n{}"),
  "says it is packed": says(
    b"\x1f\x8b\x08\x00" + b"\x00" * 999, b"200 OK", b"Content-Encoding: gzip"
  ),
  "invalid UTF-8": says(b'{"error": "\xff\xfe", "response": "\xc3\x28"}'),
  "UTF-16": says('{"error": "", "response"'.encode("utf-16")),
  "empty": says(""),
  "prose": says("Of course! Here is what you asked for."),
  "HTML": says("<html><script>alert(1)</script></html>"),
  "null": says("null"),
  "a number": says("1e999"),
  "a list": says('["error", "response", "choices"]'),
  "an empty object": says("{}"),
  "nested": says("[" * 200_000 + "]" * 200_000),
  "nested objects": says('{"choices":' * 100_000 + "1" + "}" * 100_000),
  "wrong types": says('{"error": {}, "response": 1, "choices": {"0": {"message": 1}}}'),
  "wrong types inside": says('{"error": [], "choices": [{"message": {"content": 5}}]}'),
  "a long integer": says('{"choices": ' + "9" * 5000 + "}"),
  "NaN": says('{"error": "", "response": NaN, "choices": [{"message": NaN}]}'),
  "infinity": says(
    '{"error": "", "response": 1e999, "choices": [{"message": {"content": 1e999}}]}'
  ),
  "event stream": says('data: {"choices": []}\n\n', b"200 OK", b"Content-Type: text/event-stream"),
  "401": says("no", b"401 Unauthorized", b'WWW-Authenticate: Basic realm="x"'),
  "407": says("no", b"407 Proxy Authentication Required"),
  "500": says("no", b"500 Oops"),
  "Retry-After of the year 10,000": says(
    "no", b"503 Busy", b"Retry-After: Fri, 31 Dec 9999 23:59:59 GMT"
  ),
  "Retry-After beyond": says("no", b"429 Busy", b"Retry-After: Sat, 01 Jan 10000 00:00:00 GMT"),
  "Retry-After of 1e999": says("no", b"429 Busy", b"Retry-After: 1e999"),
  "Retry-After NaN": says("no", b"429 Busy", b"Retry-After: nan"),
  "Retry-After negative": says("no", b"429 Busy", b"Retry-After: -5"),
}
REQUEST = VirtualRequest("Data", "tool", "api", {}, toolbench_key="secret-of-toolbench")
LLM = {"timeout_s": LIMIT_S, "retries": 1, "backoff_s": 0.01, "api_key": "secret-of-the-judge"}
VIRTUAL = {"timeout_s": LIMIT_S, "retries": 1, "backoff_s": 0.01, "max_wait_s": 0.3}
CLIENTS = {
  "judge": lambda url: llm_judge(Endpoint(url, "m", **LLM))("Rain?", "It rains.", None, 0),
  "/virtual": lambda url: HttpSimulator(url, **VIRTUAL).answer(REQUEST),
}


def problem(client, url) -> str:
  """What is wrong with how the client takes the server; "" where it is refused in time."""
  started = time.monotonic()
  try:
    return f"accepted {client(url)!r:.200}"
  except InfrastructureError as error:
    seconds = time.monotonic() - started
    if "secret" in str(error):
      return f"shows a key: {error}"
    if url not in str(error):
      return f"does not name the server: {error}"
    return "" if seconds < 3 else f"takes {seconds:.1f} s"
  except BaseException as error:
    return f"{type(error).__name__}: {error!s:.200}"


@pytest.mark.parametrize("kind", CLIENTS)
def test_hostile_servers(kind, capsys):
  """A limit of time that bytes outlive, a crash of a client, a reply that is none taken for one."""
  bad = []
  for name, play in SERVERS.items():
    with RawServer(play) as server:
      found = problem(CLIENTS[kind], server.url)
    bad += [f"{kind}, {name}: {found}"] if found else []
  figures.add(f"hostile servers, {kind}", len(SERVERS), {"refused": len(SERVERS) - len(bad)})
  with capsys.disabled():
    print(f"\n{kind}: {len(SERVERS)} hostile servers, {len(SERVERS) - len(bad)} refused in time")
  assert not bad, "\n".join(bad)


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize("status", [b"301 Moved", b"302 Found", b"307 Again", b"308 Gone"])
def test_no_redirect_is_followed(kind, status):
  """A redirect sent the conversation, and the key with it, to any address inside the network."""
  asked = []

  def elsewhere(send, stop):
    asked.append(1)

  with RawServer(elsewhere) as other:
    where = b"Location: " + other.url.encode() + b"/v1"
    with RawServer(says("", status, where)) as server:
      assert not problem(CLIENTS[kind], server.url)
  assert not asked


def test_odd_figures_beside_a_good_reply_cost_it_nothing():
  """A usage of 1e999 tokens ended the run of a judge."""
  call = {"function": {"name": "report_verdict", "arguments": '{"verdict": "solved"}'}}
  for tokens in ("1e999", "-1", "NaN", '"many"', "null", "[]", "9" * 400):
    usage = f'{{"prompt_tokens": {tokens}, "completion_tokens": {tokens}}}'
    choices = json.dumps([{"message": {"content": None, "tool_calls": [call]}}])
    with RawServer(says(f'{{"choices": {choices}, "usage": {usage}}}')) as server:
      assert CLIENTS["judge"](server.url).name == "SOLVED", tokens
