"""Chat formats as token pieces: a prompt, an observation, an action; nothing is rendered twice.

A conversation is prompt, (sampled turn, observation)*: the sampled ids, stop token included, are
kept as they are, and what follows them is appended. So the ids that the model saw are the record.

    name           models                      body              observation turn
    toolllama      ToolLLaMA-2 (Llama-2)       ReAct             Function: …
    chatml_react   Qwen2, SmolLM2              ReAct             role `function`
    llama31        Llama-3.x                   ReAct             role `function`
    hermes         Qwen2.5, Qwen3              <tool_call> JSON  <tool_response> in a user turn
    compact        the quickstart's model      name {json}       <|result|>

In every format but compact the task ends with a call of the tool `Finish`, which the prompt lists
behind the task's own tools; plain text without a call is malformed, not an answer.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence

import numpy as np

from steptool_jax.dialogue import compact, parser
from steptool_jax.dialogue.codec import Codec, Control, Piece
from steptool_jax.types import Action, Malformed, ToolSpec

Tools = tuple[ToolSpec, ...]


class _Whole(str):
  """A system text that lists the tools and the output format itself."""


FORMATS = ("toolllama", "chatml_react", "llama31", "hermes", "compact")
_REACT_FORMATS = ("toolllama", "chatml_react", "llama31")


@dataclasses.dataclass(frozen=True, eq=False)
class ChatFormat:
  """One chat format over one tokenizer. Made by `get_format`.

  stop_ids[0] closes a turn; the others end it just as well when the model emits them.
  """

  name: str
  codec: Codec
  stop_ids: tuple[int, ...]
  open_pieces: Callable[[str | None, Tools, str], list[Piece]]
  observation_pieces: Callable[[str], list[Piece]]
  user_pieces: Callable[[str], list[Piece]]  # a user's turn behind an observation, no header
  header: tuple[Piece, ...]  # opens an assistant turn; ends every prompt and observation
  write: Callable[[Action], str]
  read: Callable[[str], Action]
  tags: tuple[str, ...] = ()  # control tokens that belong into a turn

  def prompt(
    self, system: str | None, tools: Tools, query: str, whole: str | None = None
  ) -> np.ndarray:
    """int32[P], the assistant header included: the next token is the model's.

    system: the task description in front of the tool list; None for the format's default. whole:
    a whole system text, tools and output format included, e.g. a benchmark's own; the ReAct formats
    take it as it is, hermes and compact have their own way to list tools and ignore it.
    ValueError for a tool whose name the format reserves, or two of one name.
    """
    names = [tool.name for tool in tools]
    if len(set(names)) != len(names):
      raise ValueError(f"tools: two tools share a name in {sorted(names)}")
    if whole is not None and self.name in _REACT_FORMATS:
      system = _Whole(whole)
    return self.codec.join(self.open_pieces(system, tuple(tools), query))

  def observation(self, text: str) -> np.ndarray:
    """int32[M] that follow a turn's stop token: the observation and the next assistant header."""
    return self.codec.join(self.observation_pieces(text))

  def interject(self, shown: np.ndarray, text: str) -> tuple[int, np.ndarray]:
    """A user's turn between what was shown last (a prompt or an observation) and the model's turn.

    Returns (cut, int32[M]): take the last `cut` ids of `shown` back (the assistant header), then
    append the ids: the user's turn and the header. A tokenizer that glues the header to the text
    in front of it leaves no such place: there the cut is 0 and an empty assistant turn is closed.
    """
    header = self.codec.join(self.header)
    inserted = self.codec.join([*self.user_pieces(text), *self.header])
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


def get_format(name: str, codec: Codec) -> ChatFormat:
  """A format by name, or "auto": chosen by the tokenizer's control tokens and chat template.

  ValueError for an unknown name, for a tokenizer that lacks a token the format needs, and for
  "auto" on a tokenizer without a chat template.
  """
  if name == "auto":
    name = _choose(codec)
  if name not in _MAKERS:
    raise ValueError(f"chat_format {name!r}: choose one of auto, {', '.join(FORMATS)}")
  return _MAKERS[name](codec)


