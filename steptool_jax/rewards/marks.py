"""SC and Con of calls, put on the steps that made them."""

import dataclasses
import itertools
from collections.abc import Sequence

from steptool_jax.types import Trajectory, by_call


def on_calls(
  trajectory: Trajectory, marks: Sequence[tuple[float, float]], finished: bool
) -> Trajectory:
  """`on_steps` for marks of calls alone; finished: the last step is Finish, which earns 0."""
  return on_steps(trajectory, [*marks, (0.0, 0.0)] if finished else marks)


def on_steps(trajectory: Trajectory, marks: Sequence[tuple[float, float]]) -> Trajectory:
  """The same trajectory with (SC, Con) on every step: of a turn with several calls their means.

  marks: one of each of `by_call(trajectory.steps)`, in that order. ValueError for another number.
  """
  counts = [len(by_call([step])) for step in trajectory.steps]
  if sum(counts) != len(marks):
    raise ValueError(f"{trajectory.task_id}: {len(marks)} marks for {sum(counts)} calls")
  rest = iter(marks)
  steps = []
  for step, count in zip(trajectory.steps, counts, strict=True):
    scs, cons = zip(*itertools.islice(rest, count), strict=True)
    steps.append(
      dataclasses.replace(step, success_calling=sum(scs) / count, contribution=sum(cons) / count)
    )
  return dataclasses.replace(trajectory, steps=tuple(steps))
