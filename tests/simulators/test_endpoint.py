import concurrent.futures
import contextlib
import datetime
import email.utils
import json
import time

import pytest
from openai_server import Server, completion, script

from steptool_jax.simulators import endpoint as endpoint_lib
from steptool_jax.simulators import posting
from steptool_jax.simulators.endpoint import Endpoint
from steptool_jax.simulators.errors import InfrastructureError

MESSAGES = [{"role": "user", "content": "héllo"}]
FUNCTION = {"name": "f", "parameters": {"type": "object"}}


def client(server, **options):
  return Endpoint(server.url, "m", **{"backoff_s": 0.01, "timeout_s": 5, **options})


def test_request_and_reply():
  with Server(script(completion("hi", tokens=(7, 3)))) as server:
    reply = client(server, api_key="k").chat(
      MESSAGES, json_mode=True, max_tokens=9, temperature=0.5
    )
  assert (reply.text, reply.arguments, reply.cached) == ("hi", None, False)
  assert (reply.prompt_tokens, reply.completion_tokens) == (7, 3)
  assert server.bodies == [
    {
      "model": "m",
      "messages": MESSAGES,
      "max_tokens": 9,
      "temperature": 0.5,
      "response_format": {"type": "json_object"},
    }
  ]
  path, headers = server.headers[0]
  assert path == "/v1/chat/completions"
  assert headers["authorization"] == "Bearer k"


def test_function_is_forced_and_parsed():
  with Server(script(completion(arguments={"a": [1]}, name="f"))) as server:
    reply = client(server).chat(MESSAGES, function=FUNCTION)
  assert reply.arguments == {"a": [1]}
  assert server.bodies[0]["tools"] == [{"type": "function", "function": FUNCTION}]
  assert server.bodies[0]["tool_choice"] == {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
  "answer",
  [
    completion("just prose"),
    completion(arguments='{"a": [1', name="f"),
    completion(arguments="[1]", name="f"),
    completion(arguments={"a": 1}, name="g"),
  ],
)
def test_no_usable_call_is_the_callers_matter(answer):
  with Server(script(answer)) as server:
    assert client(server).chat(MESSAGES, function=FUNCTION).arguments is None
  assert len(server.bodies) == 1


@pytest.mark.parametrize(
  "bad",
  [
    (429, {}, "slow down"),
    (500, {}, "oops"),
    (200, {}, "<html>prose</html>"),
    (200, {}, '{"choices": []}'),
    "close",
  ],
)
def test_retried_then_well(bad):
  with Server(script(bad, bad, completion("ok"))) as server:
    endpoint = client(server, retries=2)
    assert endpoint.chat(MESSAGES).text == "ok"
  assert len(server.bodies) == 3
  assert endpoint.usage().calls == 1


@pytest.mark.parametrize(
  ("sent", "counted"),
  [("1e999", 0), ("NaN", 0), ("-5", 0), ('"many"', 0), ("[]", 0), ("3.0", 3), ("1e300", 0)],
)
def test_a_strange_usage_costs_no_good_reply(sent, counted):
  """prompt_tokens of 1e999 was an OverflowError that ended a judge run."""
  raw = json.dumps(completion("ok", tokens=("X", 1))).replace('"X"', sent)
  with Server(script((200, {}, raw))) as server:
    endpoint = client(server, retries=0)
    assert endpoint.chat(MESSAGES).text == "ok"
  assert endpoint.usage().prompt_tokens == counted


def test_arguments_that_are_nested_deeply_are_no_call():
  deep = '{"a":' * 900 + "1" + "}" * 900
  raw = json.dumps(completion(arguments="X", name="f")).replace('"X"', deep)
  with Server(script((200, {}, raw))) as server, contextlib.suppress(InfrastructureError):
    assert client(server, retries=0).chat(MESSAGES, function=FUNCTION).text == ""


def test_used_up():
  with (
    Server(script((500, {}, "oops"))) as server,
    pytest.raises(InfrastructureError, match=r"model m: status 500: 'oops' \(tried 3 times\)"),
  ):
    client(server, retries=2).chat(MESSAGES)
  assert len(server.bodies) == 3


def test_refusal_is_not_retried():
  with (
    Server(script((401, {}, "bad key"))) as server,
    pytest.raises(InfrastructureError, match="status 401: 'bad key'"),
  ):
    client(server).chat(MESSAGES)
  assert len(server.bodies) == 1


def test_hang_is_cut():
  started = time.monotonic()
  with Server(script("hang", completion("ok"))) as server:
    assert client(server, timeout_s=0.3, retries=1).chat(MESSAGES).text == "ok"
  assert 0.3 <= time.monotonic() - started < 3


def test_nobody_there():
  with Server(script("close")) as server:
    pass
  with pytest.raises(InfrastructureError, match="tried 2 times"):
    client(server, retries=1).chat(MESSAGES)


