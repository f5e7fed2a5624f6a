import concurrent.futures
import json
import socket
import threading
import time

import httpx
import pytest

from steptool_jax.serving import guards
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.toolbench.server import Server
from steptool_jax.toolbench.simulators.cache import Cache
from steptool_jax.toolbench.simulators.http import HttpSimulator
from steptool_jax.toolbench.simulators.virtual import NOT_WORKING, VirtualRequest, VirtualResponse

BODY = {
  "category": "Data",
  "tool_name": "ip_lookup",
  "api_name": "find",
  "tool_input": {"ip": "1"},
  "strip": "filter",
  "toolbench_key": "",
}
FINE = VirtualResponse("", "fine")


class Scripted:
  def __init__(self, function=lambda request: FINE):
    self.function, self.requests = function, []

  def answer(self, request):
    self.requests.append(request)
    return self.function(request)


@pytest.fixture
def start():
  servers = []

  def start(simulator, key=""):
    servers.append(Server(simulator, "127.0.0.1", 0, key))
    return servers[-1], f"http://127.0.0.1:{servers[-1].port}/virtual"

  yield start
  for server in servers:
    server.close(0)


def raises(error):
  def function(request):
    raise error

  return function


def test_the_contract(start):
  simulator = Scripted()
  _, url = start(simulator)
  reply = httpx.post(url, json={**BODY, "extra": 1})
  assert (reply.status_code, reply.json()) == (200, {"error": "", "response": "fine"})
  assert simulator.requests == [VirtualRequest("Data", "ip_lookup", "find", {"ip": "1"})]
  httpx.post(url, json={**BODY, "tool_input": "{'"})
  assert simulator.requests[1].tool_input == "{'"  # for the simulator to judge


@pytest.mark.parametrize("field", list(BODY))
def test_a_missing_field_is_422_as_officially(start, field):
  _, url = start(Scripted())
  for bad in ({k: v for k, v in BODY.items() if k != field}, {**BODY, field: 3}):
    reply = httpx.post(url, json=bad)
    assert reply.status_code == 422
    assert field in reply.json()["detail"]


@pytest.mark.parametrize("content", [b"", b"prose", b"[1]", b"\xff", b'{"a":' * 50_000])
def test_a_body_that_is_no_request_is_422(start, content):
  simulator = Scripted()
  _, url = start(simulator)
  with httpx.Client() as client:
    assert client.post(url, content=content).status_code == 422
    assert client.post(url, json=BODY).status_code == 200  # the connection is still in step
  assert len(simulator.requests) == 1


def test_other_paths_methods_and_sizes(start):
  simulator = Scripted()
  _, url = start(simulator)
  with httpx.Client() as client:
    assert client.get(url).status_code == 405
    assert client.put(url, json=BODY).status_code == 405
    assert client.get(url + "s").status_code == 404
    assert client.post(url + "s", json=BODY).status_code == 404
    for content, status in ((b"x" * (2 << 20), 413), (iter([b"{}"]), 411)):
      reply = client.post(url, content=content)
      # Its body stays unread, so that nothing else can come over this connection.
      assert (reply.status_code, reply.headers["connection"]) == (status, "close")
  assert not simulator.requests


def test_no_answer_is_the_official_error_and_failures_are_no_answers(start):
  _, url = start(Scripted(lambda request: None))
  assert httpx.post(url, json=BODY).json() == NOT_WORKING.as_dict()
  _, url = start(Scripted(raises(InfrastructureError("model is down"))))
  reply = httpx.post(url, json=BODY)
  assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
  assert "model is down" in reply.json()["detail"]
  for broken in (raises(KeyError("bug")), lambda request: VirtualResponse("", {1, 2})):
    _, url = start(Scripted(broken))
    reply = httpx.post(url, json=BODY)
    assert reply.status_code == 500
    assert "error" not in reply.json()


def test_our_client_and_our_server_agree(start, tmp_path):
  folder = tmp_path / "cache" / "Data" / "ip_lookup_for_Data"
  folder.mkdir(parents=True)
  recorded = {"error": "", "response": {"city": "Zürich", "n": [1, None]}}
  (folder / "find.json").write_text(json.dumps({"{'ip': '1'}": recorded}))
  cache = Cache(tmp_path / "cache")
  _, url = start(cache)
  client = HttpSimulator(url, retries=0)
  for tool_input in ({"ip": "1"}, '{"ip": 1}', {"ip": "2"}, "prose", ""):
    asked = VirtualRequest("Data", "IP lookup", "Find", tool_input)
    assert client.answer(asked) == (cache.answer(asked) or NOT_WORKING)
  assert (
    client.answer(VirtualRequest("Data", "ip_lookup", "find", {"ip": 1})).response
    == (recorded["response"])
  )
  _, down = start(Scripted(raises(InfrastructureError("model is down"))))
  with pytest.raises(InfrastructureError, match=r"status 503.*model is down.*tried 2 times"):
    HttpSimulator(down, retries=1, backoff_s=0.001, max_wait_s=0).answer(asked)


def test_many_clients_at_once(start):
  _, url = start(Scripted(lambda request: time.sleep(0.05) or FINE))
  client = HttpSimulator(url, retries=0, max_in_flight=64)
  request = VirtualRequest("Data", "t", "a", {})
  started = time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(64) as pool:
    assert list(pool.map(client.answer, [request] * 256)) == [FINE] * 256
  assert time.monotonic() - started < 6  # one after the other: 12.8


