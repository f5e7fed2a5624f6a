"""Conversations of several iterations (rollout.carry), as one iteration of RL sees them.

A task's samples are learnt from together, once all have ended: critics and algorithms compare them.
"""

import collections
from collections.abc import Sequence

from steptool_jax.rollout.carrying import Carried, Carry, complete_groups
from steptool_jax.rollout.setting import Stats
from steptool_jax.run.parts import rollouts
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.training.phase import Phase
from steptool_jax.types import Task, Trajectory


def drawn_before(tasks: Sequence[Task], carried: Carried, samples: int) -> collections.Counter[int]:
  """How often each task, by its index, counts as drawn already: one that is drawn again while
  samples of it are carried gets further sample numbers, and with them other keys."""
  seen: collections.Counter[int] = collections.Counter()
  if _all(carried):
    index = {task.id: k for k, task in enumerate(tasks)}
    for t in _all(carried):
      k = index[t.task_id]
      seen[k] = max(seen[k], t.sample // samples + 1)
  return seen


def roll(
  parts: Parts, phase: Phase, variables: dict, work: Sequence[tuple[Task, int]], done: int
) -> tuple[list[Task], list[Trajectory], Stats, Carried]:
  """(tasks and trajectories of what can be learnt from in iteration `done`, stats, what goes on).

  work: the iteration's new jobs. In a run's last iteration all conversations end. Raises as
  rollouts.roll.
  """
  r, carried = parts.config.rollout, phase.carried
  ids = {t.task_id for t in _all(carried)}
  known = {task.id: task for task in parts.environment.tasks("train") if task.id in ids}
  known |= {task.id: task for task, _ in work}
  jobs = [*((known[t.task_id], t.sample) for t in carried.unfinished), *work]
  last = done + 1 == parts.config.train.iterations
  carry = Carry(0 if last else r.carry, carried.unfinished, phase.sessions, phase.owners)
  found, stats = rollouts.roll(
    *(parts, variables, jobs, done, r.temperature, "rollout"), carry=carry
  )
  whole, carried = complete_groups(found, carried.waiting, r.samples)
  return [known[t.task_id] for t in whole], whole, stats, carried


def _all(carried: Carried) -> tuple[Trajectory, ...]:
  return (*carried.unfinished, *carried.waiting)
