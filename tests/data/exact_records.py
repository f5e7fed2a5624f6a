"""Records that a format has to give back bit by bit, and how to compare them."""

import dataclasses

import numpy as np

from steptool_jax.data.trajectories import AnnotatedTrajectory
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


def step(action, observation=None, seed=0, **rest):
  rng = np.random.default_rng(seed)
  # Log-probs of every magnitude, the smallest subnormal and minus zero among them.
  bits = np.array([0x80000000, 0x80000001, 0xC2C80001, 0xBF000000, 0xBEAAAAAB], np.uint32)
  logprobs = np.concatenate([bits.view(np.float32), -rng.exponential(1, 3).astype(np.float32)])
  tokens = np.array([0, 1, 2**31 - 1, -1, 128_000, 5, 6, 7], np.int32)
  return Step(tokens, logprobs, action, observation, **rest)


STEPS = (
  step(
    ToolCall("f", {"a": [1, 2.5, None, True, "\ud800 \u2028 ü"], "b": {"c": 10**30}}, "hm\n"),
    Observation('{"x": "</s>\n"}', Code.OK, {"x": [0.1, 1e-300]}, True, False, 0.25, 0.003, 1.1),
    observation_tokens=np.array([9, 8], np.int32),
    success_calling=1 / 3,
    contribution=0.1 + 0.2,
    reward=2 / 3,
  ),
  step(Malformed("no 'Action:'"), Observation("e", Code.MALFORMED, injected=True), 1, reward=-0.0),
  step(Malformed("own"), None, 3, prompt_tokens=np.array([1, 2**31 - 1, 6], np.int32)),
  step(Finish("ja", False, "so"), None, 2, reward=1.0),
)
RECORD = AnnotatedTrajectory(
  Trajectory(
    "t/ü",
    3,
    np.array([1, 5], np.int32),
    STEPS,
    Status.ANSWERED,
    5e-324,
    17,
    reward_parts={"solved": 0.1 + 0.2, "cost": 1 / 3},
  ),
  query="Rain?",
  metadata={"source": ["a.csv", 4]},
)
EMPTY = AnnotatedTrajectory(
  Trajectory("e", 0, np.zeros(0, np.int32), (), Status.INFRASTRUCTURE_ERROR)
)


def unknown(record):
  steps = tuple(
    dataclasses.replace(s, logprobs=np.full(len(s.tokens), np.nan, np.float32))
    for s in record.trajectory.steps
  )
  trajectory = dataclasses.replace(record.trajectory, steps=steps)
  return dataclasses.replace(record, trajectory=trajectory, logprobs_known=False)


def exactly(value):
  """Everything of a record in a form that == compares by bits and types."""
  if isinstance(value, np.ndarray):
    return str(value.dtype), value.shape, value.tobytes()
  if dataclasses.is_dataclass(value):
    fields = {f.name: exactly(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return type(value).__name__, fields
  if isinstance(value, dict):
    return {k: exactly(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [exactly(v) for v in value]
  return type(value).__name__, repr(value)
