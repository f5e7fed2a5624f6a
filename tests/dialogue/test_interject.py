"""A user's turn between an observation and the model's turn, and whole system texts."""

import dataclasses

import pytest

from steptool_jax.dialogue import template
from steptool_jax.types import ToolSpec

KINDS = ("toolllama", "chatml_react", "llama31", "hermes", "hermes3", "compact")
F = ToolSpec("f", "does f", {"type": "object", "properties": {}})

BETWEEN = {
  "toolllama": "\nFunction: seen\nUser: choose </s> again\nAssistant:\n",
  "chatml_react": "\n<|im_start|>function\nseen<|im_end|>\n<|im_start|>user\nchoose </s> again"
  "<|im_end|>\n<|im_start|>assistant\n",
  "llama31": "<|start_header_id|>function<|end_header_id|>\n\nseen<|eot_id|><|start_header_id|>user"
  "<|end_header_id|>\n\nchoose </s> again<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
  "\n\n",
  "hermes": "\n<|im_start|>user\n<tool_response>\nseen\n</tool_response><|im_end|>\n"
  "<|im_start|>user\nchoose </s> again<|im_end|>\n<|im_start|>assistant\n",
  "compact": "<|result|>seen<|result|>choose </s> again<|call|>",
}
BETWEEN["hermes3"] = BETWEEN["hermes"]


def format_of(codecs, kind):
  return template.get_format(kind.removesuffix("3"), codecs[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_users_turn_goes_in_front_of_the_header(codecs, kind):
  fmt = format_of(codecs, kind)
  shown = fmt.observation("seen")
  cut, ids = fmt.interject(shown, "choose </s> again")
  assert 0 < cut < len(shown)
  assert fmt.codec.decode([*shown[: len(shown) - cut], *ids]) == BETWEEN[kind]
  # The header that is taken back is the one that the inserted ids end with.
  assert ids[-cut:].tolist() == shown[-cut:].tolist()
  if kind == "toolllama":  # "</s>" in the text is no control id
    assert fmt.codec.eos_id not in ids.tolist()
  prompt = fmt.prompt(None, (F,), "q")
  assert fmt.interject(prompt, "x")[0] == cut


def test_a_header_that_is_glued_to_the_text_closes_an_empty_turn(codecs):
  """This tokenizer merges two line ends: the header is no suffix of the prompt's ids."""
  toolllama = format_of(codecs, "toolllama")
  glued = dataclasses.replace(
    toolllama,
    codec=codecs["chatml_react"],
    stop_ids=(codecs["chatml_react"].token_id("<|im_end|>"),),
  )
  shown = glued.codec.join(["Begin!\n\nAssistant:\n"])
  cut, ids = glued.interject(shown, "again")
  assert cut == 0
  assert glued.codec.decode([*shown, *ids]) == (
    "Begin!\n\nAssistant:\n<|im_end|>\nUser: again\nAssistant:\n"
  )


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_system_text_is_taken_as_it_is_where_tools_are_text(codecs, kind):
  fmt = format_of(codecs, kind)
  text = fmt.codec.decode(fmt.prompt("Mine.", (F,), "q", whole="All of it."))
  if kind in ("toolllama", "chatml_react", "llama31"):
    assert "All of it." in text
    assert "does f" not in text
  else:
    assert text == fmt.codec.decode(fmt.prompt("Mine.", (F,), "q"))
