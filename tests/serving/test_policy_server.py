"""The policy's server over an engine that holds what a real one would, and says what it is told."""

import concurrent.futures
import contextlib
import dataclasses
import json
import threading
import time

import fakes
import httpx
import numpy as np
import pytest
from rollout.test_turns import hermes  # noqa: F401

from steptool_jax.config import Limits
from steptool_jax.dialogue import compact
from steptool_jax.dialogue.codec import Codec
from steptool_jax.dialogue.template import get_format
from steptool_jax.serving import decoding
from steptool_jax.serving.decoding import Decoder
from steptool_jax.serving.messages import ApiError, parse_request
from steptool_jax.serving.recording import Session
from steptool_jax.serving.server import PolicyServer
from steptool_jax.types import Finish, Malformed, Status, ToolCall, ToolCalls

ECHO = {
  "type": "function",
  "function": {
    "name": "echo",
    "description": "",
    "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
  },
}
USER = {"role": "user", "content": "say seven"}
LIMITS = Limits(
  max_steps=4, max_step_tokens=24, max_tokens=200, max_invalid=2, max_observation_chars=40
)


@pytest.fixture(scope="module")
def chat_format(tmp_path_factory):
  out = tmp_path_factory.mktemp("tokenizer")
  compact.build_tokenizer(['echo {"x":1} answer 7 give_up'] * 50, 300, out)
  return get_format("compact", Codec.load(out))


class Slow(fakes.ScriptedEngine):
  """Waits before it decodes, where a test asks for it."""

  pause = 0.0

  def decode(self, *args):
    time.sleep(self.pause)
    return super().decode(*args)


@dataclasses.dataclass
class Served:
  server: PolicyServer
  engine: Slow
  decoder: Decoder

  def client(self, **headers):
    return httpx.Client(base_url=self.server.url, headers=headers, timeout=20)

  def post(self, messages, url="", key="", **fields):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with self.client(**headers) as client:
      url = url or self.server.url
      return client.post(f"{url}/chat/completions", json={"messages": messages, **fields})

  def session(self, name="s", limits=LIMITS, seeds=None):
    seeds = [] if seeds is None else seeds
    keys = lambda *at: seeds.append(at) or np.zeros(2, np.uint32)  # noqa: E731
    return self.server.open(name, limits, keys, 1.0)


@pytest.fixture
def serve(chat_format):
  """serve(policy, …) -> Served: `policy` says a turn for the text of a slot."""
  with contextlib.ExitStack() as stack:

    def start(policy, slots=2, everyone=True, key="", pause=0.0, chat_format=chat_format, size=300):
      engine = Slow(chat_format, policy, slots=slots, size=size, chunk=4)
      engine.pause = pause
      decoder = Decoder(engine, None, chat_format.stop_ids)
      server = stack.enter_context(
        PolicyServer(decoder, chat_format, everyone=everyone, key=key, name="tiny")
      )
      stop = threading.Event()

      def work():
        while not stop.is_set():
          decoder.step(0.02)

      thread = threading.Thread(target=work, daemon=True)
      thread.start()
      stack.callback(thread.join)
      stack.callback(stop.set)
      return Served(server, engine, decoder)

    yield start


def calls_then_answers(text):
  return Finish("7") if "<|result|>" in text else ToolCall("echo", {"x": 1})


def echo_result(message, content="seven", **fields):
  (call,) = message["tool_calls"]
  return {"role": "tool", "tool_call_id": call["id"], "content": content, **fields}


def test_a_conversation_with_a_tool_appends_only_what_is_new(serve, chat_format):
  """A history that is rendered from text again is another prompt than the one sampled after."""
  served = serve(calls_then_answers)
  # The model says it in another way than the format would write it.
  spaced = lambda action: 'echo {"x" :  1}' if isinstance(action, ToolCall) else "answer 7"  # noqa: E731
  served.engine.format = dataclasses.replace(chat_format, write=spaced)
  first = served.post([USER], tools=[ECHO], logprobs=True).json()
  choice = first["choices"][0]
  assert choice["finish_reason"] == "tool_calls"
  function = choice["message"]["tool_calls"][0]["function"]
  assert (function["name"], json.loads(function["arguments"])) == ("echo", {"x": 1})
  assert len(choice["logprobs"]["content"]) == first["usage"]["completion_tokens"]
  assert choice["logprobs"]["content"][0]["logprob"] == -0.5
  before = served.engine.forced
  # As a client may send it back: other ids and white space in the arguments, fields left out.
  call = {"id": "c1", "type": "function", "function": {"name": "echo", "arguments": '{ "x" : 1 }'}}
  said = {"role": "assistant", "tool_calls": [call]}
  result = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "seven"}]}
  second = served.post([USER, said, result], tools=[ECHO]).json()
  assert second["choices"][0]["message"]["content"] == "7"
  assert second["choices"][0]["finish_reason"] == "stop"
  assert served.engine.forced - before == len(chat_format.observation("seven"))
  assert (
    second["usage"]["prompt_tokens_details"]["cached_tokens"] == (first["usage"]["total_tokens"])
  )


