"""Recall of relevant tools. StepTool prints it without a definition; ours is

    recall(task) = |called ∩ relevant| / |relevant|        recall = mean over tasks

over the set of functions that the final chain calls (the conversation that ends in the answer, not
the branches that a search left), whether or not a call succeeded. Finish is never relevant.
"""

from collections.abc import Collection, Iterable, Mapping

from steptool_jax.types import Status, ToolCall, Trajectory, by_call


def recall(trajectory: Trajectory, relevant: Collection[str]) -> float:
  """The share of the relevant functions (at least one) that the trajectory calls."""
  steps = by_call(trajectory.steps)
  called = {step.action.name for step in steps if isinstance(step.action, ToolCall)}
  return len(called.intersection(relevant)) / len(set(relevant))


def mean_recall(
  trajectories: Iterable[Trajectory], relevant: Mapping[str, Collection[str]]
) -> tuple[float, int]:
  """(mean over tasks, how many there are); several samples of a task are averaged first.

  relevant: task id -> function names. Tasks without any, for which recall is undefined, and
  trajectories that ended in an infrastructure error are left out; NaN when nothing is left.
  """
  values: dict[str, list[float]] = {}
  for trajectory in trajectories:
    names = relevant[trajectory.task_id]
    if names and trajectory.status is not Status.INFRASTRUCTURE_ERROR:
      values.setdefault(trajectory.task_id, []).append(recall(trajectory, names))
  means = [sum(of_task) / len(of_task) for of_task in values.values()]
  return (sum(means) / len(means) if means else float("nan")), len(means)
