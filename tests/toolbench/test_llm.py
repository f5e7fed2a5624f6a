import dataclasses
import http.server
import json
import threading

import pytest

from steptool_jax.simulators import endpoint
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.toolbench.simulators.llm import MIRROR_PROMPT, LlmSimulator, parse_reply
from steptool_jax.toolbench.simulators.virtual import NOT_PARSED, VirtualRequest, VirtualResponse

DOCUMENTATION = {
  "api_name": "Songkick Artist",
  "api_description": "Artist info",
  "required_parameters": [{"name": "artist_id", "type": "STRING"}],
  "optional_parameters": [],
  "tool_description": "Music and sports",
}
REQUEST = VirtualRequest(
  "Data", "TheClique", "Songkick artist", {"artist_id": "Zoë", "n": 1}, documentation=DOCUMENTATION
)
GOOD = '{"error": "", "response": {"name": "Zoë"}}'


@dataclasses.dataclass
class Reply:
  text: str


class Endpoint:
  """Replies by script and keeps what it was asked."""

  def __init__(self, *texts):
    self.texts, self.asked = list(texts), []

  def chat(self, messages, *, accept, **settings):
    self.asked.append((messages, settings))
    reply = Reply(self.texts.pop(0))
    accept(reply)
    return reply


def test_gpt_style_shows_documentation_examples_and_input_in_json_mode():
  model = Endpoint(GOOD)
  examples = [("{'artist_id': 'a'}", {"error": "", "response": "A"})]
  simulator = LlmSimulator(model, examples=lambda request: examples)
  assert simulator.answer(REQUEST) == VirtualResponse("", {"name": "Zoë"})
  ((messages, settings),) = model.asked
  assert settings == {"json_mode": True, "max_tokens": 1024, "sample": 0}
  assert [m["role"] for m in messages] == ["system", "user"]
  user = messages[1]["content"]
  assert json.dumps(DOCUMENTATION) in user
  assert str(examples) in user
  assert '{"artist_id": "Zoë", "n": 1}' in user


def test_examples_are_at_most_five_and_2048_characters():
  def shown(examples):
    model = Endpoint(GOOD)
    LlmSimulator(model, examples=lambda request: examples).answer(REQUEST)
    user = model.asked[0][0][1]["content"]
    return user.split("Recorded answers: ")[1].split("\nInput:")[0]

  def example(i, size):
    return (f"key{i}", {"error": "", "response": "x" * size})

  short = shown([example(i, 10) for i in range(8)])
  assert "key4" in short
  assert "key5" not in short
  medium = shown([example(i, 700) for i in range(5)])
  assert "key1" in medium
  assert "key2" not in medium  # whole ones, as long as they fit
  assert medium.endswith("]")
  assert len(shown([example(0, 9000)])) == 2048


BAD = {
  "prose": "The artist is Zoë.",
  "cut off": '{"error": "", "response": "Zo',
  "a list": "[1]",
  "no error field": '{"response": "x"}',
  "nothing": '{"error": "", "response": ""}',
  "wrong type": '{"error": 5, "response": "x"}',
  "empty": "",
  "deep": "[" * 100_000,
}


@pytest.mark.parametrize("kind", BAD)
def test_a_reply_that_is_no_answer_is_asked_again_with_the_reason(kind):
  model = Endpoint(BAD[kind], BAD[kind], GOOD)
  assert LlmSimulator(model).answer(REQUEST).response == {"name": "Zoë"}
  assert [settings["sample"] for _, settings in model.asked] == [0, 1, 2]
  first, second, third = (messages for messages, _ in model.asked)
  assert len(first) == 2
  assert second[:2] == third[:2] == first
  assert len(second) == len(third) == 4  # the last bad reply only
  assert second[3]["role"] == "user"
  assert "That reply" in second[3]["content"]


@pytest.mark.parametrize("style", ["gpt", "mirror"])
def test_three_bad_replies_are_infrastructure(style):
  model = Endpoint(*[BAD["prose"]] * 4)
  with pytest.raises(InfrastructureError, match=r"Songkick artist.*3 attempts.*not JSON"):
    LlmSimulator(model, style).answer(REQUEST)
  assert len(model.asked) == 3


