"""ToolOrchestra's reward (arXiv 2511.21689, Eq. 2): outcome, cost, latency and preferred tools.

A trajectory is M = [m_1 … m_n, r_outcome, -cost, -latency], where m_t is its number of calls of
tool t. Over the group of one task's trajectories each entry is normalised,

    M~[k] = (M[k] - min M[k]) / (max M[k] - min M[k]),  0 where max = min,

and R = M~ · P where the task is solved, else 0, with the user's preference P in [0, 1]^(n+3). Cost
and latency enter with their negatives before min and max are taken: the released code mixes the
two up and so pays for slow and costly trajectories.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steptool_jax.config import Filters
from steptool_jax.types import Code, Status, ToolCall, Trajectory, by_call

PARTS = ("outcome", "cost", "latency", "preference")


@dataclasses.dataclass(frozen=True)
class Preference:
  """P. A tool to avoid has a weight below 0: it enters with minus its calls, as cost does."""

  outcome: float = 1.0
  cost: float = 0.0
  latency: float = 0.0
  tools: Mapping[str, float] = dataclasses.field(default_factory=dict)  # name -> in [-1, 1]

  def __post_init__(self):
    for name in ("outcome", "cost", "latency"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"preference.{name} is {getattr(self, name)}: must be in [0, 1]")
    for name, weight in self.tools.items():
      if not -1 <= weight <= 1:
        raise ValueError(f"preference.tools[{name!r}] is {weight}: must be in [-1, 1]")

  def of(self, wish: Mapping[str, Any]) -> "Preference":
    """These weights, with those that a task's user names (task.metadata["preference"]) instead."""
    return dataclasses.replace(self, **wish)


def final_rewards(
  trajectories: Sequence[Trajectory], preferences: Sequence[Preference]
) -> list[dict[str, float]]:
  """Eq. 2 for trajectories of any tasks, in any order: {part: reward} each, summing to R.

  Trajectories of one task_id are a group. One that ended in an infrastructure error says nothing
  about the policy: it earns 0 and moves no minimum or maximum.
  """
  out = [dict.fromkeys(PARTS, 0.0) for _ in trajectories]
  for indices in _groups(trajectories):
    healthy = [i for i in indices if trajectories[i].status is not Status.INFRASTRUCTURE_ERROR]
    group = [trajectories[i] for i in healthy]
    if not group:
      continue
    p = preferences[healthy[0]]
    solved = np.array([t.solved == 1.0 for t in group])
    parts = {
      "outcome": p.outcome * _normalised(solved),
      "cost": p.cost * _normalised([-t.cost for t in group]),
      "latency": p.latency * _normalised([-t.latency for t in group]),
      "preference": np.zeros(len(group)),
    }
    for tool, weight in p.tools.items():
      calls = np.array([_calls(t, tool) for t in group])
      parts["preference"] += abs(weight) * _normalised(np.sign(weight) * calls)
    for place, i in enumerate(healthy):
      if solved[place]:
        out[i] = {name: float(parts[name][place]) for name in PARTS}
  return out


def keep(
  trajectories: Sequence[Trajectory], filters: Filters
) -> tuple[list[Trajectory], dict[str, float]]:
  """(the trajectories to train on, in their order; how many each filter took).

  The deviation is that of the summed rewards of what is left of a group, each trajectory counting
  once however long it is. With min_deviation above 0 a group of one goes: it compares with nothing.
  """
  taken = {"dropped_malformed": 0.0, "dropped_unfinished": 0.0, "dropped_even": 0.0}
  kept: list[int] = []
  for indices in _groups(trajectories):
    left = []
    for i in indices:
      if filters.malformed and _is_malformed(trajectories[i]):
        taken["dropped_malformed"] += 1
      elif filters.unfinished and trajectories[i].truncated:
        taken["dropped_unfinished"] += 1
      else:
        left.append(i)
    returns = [sum(step.reward for step in trajectories[i].steps) for i in left]
    if left and float(np.std(returns)) < filters.min_deviation:
      taken["dropped_even"] += len(left)
    else:
      kept += left
  return [trajectories[i] for i in sorted(kept)], taken


def _groups(trajectories: Sequence[Trajectory]) -> list[list[int]]:
  groups: dict[str, list[int]] = {}
  for i, trajectory in enumerate(trajectories):
    groups.setdefault(trajectory.task_id, []).append(i)
  return list(groups.values())


def _normalised(values: Any) -> np.ndarray:
  """Min-max over a group, float64[N]; 0 where all are the same."""
  values = np.asarray(values, np.float64)
  low, high = values.min(), values.max()
  return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _calls(trajectory: Trajectory, tool: str) -> int:
  steps = by_call(trajectory.steps)
  return sum(isinstance(s.action, ToolCall) and s.action.name == tool for s in steps)


def _is_malformed(trajectory: Trajectory) -> bool:
  codes = [step.observation.code for step in trajectory.steps if step.observation is not None]
  return Code.MALFORMED in codes
