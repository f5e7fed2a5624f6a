"""Step rewards from SC, Con and IsSolved (StepTool, section 3.2).

r_k = (alpha * SC_k + Con_k) / (alpha + 1) for intermediate steps, r_S = IsSolved for the last one.
alpha = 1 gives the numbers of the released annotations.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from steptool_jax.types import Status, Trajectory

Normalization = Literal["none", "mean"]


def shape(
  trajectory: Trajectory,
  alpha: float = 1.0,
  normalization: Normalization = "mean",
  outcome_only: bool = False,
  final: Mapping[str, float] | None = None,
) -> Trajectory:
  """The same trajectory with `reward` (float) on every step, and reward_parts of their sum.

  A terminated trajectory's last step earns IsSolved, or the parts in `final` if there are some
  (rewards/orchestra.py). A truncated one has no last step in this sense: all its steps are
  intermediate. "mean" divides the intermediate rewards by their number: their sum stays in [0, 1],
  so that neither more calls nor a retry outscore a first-try success; with "none" every further
  successful call adds up. outcome_only: intermediate rewards are 0. An INFRASTRUCTURE_ERROR earns 0
  everywhere (and is kept out of training).

  reward_parts: success_calling, contribution, and solved or the names in `final`.

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
  intermediate = trajectory.steps[:count]
  parts = {
    "success_calling": scale * alpha / (alpha + 1) * sum(s.success_calling for s in intermediate),
    "contribution": scale / (alpha + 1) * sum(s.contribution for s in intermediate),
  }
  last = {"solved": float(trajectory.solved)} if final is None else dict(final)
  if not rewards or trajectory.truncated or trajectory.status == Status.INFRASTRUCTURE_ERROR:
    last = dict.fromkeys(last, 0.0)
  if rewards and not trajectory.truncated:
    rewards[-1] = sum(last.values())
  steps = tuple(
    dataclasses.replace(step, reward=float(reward))
    for step, reward in zip(trajectory.steps, rewards, strict=True)
  )
  return dataclasses.replace(trajectory, steps=steps, reward_parts=parts | last)
