"""Chat formats as token pieces: a prompt, an observation, an action; nothing is rendered twice.

A conversation is prompt, (sampled turn, observation)*: the sampled ids, stop token included, are
kept as they are, and what follows them is appended. So the ids that the model saw are the record.

    name           models                      body              observation turn
    toolllama      ToolLLaMA-2 (Llama-2)       ReAct             Function: …
    chatml_react   Qwen2, SmolLM2              ReAct             role `function`
    llama31        Llama-3.x                   ReAct             role `function`
    gemma_react    Gemma 3                     ReAct             user turn
    hermes         Qwen2.5, Qwen3              <tool_call> JSON  <tool_response> in a user turn
    compact        the quickstart's model      name {json}       <|result|>

In every format but compact the task ends with a call of the tool `Finish`, which the prompt lists
after the task's own tools; plain text without a call is malformed, not an answer. A turn has one
call; in hermes it may have several, which is asked for (`parallel_calls`). Tools are listed
as JSON schemas, which published models were trained on, or as signatures (signatures.py), for less
than half of the tokens; how a call is written and read is the same.

A new format is one row of FORMATS: how its turns are spelled, and which tokenizers it fits.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from steptool_jax.dialogue import compact, listing, parser
from steptool_jax.dialogue.chatformat import THINKING, TOOL_LISTS, UNTHINK, ChatFormat
from steptool_jax.dialogue.codec import Codec, Control, Piece


def get_format(
  name: str,
  codec: Codec,
  tool_list: str = "json",
  thinking: str = "kept",
  parallel_calls: bool = False,
) -> ChatFormat:
  """A format by name, or "auto": chosen by the tokenizer's control tokens and chat template.

  tool_list: how prompts list the tools, json or signature. thinking: one of THINKING.
  parallel_calls: a turn may have several calls. ValueError for an unknown name, for a tokenizer
  that lacks a token the format needs, for "auto" on a tokenizer without a chat template, for
  signatures in the compact format, whose list is shorter, for thoughts to strip where there are no
  <think> blocks, and for several calls in a format that has one a turn.
  """
  if name == "auto":
    name = _choose(codec)
  if name not in FORMATS:
    raise ValueError(f"chat_format {name!r}: choose one of auto, {', '.join(FORMATS)}")
  if tool_list not in TOOL_LISTS:
    raise ValueError(f"tool_list {tool_list!r}: choose one of {', '.join(TOOL_LISTS)}")
  if tool_list != "json" and name == "compact":
    raise ValueError(
      f"tool_list {tool_list!r}: chat_format 'compact' has a list of its own, shorter still; leave "
      "model.tool_list at 'json'"
    )
  if parallel_calls and name not in PARALLEL:
    raise ValueError(
      f"parallel_calls: chat_format {name!r} has one call a turn; use {' or '.join(PARALLEL)} "
      "(Qwen2.5, Qwen3), or set model.parallel_calls=False"
    )
  made = (PARALLEL[name] if parallel_calls else FORMATS[name].make)(codec)
  if thinking not in THINKING:
    raise ValueError(f"thinking {thinking!r}: choose one of {', '.join(THINKING)}")
  if thinking != "kept" and not (UNTHINK in made.tags and codec.has(UNTHINK)):
    raise ValueError(
      f"thinking {thinking!r}: chat format {name!r} over the tokenizer in {codec.directory} has no "
      "<think> blocks (hermes over Qwen3's has); leave model.thinking at 'kept'"
    )
  return dataclasses.replace(made, tool_list=tool_list, thinking=thinking)


def _choose(codec: Codec) -> str:
  template = codec.chat_template
  if template is None:
    raise ValueError(
      f"chat_format 'auto': the tokenizer in {codec.directory} has no chat template; set "
      f"chat_format to one of {', '.join(FORMATS)}"
    )
  for name, row in reversed(FORMATS.items()):
    if row.fits(codec, template):
      return name
  raise ValueError(
    f"chat_format 'auto': the chat template in {codec.directory} is of no known family; set "
    f"chat_format to one of {', '.join(FORMATS)}"
  )


def _stops(codec: Codec, first: str, *others: str) -> tuple[int, ...]:
  return (codec.token_id(first), *(codec.controls[name] for name in others if codec.has(name)))


def _toolllama(codec: Codec) -> ChatFormat:
  if codec.bos_id is None or codec.eos_id is None:
    raise ValueError(
      f"chat_format 'toolllama': the tokenizer in {codec.directory} names no bos_token or "
      "eos_token in tokenizer_config.json; this format fits Llama-2 tokenizers"
    )

  def turn(role: str, text: str) -> list[Piece]:
    # A system turn is the first one: it stands on the first line.
    line = f"{role.capitalize()}: {text}"
    return [line if role == "system" else f"\n{line}"]

  return ChatFormat(
    name="toolllama",
    codec=codec,
    stop_ids=(codec.eos_id,),
    turn=turn,
    header=("\nAssistant:\n",),
    # Llama-2's own tokenizer puts a space in front of a prompt, and only there.
    start=(Control(codec.control_name(codec.bos_id)), " " if codec.prefix_space else ""),
  )


_IM_START, _IM_END = Control("<|im_start|>"), Control("<|im_end|>")


def _chatml_turn(role: str, *content: Piece) -> list[Piece]:
  return [_IM_START, f"{role}\n", *content, _IM_END, "\n"]


def _chatml_react(codec: Codec) -> ChatFormat:
  codec.token_id(_IM_START.name)
  return ChatFormat(
    name="chatml_react",
    codec=codec,
    stop_ids=_stops(codec, _IM_END.name, "<|endoftext|>"),
    turn=_chatml_turn,
    header=(_IM_START, "assistant\n"),
    start=_begun(codec),
    after_stop="\n",
  )


def _begun(codec: Codec) -> tuple[Piece, ...]:
  """The first token, where the template writes it: Hermes 3 has ChatML over Llama's tokenizer."""
  begins = re.match(r"\s*\{\{-?\s*bos_token", codec.chat_template or "")
  return (Control(codec.control_name(codec.bos_id)),) if begins and codec.bos_id is not None else ()