def test_close_lets_requests_under_way_end(start):
  entered, release = threading.Event(), threading.Event()

  def wait(request):
    entered.set()
    release.wait(10)
    return FINE

  server, url = start(Scripted(wait))
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    reply = pool.submit(httpx.post, url, json=BODY)
    assert entered.wait(5)
    closing = pool.submit(server.close, 10.0)
    time.sleep(0.2)
    assert not closing.done()
    release.set()
    assert reply.result(5).json() == {"error": "", "response": "fine"}
    assert closing.result(5) is True
  with pytest.raises(httpx.ConnectError):
    httpx.post(url, json=BODY)


def test_close_does_not_wait_for_ever(start):
  entered, release = threading.Event(), threading.Event()
  server, url = start(Scripted(lambda request: entered.set() or (release.wait(10) and FINE)))
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    reply = pool.submit(httpx.post, url, json=BODY)
    assert entered.wait(5)
    started = time.monotonic()
    assert server.close(0.2) is False
    assert time.monotonic() - started < 3
    release.set()
    reply.result(5)


def test_a_taken_port_is_named():
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(OSError, match=f"127.0.0.1:{port}.*choose another port"):
      Server(Scripted(), "127.0.0.1", port)


def test_port_and_host_that_cannot_be():
  """Port 70000 was a traceback; no host was every address, silently."""
  with pytest.raises(OSError, match="127.0.0.1:70000.*choose another port"):
    Server(Scripted(), "127.0.0.1", 70000)
  with pytest.raises(ValueError, match="name 0.0.0.0 to listen on every address"):
    Server(Scripted(), "", 0)


@pytest.mark.parametrize("length", ["\u00b2", "-1", "1e3", "99999999999999999999"])
def test_a_content_length_that_is_none_gets_an_answer(start, length):
  """A superscript 2 counts as a digit in Python, and ended the connection without a word."""
  server, _ = start(Scripted())
  head = f"POST /virtual HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
  with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
    connection.sendall(head.encode("latin-1"))
    assert connection.recv(100).startswith(b"HTTP/1.1 4")


def test_pages_of_a_browser_cannot_ask(start):
  """A page that the user looks at reaches 127.0.0.1, by an address of its own name, too."""
  simulator = Scripted()
  _, url = start(simulator)
  for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example:8080"}):
    reply = httpx.post(url, json=BODY, headers=headers)
    assert (reply.status_code, list(reply.json())) == (403, ["detail"])
  assert not simulator.requests
  for host in ("localhost:1", "10.0.0.1", "[::1]:80", socket.gethostname()):
    assert httpx.post(url, json=BODY, headers={"Host": host}).status_code == 200


def test_a_server_with_a_key_answers_those_who_send_it_and_hands_it_to_nobody(start):
  simulator = Scripted()
  _, url = start(simulator, key="server-key")
  official = {"headers": {"toolbench_key": "server-key"}}
  ours = BODY | {"toolbench_key": "server-key"}
  for bad in ({}, {"headers": {"Authorization": "Bearer wrong"}}):
    assert httpx.post(url, json=ours, **bad).status_code == 401
  assert httpx.post(url, json=ours, **official).status_code == 200
  bearer = {"Authorization": "Bearer server-key", "Host": "any.example"}
  assert httpx.post(url, json=BODY | {"toolbench_key": "theirs"}, headers=bearer).status_code == 200
  assert [r.toolbench_key for r in simulator.requests] == ["", "theirs"]
  asked = VirtualRequest("Data", "t", "a", {}, toolbench_key="server-key")
  assert HttpSimulator(url, retries=0).answer(asked) == FINE


def test_names_and_keys_that_no_api_has_are_refused(start):
  """Caches of names kept what every request sent; a key with a line end broke the next client."""
  _, url = start(Scripted())
  for field, value in (("api_name", "x" * 600), ("category", "x" * 600), ("toolbench_key", "a\nb")):
    reply = httpx.post(url, json=BODY | {field: value})
    assert reply.status_code == 422
    assert field in reply.json()["detail"]


def test_slow_clients_cost_no_threads_and_are_given_up(start, monkeypatch):
  """Each of 200 clients that sent a byte now and then held a thread, for as long as it liked."""
  monkeypatch.setattr(guards, "_HEAD_S", 0.3)
  monkeypatch.setattr(guards, "_BODY_S", 0.3)
  server, url = start(Scripted())
  threads = threading.active_count()
  head = b"POST /virtual HTTP/1.1\r\nHost: localhost\r\n"
  slow = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(200)]
  try:
    for n, connection in enumerate(slow):
      connection.sendall(head if n % 2 else head + b"Content-Length: 99\r\n\r\n{")
    assert httpx.post(url, json=BODY, timeout=5).status_code == 200
    assert threading.active_count() <= threads + 2
    assert slow[0].recv(100).startswith(b"HTTP/1.1 408")
    assert slow[1].recv(100) == b""
  finally:
    for connection in slow:
      connection.close()


def test_further_connections_than_the_bound_are_closed(start, monkeypatch):
  monkeypatch.setattr(guards, "_CONNECTIONS", 4)
  server, url = start(Scripted())
  held = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(4)]
  with pytest.raises(httpx.TransportError):
    httpx.post(url, json=BODY, timeout=5)
  for connection in held:
    connection.close()
