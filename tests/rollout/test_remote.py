"""Rollouts on vLLM servers: what is sent, and what is refused. The servers are fakes."""

import dataclasses
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fakes
import numpy as np
import pytest

from steptool_jax import validation
from steptool_jax.config import base_config
from steptool_jax.rollout import remote
from steptool_jax.run.parts import build
from steptool_jax.run.parts import remote as parts_remote
from steptool_jax.simulators.errors import InfrastructureError

STOP = 9
LABEL = "steptool-1"


def choice(ids, label=LABEL, **changes):
  content = [{"token_id": i, "logprob": -0.5 * k, "top_logprobs": []} for k, i in enumerate(ids)]
  found = {
    "token_ids": ids,
    "logprobs": {"content": content},
    "weight_versions": [{"version": label, "start": 0, "end": len(ids)}],
  }
  return found | changes


class Vllm:
  """A server that speaks vLLM's protocol: says `turn(ids)`, keeps what it was asked."""

  def __init__(self, turn=lambda ids: [len(ids) % 5 + 1, STOP]):
    self.turn, self.label, self.asked = turn, "base", []
    self.break_with = None  # a status, where it is to sample
    self.down = False
    self.restart_before = None  # forgets its weights before this request
    self.lock = threading.Lock()
    fake = self

    class Handler(BaseHTTPRequestHandler):
      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        status, reply = fake.answer(self.path, body)
        said = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

      def log_message(self, *_):
        pass

    self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=self.http.serve_forever, daemon=True).start()
    self.address = f"http://127.0.0.1:{self.http.server_port}"

  def answer(self, path, body):
    with self.lock:
      self.asked.append((path, body))
      if self.down:
        return 503, {"error": "down"}
      if path == "/update_weight_version":
        self.label = body["new_version"]
      if path != "/inference/v1/generate":
        return 200, {"results": [None]}
      if self.restart_before is not None and len(self.of(path)) == self.restart_before:
        self.label = "base"
        if "model" in body:
          return 404, {"error": "The model `policy` does not exist."}
      if self.break_with:
        return self.break_with, {"error": "x"}
      return 200, {"choices": [choice(self.turn(body["token_ids"]), self.label)]}

  def of(self, path):
    return [body for where, body in self.asked if where == path]

  def close(self):
    self.http.shutdown()
    self.http.server_close()


@pytest.fixture
def servers():
  made = []

  def make(**options):
    made.append(Vllm(**options))
    return made[-1]

  yield make
  for server in made:
    server.close()


def engine(*fakes, published=None, **options):
  clients = [remote.Server(f.address, key="", timeout_s=5, in_flight=8) for f in fakes]
  for client in clients:
    for poster in client._posters.values():
      poster._patience = remote.Patience(1, 0.01, 0.01, 0.01)
  publish = lambda variables: (published.append(1) if published is not None else None) or "/w"  # noqa: E731
  return remote.HttpEngine(clients, publish, remote.Sampling(50), slots=4, size=64, **options)


def weights():
  return {"params": {"a": np.zeros(2)}}


def decode(eng, state, limits, variables=None, temperature=1.0):
  seeds = {slot: np.array([slot, 7], np.uint32) for slot in limits}
  return eng.decode(variables, state, limits, seeds, (STOP,), temperature)


def test_a_turn_is_what_the_server_sampled_after_all_ids_of_the_slot(servers):
  """Append, decode, fork and rewind move lists of ids; each request has the whole history."""
  fake = servers()
  eng = engine(fake)
  v = eng.lay_out(weights())
  state = eng.append(v, eng.init(), {0: np.array([1, 2, 3], np.int32)})
  state = eng.rewind(eng.fork(state, {2: 0}), {2: 2})
  state, out = decode(eng, state, {0: 5, 2: 6})
  assert out.tokens[0, :2].tolist() == [4, STOP]
  assert out.tokens[2, :2].tolist() == [3, STOP]
  assert out.logprobs[0, :2].tolist() == [0.0, -0.5]
  assert out.count.tolist() == [2, 0, 2, 0]
  assert out.stopped.tolist() == [True, False, True, False]
  assert state[0] == [1, 2, 3, 4, STOP]
  asked = sorted(fake.of("/inference/v1/generate"), key=lambda b: len(b["token_ids"]))
  assert [body["token_ids"] for body in asked] == [[1, 2], [1, 2, 3]]
  p = asked[1]["sampling_params"]
  assert (p["max_tokens"], p["temperature"], p["stop_token_ids"]) == (5, 1.0, [STOP])
  assert (p["logprobs"], p["ignore_eos"], p["detokenize"]) == (0, True, False)
  assert asked[0]["sampling_params"]["seed"] != p["seed"]
  eng.close()


