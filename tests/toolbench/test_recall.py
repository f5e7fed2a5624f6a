import numpy as np
import pytest

from steptool_jax.toolbench.recall import called_functions, macro_recall, recall
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

NAMES = {
  ("Sky", "Rain"): "rain_for_sky",
  ("Sky", "rain"): "rain_for_sky",
  ("Sky", "Sun"): "sun_for_sky",
  ("Map", "Find"): "find_for_map",
}


def name_of(tool, api):
  return NAMES[tool, api]


def trajectory(task, *names, status=Status.ANSWERED):
  actions = [*(ToolCall(name, {}) for name in names), Malformed("sun_for_sky"), Finish("x")]
  failed = Observation("no", Code.TOOL_ERROR)
  steps = tuple(
    Step(np.zeros(1, np.int32), np.zeros(1, np.float32), action, failed) for action in actions
  )
  return Trajectory(task, 0, np.zeros(1, np.int32), steps, status)


def test_by_hand():
  relevant = [("Sky", "Rain"), ("Sky", "rain"), ("Sky", "Sun"), ("Map", "Find")]
  assert recall([], relevant, name_of) == 0
  assert recall(["rain_for_sky", "rain_for_sky", "other"], relevant, name_of) == 1 / 3
  assert recall(NAMES.values(), relevant, name_of) == 1
  with pytest.raises(ValueError, match="at least one API"):
    recall(["rain_for_sky"], [], name_of)


def test_called_are_calls_and_nothing_else():
  assert called_functions(trajectory("a", "rain_for_sky", "Finish", "x", "x")) == {
    "rain_for_sky",
    "x",
  }


def test_macro_average():
  relevant = {
    "a": [("Sky", "Rain"), ("Sky", "Sun")],
    "b": [("Map", "Find")],
    "c": [],
    "d": [("Map", "Find")],
  }
  got = macro_recall(
    [
      trajectory("a", "rain_for_sky"),
      trajectory("a", "rain_for_sky", "sun_for_sky"),  # a second sample of the same task
      trajectory("b", "sun_for_sky"),
      trajectory("c", "sun_for_sky"),
      trajectory("d", "find_for_map", status=Status.INFRASTRUCTURE_ERROR),
    ],
    relevant,
    name_of,
  )
  assert got.of_task == {"a": 0.75, "b": 0}
  assert got.mean == 0.375
  assert (got.tasks, got.without_relevant, got.infrastructure) == (2, ("c",), ("d",))


def test_an_unknown_task_is_named_and_nothing_is_nan():
  with pytest.raises(ValueError, match="task 'z' is not among"):
    macro_recall([trajectory("z")], {}, name_of)
  assert np.isnan(macro_recall([], {}, name_of).mean)
