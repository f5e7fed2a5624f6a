"""Con as information gain (IGPO, Wang et al. 2025, arXiv 2510.14967, section 3.2). Host side.

    p_k = exp(1 / L sum_j log pi(a_j | what was shown up to and with step k, a_<j))
    IG_k = p_k - p_{k-1}            p_{-1}: after the prompt alone

pi is the policy that is trained, as it is now; a are the L tokens of the gold answer. The mean over
tokens in the exponent keeps long answers comparable; it is the paper's. Con is IG clipped to
[0, 1]: what takes the policy further from the answer earns nothing, as a call that fails does.

The answer stands where the policy would write it: in the chat format's final turn. Of that turn
the tokens in front of the answer (the name of the final action, quotation marks) are given and not
scored, nor are those behind it: they say when the policy stops and not what it knows. A task whose
final state is checked has no gold answer; its steps keep the Con of progress.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.rewards import model
from steptool_jax.types import Finish, Status, Step, Task, Trajectory

# Of these the final state is checked and the answer's text is free: no answer is the gold one.
_WITHOUT = frozenset({"state", "table"})


@dataclasses.dataclass(frozen=True)
class Gold:
  """given: int32[G], the final turn's tokens in front of the answer; answer: int32[L], L > 0."""

  given: np.ndarray
  answer: np.ndarray

  def __len__(self) -> int:
    return len(self.given) + len(self.answer)


def has_gold(task: Task) -> bool:
  """Whether the task has a gold answer."""
  last = task.demonstration[-1] if task.demonstration else None
  if not isinstance(last, Finish) or last.gave_up or not last.answer:
    return False
  return task.checker.get("type") not in _WITHOUT


def gold(task: Task, chat_format: ChatFormat) -> Gold | None:
  """The tokens of the task's gold answer; None for a task that has none."""
  if not has_gold(task):
    return None
  last = task.demonstration[-1]
  whole = chat_format.render_action(Finish(last.answer)).tolist()
  empty = chat_format.render_action(Finish("")).tolist()
  start = _common(whole, empty)
  stop = len(whole) - _common(whole[start:][::-1], empty[start:][::-1])
  ids = np.array(whole, np.int32)
  return Gold(ids[:start], ids[start:stop])


def refuse_without_gold(tasks: Sequence[Task], chat_format: ChatFormat, row_tokens: int, room: int):
  """ValueError where no task has a gold answer, or a row has no room behind a conversation.

  room: tokens that a conversation may have; row_tokens: of a packed row.
  """
  lengths = [len(found) for task in tasks if (found := gold(task, chat_format)) is not None]
  if not lengths:
    raise ValueError(
      "config.rewards.source: 'info_gain' needs tasks with a gold answer, and none of "
      f"{len(tasks)} training tasks has one (a demonstration that ends in an answer, and a checker "
      "that is not of the final state); use 'progress', or 'model', which need none"
    )
  if room + max(lengths) > row_tokens:
    raise ValueError(
      f"config.train.row_tokens: {row_tokens}, but info_gain puts gold answers of up to "
      f"{max(lengths)} tokens behind conversations of up to {room}; set it to {room + max(lengths)}"
    )


def questions(trajectory: Trajectory, answer: Gold) -> list[Trajectory]:
  """What the policy is asked: the answer after the prompt, and after every step that was answered.

  Each is a trajectory of one step, the answer's tokens, behind what was shown so far; so they are
  packed and their log-probs computed as those of any others.
  """
  shown = model.ids(trajectory)
  lengths = [len(trajectory.prompt_tokens), *(model.ends(trajectory)[_answered(trajectory)] + 1)]
  step = Step(answer.answer, np.zeros(len(answer.answer), np.float32), Finish(""))
  return [
    Trajectory(
      trajectory.task_id,
      trajectory.sample,
      np.concatenate([shown[:length], answer.given]).astype(np.int32),
      (step,),
      Status.ANSWERED,
    )
    for length in lengths
  ]


def gains(trajectory: Trajectory, logprobs: Sequence[np.ndarray]) -> Trajectory:
  """The same trajectory with Con of every step.

  logprobs: float32[L] of the answer's tokens for each of `questions`. A step whose observation was
  not shown to the policy (the last one) has told it nothing: 0. A turn of several calls has one.
  """
  chances = np.exp([np.mean(x, dtype=np.float32) for x in logprobs])
  found = np.zeros(len(trajectory.steps), np.float32)
  found[_answered(trajectory)] = np.clip(np.diff(chances), 0.0, 1.0)
  steps = tuple(
    dataclasses.replace(step, contribution=float(con))
    for step, con in zip(trajectory.steps, found, strict=True)
  )
  return dataclasses.replace(trajectory, steps=steps)


def _answered(trajectory: Trajectory) -> np.ndarray:
  return np.array([len(step.observation_tokens) > 0 for step in trajectory.steps], bool)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
  """Length of the common beginning."""
  return next(
    (k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
  )
