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
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from steptool_jax.dialogue import compact, parser
from steptool_jax.dialogue.codec import Codec, Control, Piece
from steptool_jax.dialogue.signatures import signature
from steptool_jax.types import Action, Malformed, ToolSpec

Tools = tuple[ToolSpec, ...]
TOOL_LISTS = ("json", "signature")
THINKING = ("kept", "template", "stripped")
_UNTHINK = "</think>"


@dataclasses.dataclass(frozen=True, eq=False)
class ChatFormat:
  """One chat format over one tokenizer. Made by `get_format`.

  stop_ids[0] closes a turn; the others end it just as well when the model emits them.
  """

  name: str
  codec: Codec
  stop_ids: tuple[int, ...]
  turn: Callable[[str, str], list[Piece]]  # (role, text) -> a turn of anyone but the model
  header: tuple[Piece, ...]  # opens an assistant turn; ends every prompt and observation
  start: tuple[Piece, ...] = ()  # stands in front of the first turn
  after_stop: str = ""  # between a stop token and the next turn
  # (system, tool list, query) -> the first turns; None: those of a ReAct format.
  opening: Callable[[str | None, str, str], list[Piece]] | None = None
  json_list: Callable[[Tools], str] | None = None  # tools in its own layout; None: as ReAct does
  tool_list: str = "json"  # or "signature"
  thinking: str = "kept"  # what becomes of the thoughts of earlier turns: one of THINKING
  write: Callable[[Action], str] = parser.write_react
  read: Callable[[str], Action] = parser.parse_react
  tags: tuple[str, ...] = ()  # control tokens that belong into a turn
  # Results of several calls of one turn, which the model writes then; None: one call a turn.
  results: Callable[[Sequence[str]], list[Piece]] | None = None
  talks: bool = True  # a user's turn is spelled as such, so that one can talk without tools

  @property
  def react(self) -> bool:
    """Whether the model writes Thought, Action, Action Input."""
    return self.opening is None

  def prompt(
    self, system: str | None, tools: Tools, query: str, whole: str | None = None
  ) -> np.ndarray:
    """int32[P], the assistant header included: the next token is the model's.

    system: the task description in front of the tool list; None for the format's default. whole:
    a whole system text, tools and output format included, e.g. a benchmark's own; the ReAct formats
    take it as it is, hermes and compact have their own way to list tools and ignore it, and so do
    signatures, which take the place of its tools.
    ValueError for a tool whose name the format reserves, or two of one name.
    """
    names = [tool.name for tool in tools]
    if len(set(names)) != len(names):
      raise ValueError(f"tools: two tools share a name in {sorted(names)}")
    short = self.tool_list == "signature"
    if self.opening is not None:
      listed = signatures(tuple(tools)) if short else self.json_list(tuple(tools))
      turns = self.opening(system, listed, query)
    else:
      own = react_system(system, tuple(tools), self.tool_list)
      turns = self.turn("system", own if whole is None or short else whole)
      turns += self.turn("user", f"\n{query}\nBegin!\n")
    return self.codec.join([*self.start, *turns, *self.header])

  def observation(self, *texts: str) -> np.ndarray:
    """int32[M] that follow a turn's stop token: an observation a call, the assistant's header."""
    return self.others([("function", text) for text in texts])

  def others(self, turns: Sequence[tuple[str, str]]) -> np.ndarray:
    """int32[M] that follow a turn's stop token: (role, text) of anyone but the model, the header.

    Roles are user and function (an observation).
    """
    pieces: list[Piece] = []
    for role, group in itertools.groupby(turns, lambda turn: turn[0]):
      texts = [text for _, text in group]
      if role == "function" and len(texts) > 1 and self.results is not None:
        pieces += self.results(texts)
      else:
        pieces += [piece for text in texts for piece in self.turn(role, text)]
    return self.codec.join([self.after_stop, *pieces, *self.header])

  def talk(self, system: str | None, text: str) -> np.ndarray:
    """int32[P] of a conversation without tools: the user's turn and the header, nothing around it.

    What the model says in it is text and no action; close it with stop_ids[0].
    """
    if not self.talks:
      return self.prompt(system, (), text)
    turns = [] if system is None else self.turn("system", system)
    return self.codec.join([*self.start, *turns, *self.turn("user", text), *self.header])

  def interject(self, shown: np.ndarray, text: str) -> tuple[int, np.ndarray]:
    """A user's turn between what was shown last (a prompt or an observation) and the model's turn.

    Returns (cut, int32[M]): take the last `cut` ids of `shown` back (the assistant header), then
    append the ids: the user's turn and the header. A tokenizer that glues the header to the text
    in front of it leaves no such place: there the cut is 0 and an empty assistant turn is closed.
    """
    header = self.codec.join(self.header)
    inserted = self.codec.join([*self.turn("user", text), *self.header])
    if len(header) < len(shown) and (shown[-len(header) :] == header).all():
      return len(header), inserted
    return 0, np.concatenate([np.asarray(self.stop_ids[:1], np.int32), inserted])

  def render_action(self, action: Action) -> np.ndarray:
    """int32[L] of an assistant turn, stop token included; `parse` inverts it exactly.

    ValueError for an action that the format cannot carry (a Malformed, a reserved tool name).
    The compact format has no place for thoughts and drops them.
    """
    pieces = _split_tags(self.write(action), self.tags, self.codec)
    return np.append(self.codec.join(pieces), np.int32(self.stop_ids[0]))

  def without_thoughts(self, turn: np.ndarray) -> np.ndarray:
    """int32[L] of an assistant turn as Qwen3's chat template repeats it in history: what stands up
    to the last </think> and the line breaks after it are gone. A block that was never closed stays.
    """
    ends = np.flatnonzero(turn == self.codec.token_id(_UNTHINK))
    if not len(ends):
      return turn
    left = turn[ends[-1] + 1 :]
    while len(left):
      text = self.codec.decode(left[:1])
      rest = text.lstrip("\n")
      if rest == text:
        break
      left = np.concatenate([np.asarray(self.codec.encode(rest), np.int32), left[1:]])
    return left

  def parse(self, ids: Sequence[int] | np.ndarray) -> Action:
    """The action of one sampled turn, int32[L], with or without its stop token."""
    body = [int(i) for i in ids]
    if body and body[-1] in self.stop_ids:
      body.pop()
    for i in body:
      name = self.codec.control_name(i)
      if name is not None and name not in self.tags:
        return Malformed(f"the turn contains the control token {name}: write plain text")
    text = self.codec.decode(body)
    if not text.strip():
      return Malformed("the turn is empty: name a tool or finish")
    return self.read(text)


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
  if thinking != "kept" and not (_UNTHINK in made.tags and codec.has(_UNTHINK)):
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


