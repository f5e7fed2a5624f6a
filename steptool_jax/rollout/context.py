"""What the next turn sees where history is changed: thoughts stripped, results folded.

Usually a conversation only grows, and a turn sees all that was sampled and shown before. Two rules
take something back, which a next turn does not see any more:

    model.thinking  the <think> blocks of earlier turns (ChatFormat.without_thoughts)
    rollout.fold    results that are not among the newest n: one line stands in their place

The step after such a change has a prompt of its own (Step.prompt_tokens). It is made out of the ids
that were sampled and shown, not of their text.
"""

from collections.abc import Sequence

import numpy as np

from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.types import Finish, Step

FOLDED = "(an earlier result, left out)"


def changes(chat_format: ChatFormat, fold: int) -> bool:
  """Whether there is a rule."""
  return chat_format.thinking != "kept" or fold > 0


def shown(
  chat_format: ChatFormat, fold: int, prompt: np.ndarray, steps: Sequence[Step]
) -> np.ndarray:
  """int32[N] in front of the turn after `steps`, the last observation and the header included.

  Where a step with an answer is followed by another one, the user has spoken again: that is where
  thinking "template" takes thoughts back. What the user said is not folded.
  """
  spoke = max((k for k, step in enumerate(steps) if isinstance(step.action, Finish)), default=-1)
  thoughtless = {"kept": 0, "template": spoke + 1, "stripped": len(steps)}[chat_format.thinking]
  line = chat_format.observation(FOLDED) if fold else None
  results = [k for k, step in enumerate(steps) if not isinstance(step.action, Finish)]
  older = set(results[:-fold]) if fold else set()
  pieces = [prompt]
  for k, step in enumerate(steps):
    turn, seen = step.tokens, step.observation_tokens
    if k < thoughtless:
      turn = chat_format.without_thoughts(turn)
    if k in older:
      closed = step.tokens[-1] in chat_format.stop_ids
      short = line if closed else np.append(np.int32(chat_format.stop_ids[0]), line)
      seen = short if len(short) < len(seen) else seen
    pieces += [turn, seen]
  return np.concatenate(pieces).astype(np.int32)


def common(before: np.ndarray, after: np.ndarray) -> int:
  """Ids that both begin with."""
  size = min(len(before), len(after))
  differ = np.flatnonzero(before[:size] != after[:size])
  return int(differ[0]) if len(differ) else size
