"""One chat format over one tokenizer: pieces of turns become ids, sampled ids become actions."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from steptool_jax.dialogue import parser
from steptool_jax.dialogue.codec import Codec, Control, Piece
from steptool_jax.dialogue.listing import Tools, react_system, signatures
from steptool_jax.types import Action, Malformed

TOOL_LISTS = ("json", "signature")
THINKING = ("kept", "template", "stripped")
UNTHINK = "</think>"


@dataclasses.dataclass(frozen=True, eq=False)
class ChatFormat:
  """One chat format over one tokenizer. Made by `template.get_format`.

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
  system_turn: bool = True  # False: the system text stands at the head of the first user's turn

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
      turns = self._first(own if whole is None or short else whole, f"\n{query}\nBegin!\n")
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
    turns = self.turn("user", text) if system is None else self._first(system, text)
    return self.codec.join([*self.start, *turns, *self.header])

  def _first(self, system: str, text: str) -> list[Piece]:
    """The turns before the model's first one."""
    if not self.system_turn:
      return self.turn("user", f"{system}\n\n{text.strip()}")
    return [*self.turn("system", system), *self.turn("user", text)]

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
    return np.append(self.spell(self.write(action)), np.int32(self.stop_ids[0]))

  def spell(self, text: str) -> np.ndarray:
    """int32[L] of what `write` gave, or of its beginning: its tags are control tokens."""
    return self.codec.join(_split_tags(text, self.tags, self.codec))

  def without_thoughts(self, turn: np.ndarray) -> np.ndarray:
    """int32[L] of an assistant turn as Qwen3's chat template repeats it in history: what stands up
    to the last </think> and the line breaks after it are gone. A block that was never closed stays.
    """
    ends = np.flatnonzero(turn == self.codec.token_id(UNTHINK))
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


def _split_tags(text: str, tags: tuple[str, ...], codec: Codec) -> list[Piece]:
  """`write`'s scaffolding tags as control ids: the first of each outside the JSON arguments.

  A tag inside the arguments or the thought stays text: the writer puts the JSON on one line of its
  own, so only a tag that is a whole line is scaffolding.
  """
  pieces: list[Piece] = []
  for line in text.split("\n"):
    pieces += ["\n", Control(line) if line in tags and codec.has(line) else line]
  return pieces[1:]
