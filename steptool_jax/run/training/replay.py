"""Past trajectories for ArCHer's critic: drawn, kept, and as JSON data for a checkpoint.

Only what the critic reads is kept: tokens, rewards, how they ended.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from steptool_jax.data.trajectories import AnnotatedTrajectory, from_document, to_document
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


def from_documents(documents: Sequence[dict[str, Any]]) -> list[Trajectory]:
  return [from_document(document).trajectory for document in documents]
