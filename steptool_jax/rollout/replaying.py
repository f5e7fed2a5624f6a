"""Demonstrated actions -> trajectories, through the same state machine that rollouts use."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.environments.base import TURNS, Environment, Session
from steptool_jax.rollout.conversation import Conversation, Limits, State
from steptool_jax.simulators import parallel
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.runner import ToolRunner, TooManyStuck
from steptool_jax.types import (
  Action,
  Code,
  Finish,
  Observation,
  Status,
  Step,
  Task,
  ToolCall,
  ToolCalls,
  Trajectory,
  by_call,
)

T = TypeVar("T")


def replay_actions(
  environment: Environment,
  task: Task,
  actions: Sequence[Action],
  chat_format: ChatFormat,
  limits: Limits,
  system: str | None = None,
  sample: int = 0,
  runner: ToolRunner | None = None,
) -> Trajectory:
  """Replays `actions` in a fresh session; the environment's real answers become observations.

  After an injected fault the action is repeated, as a policy must do it: what comes next uses the
  answer. Log-probs are 0: nobody sampled these tokens. A demonstration that does not fit the limits
  ends in its status (STEP_BUDGET, TOKEN_BUDGET) with the steps that fit, one whose tools are down
  in INFRASTRUCTURE_ERROR; the caller leaves those out and counts them.

  runner: runs every call, and opens and grades, with its time-out and retries; a call that takes
  longer is a TIMEOUT observation. Without one, a tool that hangs hangs this call.

  Raises:
    ValueError: the actions end before the conversation does.
    RuntimeError: a checker raised, or returned nonsense.
    TooManyStuck: more calls hang than the runner may leave behind.
  """
  conversation = Conversation(task, sample, chat_format, limits, system)
  replaying = _Replaying(environment, runner)
  session = replaying.opened(task, sample)
  if session is None:
    return unopened(task, sample)
  try:
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
          observation = replaying.answered(session, conversation.call)
          faulted = observation is not None and observation.injected
          conversation.observe(observation)
          action = to_repeat(action, observation) if faulted else action
    if conversation.state is not State.DONE:
      raise ValueError(f"the demonstration of task {task.id!r} does not end in Finish")
    trajectory = conversation.trajectory(0.0, 0)
    return replaying.graded(session, trajectory, conversation.answer)
  finally:
    session.close()


def perform(
  environment: Environment,
  task: Task,
  actions: Sequence[Action],
  sample: int = 0,
  runner: ToolRunner | None = None,
) -> Trajectory:
  """The same replay without a chat format: no tokens, and so no limits. For checks of tasks whose
  model is not there. Raises as `replay_actions`.
  """
  replaying = _Replaying(environment, runner)
  session = replaying.opened(task, sample)
  if session is None:
    return unopened(task, sample)
  nothing = np.zeros(0, np.int32)
  steps: list[Step] = []
  status, answer = Status.STEP_BUDGET, None
  try:
    for action in actions:
      observation = None
      if not isinstance(action, Finish) or task.metadata.get(TURNS):
        observation = replaying.answered(session, action)
        while observation is not None and observation.injected:
          steps.append(Step(nothing, nothing.astype(np.float32), action, observation))
          action = to_repeat(action, observation)
          observation = replaying.answered(session, action)
      steps.append(Step(nothing, nothing.astype(np.float32), action, observation))
      if observation is None:
        status, answer = Status.ANSWERED, action.answer
        break
      if observation.code is Code.INFRASTRUCTURE:
        status = Status.INFRASTRUCTURE_ERROR
        break
    if status is Status.STEP_BUDGET:
      raise ValueError(f"the demonstration of task {task.id!r} does not end in Finish")
    trajectory = Trajectory(task.id, sample, nothing, tuple(steps), status)
    return replaying.graded(session, trajectory, answer)
  finally:
    session.close()


def answered(
  session: Session, action: ToolCall | ToolCalls | Finish, runner: ToolRunner | None
) -> Observation | None:
  """What follows a demonstrated action: the answer to its calls, or the user's to an answer."""
  if isinstance(action, Finish):
    limit_s = None if runner is None else runner.reply_s
    what = "the user's reply"
    return _within(runner, what, lambda: session.reply(action.answer), limit_s=limit_s)
  if runner is None:
    return parallel.call(session, action)
  return parallel.submit(runner, session, action).result()


def to_repeat(action: Action, observation: Observation) -> Action:
  """What has to be done again after injected faults: of several calls those that they have hit."""
  if not isinstance(action, ToolCalls):
    return action
  pairs = zip(action.calls, observation.parts, strict=True)
  hit = tuple(call for call, part in pairs if part.injected)
  return dataclasses.replace(action, calls=hit) if len(hit) > 1 else hit[0]


def unopened(task: Task, sample: int, version: int = 0) -> Trajectory:
  """The empty trajectory of a task whose session could not be opened; version: of the policy."""
  nothing = np.zeros(0, np.int32)
  status = Status.INFRASTRUCTURE_ERROR
  return Trajectory(task.id, sample, nothing, (), status, policy_version=version)


def hung(trajectory: Trajectory) -> bool:
  """Whether one of its calls took longer than its time-out, and no injected fault said so."""
  return any(
    s.observation is not None and s.observation.code is Code.TIMEOUT and not s.observation.injected
    for s in by_call(trajectory.steps)
  )


class _Replaying:
  """The blocking work of a replay, with a runner's time-out where there is a runner."""

  def __init__(self, environment: Environment, runner: ToolRunner | None):
    self._environment, self._runner = environment, runner

  def opened(self, task: Task, sample: int):
    """A session; None where its infrastructure is down or it takes too long."""
    try:
      return _within(
        self._runner,
        f"opening a session for task {task.id}",
        lambda: self._environment.open(task, sample),
        lambda late: late.close(),
      )
    except TooManyStuck:
      raise
    except InfrastructureError:
      return None

  def answered(self, session, action: ToolCall | ToolCalls | Finish) -> Observation | None:
    return answered(session, action, self._runner)

  def graded(self, session, trajectory: Trajectory, answer: str | None) -> Trajectory:
    """The trajectory with its checker's verdict; one that is down marks it."""
    if trajectory.status is Status.INFRASTRUCTURE_ERROR:
      return trajectory
    try:
      solved = _within(
        self._runner, f"grading task {trajectory.task_id}", lambda: session.grade(answer)
      )
    except TooManyStuck:
      raise
    except InfrastructureError:
      return dataclasses.replace(trajectory, status=Status.INFRASTRUCTURE_ERROR)
    return dataclasses.replace(trajectory, solved=float(solved))


def _within(
  runner: ToolRunner | None,
  what: str,
  work: Callable[[], T],
  late: Callable[[T], object] | None = None,
  limit_s: float | None = None,
) -> T:
  return work() if runner is None else runner.within(work, what, late, limit_s=limit_s)
