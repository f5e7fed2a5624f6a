"""Recall of relevant tools. StepTool prints it without a definition; ours is

    recall(task) = |called ∩ relevant| / |relevant|        recall = mean over tasks

over the set of functions that the final chain calls (the conversation that ends in the answer, not
the branches that a search left), whether or not a call succeeded. Both sides are compared as
function names: the query file's "relevant APIs" are [tool, API] pairs and are named by the official
rules, which the caller gives (environments/toolbench). Finish is never relevant.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from steptool_jax.dialogue.parser import FINISH
from steptool_jax.types import Status, ToolCall, Trajectory

Namer = Callable[[str, str], str]  # (tool name, API name) -> function name


@dataclasses.dataclass(frozen=True)
class Recall:
  mean: float  # over the tasks counted; NaN when there is none
  tasks: int
  without_relevant: tuple[str, ...]  # ids of tasks that name no relevant API: recall is undefined
  infrastructure: tuple[str, ...]  # ids of tasks left out because of an infrastructure error
  of_task: Mapping[str, float]


def called_functions(trajectory: Trajectory) -> frozenset[str]:
  """Names that the trajectory's calls name, Finish apart."""
  names = (step.action.name for step in trajectory.steps if isinstance(step.action, ToolCall))
  return frozenset(name for name in names if name != FINISH)


def recall(called: Iterable[str], relevant: Iterable[tuple[str, str]], name_of: Namer) -> float:
  """Recall of one task in [0, 1]; ValueError when nothing is relevant."""
  wanted = {name_of(tool, api) for tool, api in relevant}
  if not wanted:
    raise ValueError("relevant: must name at least one API, recall is undefined without")
  return len(wanted.intersection(called)) / len(wanted)


def macro_recall(
  trajectories: Iterable[Trajectory],
  relevant: Mapping[str, Iterable[tuple[str, str]]],
  name_of: Namer,
) -> Recall:
  """Mean recall over tasks; several samples of one task are averaged first.

  relevant: task id -> [tool, API] pairs. ValueError names a task that is not in it.
  """
  scores: dict[str, list[float]] = {}
  without, broken = set(), set()
  for trajectory in trajectories:
    task = trajectory.task_id
    if task not in relevant:
      raise ValueError(f"task {task!r} is not among the {len(relevant)} tasks of `relevant`")
    pairs = list(relevant[task])
    if trajectory.status is Status.INFRASTRUCTURE_ERROR:
      broken.add(task)
    elif not pairs:
      without.add(task)
    else:
      scores.setdefault(task, []).append(recall(called_functions(trajectory), pairs, name_of))
  of_task = {task: sum(values) / len(values) for task, values in scores.items()}
  mean = sum(of_task.values()) / len(of_task) if of_task else float("nan")
  return Recall(
    mean, len(of_task), tuple(sorted(without)), tuple(sorted(broken - set(of_task))), of_task
  )
