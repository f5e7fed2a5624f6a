"""Trajectories in a checkpoint, as JSON data: ArCHer's past, those sampled ahead of their turn, and
conversations that go on.

Of the past only what the critic reads is kept: tokens, rewards, how they ended.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from steptool_jax.data.trajectories import (
  AnnotatedTrajectory,
  from_document,
  to_document,
  with_values,
)
from steptool_jax.rollout.carrying import Carried
from steptool_jax.run.training.progress import Progress
from steptool_jax.types import Malformed, Trajectory


def draw(past: Sequence[Trajectory], count: int, seed: Sequence[int]) -> list[Trajectory]:
  """`count` different ones, or all where there are fewer; decided by the seed alone."""
  chosen = np.random.default_rng(seed).permutation(len(past))[:count]
  return [past[i] for i in chosen]


def remember(
  past: Sequence[Trajectory], new: Sequence[Trajectory], capacity: int
) -> list[Trajectory]:
  """The newest `capacity` of both."""
  return [*past, *map(_bare, new)][-capacity:]


def _bare(trajectory: Trajectory) -> Trajectory:
  steps = tuple(
    dataclasses.replace(
      step, logprobs=np.zeros_like(step.logprobs), action=Malformed(""), observation=None
    )
    for step in trajectory.steps
  )
  return dataclasses.replace(trajectory, steps=steps)


def to_documents(past: Sequence[Trajectory]) -> list[dict[str, Any]]:
  return [to_document(AnnotatedTrajectory(trajectory)) for trajectory in past]


def parted(
  documents: Sequence[dict[str, Any]], progress: Progress
) -> tuple[list[Trajectory], list[Trajectory], Carried]:
  """(the past, those sampled ahead, what is carried over), as a checkpoint has them in a row."""
  left = [from_document(document).trajectory for document in documents]
  waiting, unfinished, ahead = (
    [left.pop() for _ in range(count)][::-1]
    for count in (progress.waiting, progress.unfinished, progress.ahead)
  )
  return left, ahead, Carried(tuple(unfinished), tuple(waiting))


def without_values(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
  """Paid trajectories as a checkpoint holds them: what a tool returned need not be JSON data, and
  nothing reads it after rewards but through its text."""
  return [with_values(t, lambda value: None) for t in trajectories]
