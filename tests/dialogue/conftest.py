"""Small tokenizers of every family, with the real families' special tokens; no network."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from steptool_jax.dialogue import compact
from steptool_jax.dialogue.codec import Codec

QWEN2 = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOOL_TAGS = ("<tool_call>", "</tool_call>")
QWEN3_TAGS = (*TOOL_TAGS, "<tool_response>", "</tool_response>", "<think>", "</think>")
LLAMA31 = (
  "<|begin_of_text|>",
  "<|end_of_text|>",
  "<|start_header_id|>",
  "<|end_header_id|>",
  "<|eom_id|>",
  "<|eot_id|>",
)

# The published ChatML and Hermes layouts, as far as the tests need them.
CHATML_TEMPLATE = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HERMES_TEMPLATE = (
  "{% for m in messages %}"
  "{% if m.role == 'system' %}{{ '<|im_start|>system\n' + m.content }}"
  "{{ '\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
  "You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}"
  "{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}"
  "{{ '\n</tools>\n\nFor each function call, return a json object with function name and arguments"
  ' within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments":'
  " <args-json-object>}\n</tool_call><|im_end|>\n' }}"
  "{% elif m.role == 'tool' %}"
  "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
  "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA31_TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}"
  "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}"
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<image_soft_token>")
# As published: two roles, contents trimmed, the system text at the head of the first turn.
GEMMA_TEMPLATE = (
  "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
  "{%- set prefix = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}"
  "{%- else -%}{%- set prefix = '' -%}{%- set rest = messages -%}{%- endif -%}"
  "{%- for m in rest -%}"
  "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
  "{{ prefix if loop.first else '' }}{{ m['content'] | trim }}{{ '<end_of_turn>\n' }}"
  "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


# How Llama-3 and Qwen split text.
WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(out, specials=(), tags=(), template=None, bos=None, eos=None):
  """A tokenizer over bytes with a few merges, written as a Hugging Face directory."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("i", "n"), ("Ċ", "Ċ"), ("<", "|")]
  vocabulary = [*alphabet, *("".join(pair) for pair in merges)]
  model = models.BPE({token: i for i, token in enumerate(vocabulary)}, merges)
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  return _write(out, tokenizer, specials, tags, template, bos, eos)


def llama2(out, template=None):
  """Llama-2's shape: a space in front of a text, "▁" for spaces, byte fallback."""
  ascii_text = [chr(c) for c in range(33, 127)]
  merges = [("▁", "S"), ("o", "n"), ("i", "n"), ("▁", "▁"), ("<", "/"), ("</", "s")]
  vocabulary = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{b:02X}>" for b in range(256)),
    "▁",
    *ascii_text,
    *("".join(pair) for pair in merges),
  ]
  model = models.BPE(
    {token: i for i, token in enumerate(vocabulary)},
    merges,
    unk_token="<unk>",
    fuse_unk=True,
    byte_fallback=True,
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  return _write(out, tokenizer, ("<unk>", "<s>", "</s>"), (), template, "<s>", "</s>")


def _write(out, tokenizer, specials, tags, template, bos, eos):
  tokenizer.add_special_tokens(list(specials))
  tokenizer.add_tokens([tokenizers.AddedToken(t, special=False, normalized=False) for t in tags])
  out.mkdir(parents=True)
  tokenizer.save(str(out / "tokenizer.json"))
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": bos,
    # Both notations occur in the wild: a string, and this.
    "eos_token": {"__type": "AddedToken", "content": eos, "special": True} if eos else None,
    "chat_template": template,
    "clean_up_tokenization_spaces": False,
  }
  config = {key: value for key, value in config.items() if value is not None}
  (out / "tokenizer_config.json").write_text(json.dumps(config))
  return out


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
  """Format name -> tokenizer directory."""
  root = tmp_path_factory.mktemp("tokenizers")
  compact.build_tokenizer(
    ["Which orders did Mira Tol place?", 'find_customer {"name":"Mira Tol"}'] * 5,
    320,
    root / "compact",
  )
  return {
    "toolllama": llama2(root / "llama2", "{% for m in messages %}{{ 'Assistant:' }}{% endfor %}"),
    "chatml_react": byte_level(root / "qwen2", QWEN2, (), CHATML_TEMPLATE, None, "<|im_end|>"),
    "llama31": byte_level(
      root / "llama31", LLAMA31, (), LLAMA31_TEMPLATE, "<|begin_of_text|>", "<|eot_id|>"
    ),
    "hermes": byte_level(root / "qwen25", QWEN2, TOOL_TAGS, HERMES_TEMPLATE, None, "<|im_end|>"),
    "hermes3": byte_level(
      *(root / "qwen3", QWEN2, QWEN3_TAGS, "{# <think> #}" + HERMES_TEMPLATE, None, "<|im_end|>")
    ),
    "gemma_react": byte_level(root / "gemma", GEMMA, (), GEMMA_TEMPLATE, "<bos>", "<eos>"),
    "compact": root / "compact",
  }


@pytest.fixture(scope="session")
def codecs(directories):
  return {name: Codec.load(directory) for name, directory in directories.items()}
