"""The figures of a set of trajectories that evaluation/figures.py defines as ROLLOUTS."""

import json
from collections.abc import Sequence

import numpy as np

from steptool_jax.rollout.conversation import INVALID
from steptool_jax.types import Action, Code, Finish, Status, Step, ToolCall, Trajectory


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
  """figures.ROLLOUTS, by name; 0 where there is nothing to take a mean of."""
  healthy = [t for t in trajectories if t.status is not Status.INFRASTRUCTURE_ERROR]
  steps = [step for t in healthy for step in t.steps]
  codes = [step.observation.code for step in steps if step.observation is not None]
  calls = [step for step in steps if isinstance(step.action, ToolCall)]
  parts = dict.fromkeys(name for t in healthy for name in t.reward_parts)
  failed = [t for t in healthy if any(_failed(step) for step in t.steps)]
  return {
    "pass_rate": _mean([t.solved for t in healthy]),
    "reward": _mean([sum(s.reward for s in t.steps) for t in healthy]),
    **{f"reward_{p}": _mean([t.reward_parts.get(p, 0.0) for t in healthy]) for p in parts},
    "success_calling": _mean([s.success_calling for s in calls]),
    "contribution": _mean([s.contribution for s in calls]),
    "calls_per_task": _mean(
      [sum(isinstance(s.action, ToolCall) for s in t.steps) for t in healthy]
    ),
    "tokens_per_task": _mean([t.num_tokens for t in healthy]),
    "cost_per_task": _mean([t.cost for t in healthy]),
    "latency_per_task": _mean([t.latency for t in healthy]),
    "invalid_call_rate": _mean([code in INVALID for code in codes]),
    "invocation_success": _mean([code is Code.OK for code in codes]),
    "repeated_calls": _mean([repeat for t in healthy for repeat in _repeats(t)]),
    "recovery": _mean([good for t in healthy for good in _recoveries(t)]),
    "solved_after_error": _mean([t.solved for t in failed]),
    "diversity": _diversity(healthy),
    "answered": _mean([t.status is Status.ANSWERED for t in healthy]),
    "gave_up": _mean([t.status is Status.GAVE_UP for t in healthy]),
    "truncated": _mean([t.truncated for t in healthy]),
    "prompts_without_room": float(sum(not t.steps for t in healthy)),
    "infrastructure_errors": float(len(trajectories) - len(healthy)),
  }


def _failed(step: Step) -> bool:
  return step.observation is not None and step.observation.code is not Code.OK


def _repeats(trajectory: Trajectory) -> list[bool]:
  """For each call, whether an earlier one was the same and nothing has changed since."""
  out, done = [], set()
  for step in trajectory.steps:
    if isinstance(step.action, ToolCall):
      key = action_key(step.action)
      out.append(key in done)
      if step.observation is not None and step.observation.changed:
        done.clear()
      done.add(key)
  return out


def _recoveries(trajectory: Trajectory) -> list[bool]:
  """For each failed call, whether the trajectory made it good."""
  called = [step for step in trajectory.steps if step.observation is not None]
  out = []
  for k, step in enumerate(called):
    if not _failed(step):
      continue
    later = called[k + 1 :]
    if isinstance(step.action, ToolCall) and step.observation.code is not Code.UNKNOWN_TOOL:
      later = [
        s for s in later if isinstance(s.action, ToolCall) and s.action.name == step.action.name
      ]
      out.append(not all(_failed(s) for s in later))
    else:
      out.append(bool(later) and not _failed(later[0]))
  return out


def _diversity(trajectories: Sequence[Trajectory]) -> float:
  """(distinct sequences - 1) / (samples - 1), the mean over tasks with several samples."""
  groups: dict[str, list[str]] = {}
  for t in trajectories:
    sequence = " ".join(action_key(step.action) for step in t.steps)
    groups.setdefault(t.task_id, []).append(sequence)
  several = [g for g in groups.values() if len(g) > 1]
  return _mean([(len(set(g)) - 1) / (len(g) - 1) for g in several])


def action_key(action: Action) -> str:
  """An action as text; its thoughts and the order of its arguments do not matter."""
  if isinstance(action, ToolCall):
    # default: arguments that the schema refused may be anything.
    return json.dumps([action.name, action.arguments], sort_keys=True, default=str)
  if isinstance(action, Finish):
    return json.dumps({"answer": action.answer, "gave_up": action.gave_up})
  return "malformed"


def _mean(values: Sequence[float]) -> float:
  return float(np.mean(values)) if len(values) else 0.0
