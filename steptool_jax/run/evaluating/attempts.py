"""Attempts at tasks by the configured strategy, under one budget in LLM calls.

A task's budget is the same for every strategy. chain: one conversation of at most max_steps calls;
with evaluation.attempts = n (CoT@n) a task without an answer gets another one, as long as calls are
left. dfsdt: one tree search. Both are recorded with what they really took.
"""

import collections
import dataclasses
from collections.abc import Sequence

from steptool_jax.rollout.strategy import Search, SearchResult
from steptool_jax.run.evaluating.work import Work
from steptool_jax.run.parts import build, rollouts
from steptool_jax.run.parts.opening import Parts
from steptool_jax.toolbench.formats.answers import cot_method, dfs_method
from steptool_jax.types import Status, Task, Trajectory


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
  """What one task's budget was spent on."""

  task: Task
  attempts: tuple[Trajectory, ...]  # dfsdt: the chosen chain alone
  search: SearchResult | None = None

  @property
  def chosen(self) -> Trajectory:
    """The first answer, else the last attempt."""
    answered = [t for t in self.attempts if t.status is Status.ANSWERED]
    return answered[0] if answered else self.attempts[-1]

  @property
  def llm_calls(self) -> int:
    if self.search is not None:
      return self.search.calls
    return sum(len(t.steps) for t in self.attempts)


def method(parts: Parts) -> str:
  """The official name of the strategy, which answer files carry."""
  strategy = build.build_search(parts.config)
  return dfs_method(strategy) if strategy else cot_method(parts.config.evaluation.attempts)


def solve(
  parts: Parts, variables: dict, tasks: Sequence[Task], repetition: int, label: str
) -> tuple[list[Solution], Work]:
  """One Solution a task, in order; `repetition` numbers the runs of a sampled evaluation."""
  strategy = build.build_search(parts.config)
  if strategy is None:
    return _chains(parts, variables, tasks, repetition, label)
  return _searches(parts, variables, tasks, repetition, label, strategy)


def _searches(
  parts: Parts,
  variables: dict,
  tasks: Sequence[Task],
  repetition: int,
  label: str,
  strategy: Search,
) -> tuple[list[Solution], Work]:
  results, stats = rollouts.roll(
    parts,
    variables,
    [(task, repetition) for task in tasks],
    rollouts.EVALUATION,
    parts.config.evaluation.temperature,
    label,
    strategy=strategy,
  )
  followed = []
  for result in results:
    parents = {node.parent for node in result.nodes}
    followed += [node.step for node in result.nodes if node.index in parents]
  work = Work()
  work.add(stats, [r.trajectory for r in results], followed, sum(r.calls for r in results))
  return [Solution(t, (r.trajectory,), r) for t, r in zip(tasks, results, strict=True)], work


def _chains(
  parts: Parts, variables: dict, tasks: Sequence[Task], repetition: int, label: str
) -> tuple[list[Solution], Work]:
  work, attempts = Work(), parts.config.evaluation.attempts
  left = [build.build_budget(parts.config)] * len(tasks)
  made: list[list[Trajectory]] = [[] for _ in tasks]
  for attempt in range(attempts):
    # Conversations of one rollout share their limits, so tasks go by what they may still spend.
    groups: dict[int, list[int]] = collections.defaultdict(list)
    for n in range(len(tasks)):
      if left[n] and (not made[n] or _goes_on(made[n][-1])):
        groups[min(left[n], parts.limits.max_steps)].append(n)
    for most, members in sorted(groups.items(), reverse=True):
      found, stats = rollouts.roll(
        parts,
        variables,
        [(tasks[n], repetition * attempts + attempt) for n in members],
        rollouts.EVALUATION,
        parts.config.evaluation.temperature,
        label,
        limits=dataclasses.replace(parts.limits, max_steps=most),
        some=attempt > 0,
      )
      for n, trajectory in zip(members, found, strict=True):
        made[n].append(trajectory)
        left[n] -= len(trajectory.steps)
      followed = [step for t in found for step in t.steps[:-1]]
      work.add(stats, found, followed, sum(len(t.steps) for t in found))
  return [Solution(t, tuple(a)) for t, a in zip(tasks, made, strict=True)], work


def _goes_on(last: Trajectory) -> bool:
  """Whether another attempt may follow; a prompt that did not fit will not fit again."""
  return last.status not in (Status.ANSWERED, Status.INFRASTRUCTURE_ERROR) and bool(last.steps)
