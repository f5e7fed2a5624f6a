"""A chat format and a tokenizer for models of one or two million parameters.

    <|task|>query<|tools|>find_customer(name)
    list_orders(customer_id,status?)<|call|>find_customer {"name":"Mira Tol"}<|end|>
    <|result|>{"id": 7}<|call|>answer 7<|end|>          (no line breaks between the turns)

Every boundary is one control token, so a turn costs what it says. The tokenizer makes copying
easy: no word carries its leading space, so a name has the same ids in the query, in a tool's JSON
and in the arguments; numbers are single digits. Rare words (the data: names, ids) get no token of
their own, so names that training never saw are spelled like those it saw.
"""

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from steptool_jax.dialogue import parser
from steptool_jax.dialogue.codec import Control, Piece
from steptool_jax.types import Malformed, Task, ToolSpec

PAD, END, TASK, TOOLS = "<|pad|>", "<|end|>", "<|task|>", "<|tools|>"
CALL, RESULT = "<|call|>", "<|result|>"
SPECIALS = (PAD, END, TASK, TOOLS, CALL, RESULT)

# Spaces stand alone, except in front of punctuation (' {"' is one token).
_WORDS = (
  r"[\p{Ll}_]+"
  r"|\p{Lu}[\p{Ll}]*"
  r"|\p{N}"
  r"| ?[^\s\p{L}\p{N}_]+\n?"
  r"|\s+"
  r"|\p{L}\p{M}*"
)

_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ '<|task|>' + message.content + '\\n' }}
{%- elif message.role == 'user' -%}
{{ ('' if loop.index0 and messages[loop.index0 - 1].role == 'system' else '<|task|>')
   + message.content + '<|tools|>' }}
{%- for tool in tools or [] -%}
{%- set f = tool.function -%}
{{ f.name + '(' }}
{%- for p in f.parameters.properties or {} -%}
{{ p + ('' if p in (f.parameters.required or []) else '?') + ('' if loop.last else ',') }}
{%- endfor -%}
{{ ')' + ('' if loop.last else '\\n') }}
{%- endfor -%}
{%- elif message.role == 'assistant' -%}{{ '<|call|>' + message.content + '<|end|>' }}
{%- else -%}{{ '<|result|>' + message.content }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|call|>' }}{%- endif -%}
"""


def signature(tool: ToolSpec) -> str:
  """`name(required,optional?)`; the description is left out."""
  parser.check_compact_name(tool.name)
  required = tool.parameters.get("required", ())
  names = tool.parameters.get("properties", {})
  return f"{tool.name}({','.join(n if n in required else n + '?' for n in names)})"


def listing(tools: tuple[ToolSpec, ...]) -> str:
  """A line a tool."""
  return "\n".join(map(signature, tools))


def opening(system: str | None, listed: str, query: str) -> list[Piece]:
  """What stands in front of the first assistant turn."""
  task = query if system is None else f"{system}\n{query}"
  return [Control(TASK), task, Control(TOOLS), listed]


def task_texts(task: Task) -> Iterator[str]:
  """What a task contributes to the tokenizer's corpus: its query, signatures, gold actions."""
  yield task.query
  for tool in task.tools:
    yield signature(tool) + "\n"
  for action in task.demonstration:
    if not isinstance(action, Malformed):
      yield parser.write_compact(action)


def build_tokenizer(
  corpus: Iterable[str], vocab_size: int, out_dir: str | pathlib.Path, min_share: float = 0.001
) -> pathlib.Path:
  """Trains a byte-level BPE and writes tokenizer.json and tokenizer_config.json to `out_dir`.

  Deterministic: the same corpus gives the same bytes. Control ids are 0..5 (`SPECIALS`), <|pad|>
  is 0. transformers.AutoTokenizer opens the directory. vocab_size is an upper bound. min_share:
  two pieces are merged only where they meet at least min_share * len(corpus) times (and twice);
  what is rarer is data and stays in small pieces. ValueError when vocab_size has no room for 256
  bytes and 6 controls.
  """
  texts = list(corpus)
  least = 256 + len(SPECIALS)
  if vocab_size < least:
    raise ValueError(f"vocab_size {vocab_size}: at least {least} (bytes, controls)")
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  bpe.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=max(2, round(min_share * len(texts))),
    special_tokens=list(SPECIALS),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  bpe.train_from_iterator(texts, trainer=trainer)

  out_dir = pathlib.Path(out_dir)
  out_dir.mkdir(parents=True, exist_ok=True)
  text = json.dumps(json.loads(bpe.to_str()), indent=2, ensure_ascii=False) + "\n"
  (out_dir / "tokenizer.json").write_text(text, encoding="utf-8")
  config: Mapping[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": PAD,
    "eos_token": END,
    "clean_up_tokenization_spaces": False,
    "chat_template": _CHAT_TEMPLATE,
  }
  text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
  (out_dir / "tokenizer_config.json").write_text(text, encoding="utf-8")
  return out_dir
