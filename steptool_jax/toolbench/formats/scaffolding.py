"""How files and chat formats spell a conversation: text -> messages -> ids.

Official rows spell one model family's scaffolding, which is taken off here; `tokenise` puts that of
a chat format around the messages, with control tokens as control ids and texts as plain text.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from steptool_jax.dialogue.codec import Control, Piece
from steptool_jax.dialogue.template import ChatFormat
from steptool_jax.toolbench.formats.training_rows import Message, StepRow

# Scaffolding of the three families: opening, observation, and what may end a response.
_FAMILIES = (
  (
    r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n<\|im_start\|>user\n(.*)<\|im_end\|>\n"
    r"<\|im_start\|>assistant\n",
    r"<\|im_start\|>function\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n",
    "<|im_end|>",
  ),
  (
    r"(?:<\|begin_of_text\|>)?<\|start_header_id\|>system<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>"
    r"<\|start_header_id\|>user<\|end_header_id\|>\n\n(.*)<\|eot_id\|>"
    r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
    r"<\|start_header_id\|>function<\|end_header_id\|>\n\n(.*)<\|eot_id\|>"
    r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
    "<|eot_id|>",
  ),
  (
    r"System:[ \n](.*?)\nUser:[ \n](.*)\nAssistant:\s*",
    r"Function:[ \n](.*)\nAssistant:\s*",
    "</s>",
  ),
)


def split_row(row: StepRow, where: str) -> list[Message]:
  """system, user, (assistant, function)*, assistant."""
  matches = [(re.fullmatch(f[0], row.prompts[0], re.DOTALL), *f[1:]) for f in _FAMILIES]
  match, observation, end = next((m for m in matches if m[0]), (None, "", ""))
  if match is None:
    raise ValueError(
      f"{where}: the prompt is of no known family (ToolLLaMA, ChatML, Llama-3.1), it starts with "
      f"{row.prompts[0]!r:.60}"
    )
  messages = [Message("system", match[1]), Message("user", match[2])]
  for k, response in enumerate(row.responses):
    if k:
      match = re.fullmatch(observation, row.prompts[k], re.DOTALL)
      if match is None:
        raise ValueError(
          f"{where}, step {k}: the observation is not in the scaffolding of its prompt, it starts "
          f"with {row.prompts[k]!r:.60}"
        )
      messages.append(Message("function", match[1]))
    messages.append(Message("assistant", response.rstrip("\n").removesuffix(end)))
  return messages


_TURN = re.compile(r"^(System|User|Assistant|Function):[ \n]?", re.MULTILINE)


def split_react(prompt: str, where: str) -> list[Message]:
  """A prompt of `Role: text` lines that ends in an empty `Assistant:` -> its messages.

  ValueError when the roles are not system, user, (assistant, function)*.
  """
  parts = _TURN.split(prompt)
  messages = [
    Message(role.lower(), text.removesuffix("\n"))
    for role, text in zip(parts[1::2], parts[2::2], strict=True)
  ]
  expected = ["system", "user", "assistant"] + ["function", "assistant"] * (len(messages) // 2 - 1)
  if parts[0].strip() or [m.role for m in messages] != expected or messages[-1].text.strip():
    raise ValueError(
      f"{where}: the prompt must hold System, User, then Assistant and Function in turn, and end "
      f"in an empty Assistant; found {[m.role for m in messages]}"
    )
  return messages[:-1]


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How a format spells a turn. `between` stands between two turns, not in front of the first."""

  start: list[Piece]
  between: str
  turn: Callable[[str, str], list[Piece]]  # of (role, text)
  header: list[Piece]  # of the assistant's turn


def _layout(chat_format: ChatFormat) -> _Layout:
  codec = chat_format.codec
  if chat_format.name == "toolllama":
    # Llama-2's own tokenizer puts a space in front of a prompt, and only there.
    start: list[Piece] = [Control(codec.control_name(codec.bos_id))]
    start += [" "] if codec.prefix_space else []
    return _Layout(
      start, "\n", lambda role, text: [f"{role.capitalize()}: {text}"], ["Assistant:\n"]
    )
  if chat_format.name == "chatml_react":
    begin, end = Control("<|im_start|>"), Control("<|im_end|>")
    return _Layout(
      [], "\n", lambda role, text: [begin, f"{role}\n", text, end], [begin, "assistant\n"]
    )
  if chat_format.name == "llama31":
    names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    first, last, eot = (Control(name) for name in names)
    return _Layout(
      [Control("<|begin_of_text|>")],
      "",
      lambda role, text: [first, role, last, "\n\n", text, eot],
      [first, "assistant", last, "\n\n"],
    )
  raise ValueError(
    f"chat_format {chat_format.name!r}: the official rows are ReAct text (Thought, Action, Action "
    "Input); choose toolllama, chatml_react or llama31"
  )


def tokenise(
  prompt: Sequence[Message], rest: Sequence[Message], chat_format: ChatFormat
) -> tuple[np.ndarray, list[np.ndarray]]:
  """(int32[P] of the prompt, int32 ids of every message of `rest`), which starts with a response.

  Each response ends in the stop token; every other message carries the assistant header behind it.
  """
  layout = _layout(chat_format)
  stop = np.int32(chat_format.stop_ids[0])
  parts: list[np.ndarray] = []
  pending: list[Piece] = list(layout.start)
  for number, message in enumerate((*prompt, *rest)):
    if number:
      pending.append(layout.between)
    if message.role == "assistant":
      parts.append(chat_format.codec.join([*pending, *layout.header]))
      # Outer newlines belong to the scaffolding, which the files spell with and without.
      parts.append(np.append(chat_format.codec.join([message.text.strip("\n")]), stop))
      pending = []
    else:
      text = message.text
      if number == 1:  # the query, as the formats spell it
        text = "\n" + text.strip("\n") + "\n"
      pending += layout.turn(message.role, text)
  split = len(parts) - len(rest)
  return np.concatenate(parts[:split]), parts[split:]
