"""How files and chat formats spell a conversation: text -> messages -> ids.

Official rows spell one model family's scaffolding, which is taken off here; `tokenise` puts that of
a chat format around the messages, with control tokens as control ids and texts as plain text.
"""

import re
from collections.abc import Sequence

import numpy as np

from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.dialogue.codec import Piece
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


def tokenise(
  prompt: Sequence[Message], rest: Sequence[Message], chat_format: ChatFormat
) -> tuple[np.ndarray, list[np.ndarray]]:
  """(int32[P] of the prompt, int32 ids of every message of `rest`), which starts with a response.

  Each response ends in the stop token; every other message carries the assistant header after it.
  ValueError for a chat format that is not a ReAct one.
  """
  if not chat_format.react:
    raise ValueError(
      f"chat_format {chat_format.name!r}: the official rows are ReAct text (Thought, Action, "
      "Action Input); choose toolllama, chatml_react or llama31"
    )
  codec, stop = chat_format.codec, np.int32(chat_format.stop_ids[0])
  parts: list[np.ndarray] = []
  pending: list[Piece] = list(chat_format.start)
  for number, message in enumerate((*prompt, *rest)):
    if message.role == "assistant":
      parts.append(codec.join([*pending, *chat_format.header]))
      # Outer newlines belong to the scaffolding, which the files spell with and without.
      parts.append(np.append(codec.join([message.text.strip("\n")]), stop))
      pending = [chat_format.after_stop]
    else:
      # The second message is the query, as the formats spell it.
      text = "\n" + message.text.strip("\n") + "\n" if number == 1 else message.text
      pending += chat_format.turn(message.role, text)
  split = len(parts) - len(rest)
  return np.concatenate(parts[:split]), parts[split:]
