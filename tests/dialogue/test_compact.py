import json
import subprocess
import sys

import pytest

from steptool_jax.dialogue import compact
from steptool_jax.dialogue.codec import Codec
from steptool_jax.dialogue.template import get_format
from steptool_jax.types import Finish, Task, ToolCall, ToolSpec

CORPUS = [
  "Which orders did Mira Tol place in 2021?",
  "find_customer(name)\n",
  'find_customer {"name":"Mira Tol"}',
  '{"id": 17, "name": "Mira Tol", "city": "Oslo"}',
] * 10


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
  return Codec.load(compact.build_tokenizer(CORPUS, 360, tmp_path_factory.mktemp("compact")))


def test_controls_come_first_and_pad_is_zero(codec):
  assert [codec.token_id(name) for name in compact.SPECIALS] == [0, 1, 2, 3, 4, 5]
  assert (codec.pad_id, codec.eos_id, codec.bos_id) == (0, 1, None)


def test_names_and_digits_have_the_same_ids_wherever_they_stand(codec):
  # What a tiny model must copy has one spelling: after a space, a quote or at the start.
  for word in ("Mira", "orders", "zq"):
    ids = codec.encode(word)
    for before in (" ", '"', "(", "x ", "\n", "7"):
      assert codec.encode(before + word)[-len(ids) :] == ids
  digits = [codec.encode(digit)[0] for digit in "2021"]
  for text in ("2021", " 2021", '"2021', "C-2021"):
    assert codec.encode(text)[-4:] == digits
  assert codec.encode("2021") == digits


def test_a_tool_name_in_the_list_and_in_a_call_is_the_same(codec):
  name = codec.encode("find_customer")
  assert codec.encode("find_customer(name)\n")[: len(name)] == name
  assert codec.encode('find_customer {"a":1}')[: len(name)] == name


def test_building_is_deterministic_across_processes(tmp_path):
  program = (
    "import sys, json; from steptool_jax.dialogue import compact;"
    "compact.build_tokenizer(json.loads(sys.argv[1]), 360, sys.argv[2])"
  )
  for name in ("a", "b"):
    command = [sys.executable, "-c", program, json.dumps(CORPUS), str(tmp_path / name)]
    subprocess.run(command, check=True)
  for file in ("tokenizer.json", "tokenizer_config.json"):
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_transformers_opens_it_and_decodes_alike(codec):
  transformers = pytest.importorskip("transformers")
  hf = transformers.AutoTokenizer.from_pretrained(str(codec.directory))
  assert (hf.pad_token_id, hf.eos_token_id, len(hf)) == (0, 1, codec.vocab_size)
  text = 'find_customer {"name":"Mira Tol é漢"}\n  x'
  assert hf(text, add_special_tokens=False).input_ids == codec.encode(text)
  assert hf.decode(codec.encode(text)) == text


def test_rare_words_get_no_token_of_their_own(tmp_path):
  # Names are data: those of the training tasks must not be spelled otherwise than held-out ones.
  corpus = ["which city"] * 2000 + ["mira"] * 19
  codec = Codec.load(compact.build_tokenizer(corpus, 400, tmp_path, min_share=0.01))
  assert len(codec.encode("which")) == 1
  assert len(codec.encode("mira")) == 4
  codec = Codec.load(compact.build_tokenizer(corpus, 400, tmp_path, min_share=0.001))
  assert len(codec.encode("mira")) == 1


def test_any_bytes_are_covered_by_the_smallest_vocabulary(tmp_path):
  codec = Codec.load(compact.build_tokenizer([], 262, tmp_path))
  assert codec.vocab_size == 262
  text = "é漢🙂\x00\u2028"
  assert codec.decode(codec.encode(text)) == text
  with pytest.raises(ValueError, match="262"):
    compact.build_tokenizer([], 261, tmp_path)


def test_signature_marks_optional_arguments():
  schema = {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["b"]}
  assert compact.signature(ToolSpec("f", "long text", schema)) == "f(a?,b)"
  assert compact.signature(ToolSpec("f", "", {"type": "object"})) == "f()"


def test_task_texts_are_what_the_conversation_will_contain(codec):
  tool = ToolSpec("f", "", {"type": "object", "properties": {"a": {}}, "required": ["a"]})
  demonstration = (ToolCall("f", {"a": 1}, "dropped"), Finish("7"))
  task = Task("t", "e", "Query?", (tool,), {}, demonstration)
  assert list(compact.task_texts(task)) == ["Query?", "f(a)\n", 'f {"a":1}', "answer 7"]
  fmt = get_format("compact", codec)
  assert fmt.parse(fmt.render_action(demonstration[0])) == ToolCall("f", {"a": 1})


def test_a_vocabulary_without_room_for_bytes_and_controls_is_refused(tmp_path):
  with pytest.raises(ValueError, match="at least 262"):
    compact.build_tokenizer(CORPUS, 261, tmp_path)
