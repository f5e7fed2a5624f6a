"""Demonstrated actions -> trajectories, through the same state machine that rollouts use."""

from collections.abc import Sequence

import numpy as np

from steptool_jax.dialogue.template import ChatFormat
from steptool_jax.environments.base import Environment
from steptool_jax.rollout.conversation import Conversation, Limits, State
from steptool_jax.types import Action, Task, Trajectory


def replay_actions(
  environment: Environment,
  task: Task,
  actions: Sequence[Action],
  chat_format: ChatFormat,
  limits: Limits,
  system: str | None = None,
  sample: int = 0,
) -> Trajectory:
  """Replays `actions` in a fresh session; the environment's real answers become observations.

  After an injected fault the action is repeated, as a policy must do it: what comes next uses the
  answer. Log-probs are 0: nobody sampled these tokens. A demonstration that does not fit the limits
  ends in its status (STEP_BUDGET, TOKEN_BUDGET) with the steps that fit, one whose tools are down
  in INFRASTRUCTURE_ERROR; the caller leaves those out and counts them.

  Raises:
    ValueError: the actions end before the conversation does.
  """
  session = environment.open(task, sample)
  try:
    conversation = Conversation(task, sample, chat_format, limits, system)
    for action in actions:
      faulted = True
      while faulted and conversation.state is State.NEEDS_APPEND:
        ids = chat_format.render_action(action)
        conversation.appended()
        ids = ids[: conversation.budget()]
        stopped = int(ids[-1]) in chat_format.stop_ids
        conversation.sampled(ids, np.zeros(len(ids), np.float32), stopped)
        faulted = False
        if conversation.state is State.CALLING:
          observation = session.call(conversation.call)
          faulted = observation.injected
          conversation.observe(observation)
    if conversation.state is not State.DONE:
      raise ValueError(f"the demonstration of task {task.id!r} does not end in Finish")
    return conversation.trajectory(session.grade(conversation.answer), 0)
  finally:
    session.close()