def _choose(codec: Codec) -> str:
  template = codec.chat_template
  if template is None:
    raise ValueError(
      f"chat_format 'auto': the tokenizer in {codec.directory} has no chat template; set "
      f"chat_format to one of {', '.join(FORMATS)}"
    )
  if codec.has(compact.RESULT) and codec.has(compact.CALL):
    return "compact"
  if codec.has("<|start_header_id|>") and codec.has("<|eot_id|>"):
    return "llama31"
  if codec.has("<|im_start|>") and codec.has("<|im_end|>"):
    return "hermes" if "<tool_call>" in template else "chatml_react"
  if "Assistant:" in template and codec.eos_id is not None:
    return "toolllama"
  raise ValueError(
    f"chat_format 'auto': the chat template in {codec.directory} is of no known family; set "
    f"chat_format to one of {', '.join(FORMATS)}"
  )


# --- shared texts ----------------------------------------------------------------------------

_TASK = (
  "You solve the user's task by calling tools. Think first, then make exactly one call and wait "
  f"for its result. When you know the answer, or know that there is none, call {parser.FINISH}."
)
_REACT_RULES = (
  "Your output should follow this format:\nThought:\nAction\nAction Input:\n\n"
  "Action is the name of one tool, Action Input a JSON object with its arguments."
)


def _with_finish(tools: Tools) -> Tools:
  if any(tool.name == parser.FINISH for tool in tools):
    raise ValueError(
      f"tools: the name {parser.FINISH!r} is reserved, the chat format adds that tool itself"
    )
  return (*tools, parser.FINISH_TOOL)


def _function(tool: ToolSpec) -> dict:
  return {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}


def react_system(system: str | None, tools: Tools) -> str:
  """The system text of the ReAct formats: task, numbered tools, output format, JSON schemas."""
  tools = _with_finish(tools)
  if isinstance(system, _Whole):
    return str(system)
  numbered = "\n".join(f"{n}.{t.name}: {t.description}" for n, t in enumerate(tools, start=1))
  schemas = json.dumps([_function(t) for t in tools], ensure_ascii=False)
  task = _TASK if system is None else system
  return f"{task}\n\nTools:\n{numbered}\n\n{_REACT_RULES}\n\nTheir JSON schemas: {schemas}"


def _react_user(query: str) -> str:
  return f"\n{query}\nBegin!\n"


def _stops(codec: Codec, first: str, *others: str) -> tuple[int, ...]:
  return (codec.token_id(first), *(codec.controls[name] for name in others if codec.has(name)))


def _split_tags(text: str, tags: tuple[str, ...], codec: Codec) -> list[Piece]:
  """`write`'s scaffolding tags as control ids: the first of each outside the JSON arguments.

  A tag inside the arguments or the thought stays text: the writer puts the JSON on one line of its
  own, so only a tag that is a whole line is scaffolding.
  """
  if not tags:
    return [text]
  pieces: list[Piece] = []
  lines = text.split("\n")
  for n, line in enumerate(lines):
    if line in tags and codec.has(line):
      pieces.append(Control(line))
    else:
      pieces.append(line)
    if n + 1 < len(lines):
      pieces.append("\n")
  return pieces


# --- the formats -----------------------------------------------------------------------------


def _toolllama(codec: Codec) -> ChatFormat:
  if codec.bos_id is None or codec.eos_id is None:
    raise ValueError(
      f"chat_format 'toolllama': the tokenizer in {codec.directory} names no bos_token or "
      "eos_token in tokenizer_config.json; this format fits Llama-2 tokenizers"
    )
  bos = Control(codec.control_name(codec.bos_id))
  # Llama-2's own tokenizer puts a space in front of a prompt, and only there.
  lead = " " if codec.prefix_space else ""

  def opening(system: str | None, tools: Tools, query: str) -> list[Piece]:
    text = f"{lead}System: {react_system(system, tools)}\nUser: {_react_user(query)}\nAssistant:\n"
    return [bos, text]

  return ChatFormat(
    name="toolllama",
    codec=codec,
    stop_ids=(codec.eos_id,),
    open_pieces=opening,
    observation_pieces=lambda text: [f"\nFunction: {text}\nAssistant:\n"],
    user_pieces=lambda text: [f"\nUser: {text}"],
    header=("\nAssistant:\n",),
    write=parser.write_react,
    read=parser.parse_react,
  )


_IM_START, _IM_END = Control("<|im_start|>"), Control("<|im_end|>")


def _chatml_turn(role: str, *content: Piece) -> list[Piece]:
  return [_IM_START, f"{role}\n", *content, _IM_END, "\n"]


_CHATML_ASSISTANT: list[Piece] = [_IM_START, "assistant\n"]


