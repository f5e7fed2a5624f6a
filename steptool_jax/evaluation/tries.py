"""What a policy can do in several tries, before training and after it: new, or only sharper?

pass@1 rises when a policy does more often what it did sometimes; pass@k for large k, and tasks that
it solves in a way that it never took before, rise when it has learnt something else.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from steptool_jax.types import Status, ToolCall, Trajectory, by_call

MOST_TRIES = 16  # the largest k of pass@k


def pass_at(solved: Sequence[tuple[int, int]], k: int) -> float:
  """Mean over tasks of the chance that one of k tries solves it; NaN where no task has k tries.

  solved: (tries, of them solved) of each task. Unbiased from n >= k tries, c of them solved (Chen
  et al. 2021, arXiv 2107.03374, eq. 1): 1 - C(n - c, k) / C(n, k). 1 - (1 - c / n)^k is too low.
  Tasks with fewer tries say nothing.
  """
  found = [1 - math.comb(n - c, k) / math.comb(n, k) for n, c in solved if n >= k]
  return float(np.mean(found)) if found else math.nan


def sequence(trajectory: Trajectory) -> tuple[str, ...]:
  """Names of the tools that it calls, in their order; whatever the arguments."""
  steps = by_call(trajectory.steps)
  return tuple(step.action.name for step in steps if isinstance(step.action, ToolCall))


def document(trajectories: Iterable[Trajectory]) -> dict[str, dict[str, Any]]:
  """{task: {"tries", "solved", "sequences": all, "solving": those of solved tries}}, as JSON data.

  Without what ended in an infrastructure error.
  """
  out: dict[str, dict[str, Any]] = {}
  for t in trajectories:
    if t.status is Status.INFRASTRUCTURE_ERROR:
      continue
    task = out.setdefault(t.task_id, {"tries": 0, "solved": 0, "sequences": [], "solving": []})
    task["tries"] += 1
    task["solved"] += t.solved >= 1
    for name in ("sequences", "solving") if t.solved >= 1 else ("sequences",):
      if list(sequence(t)) not in task[name]:
        task[name].append(list(sequence(t)))
  return out


def pass_at_all(found: Mapping[str, Mapping[str, Any]]) -> dict[int, float]:
  """{k: pass@k} of a document, for each k from 1 to MOST_TRIES that a task has tries for."""
  solved = [(task["tries"], task["solved"]) for task in found.values()]
  most = min(max((n for n, _ in solved), default=0), MOST_TRIES)
  return {k: pass_at(solved, k) for k in range(1, most + 1)}


def new_sequences(
  before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]
) -> float:
  """Share of the tasks solved after training none of whose solving sequences of tools was among any
  that the policy tried before; NaN where none is solved. Tasks of both documents count."""
  solved = [name for name, task in after.items() if task["solving"] and name in before]
  new = [
    not any(way in before[name]["sequences"] for way in after[name]["solving"]) for name in solved
  ]
  return float(np.mean(new)) if new else math.nan