def test_a_turn_of_several_calls_is_all_of_them(serve, hermes):  # noqa: F811
  """Given as text they would pass for the answer. Their results are shown as in a rollout."""
  both = ToolCalls((ToolCall("echo", {"x": 1}), ToolCall("echo", {"x": 2})), "Both.")
  policy = lambda text: Finish("7") if "<tool_response>" in text else both  # noqa: E731
  served = serve(policy, chat_format=hermes, size=2000)
  opened = served.session(limits=dataclasses.replace(LIMITS, max_tokens=2000, max_step_tokens=200))
  ask = {"url": opened.url, "key": opened.key, "tools": [ECHO]}
  choice = served.post([USER], **ask).json()["choices"][0]
  assert choice["finish_reason"] == "tool_calls"
  calls = choice["message"]["tool_calls"]
  assert [json.loads(c["function"]["arguments"]) for c in calls] == [{"x": 1}, {"x": 2}]
  assert len({c["id"] for c in calls}) == 2
  before = served.engine.forced
  results = [
    {"role": "tool", "tool_call_id": c["id"], "content": text}
    for c, text in zip(calls, ("one", "two"), strict=True)
  ]
  # As they came: the second was quicker, and ids say whose they are.
  last = served.post([USER, choice["message"], *results[::-1]], **ask).json()["choices"][0]
  assert last["message"]["content"] == "7"
  assert served.engine.forced - before == len(hermes.observation("one", "two"))
  first, second = opened.session.trajectory("t", 0, 0).steps
  assert first.action == both
  assert [part.text for part in first.observation.parts] == ["one", "two"]
  assert first.observation_tokens.tolist() == hermes.observation("one", "two").tolist()
  assert second.action == Finish("7")
  refused = served.post([USER], **ask, parallel_tool_calls=False).json()["error"]
  assert refused["param"] == "parallel_tool_calls"
  # A history that was not sampled here, as after a restart, is one as well.
  other = serve(policy, chat_format=hermes, size=2000)
  told = other.post([USER, choice["message"], *results], tools=[ECHO]).json()["choices"][0]
  assert told["message"]["content"] == "7"


def test_a_forced_call_begins_as_the_format_writes_it(hermes):  # noqa: F811
  """Its tags were spelled as text, which the model has never seen in front of a call."""
  session = Session("s", hermes, LIMITS, None)
  body = {"messages": [USER], "tools": [ECHO]}
  body["tool_choice"] = {"type": "function", "function": {"name": "echo"}}
  forced = session._forced(parse_request(json.dumps(body).encode()))
  whole = hermes.render_action(ToolCall("echo", {"x": 1})).tolist()
  assert forced == whole[: len(forced)]
  assert hermes.codec.token_id("<tool_call>") in forced
  assert hermes.codec.decode(forced).endswith('"arguments":')


def test_streams_carry_the_same_answer(serve):
  """A client that puts the deltas together has what the whole answer says."""
  served = serve(calls_then_answers)
  with (
    served.client() as client,
    client.stream(
      "POST",
      "chat/completions",
      json={
        "messages": [USER],
        "tools": [ECHO],
        "stream": True,
        "stream_options": {"include_usage": True},
      },
    ) as reply,
  ):
    events = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
  assert events[-1] == "[DONE]"
  pieces = [json.loads(event) for event in events[:-1]]
  assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
  (called,) = [c for p in pieces for d in p["choices"] for c in d["delta"].get("tool_calls", [])]
  assert (called["index"], called["function"]["name"]) == (0, "echo")
  assert [d["finish_reason"] for p in pieces for d in p["choices"]][-1] == "tool_calls"
  assert pieces[-1]["usage"]["completion_tokens"] > 0


