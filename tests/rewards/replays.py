"""Trajectories out of action sequences: each call is answered by a session of the environment."""

import numpy as np

from steptool_jax.types import Code, Finish, Malformed, Observation, Status, Step, Trajectory


def step(action, observation=None, **rest):
  return Step(np.zeros(1, np.int32), np.zeros(1, np.float32), action, observation, **rest)


def trajectory(task, steps, solved=0.0, status=Status.ANSWERED):
  return Trajectory(task.id, 0, np.zeros(1, np.int32), tuple(steps), status, solved)


def replay(env, task, actions, status=Status.ANSWERED):
  session = env.open(task, 0)
  steps, solved = [], 0.0
  for action in actions:
    if isinstance(action, Finish):
      solved = session.grade(None if action.gave_up else action.answer)
      steps.append(step(action))
    elif isinstance(action, Malformed):
      steps.append(step(action, Observation(action.reason, Code.MALFORMED)))
    else:
      steps.append(step(action, session.call(action)))
  session.close()
  return trajectory(task, steps, solved, status)
