"""The figures of a set of trajectories that evaluation/figures.py defines as ROLLOUTS."""

import json
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from steptool_jax.environments.base import KIND
from steptool_jax.rollout.conversation import INVALID
from steptool_jax.types import (
  Action,
  Code,
  Finish,
  Status,
  Step,
  Task,
  ToolCall,
  ToolCalls,
  Trajectory,
  by_call,
)


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
  """Every figure of MEASURES and reward_<part> of each part that a reward has, by name."""
  healthy = [t for t in trajectories if t.status is not Status.INFRASTRUCTURE_ERROR]
  parts = dict.fromkeys(name for t in healthy for name in t.reward_parts)
  return {
    **{name: measure(healthy) for name, measure in MEASURES.items()},
    **{f"reward_{p}": _mean([t.reward_parts.get(p, 0.0) for t in healthy]) for p in parts},
    "infrastructure_errors": float(len(trajectories) - len(healthy)),
  }


def by_kind(tasks: Sequence[Task], trajectories: Sequence[Trajectory]) -> dict[str, float]:
  """The pass rate of each kind of task; nothing where they have none.

  trajectories: of these tasks, judged; those of infrastructure errors do not count.
  """
  kinds = {task.id: task.metadata[KIND] for task in tasks if KIND in task.metadata}
  solved: dict[str, list[float]] = {}
  for trajectory in trajectories:
    if trajectory.task_id in kinds and trajectory.status is not Status.INFRASTRUCTURE_ERROR:
      solved.setdefault(kinds[trajectory.task_id], []).append(trajectory.solved)
  return {kind: _mean(found) for kind, found in solved.items()}


def _calls(trajectory: Trajectory) -> list[Step]:
  return [step for step in by_call(trajectory.steps) if isinstance(step.action, ToolCall)]


def _codes(trajectory: Trajectory) -> list[Code]:
  """Of calls, malformed ones too."""
  return [step.observation.code for step in _answered(trajectory)]


def _answered(trajectory: Trajectory) -> list[Step]:
  steps = by_call(trajectory.steps)
  return [s for s in steps if s.observation is not None and not isinstance(s.action, Finish)]


def _failed(step: Step) -> bool:
  return step.observation is not None and step.observation.code is not Code.OK


def _repeats(trajectory: Trajectory) -> list[bool]:
  """For each call, whether an earlier one was the same and nothing has changed since."""
  out, done = [], set()
  for step in by_call(trajectory.steps):
    if isinstance(step.action, ToolCall):
      key = action_key(step.action)
      out.append(key in done)
      if step.observation is not None and step.observation.changed:
        done.clear()
      done.add(key)
  return out


def _recoveries(trajectory: Trajectory) -> list[bool]:
  """For each failed call, whether the trajectory made it good."""
  called = _answered(trajectory)
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
  if isinstance(action, ToolCalls):
    return " ".join(map(action_key, action.calls))
  if isinstance(action, Finish):
    return json.dumps({"answer": action.answer, "gave_up": action.gave_up})
  return "malformed"


def _mean(values: Sequence[float]) -> float:
  return float(np.mean(values)) if len(values) else 0.0


def _per(values: Callable[[Trajectory], Iterable[float]]) -> Callable[..., float]:
  """The mean over what `values` gives of all trajectories; 0 where that is nothing."""
  return lambda trajectories: _mean([value for t in trajectories for value in values(t)])


# Name in figures.ROLLOUTS -> the figure of the trajectories that no infrastructure error ended.
MEASURES: dict[str, Callable[[Sequence[Trajectory]], float]] = {
  "pass_rate": _per(lambda t: [t.solved]),
  "reward": _per(lambda t: [sum(s.reward for s in t.steps)]),
  "success_calling": _per(lambda t: [s.success_calling for s in _calls(t)]),
  "contribution": _per(lambda t: [s.contribution for s in _calls(t)]),
  "calls_per_task": _per(lambda t: [len(_calls(t))]),
  "useless_calls": _per(lambda t: [sum(s.contribution == 0 for s in _calls(t))]),
  "tokens_per_task": _per(lambda t: [t.num_tokens]),
  "cost_per_task": _per(lambda t: [t.cost]),
  "latency_per_task": _per(lambda t: [t.latency]),
  "invalid_call_rate": _per(lambda t: [code in INVALID for code in _codes(t)]),
  "invocation_success": _per(lambda t: [code is Code.OK for code in _codes(t)]),
  "repeated_calls": _per(_repeats),
  "recovery": _per(_recoveries),
  "solved_after_error": _per(lambda t: [t.solved] if any(map(_failed, t.steps)) else []),
  "diversity": _diversity,
  "answered": _per(lambda t: [t.status is Status.ANSWERED]),
  "gave_up": _per(lambda t: [t.status is Status.GAVE_UP]),
  "truncated": _per(lambda t: [t.truncated]),
  "prompts_without_room": lambda ts: float(sum(not t.steps for t in ts)),
}