def test_text_without_tools_streams_as_it_is_sampled(serve):
  """Whoever reads along must not wait for the whole, and must get nothing after a stop text."""
  served = serve(lambda text: Finish("one two three four five six seven eight"), pause=0.02)
  for stop, wanted in ((None, " eight"), ("six", " five ")):
    request = {"messages": [USER], "stream": True, "stop": stop}
    with (
      served.client() as client,
      client.stream("POST", "chat/completions", json=request) as reply,
    ):
      lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    deltas = [json.loads(line)["choices"][0]["delta"].get("content") for line in lines[:-1]]
    said = [delta for delta in deltas if delta]
    assert len(said) > 2
    assert "".join(said).endswith(wanted)
    assert "".join(said).startswith("answer one two")


def test_stop_texts_and_max_tokens_cut_the_turn(serve, chat_format):
  """The ids after a stop text were never said: the next turn must not come after them."""
  served = serve(lambda text: Finish("one two three four five six"))
  opened = served.session()
  post = lambda messages, **f: served.post(messages, opened.url, opened.key, **f)  # noqa: E731
  choice = post([USER], stop=["three"]).json()["choices"][0]
  assert (choice["message"]["content"], choice["finish_reason"]) == ("answer one two ", "stop")
  step = opened.session.last.steps[0]
  text = chat_format.codec.decode(step.tokens)
  assert text.startswith("answer one two t")
  assert "four" not in text
  assert len(step.logprobs) == len(step.tokens)
  short = post([USER, choice["message"], USER], max_completion_tokens=3).json()
  assert short["choices"][0]["finish_reason"] == "length"
  assert short["usage"]["completion_tokens"] == 3
  # A turn that was cut is closed by a stop token, which was not sampled.
  observed = opened.session.last.steps[0].observation_tokens
  assert observed[0] == chat_format.stop_ids[0]


