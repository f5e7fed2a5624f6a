"""Demonstrated actions -> trajectories, through the same state machine that rollouts use."""

from collections.abc import Sequence

import numpy as np

from steptool_jax.dialogue.template import ChatFormat
from steptool_jax.environments.base import Environment
from steptool_jax.rollout.conversation import Conversation, Limits, State
from steptool_jax.types import Action, Task, Trajectory


def demonstrate(
  environment: Environment,
  task: Task,
  actions: Sequence[Action],
  chat_format: ChatFormat,
  limits: Limits,
  system: str | None = None,
  sample: int = 0,
) -> Trajectory:
  """Replays `actions` in a fresh session; the environment's real answers become observations.

  Log-probs are 0: nobody sampled these tokens. A demonstration that does not fit the limits ends
  in its status (STEP_BUDGET, TOKEN_BUDGET) with the steps that fit; the caller counts those.

  Raises:
    ValueError: the actions end before the conversation does.
  """
  session = environment.open(task, sample)
  try:
    conversation = Conversation(task, sample, chat_format, limits, system)
    for action in actions:
      if conversation.state is not State.NEEDS_APPEND:
        break
      ids = chat_format.render_action(action)
      conversation.appended()
      ids = ids[: conversation.budget()]
      stopped = int(ids[-1]) in chat_format.stop_ids
      conversation.sampled(ids, np.zeros(len(ids), np.float32), stopped)
      if conversation.state is State.CALLING:
        conversation.observe(session.call(conversation.call))
    if conversation.state is not State.DONE:
      raise ValueError(f"the demonstration of task {task.id!r} does not end in Finish")
    return conversation.trajectory(session.grade(conversation.answer), 0)
  finally:
    session.close()