def test_huge_reply_is_given_up(monkeypatch):
  monkeypatch.setattr(endpoint_lib, "_MAX_BODY_BYTES", 1000)
  with (
    Server(script(completion("x" * 5000))) as server,
    pytest.raises(InfrastructureError, match="more than 1000 bytes"),
  ):
    client(server).chat(MESSAGES)
  assert len(server.bodies) == 1


def test_retry_after_is_waited_for_and_the_place_kept():
  busy = (429, {"retry-after": "0.6"}, "")
  with Server(script(busy, completion("ok"))) as server:
    endpoint = client(server, max_in_flight=1)
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      for text in ("first", "second"):
        pool.submit(endpoint.chat, [{"role": "user", "content": text}])
        while not server.bodies:
          time.sleep(0.01)
    seconds = time.monotonic() - started
  assert seconds >= 0.6
  # Nobody else asks meanwhile: the server wanted fewer requests.
  assert [b["messages"][0]["content"] for b in server.bodies] == ["first", "first", "second"]


def test_a_long_retry_after_is_a_failure():
  when = email.utils.format_datetime(
    datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
  )
  with (
    Server(script((503, {"retry-after": when}, ""))) as server,
    pytest.raises(InfrastructureError, match="503"),
  ):
    client(server).chat(MESSAGES)
  assert len(server.bodies) == 1


def test_back_off_grows_and_jitters(monkeypatch):
  pauses = []
  monkeypatch.setattr(posting.time, "sleep", pauses.append)
  endpoint = Endpoint("http://127.0.0.1:9", "m", retries=8, backoff_s=1)
  with pytest.raises(InfrastructureError):
    endpoint.chat(MESSAGES)
  for pause, base in zip(pauses, (1, 2, 4, 8, 16, 20, 20, 20), strict=True):
    assert 0.5 * base <= pause <= 1.5 * base
  assert len(set(pauses)) == 8


def test_cache(tmp_path):
  behaviour = lambda body, number: completion(f"answer {number}", tokens=(1000, 500))  # noqa: E731
  with Server(behaviour) as server:
    first = client(server, cache_dir=tmp_path, prices=(2, 4))
    assert first.chat(MESSAGES).text == "answer 0"
    again = first.chat(MESSAGES)
    assert (again.text, again.cached) == ("answer 0", True)
    assert first.chat(MESSAGES, sample=1).text == "answer 1"
    assert first.chat(MESSAGES, temperature=1.0).text == "answer 2"
    assert first.chat(MESSAGES, function=FUNCTION).text == "answer 3"
    other = Endpoint(server.url, "n", cache_dir=tmp_path)
    assert other.chat(MESSAGES).text == "answer 4"
    resumed = client(server, cache_dir=tmp_path)
    assert resumed.chat(MESSAGES).text == "answer 0"
  usage = first.usage()
  assert (usage.calls, usage.cached_calls) == (4, 1)
  assert (usage.prompt_tokens, usage.completion_tokens) == (4000, 2000)
  assert usage.cost_usd == pytest.approx(4000 * 2e-6 + 2000 * 4e-6)
  assert resumed.usage() == endpoint_lib.Usage(cached_calls=1)
  assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("damage", ["", '{"reply": {"cho', "[]", '{"reply": {"choices": []}}'])
def test_broken_cache_file_is_replaced(tmp_path, damage):
  with Server(script(completion("fresh"))) as server:
    endpoint = client(server, cache_dir=tmp_path)
    endpoint.chat(MESSAGES)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(damage)
    assert not endpoint.chat(MESSAGES).cached
    assert endpoint.chat(MESSAGES).cached
  assert json.loads(file.read_text())["request"]["messages"] == MESSAGES


def test_a_refused_reply_is_not_kept(tmp_path):
  def accept(reply):
    if reply.text != "good":
      raise ValueError("no good")

  with Server(script(completion("bad"), completion("good"))) as server:
    endpoint = client(server, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="no good"):
      endpoint.chat(MESSAGES, accept=accept)
    assert not list(tmp_path.rglob("*.json"))
    assert endpoint.chat(MESSAGES, accept=accept).text == "good"
    assert endpoint.chat(MESSAGES, accept=accept).cached
  assert endpoint.usage().calls == 2


def test_bounded_concurrency():
  with Server(script(completion("x")), delay_s=0.1) as server:
    endpoint = client(server, max_in_flight=8)
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
      replies = list(pool.map(lambda k: endpoint.chat(MESSAGES, sample=k), range(40)))
    seconds = time.monotonic() - started
  assert len(replies) == len(server.bodies) == endpoint.usage().calls == 40
  assert server.peak == 8
  assert 0.5 <= seconds < 2.5  # 5 rounds of 0.1 s, not 40


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"base_url": "localhost:1"}, "base_url"),
    ({"model": ""}, "model"),
    ({"timeout_s": 0}, "timeout_s"),
    ({"retries": -1}, "retries"),
    ({"max_in_flight": 0}, "max_in_flight"),
    ({"prices": (1, -1)}, "prices"),
  ],
)
def test_settings_are_checked(options, match):
  with pytest.raises(ValueError, match=match):
    Endpoint(**{"base_url": "http://x", "model": "m", **options})