def test_one_seed_one_answer(serve):
  """The same seed asks the sampler with the same key, another one with another."""
  served = serve(calls_then_answers)
  keys = []
  whole = served.engine.decode
  served.engine.decode = lambda *a: keys.append(tuple(*map(tuple, a[3].values()))) or whole(*a)
  for seed in (5, 5, 6, None, None):
    served.post([USER], tools=[ECHO], seed=seed)
  one, same, other, *free = keys[:: len(keys) // 5]
  assert one == same != other
  assert free[0] != free[1]


def test_tool_choice(serve, chat_format):
  """A named tool is called: the beginning of the call is forced, and is no sampled token."""

  def policy(text):
    return ToolCall("echo", {"x": 1}) if text.endswith("<|call|>") else Finish("7")

  served = serve(policy)
  refused = served.post([USER], tools=[ECHO, _tool("other")], tool_choice="required")
  assert "no grammar" in refused.json()["error"]["message"]
  none = served.post([USER], tools=[ECHO], tool_choice="none").json()["choices"][0]
  assert none["message"]["content"].startswith("echo {")
  assert "tool_calls" not in none["message"]
  opened = served.session()
  named = {"type": "function", "function": {"name": "echo"}}
  fields = {"tools": [ECHO], "tool_choice": named}
  # The script's next words are no arguments; what counts is where they begin.
  served.post([USER], opened.url, opened.key, **fields)
  trajectory = opened.session.trajectory("t", 0, 0)
  assert chat_format.codec.decode(trajectory.prompt_tokens).endswith("<|call|>echo ")
  assert chat_format.codec.decode(trajectory.steps[0].tokens).startswith("answer")


def test_calls_that_are_under_way_count(chat_format):
  """An agent with many sub-agents at once went past rollout.max_steps."""
  session = Session("s", chat_format, dataclasses.replace(LIMITS, max_steps=2), None)
  requests = [
    parse_request(json.dumps({"messages": [{"role": "user", "content": f"say {k}"}]}).encode())
    for k in range(4)
  ]
  session.ask(requests[0])
  session.dropped()  # its client went away
  asked = [session.ask(request) for request in requests[:2]]
  with pytest.raises(ApiError, match="has made its LLM calls"):
    session.ask(requests[2])
  for ask in asked:
    session.answered(ask, [5], [-0.5], True, "call")
  assert len(session.trajectory("t", 0, 0).steps) == 2


def _tool(name):
  return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def test_a_session_records_what_was_sampled(serve, chat_format):
  """The recorded ids are those of the engine's slot, and each turn has the key of its number."""
  seeds = []
  served = serve(calls_then_answers, everyone=False)
  opened = served.session(seeds=seeds)
  reply = served.post([USER], opened.url, opened.key, tools=[ECHO], temperature=0).json()
  message = reply["choices"][0]["message"]
  result = echo_result(message, "seven" * 20)
  served.post([USER, message, result], opened.url, opened.key, tools=[ECHO])
  t = opened.session.trajectory("t", 3, 5)
  parts = [p for s in t.steps for p in (s.tokens, s.observation_tokens)]
  assert np.concatenate([t.prompt_tokens, *parts]).tolist() in served.engine.seen.values()
  assert (t.status, t.sample, t.policy_version) == (Status.ANSWERED, 3, 5)
  assert seeds == [(0, 0, 0), (0, 1, 0)]
  assert t.steps[0].action == ToolCall("echo", {"x": 1})
  assert "..." in chat_format.codec.decode(t.steps[0].observation_tokens)  # cut as in a rollout


def own(trajectory):
  """The prompts of steps that have one."""
  return [s.prompt_tokens.tolist() for s in trajectory.steps if s.prompt_tokens is not None]


def test_changed_history_opens_a_conversation_of_its_own(serve):
  """Ids that were sampled after one prompt must never be trained on after another."""
  seeds = []
  served = serve(calls_then_answers)
  opened = served.session(limits=dataclasses.replace(LIMITS, max_steps=9), seeds=seeds)
  post = lambda messages: served.post(messages, opened.url, opened.key, tools=[ECHO])  # noqa: E731
  message = post([USER]).json()["choices"][0]["message"]
  assert post([USER]).status_code == 200  # a second draw of the same
  other = {"role": "user", "content": "say eight"}
  assert post([other, message, echo_result(message)]).status_code == 200
  for _ in range(2):
    assert post([USER, message, echo_result(message)]).status_code == 200
  assert seeds == [(0, 0, 0), (1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 1, 1)]
  t = opened.session.trajectory("t", 0, 0)
  assert [len(p.prompt) for p in t.parts] == [len(t.prompt_tokens), *map(len, own(t))]
  assert len(t.steps) == len(t.parts) == 5  # nothing goes on where the call before it ended
  assert own(t)[0] == t.prompt_tokens.tolist()


@pytest.mark.parametrize(
  ("reached", "code", "status"),
  [
    ({"max_steps": 1}, "step_budget", Status.STEP_BUDGET),
    ({"max_tokens": 60}, "context_length_exceeded", Status.TOKEN_BUDGET),
  ],
)
def test_budgets_end_a_session_as_they_end_a_rollout(serve, reached, code, status):
  served = serve(lambda text: ToolCall("echo", {"x": 1}))
  limits = dataclasses.replace(LIMITS, max_observation_chars=400, **reached)
  opened = served.session(limits=limits)
  reply = served.post([USER], opened.url, opened.key, tools=[ECHO]).json()
  message = reply["choices"][0]["message"]
  shown = "seven" * (60 if "max_tokens" in reached else 1)
  messages = [USER, message, echo_result(message, shown)]
  for _ in range(2):
    refused = served.post(messages, opened.url, opened.key, tools=[ECHO])
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)
  t = opened.session.trajectory("t", 0, 0)
  assert t.status is status
  assert t.steps[-1].observation is not None
  assert bool(len(t.steps[-1].observation_tokens)) == (status is Status.STEP_BUDGET)


def test_malformed_turns_are_text_and_say_why(serve):
  """An agent without our field sees an answer; with it, it can go on as a rollout does."""
  served = serve(lambda text: Malformed(""))
  opened = served.session()
  messages = [USER]
  for _ in range(2):
    reply = served.post(messages, opened.url, opened.key, tools=[ECHO]).json()
    message = reply["choices"][0]["message"]
    assert message["content"] == "what"
    assert message["action"]["kind"] == "malformed"
    messages += [message, {"role": "user", "content": "error"}]
  refused = served.post(messages, opened.url, opened.key, tools=[ECHO])
  assert refused.json()["error"]["code"] == "gave_up"
  assert opened.session.trajectory("t", 0, 0).status is Status.GAVE_UP


