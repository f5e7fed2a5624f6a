"""What of an iteration's trajectories is learnt from. Host side, no arrays."""

import dataclasses
from collections.abc import Callable, Sequence

from steptool_jax.types import Trajectory

Units = list[tuple[Trajectory, ...]]


@dataclasses.dataclass(frozen=True)
class Selection:
  """pick: trajectories -> units that must not be parted, of `rows` trajectories each.

  needs: what there must be one of, in words, for there to be something to learn.
  """

  pick: Callable[[Sequence[Trajectory]], Units]
  rows: int
  needs: str


def _everything(trajectories: Sequence[Trajectory]) -> Units:
  return [(trajectory,) for trajectory in trajectories]


def _solved(trajectories: Sequence[Trajectory]) -> Units:
  """Solved ones, each way of solving a task once (Yuan et al. 2023, arXiv 2308.01825)."""
  distinct = {
    (t.task_id, *(s.tokens.tobytes() for s in t.steps)): t for t in trajectories if t.solved >= 1
  }
  return [(trajectory,) for trajectory in distinct.values()]


def _pairs(trajectories: Sequence[Trajectory]) -> Units:
  """(success, failure) of one task; everyone of a task that has both is in a pair.

  Where one kind is fewer, it goes round: 1 success and 3 failures make 3 pairs, not 1.
  """
  by_task: dict[str, tuple[list[Trajectory], list[Trajectory]]] = {}
  for trajectory in trajectories:
    successes, failures = by_task.setdefault(trajectory.task_id, ([], []))
    if trajectory.solved >= 1:
      successes.append(trajectory)
    elif trajectory.solved <= 0:
      failures.append(trajectory)
  return [
    (successes[k % len(successes)], failures[k % len(failures)])
    for successes, failures in by_task.values()
    if successes and failures
    for k in range(max(len(successes), len(failures)))
  ]


EVERYTHING = Selection(_everything, rows=1, needs="a trajectory")
SOLVED = Selection(_solved, rows=1, needs="a solved trajectory")
PAIRS = Selection(_pairs, rows=2, needs="a success and a failure of the same task")
