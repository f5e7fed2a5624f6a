"""Official step annotations, as a source of SC, Con and IsSolved.

The released training rows lie on the grid of r = .5 SC + .5 Con / 5 for three judge runs, all of
them. They are of other runs than the released annotation file, though: of its five trajectories
four are rows 1, 2, 4 and 5 of the qwen2 file, and 5 of their 11 rewards are those of the file (row
1 first step and answer, row 2 second step and answer, row 4 answer).
"""

import pathlib

from steptool_jax.rewards.responses import Transcript
from steptool_jax.rewards.scores import CONTRIBUTION_MAX, StepScores, mean
from steptool_jax.toolbench.formats import official


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