def _chatml_react(codec: Codec) -> ChatFormat:
  codec.token_id(_IM_START.name)

  def opening(system: str | None, tools: Tools, query: str) -> list[Piece]:
    return [
      *_chatml_turn("system", react_system(system, tools)),
      *_chatml_turn("user", _react_user(query)),
      *_CHATML_ASSISTANT,
    ]

  return ChatFormat(
    name="chatml_react",
    codec=codec,
    stop_ids=_stops(codec, _IM_END.name, "<|endoftext|>"),
    open_pieces=opening,
    observation_pieces=lambda text: ["\n", *_chatml_turn("function", text), *_CHATML_ASSISTANT],
    user_pieces=lambda text: _chatml_turn("user", text),
    header=tuple(_CHATML_ASSISTANT),
    write=parser.write_react,
    read=parser.parse_react,
  )


def _llama31(codec: Codec) -> ChatFormat:
  start, end, eot = (Control(n) for n in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
  begin = Control("<|begin_of_text|>")
  for needed in (start, end, eot, begin):
    codec.token_id(needed.name)

  def header(role: str) -> list[Piece]:
    return [start, role, end, "\n\n"]

  def opening(system: str | None, tools: Tools, query: str) -> list[Piece]:
    return [
      begin,
      *[*header("system"), react_system(system, tools), eot],
      *[*header("user"), _react_user(query), eot],
      *header("assistant"),
    ]

  return ChatFormat(
    name="llama31",
    codec=codec,
    stop_ids=_stops(codec, eot.name, "<|eom_id|>", "<|end_of_text|>"),
    open_pieces=opening,
    observation_pieces=lambda text: [*header("function"), text, eot, *header("assistant")],
    user_pieces=lambda text: [*header("user"), text, eot],
    header=tuple(header("assistant")),
    write=parser.write_react,
    read=parser.parse_react,
  )


_HERMES_TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")


def _hermes(codec: Codec) -> ChatFormat:
  codec.token_id(_IM_START.name)

  def tag(name: str) -> Piece:
    # Qwen2.5 has <tool_call> as a token and <tool_response> as text; Qwen3 has both as tokens.
    return Control(name) if codec.has(name) else name

  def opening(system: str | None, tools: Tools, query: str) -> list[Piece]:
    listed = "".join(
      "\n" + json.dumps({"type": "function", "function": _function(tool)}, ensure_ascii=False)
      for tool in _with_finish(tools)
    )
    content: list[Piece] = [
      _TASK if system is None else system,
      "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
      f"provided with function signatures within <tools></tools> XML tags:\n<tools>{listed}\n"
      "</tools>\n\nFor each function call, return a json object with function name and arguments "
      "within ",
      *(tag("<tool_call>"), tag("</tool_call>"), " XML tags:\n", tag("<tool_call>")),
      '\n{"name": <function-name>, "arguments": <args-json-object>}\n',
      tag("</tool_call>"),
    ]
    return [*_chatml_turn("system", *content), *_chatml_turn("user", query), *_CHATML_ASSISTANT]

  def observation(text: str) -> list[Piece]:
    response = [tag("<tool_response>"), f"\n{text}\n", tag("</tool_response>")]
    return ["\n", *_chatml_turn("user", *response), *_CHATML_ASSISTANT]

  think = codec.has("<think>")
  return ChatFormat(
    name="hermes",
    codec=codec,
    stop_ids=_stops(codec, _IM_END.name, "<|endoftext|>"),
    open_pieces=opening,
    observation_pieces=observation,
    user_pieces=lambda text: _chatml_turn("user", text),
    header=tuple(_CHATML_ASSISTANT),
    write=lambda action: parser.write_tool_call(action, think),
    read=parser.parse_tool_call,
    tags=_HERMES_TAGS,
  )


def _compact(codec: Codec) -> ChatFormat:
  for needed in compact.SPECIALS:
    codec.token_id(needed)
  return ChatFormat(
    name="compact",
    codec=codec,
    stop_ids=(codec.token_id(compact.END),),
    open_pieces=compact.prompt_pieces,
    observation_pieces=compact.observation_pieces,
    user_pieces=lambda text: compact.observation_pieces(text)[:-1],  # it has no user's turn
    header=(Control(compact.CALL),),
    write=parser.write_compact,
    read=parser.parse_compact,
  )


_MAKERS: dict[str, Callable[[Codec], ChatFormat]] = {
  "toolllama": _toolllama,
  "chatml_react": _chatml_react,
  "llama31": _llama31,
  "hermes": _hermes,
  "compact": _compact,
}