# --- shared texts ----------------------------------------------------------------------------

_TASK = (
  "You solve the user's task by calling tools. Think first, then make exactly one call and wait "
  f"for its result. When you know the answer, or know that there is none, call {parser.FINISH}."
)
_TASK_PARALLEL = (
  "You solve the user's task by calling tools. Think first, then make a call, or several calls "
  "that do not need one another's results, and wait for what they return. When you know the "
  f"answer, or know that there is none, call {parser.FINISH}, alone."
)
_REACT_RULES = (
  "Your output should follow this format:\nThought:\nAction\nAction Input:\n\n"
  "Action is the name of one tool, Action Input a JSON object with its arguments."
)
_SHORT_RULES = (
  "Your output should follow this format:\nThought: your thoughts\nAction: name of one tool\n"
  "Action Input: JSON object with its arguments"
)
# What Finish is for stands in the task: here it only has to be called right.
_SHORT_FINISH = dataclasses.replace(
  parser.FINISH_TOOL,
  description="Ends the task.",
  parameters={
    **parser.FINISH_TOOL.parameters,
    "properties": {
      **parser.FINISH_TOOL.parameters["properties"],
      "final_answer": {"type": "string", "description": f"needed with {parser.GIVE_ANSWER}"},
    },
  },
)


def _with_finish(tools: Tools, finish: ToolSpec = parser.FINISH_TOOL) -> Tools:
  if any(tool.name == parser.FINISH for tool in tools):
    raise ValueError(
      f"tools: the name {parser.FINISH!r} is reserved, the chat format adds that tool itself"
    )
  return (*tools, finish)


def _function(tool: ToolSpec) -> dict:
  return {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}


def signatures(tools: Tools) -> str:
  """A line a tool, Finish at last."""
  return "\n".join(map(signature, _with_finish(tools, _SHORT_FINISH)))


def react_system(system: str | None, tools: Tools, tool_list: str = "json") -> str:
  """The system text of the ReAct formats: task, tools, output format; every tool once."""
  task = _TASK if system is None else system
  if tool_list == "signature":
    return f"{task}\n\nTools:\n{signatures(tools)}\n\n{_SHORT_RULES}"
  schemas = json.dumps([_function(t) for t in _with_finish(tools)], ensure_ascii=False)
  return f"{task}\n\n{_REACT_RULES}\n\nTools, as JSON schemas: {schemas}"


def _stops(codec: Codec, first: str, *others: str) -> tuple[int, ...]:
  return (codec.token_id(first), *(codec.controls[name] for name in others if codec.has(name)))


def _split_tags(text: str, tags: tuple[str, ...], codec: Codec) -> list[Piece]:
  """`write`'s scaffolding tags as control ids: the first of each outside the JSON arguments.

  A tag inside the arguments or the thought stays text: the writer puts the JSON on one line of its
  own, so only a tag that is a whole line is scaffolding.
  """
  pieces: list[Piece] = []
  for line in text.split("\n"):
    pieces += ["\n", Control(line) if line in tags and codec.has(line) else line]
  return pieces[1:]


# --- the formats -----------------------------------------------------------------------------


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
    after_stop="\n",
  )


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
    # Gemma knows two roles; system text and results come from the user.
    turn=lambda role, text: [start, f"user\n{text}", end, "\n"],
    header=(start, "model\n"),
    start=(begin,),
    after_stop="\n",
  )


def _hermes(codec: Codec, parallel: bool = False) -> ChatFormat:
  codec.token_id(_IM_START.name)

  def tag(name: str) -> Piece:
    # Qwen2.5 has <tool_call> as a token and <tool_response> as text; Qwen3 has both as tokens.
    return Control(name) if codec.has(name) else name

  def json_list(tools: Tools) -> str:
    return "\n".join(
      json.dumps({"type": "function", "function": _function(tool)}, ensure_ascii=False)
      for tool in _with_finish(tools)
    )

  task = _TASK_PARALLEL if parallel else _TASK

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

  think = codec.has("<think>")
  return ChatFormat(
    name="hermes",
    codec=codec,
    stop_ids=_stops(codec, _IM_END.name, "<|endoftext|>"),
    turn=turn,
    header=(_IM_START, "assistant\n"),
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
_is_llama31 = _has("<|start_header_id|>", "<|eot_id|>")


def _is_hermes(codec: Codec, template: str) -> bool:
  # A Llama-3 tokenizer with ChatML tokens added is still Llama's.
  is_llama = _is_llama31(codec, template)
  return _is_chatml(codec, template) and "<tool_call>" in template and not is_llama


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
