"""SC, Con and IsSolved of a judged trajectory, and what several judge runs come to on average.

Judges give SC in {0, 1}, Con in 0..5 and a status a run; here both are means over runs in [0, 1],
so that shaping.shape with alpha = 1 and shaping "sum" gives r = .5 SC + .5 Con / 5.
"""

import dataclasses
import statistics
from collections.abc import Sequence

from steptool_jax.rewards import marks
from steptool_jax.rewards.responses import transcript
from steptool_jax.types import Status, Trajectory

CONTRIBUTION_MAX = 5


@dataclasses.dataclass(frozen=True)
class StepScores:
  """One trajectory's SC and Con in [0, 1], of every call but Finish, and IsSolved in [0, 1]."""

  success_calling: tuple[float, ...]
  contribution: tuple[float, ...]
  solved: float

  def __post_init__(self):
    if len(self.success_calling) != len(self.contribution):
      raise ValueError(
        f"{len(self.success_calling)} scores of success_calling and {len(self.contribution)} of "
        "contribution: there must be one of each a call"
      )
    if not all(0 <= v <= 1 for v in (*self.success_calling, *self.contribution, self.solved)):
      raise ValueError(f"scores outside [0, 1]: {self}")


def mean(runs: Sequence[StepScores]) -> StepScores:
  """Average over judge runs of one trajectory. ValueError for none, or for different lengths."""
  if not runs:
    raise ValueError("no judge run to average")

  def average(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(statistics.fmean(column) for column in zip(*rows, strict=True))

  return StepScores(
    average([run.success_calling for run in runs]),
    average([run.contribution for run in runs]),
    statistics.fmean(run.solved for run in runs),
  )


def apply(scores: StepScores, trajectory: Trajectory) -> Trajectory:
  """The same trajectory with these scores on its calls, 0 on Finish, and `solved`.

  Of a turn with several calls a step has their means.

  ValueError when the number of calls differs, or when the trajectory ended in an infrastructure
  error, which is never scored.
  """
  if trajectory.status is Status.INFRASTRUCTURE_ERROR:
    raise ValueError(f"{trajectory.task_id}: ended in an infrastructure error, it has no score")
  texts = transcript("", trajectory)
  calls = len(texts.steps)
  if calls != len(scores.contribution):
    raise ValueError(
      f"{trajectory.task_id}: {len(scores.contribution)} scores for {calls} calls; the "
      "annotation belongs to another trajectory"
    )
  found = list(zip(scores.success_calling, scores.contribution, strict=True))
  marked = marks.on_calls(trajectory, found, texts.finished)
  return dataclasses.replace(marked, solved=scores.solved)
