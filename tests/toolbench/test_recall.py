import numpy as np

from steptool_jax.toolbench.recall import mean_recall, recall
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


def trajectory(task, *names, status=Status.ANSWERED):
  actions = [*(ToolCall(name, {}) for name in names), Malformed("sun_for_sky"), Finish("x")]
  failed = Observation("no", Code.TOOL_ERROR)
  steps = tuple(
    Step(np.zeros(1, np.int32), np.zeros(1, np.float32), action, failed) for action in actions
  )
  return Trajectory(task, 0, np.zeros(1, np.int32), steps, status)


def test_by_hand():
  """Calls count whether they succeed or not, a repeated one once; a malformed turn is no call."""
  relevant = ["rain_for_sky", "sun_for_sky", "find_for_map"]
  assert recall(trajectory("a"), relevant) == 0
  assert recall(trajectory("a", "rain_for_sky", "rain_for_sky", "other"), relevant) == 1 / 3
  assert recall(trajectory("a", *relevant), relevant) == 1


def test_samples_of_a_task_are_averaged_before_tasks():
  relevant = {
    "a": ["rain_for_sky", "sun_for_sky"],
    "b": ["find_for_map"],
    "c": [],
    "d": ["find_for_map"],
  }
  made = [
    trajectory("a", "rain_for_sky"),
    trajectory("a", "rain_for_sky", "sun_for_sky"),
    trajectory("b", "sun_for_sky"),
    trajectory("c", "sun_for_sky"),
    trajectory("d", "find_for_map", status=Status.INFRASTRUCTURE_ERROR),
  ]
  assert mean_recall(made, relevant) == (0.375, 2)
  assert np.isnan(mean_recall(made[3:], relevant)[0])