ASSISTANT = {
  "role": "assistant",
  "tool_calls": [{"id": "c", "type": "function", "function": {"name": "echo", "arguments": "{}"}}],
}
BAD = {
  "no messages": ({"messages": []}, "messages"),
  "an unknown role": ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role"),
  "a picture": (
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    "messages[0].content[0]",
  ),
  "a result without a call": (
    {"messages": [USER, {"role": "tool", "tool_call_id": "c", "content": "7"}]},
    "messages[1].tool_call_id",
  ),
  "a call without a result": ({"messages": [USER, ASSISTANT, USER]}, "messages[2]"),
  "nothing to answer": ({"messages": [USER, {"role": "assistant", "content": "7"}]}, "messages"),
  "no user": ({"messages": [ASSISTANT, USER]}, "messages[1]"),
  "arguments that are no JSON": (
    {
      "messages": [
        USER,
        {
          "role": "assistant",
          "tool_calls": [{"id": "c", "function": {"name": "e", "arguments": "{"}}],
        },
      ]
    },
    "messages[1].tool_calls[0].function.arguments",
  ),
  "two choices": ({"n": 2}, "n"),
  "a temperature": ({"temperature": -1}, "temperature"),
  "max_tokens 0": ({"max_tokens": 0}, "max_tokens"),
  "a nucleus": ({"top_p": 0.5}, "top_p"),
  "top_logprobs": ({"logprobs": True, "top_logprobs": 3}, "top_logprobs"),
  "a penalty": ({"presence_penalty": 1}, "presence_penalty"),
  "a grammar": ({"response_format": {"type": "json_object"}}, "response_format"),
  "old functions": ({"functions": [{}]}, "functions"),
  "an unknown tool": (
    {"tools": [ECHO], "tool_choice": {"type": "function", "function": {"name": "x"}}},
    "tool_choice",
  ),
  "a broken tool": ({"tools": [{"type": "function"}]}, "tools[0]"),
  "two tools of one name": ({"tools": [ECHO, ECHO]}, "messages"),
  "an empty stop": ({"stop": [""]}, "stop"),
}


def test_a_quick_client_is_back_before_the_next_round(chat_format, monkeypatch):
  """Others sample on. Whose turn has just ended is waited for a moment, as its next turn would else
  wait for a whole round; who stays away longer costs nobody a second moment."""
  monkeypatch.setattr(decoding, "_QUICK_SHARE", 1000.0)
  monkeypatch.setattr(decoding, "_QUICK_S", 5.0)
  policy = lambda text: Finish("7" * 30 if "long" in text else "7")  # noqa: E731
  engine = Slow(chat_format, policy, chunk=1)
  engine.pause = 0.01
  decoder, rounds, decode = Decoder(engine, None, chat_format.stop_ids), [], engine.decode
  engine.decode = lambda *args: rounds.append(len(args[2])) or decode(*args)

  def turn(query, owner):
    ids = chat_format.prompt(None, (), query)
    return decoding.Turn(ids, 99, np.zeros(2, np.uint32), 1.0, owner)

  def until_done(asked):
    decoder.submit(asked)
    while not asked.future.done():
      decoder.step(0.0)

  decoder.submit(turn("long", "b"))
  until_done(turn("short", "a"))
  rounds.clear()
  threading.Timer(0.05, decoder.submit, [turn("short again", "a")]).start()
  decoder.step(0.0)
  assert rounds == [2]
  monkeypatch.setattr(decoding, "_QUICK_S", 0.05)
  until_done(turn("short", "a"))  # there is room for two: it comes after the one before
  for _ in range(2):
    started = time.monotonic()
    decoder.step(0.0)
    waited = time.monotonic() - started
  assert rounds[-2:] == [1, 1]
  assert waited < 0.045, "who has not come back is waited for again"


@pytest.fixture(scope="module")
def standing(chat_format):
  """One server for what is refused before anything is sampled."""
  engine = fakes.ScriptedEngine(chat_format, calls_then_answers, size=300)
  decoder = Decoder(engine, None, chat_format.stop_ids)
  with PolicyServer(decoder, chat_format, everyone=True, name="tiny") as server:
    yield server


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_answered_with_its_field(standing, name):
  fields, param = BAD[name]
  reply = httpx.post(f"{standing.url}/chat/completions", json={"messages": [USER]} | fields)
  assert reply.status_code == 400
  error = reply.json()["error"]
  assert error["type"] == "invalid_request_error"
  assert error["param"] == param
  assert error["message"]