def _llama31(codec: Codec) -> ChatFormat:
  start, end, eot = (Control(n) for n in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
  begin = Control("<|begin_of_text|>")
  for needed in (start, end, eot, begin):
    codec.token_id(needed.name)
  return ChatFormat(
    name="llama31",
    codec=codec,
    stop_ids=_stops(codec, eot.name, "<|eom_id|>", "<|end_of_text|>"),
    turn=lambda role, text: [start, role, end, "\n\n", text, eot],
    header=(start, "assistant", end, "\n\n"),
    start=(begin,),
  )


def _gemma_react(codec: Codec) -> ChatFormat:
  begin, start, end = (Control(n) for n in ("<bos>", "<start_of_turn>", "<end_of_turn>"))
  for needed in (begin, start, end):
    codec.token_id(needed.name)
  return ChatFormat(
    name="gemma_react",
    codec=codec,
    stop_ids=_stops(codec, end.name, "<eos>"),
    # Gemma knows two roles: results come from the user, and so does the system text.
    turn=lambda role, text: [start, f"user\n{text.strip()}", end, "\n"],
    header=(start, "model\n"),
    start=(begin,),
    after_stop="\n",
    system_turn=False,
  )


def _hermes(codec: Codec, parallel: bool = False) -> ChatFormat:
  codec.token_id(_IM_START.name)

  def tag(name: str) -> Piece:
    # Qwen2.5 has <tool_call> as a token and <tool_response> as text; Qwen3 has both as tokens.
    return Control(name) if codec.has(name) else name

  def json_list(tools: listing.Tools) -> str:
    return "\n".join(
      json.dumps({"type": "function", "function": listing.function(tool)}, ensure_ascii=False)
      for tool in listing.with_finish(tools)
    )

  task = listing.TASK_PARALLEL if parallel else listing.TASK

  def opening(system: str | None, listed: str, query: str) -> list[Piece]:
    content: list[Piece] = [
      task if system is None else system,
      "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
      f"provided with function signatures within <tools></tools> XML tags:\n<tools>\n{listed}\n"
      "</tools>\n\nFor each function call, return a json object with function name and arguments "
      "within ",
      tag("<tool_call>"),
      tag("</tool_call>"),
      " XML tags:\n",
      tag("<tool_call>"),
      '\n{"name": <function-name>, "arguments": <args-json-object>}\n',
      tag("</tool_call>"),
    ]
    return [*_chatml_turn("system", *content), *_chatml_turn("user", query)]

  def results(texts: Sequence[str]) -> list[Piece]:
    # One user turn for all of them, as the models' own templates have it.
    content: list[Piece] = []
    for text in texts:
      between = ["\n"] if content else []
      content += [*between, tag("<tool_response>"), f"\n{text}\n", tag("</tool_response>")]
    return _chatml_turn("user", *content)

  def turn(role: str, text: str) -> list[Piece]:
    return results([text]) if role == "function" else _chatml_turn(role, text)

  # Some tokenizers have the token of models that do not think: what the template never writes.
  think = codec.has("<think>") and "<think>" in (codec.chat_template or "<think>")
  return ChatFormat(
    name="hermes",
    codec=codec,
    stop_ids=_stops(codec, _IM_END.name, "<|endoftext|>"),
    turn=turn,
    header=(_IM_START, "assistant\n"),
    start=_begun(codec),
    after_stop="\n",
    opening=opening,
    json_list=json_list,
    write=lambda action: parser.write_tool_call(action, think),
    read=parser.parse_tool_calls if parallel else parser.parse_tool_call,
    results=results if parallel else None,
    tags=("<tool_call>", "</tool_call>", "<think>", "</think>"),
  )


def _compact(codec: Codec) -> ChatFormat:
  for needed in compact.SPECIALS:
    codec.token_id(needed)
  return ChatFormat(
    name="compact",
    codec=codec,
    stop_ids=(codec.token_id(compact.END),),
    turn=lambda role, text: [Control(compact.RESULT), text],  # a user's turn looks the same
    header=(Control(compact.CALL),),
    opening=compact.opening,
    json_list=compact.listing,
    write=parser.write_compact,
    read=parser.parse_compact,
    talks=False,
  )


class Row(NamedTuple):
  """make: the format over a tokenizer, ValueError where a token is missing. fits: whether it is the
  one of a tokenizer with this chat template.
  """

  make: Callable[[Codec], ChatFormat]
  fits: Callable[[Codec, str], bool]


def _has(*names: str) -> Callable[[Codec, str], bool]:
  return lambda codec, template: all(codec.has(name) for name in names)


_is_chatml = _has("<|im_start|>", "<|im_end|>")


def _is_llama31(codec: Codec, template: str) -> bool:
  # Not of models that write ChatML over Llama's tokenizer.
  start = "<|start_header_id|>"
  return codec.has(start) and codec.has("<|eot_id|>") and start in template


def _is_hermes(codec: Codec, template: str) -> bool:
  is_llama = _is_llama31(codec, template)
  # Qwen3-Coder writes XML within <tool_call>.
  json_calls = "<tool_call>" in template and "<function=" not in template
  return _is_chatml(codec, template) and json_calls and not is_llama


# "auto" takes the last one that fits: a format stands after those that are more general.
FORMATS: Mapping[str, Row] = {
  "toolllama": Row(_toolllama, lambda c, text: "Assistant:" in text and c.eos_id is not None),
  "chatml_react": Row(_chatml_react, _is_chatml),
  "llama31": Row(_llama31, _is_llama31),
  "gemma_react": Row(_gemma_react, _has("<start_of_turn>", "<end_of_turn>")),
  "hermes": Row(_hermes, _is_hermes),
  "compact": Row(_compact, _has(compact.RESULT, compact.CALL)),
}
# Those whose turns may have several calls.
PARALLEL: Mapping[str, Callable[[Codec], ChatFormat]] = {
  "hermes": lambda c: _hermes(c, parallel=True)
}
