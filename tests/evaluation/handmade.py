"""Trajectories written down by hand, for tests of what is counted on them."""

import numpy as np

from steptool_jax.types import (
  Code,
  Finish,
  Malformed,
  Observation,
  Status,
  Step,
  ToolCall,
  Trajectory,
)


def call(name, code=Code.OK, injected=False, changed=False, text="", **arguments) -> Step:
  answer = text or str(code)
  observation = Observation(answer, code, injected=injected, changed=changed)
  return _step(ToolCall(name, arguments, thought=f"try {name}"), observation)


def finish(answer="42") -> Step:
  return _step(Finish(answer))


def give_up() -> Step:
  return _step(Finish("", gave_up=True))


def malformed() -> Step:
  return _step(Malformed("no JSON"), Observation("no JSON", Code.MALFORMED))


def trajectory(*steps, task="t", sample=0, solved=0.0, status=None) -> Trajectory:
  if status is None:
    last = steps[-1].action
    status = Status.STEP_BUDGET
    if isinstance(last, Finish):
      status = Status.GAVE_UP if last.gave_up else Status.ANSWERED
  return Trajectory(task, sample, np.arange(3, dtype=np.int32), steps, status, solved)


def _step(action, observation=None) -> Step:
  return Step(
    tokens=np.array([4, 5], np.int32),
    logprobs=np.array([-0.5, -0.25], np.float32),
    action=action,
    observation=observation,
    success_calling=float(observation is not None and observation.code is Code.OK),
    contribution=0.5,
    reward=0.25,
  )
