"""Figures of a set of trajectories: pass rate, calls, errors. Host side, plain NumPy."""

from collections.abc import Sequence

import numpy as np

from steptool_jax.rollout.conversation import INVALID
from steptool_jax.types import Code, Status, ToolCall, Trajectory


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
  """Means over trajectories; infrastructure errors are counted and otherwise left out.

  pass_rate is the mean of IsSolved; reward the mean of summed step rewards; invalid_call_rate and
  invocation_success are shares of calls; recovery is the share of trajectories with a failed call
  that are solved all the same (NaN-free: 0 where there is none).
  """
  healthy = [t for t in trajectories if t.status is not Status.INFRASTRUCTURE_ERROR]
  steps = [step for t in healthy for step in t.steps]
  codes = [step.observation.code for step in steps if step.observation is not None]
  calls = [step for step in steps if isinstance(step.action, ToolCall)]
  failed = [
    t
    for t in healthy
    if any(s.observation is not None and s.observation.code is not Code.OK for s in t.steps)
  ]
  return {
    "pass_rate": _mean([t.solved for t in healthy]),
    "reward": _mean([sum(s.reward for s in t.steps) for t in healthy]),
    "success_calling": _mean([s.success_calling for s in calls]),
    "contribution": _mean([s.contribution for s in calls]),
    "calls_per_task": _mean(
      [sum(isinstance(s.action, ToolCall) for s in t.steps) for t in healthy]
    ),
    "tokens_per_task": _mean([t.num_tokens for t in healthy]),
    "invalid_call_rate": _mean([code in INVALID for code in codes]),
    "invocation_success": _mean([code is Code.OK for code in codes]),
    "recovery": _mean([t.solved for t in failed]),
    "answered": _mean([t.status is Status.ANSWERED for t in healthy]),
    "gave_up": _mean([t.status is Status.GAVE_UP for t in healthy]),
    "truncated": _mean([t.truncated for t in healthy]),
    "infrastructure_errors": float(len(trajectories) - len(healthy)),
  }


def _mean(values: Sequence[float]) -> float:
  return float(np.mean(values)) if len(values) else 0.0