def test_weights_go_out_once_for_each_update(servers):
  """To every server, with the cache dropped and the version said; not again for an evaluation."""
  fakes, published = (servers(), servers()), []
  eng = engine(*fakes, published=published)
  first = weights()
  eng.lay_out(first)
  eng.lay_out(first)
  eng.lay_out(weights())
  assert len(published) == 2
  for fake in fakes:
    paths = [path for path, _ in fake.asked]
    assert paths == ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version"] * 2
    assert fake.of("/collective_rpc")[0]["kwargs"] == {"weights_path": "/w"}
  labels = {fake.label for fake in fakes}
  assert len(labels) == 1
  assert re.fullmatch(r"steptool-\w{8}-2", labels.pop())
  eng.close()


def test_an_adapter_is_loaded_and_sampled_from(servers):
  fake = servers()
  eng = engine(fake, adapter=True)
  v = eng.lay_out(weights())
  (loaded,) = fake.of("/v1/load_lora_adapter")
  assert loaded["load_inplace"]
  state = eng.append(v, eng.init(), {0: np.array([1], np.int32)})
  decode(eng, state, {0: 5})
  assert fake.of("/inference/v1/generate")[0]["model"] == loaded["lora_name"]
  eng.close()


def test_a_server_that_forgot_its_weights_gets_them_again(servers):
  """A restart in the middle: its answer is thrown away, the turn asked for again."""
  fake = servers()
  eng = engine(fake)
  v = eng.lay_out(weights())
  state = eng.append(v, eng.init(), {0: np.array([1], np.int32)})
  fake.restart_before = 1
  _, out = decode(eng, state, {0: 5})
  assert out.count[0] == 2
  assert len(fake.of("/collective_rpc")) == 2
  assert len(fake.of("/inference/v1/generate")) == 2
  eng.close()


def test_a_server_that_forgot_its_adapter_gets_it_again(servers):
  fake = servers()
  eng = engine(fake, adapter=True)
  v = eng.lay_out(weights())
  state = eng.append(v, eng.init(), {0: np.array([1], np.int32)})
  fake.restart_before = 1
  _, out = decode(eng, state, {0: 5})
  assert out.count[0] == 2
  assert len(fake.of("/v1/load_lora_adapter")) == 2
  eng.close()


def test_a_server_that_is_down_is_passed_over(servers):
  bad, good = servers(), servers()
  eng = engine(bad, good)
  v = eng.lay_out(weights())
  state = eng.append(v, eng.init(), {0: np.array([1], np.int32), 1: np.array([2], np.int32)})
  bad.break_with = 503
  _, out = decode(eng, state, {0: 5, 1: 5})
  assert out.count.tolist() == [2, 2, 0, 0]
  good.break_with = 400
  with pytest.raises(InfrastructureError, match=r"none samples; .*status 503.*status 400"):
    decode(eng, state, {0: 5})
  eng.close()


def test_a_server_that_is_down_when_weights_go_out_gets_them_when_it_is_back(servers):
  """What it has then may be another run's, of the same number; it must not be sampled from."""
  earlier, late, good = engine(), servers(), servers()
  earlier._version = 1
  eng = engine(late, good)
  late.label, late.down = earlier._label, True
  v = eng.lay_out(weights())
  late.down = False
  state = eng.append(v, eng.init(), {0: np.array([1], np.int32)})
  _, out = decode(eng, state, {0: 5})
  assert out.count[0] == 2
  assert late.label == good.label != earlier._label
  late.down = good.down = True
  with pytest.raises(InfrastructureError, match=r"none takes weights; .*503.*; .*503"):
    eng.lay_out(weights())
  eng.close()
  earlier.close()


