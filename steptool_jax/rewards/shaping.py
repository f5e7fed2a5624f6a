"""Step rewards from SC, Con and IsSolved (StepTool, section 3.2).

r_k = (alpha * SC_k + Con_k) / (alpha + 1) for intermediate steps, r_S = IsSolved for the last one.
alpha = 1 gives the numbers of the released annotations.
"""

import dataclasses
import math
from typing import Literal

from steptool_jax.types import Status, Trajectory

Normalization = Literal["none", "mean"]


def shape(
  trajectory: Trajectory,
  alpha: float = 1.0,
  normalization: Normalization = "mean",
  outcome_only: bool = False,
) -> Trajectory:
  """The same trajectory with `reward` (float) on every step.

  A terminated trajectory's last step earns IsSolved. A truncated one has no last step in this
  sense: all its steps are intermediate. "mean" divides the intermediate rewards by their number:
  their sum stays in [0, 1], so that neither more calls nor a retry outscore a first-try success;
  with "none" every further successful call adds up. outcome_only: intermediate rewards are 0.
  An INFRASTRUCTURE_ERROR earns 0 everywhere (and is kept out of training).

  ValueError for alpha < 0, an unknown normalization, or SC, Con, IsSolved outside [0, 1].
  """
  if not (math.isfinite(alpha) and alpha >= 0):
    raise ValueError(f"alpha is {alpha}: must be a finite number >= 0")
  if normalization not in ("none", "mean"):
    raise ValueError(f"normalization is {normalization!r}: must be 'none' or 'mean'")
  if not 0 <= trajectory.solved <= 1:
    raise ValueError(f"{trajectory.task_id}: solved is {trajectory.solved}, outside [0, 1]")
  for k, step in enumerate(trajectory.steps):
    for field, value in (("SC", step.success_calling), ("Con", step.contribution)):
      if not 0 <= value <= 1:
        raise ValueError(f"{trajectory.task_id}, step {k}: {field} is {value}, outside [0, 1]")

  count = len(trajectory.steps) - (not trajectory.truncated)  # intermediate steps
  if outcome_only or trajectory.status == Status.INFRASTRUCTURE_ERROR:
    scale = 0.0
  else:
    scale = 1.0 / count if normalization == "mean" and count > 0 else 1.0
  rewards = [
    scale * (alpha * step.success_calling + step.contribution) / (alpha + 1)
    for step in trajectory.steps
  ]
  if rewards and not trajectory.truncated:
    failed = trajectory.status == Status.INFRASTRUCTURE_ERROR
    rewards[-1] = 0.0 if failed else float(trajectory.solved)
  steps = tuple(
    dataclasses.replace(step, reward=float(reward))
    for step, reward in zip(trajectory.steps, rewards, strict=True)
  )
  return dataclasses.replace(trajectory, steps=steps)
