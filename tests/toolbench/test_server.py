import concurrent.futures
import json
import socket
import threading
import time

import httpx
import pytest

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

  def start(simulator):
    servers.append(Server(simulator, "127.0.0.1", 0))
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