@pytest.mark.parametrize(
  ("wrong", "reason"),
  [
    ({"token_ids": [99, STOP]}, "beyond the vocabulary"),
    ({"token_ids": [True, STOP]}, "beyond the vocabulary"),
    ({"token_ids": [1, 2, 3, 4, 5, STOP]}, "more than 5"),
    ({"token_ids": [2, STOP]}, "of other ids"),
    ({"token_ids": []}, "without token_ids"),
    ({"logprobs": None}, "without token_ids or without"),
    ({"weight_versions": None}, "without a label"),
    ({"weight_versions": [{"version": LABEL}, {"version": "base"}]}, "weights .*base"),
  ],
)
def test_what_was_not_sampled_is_refused(wrong, reason):
  with pytest.raises(remote.Wrong, match=reason):
    remote.read_choice(choice([1, STOP]) | wrong, LABEL, 5, (STOP,), 50)


@pytest.mark.parametrize(
  ("ids", "reason"),
  [([1, STOP, 2], "ends neither"), ([1, 2], "ends neither"), ([STOP, STOP], "ends neither")],
)
def test_a_turn_ends_at_its_stop_token_or_with_its_budget(ids, reason):
  with pytest.raises(remote.Wrong, match=reason):
    remote.read_choice(choice(ids), LABEL, 5, (STOP,), 50)
  assert remote.read_choice(choice([1, 2, 3, 4, 5]), LABEL, 5, (STOP,), 50)[0] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("logprob", [0.5, float("nan"), None, float("-inf")])
def test_log_probs_that_are_none(logprob):
  found = choice([STOP])
  found["logprobs"]["content"][0]["logprob"] = logprob
  with pytest.raises(remote.Wrong, match="log-probs that are none"):
    remote.read_choice(found, LABEL, 5, (STOP,), 50)


def test_a_gap_stops_before_anything_is_learnt():
  remote.refuse_gap(0.9, 1.0)
  remote.refuse_gap(9.0, 0.0)
  for gap in (1.1, float("nan")):
    with pytest.raises(RuntimeError, match=r"rollout.http.gap is 1"):
      remote.refuse_gap(gap, 1.0)


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({}, "rollout.http.servers: empty"),
    ({"servers": ("localhost:8000",)}, "rollout.http.servers"),
    ({"servers": ("http://u:p@h:1",)}, "a user name or a password"),
    ({"servers": ("http://h:1",), "weights": "adapter"}, "use 'reload'"),
    ({"servers": ("http://h:1",), "weights": "adaptor"}, "adapter"),
    ({"servers": ("http://h:1",), "kv_cache": "int8"}, r"rollout\.kv_cache: 'int8' .* to 'auto'"),
  ],
)
def test_a_config_that_cannot_work_is_refused(changes, reason):
  config = base_config()
  config.rollout.engine = "http"
  config.rollout.kv_cache = changes.pop("kv_cache", "auto")
  config.rollout.http.update(changes)
  with pytest.raises(ValueError, match=reason):
    validation.validate(config)


def test_a_head_that_servers_would_not_reload_is_refused(tmp_path):
  """vLLM kept a tied head as it was: log-probs were up to .3 nats off, and ever more so."""
  config = base_config()
  config.rollout.engine, config.rollout.http.servers = "http", ("http://h:1",)
  checked = validation.validate(config)
  tied = build.Policy(fakes.tiny_config(tie_embeddings=True), None, None, None, None, {})
  with (
    pytest.raises(ValueError, match=r"leaves such a head as it was.*lora\.rank=16"),
    parts_remote.opened(checked, tied, None, tmp_path),
  ):
    pass
  untied = dataclasses.replace(tied, model=fakes.tiny_config(tie_embeddings=False))
  with parts_remote.opened(checked, untied, None, tmp_path) as engine:
    assert engine.slots == config.rollout.slots


def test_the_address_is_in_the_error_and_the_key_is_not(servers):
  fake = servers()
  fake.break_with = 401
  client = remote.Server(fake.address, key="secret-key-1", timeout_s=5, in_flight=1)
  with pytest.raises(InfrastructureError, match=re.escape(fake.address)) as error:
    client.generate({"token_ids": [1]})
  assert "secret-key-1" not in str(error.value)