def test_bodies_that_are_no_request(standing):
  url = f"{standing.url}/chat/completions"
  deep = "[" * 100_000
  for body in (b"{", b"[]", b"\xff", deep.encode()):
    reply = httpx.post(url, content=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, None)
  large = json.dumps({"messages": [{"role": "user", "content": "x" * 10_000_000}]})
  reply = httpx.post(url, content=large, timeout=30)
  assert (reply.status_code, reply.json()["error"]["type"]) == (413, "invalid_request_error")
  started = time.monotonic()
  reply = httpx.post(url, json={"messages": [{"role": "user", "content": "x " * 3_000_000}]})
  assert reply.json()["error"]["code"] == "context_length_exceeded"
  assert time.monotonic() - started < 5  # it is not tokenized first
  assert httpx.get(url).status_code == 405
  assert httpx.get(f"{standing.url}/nothing").json()["error"]["type"] == "invalid_request_error"
  reply = httpx.post(url, json={"messages": [USER]}, headers={"Origin": "http://evil"})
  assert (reply.status_code, reply.json()["error"]["type"]) == (403, "permission_error")


def test_models_and_keys(serve):
  """A session's key opens its own path, and nobody else's."""
  served = serve(calls_then_answers, everyone=False)
  one, two = served.session("one"), served.session("two")
  assert served.post([USER]).status_code == 401
  assert served.post([USER], one.url, two.key).status_code == 401
  assert served.post([USER], one.url, one.key, tools=[ECHO]).status_code == 200
  assert served.post([USER], "", two.key, tools=[ECHO]).status_code == 200  # found by its key
  assert len(two.session.last.steps) == 1
  with served.client(Authorization=f"Bearer {one.key}") as client:
    assert [m["id"] for m in client.get("models").json()["data"]] == ["tiny"]
    assert client.get("models/other").status_code == 404
  served.server.close_session(one)
  gone = served.post([USER], one.url, one.key)
  assert (gone.status_code, gone.json()["error"]["code"]) == (404, "no_session")


def test_a_client_that_goes_away_frees_its_slot(serve):
  """Else a server whose clients time out is full of turns that nobody waits for."""
  long = " ".join(
    map(str, range(60))
  )  # on a busy machine, too, it is not done when the client goes
  served = serve(lambda text: Finish("one" if "next" in text else long), slots=1, pause=0.2)
  for stream in (True, False):
    with served.client() as client, contextlib.suppress(httpx.TimeoutException):
      request = {"messages": [USER], "stream": stream}
      with client.stream("POST", "chat/completions", json=request, timeout=1) as reply:
        next(reply.iter_lines())
        time.sleep(0.2)
    until = time.monotonic() + 5
    while served.decoder.busy and time.monotonic() < until:
      time.sleep(0.01)
    assert not served.decoder.busy
    assert served.engine.todo[0]  # the turn was left where it was
  assert served.post([{"role": "user", "content": "next"}]).status_code == 200


def test_more_conversations_than_slots(serve):
  """Slots are lent by the turn: a conversation that lost its slot goes on in another one."""
  served = serve(calls_then_answers, slots=2)

  def converse(k):
    user = {"role": "user", "content": f"say {k}"}
    message = served.post([user], tools=[ECHO]).json()["choices"][0]["message"]
    time.sleep(0.01 * (k % 3))
    reply = served.post([user, message, echo_result(message)], tools=[ECHO]).json()
    return reply["choices"][0]["message"]["content"]

  with concurrent.futures.ThreadPoolExecutor(7) as pool:
    assert list(pool.map(converse, range(7))) == ["7"] * 7
  for context, ids in served.engine.turns:
    text = served.engine.format.codec.decode(context)
    assert text.count("<|task|>") == 1
    assert ids


def test_a_shared_prompt_is_computed_once(serve):
  """Samples of one task come at the same time; each pays for its own tokens only."""
  served = serve(calls_then_answers, slots=4)
  user = {"role": "user", "content": "a long question " * 10}
  opened = [served.session(str(k)) for k in range(4)]
  for one in opened:
    served.decoder.expect(one.session.name)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda o: served.post([user], o.url, o.key, tools=[ECHO]), opened))
  lengths = [len(o.session.last.prompt) for o in opened]
  assert served.engine.forced == lengths[0]


def test_what_breaks_is_said(serve):
  """Log-probs that are not finite end in an error, never in an answer to train on."""
  served = serve(calls_then_answers)
  whole = served.engine.decode

  def broken(*args):
    state, decoded = whole(*args)
    return state, decoded._replace(logprobs=decoded.logprobs * np.nan)

  served.engine.decode = broken
  opened = served.session()
  reply = served.post([USER], opened.url, opened.key, tools=[ECHO])
  assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
  assert opened.session.last is None
