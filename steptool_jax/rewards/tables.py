"""Step annotations that exist already, as a source of SC, Con and IsSolved; and what judge runs
come to on average.

Judges give SC in {0, 1}, Con in 0..5 and a status a run; here both are means over runs in [0, 1],
so that shaping.shape(alpha=1, normalization="none") gives r = .5 SC + .5 Con / 5.

The released training rows lie on that formula's grid for three judge runs, all of them. They are of
other runs than the released annotation file, though: of its five trajectories four are rows 1, 2, 4
and 5 of the qwen2 file, and 5 of their 11 rewards are those of the file (row 1 first step and
answer, row 2 second step and answer, row 4 answer).
"""

import dataclasses
import pathlib
import statistics
from collections.abc import Sequence

from steptool_jax.data import official
from steptool_jax.rewards.responses import Transcript, transcript
from steptool_jax.types import Status, Trajectory

CONTRIBUTION_MAX = 5


@dataclasses.dataclass(frozen=True)
class StepScores:
  """Of one trajectory: SC and Con in [0, 1] a call (Finish left out), IsSolved in [0, 1]."""

  success_calling: tuple[float, ...]
  contribution: tuple[float, ...]
  solved: float
  runs: int = 1

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
    len(runs),
  )


def apply(scores: StepScores, trajectory: Trajectory) -> Trajectory:
  """The same trajectory with these scores on its calls, 0 on Finish, and `solved`.

  ValueError when the number of calls differs, or when the trajectory ended in an infrastructure
  error, which is never scored.
  """
  if trajectory.status is Status.INFRASTRUCTURE_ERROR:
    raise ValueError(f"{trajectory.task_id}: ended in an infrastructure error, it has no score")
  calls = len(transcript("", trajectory).steps)
  if calls != len(scores.contribution):
    raise ValueError(
      f"{trajectory.task_id}: {len(scores.contribution)} scores for {calls} calls; the "
      "annotation belongs to another trajectory"
    )
  rest = (0.0,) * (len(trajectory.steps) - calls)
  steps = tuple(
    dataclasses.replace(step, success_calling=sc, contribution=con)
    for step, sc, con in zip(
      trajectory.steps, scores.success_calling + rest, scores.contribution + rest, strict=True
    )
  )
  return dataclasses.replace(trajectory, steps=steps, solved=scores.solved)


def read(path: pathlib.Path | str) -> dict[str, tuple[Transcript, StepScores]]:
  """An official reward_annotation file: query id -> the trajectory's texts and its scores.

  ValueError that names file, query and field for missing fields, wrong lengths and scores out of
  range; OSError for a missing file.
  """
  return {
    query_id: (official_transcript(entry), _scores(entry))
    for query_id, entry in official.read_annotations(path).items()
  }


def _scores(entry: official.Annotation) -> StepScores:
  return mean(
    [
      StepScores(
        tuple(map(float, sc)), tuple(con / CONTRIBUTION_MAX for con in cons), verdict.score
      )
      for sc, cons, verdict in zip(
        entry.success_calling, entry.contribution, entry.verdicts, strict=True
      )
    ]
  )


def official_transcript(entry: official.Annotation | official.Result) -> Transcript:
  """The texts of a stored trajectory; its last step is apart in one format, among the steps in
  the other."""
  finished = entry.final.name == "Finish"
  calls = entry.steps
  if finished and calls and calls[-1].name == "Finish":
    calls = calls[:-1]
  return Transcript(
    entry.query,
    tuple((f"{step.name} {step.arguments}", step.response) for step in calls),
    official.answer_of(entry.final.arguments) if finished else "",
    finished,
  )