def test_an_endpoint_that_fails_is_not_asked_again():
  class Down:
    calls = 0

    def chat(self, messages, **settings):
      self.calls += 1
      raise InfrastructureError("no route")

  down = Down()
  with pytest.raises(InfrastructureError, match="no route"):
    LlmSimulator(down).answer(REQUEST)
  assert down.calls == 1  # it has retried already


def test_with_a_real_endpoint_only_valid_replies_are_kept(tmp_path):
  texts = [BAD["prose"], BAD["cut off"], BAD["prose"], GOOD]
  bodies = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
      message = {"role": "assistant", "content": texts[len(bodies) - 1]}
      usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
      reply = json.dumps({"choices": [{"index": 0, "message": message}], "usage": usage}).encode()
      self.send_response(200)
      self.send_header("Content-Length", str(len(reply)))
      self.end_headers()
      self.wfile.write(reply)

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    simulator = LlmSimulator(endpoint.Endpoint(url, "m", cache_dir=tmp_path))
    with pytest.raises(InfrastructureError, match="3 attempts"):
      simulator.answer(REQUEST)
    # A later run asks anew: the three bad replies are not replayed from the endpoint's cache.
    for _ in range(2):
      assert simulator.answer(REQUEST) == VirtualResponse("", {"name": "Zoë"})
      assert len(bodies) == 4
    server.shutdown()


def test_mirror_style_prints_the_form_that_the_model_was_trained_on():
  model = Endpoint(GOOD)
  simulator = LlmSimulator(model, "mirror")
  keyed = dataclasses.replace(REQUEST, tool_input='{"artist_id": "a", "toolbench_key": "k"}')
  assert simulator.answer(keyed).response == {"name": "Zoë"}
  ((messages, settings),) = model.asked
  assert messages[0] == {"role": "system", "content": MIRROR_PROMPT}
  assert messages[1]["content"] == (
    "API doc:\n"
    "{'api_name': 'songkick_artist', 'api_description': 'Artist info', "
    "'required_parameters': [{'name': 'artist_id', 'type': 'STRING'}], "
    "'optional_parameters': [], 'tool_description': 'Music and sports', "
    "'tool_name': 'theclique', 'tool_category': 'Data'}\n\n"
    "Request:\n{'artist_id': 'a'}"
  )
  assert settings["json_mode"] is False
  assert settings["max_tokens"] == 2048


def test_mirror_style_knows_nothing_without_documentation():
  undocumented = dataclasses.replace(REQUEST, documentation=None)
  assert LlmSimulator(Endpoint(), "mirror").answer(undocumented) is None
  assert LlmSimulator(Endpoint(GOOD)).answer(undocumented).response == {"name": "Zoë"}


def test_input_that_is_no_object_costs_no_call():
  model = Endpoint()
  bad = dataclasses.replace(REQUEST, tool_input="prose")
  assert LlmSimulator(model).answer(bad) == NOT_PARSED
  assert not model.asked


def test_fences_and_loose_quotes():
  assert parse_reply(f"```json\n{GOOD}\n```").response == {"name": "Zoë"}
  loose = '{\n "error": "",\n "response": "{"status": 0, "langs": ["en"]}" \n}'
  assert parse_reply(loose, lenient=True) == VirtualResponse("", '{"status": 0, "langs": ["en"]}')
  failed = '{"error": "bad \\"id\\"", "response": "a "b" c"}'
  assert parse_reply(failed, lenient=True) == VirtualResponse('bad "id"', 'a "b" c')
  with pytest.raises(ValueError, match="not JSON"):
    parse_reply(loose)
  inside = '{"error": "", "response": "{"langs": [{"id": "en"}'
  for cut in (loose[:-3], loose[:40], '{"error": "", "response": "}', inside):
    with pytest.raises(ValueError, match="not JSON"):
      parse_reply(cut, lenient=True)


def test_bad_settings():
  with pytest.raises(ValueError, match="use gpt or mirror"):
    LlmSimulator(Endpoint(), "claude")
  with pytest.raises(ValueError, match="uses no examples"):
    LlmSimulator(Endpoint(), "mirror", examples=lambda request: [])
