"""Attempts at tasks by the configured strategy, under one budget in LLM calls.

A task's budget is the same for every strategy. chain: one conversation of at most max_steps calls;
with evaluation.attempts = n (CoT@n) a task without an answer gets another one, as long as calls are
left. dfsdt: one tree search. Both are recorded with what they really took.
"""

import collections
import dataclasses
from collections.abc import Sequence

from steptool_jax.rollout.chain import Stats
from steptool_jax.rollout.strategy import SearchResult
from steptool_jax.rollout.tree import TreeStats
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


@dataclasses.dataclass
class Work:
  """Where time and tokens went."""

  seconds: float = 0.0
  device_seconds: float = 0.0
  tool_wait_seconds: float = 0.0
  llm_calls: int = 0
  sampled_tokens: int = 0
  forced_tokens: int = 0  # all that were appended and not sampled; of these:
  prompt_tokens: int = 0  # every prompt once
  observation_tokens: int = 0  # every observation that a turn followed, once
  diversity_tokens: int = 0  # dfsdt: prompts in front of siblings
  replaced_tokens: int = 0  # dfsdt: siblings' turns, put where such a prompt stood
  shared_tokens: int = 0  # of prompts that were forked and not appended
  siblings_without_room: int = 0
  replayed_calls: int = 0

  @property
  def prefilled_again_tokens(self) -> int:
    """Forced tokens that had been computed before: 0, because backing up is a rewind."""
    once = self.prompt_tokens + self.observation_tokens - self.shared_tokens
    return self.forced_tokens - once - self.diversity_tokens - self.replaced_tokens

  @property
  def device_share(self) -> float:
    return self.device_seconds / max(self.seconds, 1e-9)

  @property
  def host_share(self) -> float:
    """Of the time: neither the model nor waiting for a tool."""
    return max(0.0, 1 - (self.device_seconds + self.tool_wait_seconds) / max(self.seconds, 1e-9))


def method(parts: Parts) -> str:
  """The official name of the strategy, which answer files carry."""
  strategy = build.build_search(parts.config)
  return dfs_method(strategy) if strategy else cot_method(parts.config.evaluation.attempts)


def solve(
  parts: Parts, variables: dict, tasks: Sequence[Task], repetition: int, label: str
) -> tuple[list[Solution], Work]:
  """One Solution a task, in order; `repetition` numbers the runs of a sampled evaluation."""
  work = Work()
  strategy = build.build_search(parts.config)
  if strategy is None:
    return _chains(parts, variables, tasks, repetition, label, work), work
  jobs = [(task, repetition) for task in tasks]
  results, stats = rollouts.roll(
    parts,
    variables,
    jobs,
    rollouts.EVALUATION,
    parts.config.evaluation.temperature,
    label,
    strategy=strategy,
  )
  for result in results:
    _count(work, [result.trajectory], result)
  _add(work, stats)
  return [Solution(t, (r.trajectory,), r) for t, r in zip(tasks, results, strict=True)], work


def _chains(
  parts: Parts,
  variables: dict,
  tasks: Sequence[Task],
  repetition: int,
  label: str,
  work: Work,
) -> list[Solution]:
  attempts = parts.config.evaluation.attempts
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
      )
      for n, trajectory in zip(members, found, strict=True):
        made[n].append(trajectory)
        left[n] -= len(trajectory.steps)
      _count(work, found, None)
      _add(work, stats)
  return [Solution(t, tuple(a)) for t, a in zip(tasks, made, strict=True)]


def _goes_on(last: Trajectory) -> bool:
  """Whether another attempt may follow; a prompt that did not fit will not fit again."""
  return last.status not in (Status.ANSWERED, Status.INFRASTRUCTURE_ERROR) and bool(last.steps)


def _count(work: Work, trajectories: Sequence[Trajectory], search: SearchResult | None) -> None:
  """Tokens that had to be forced once: prompts, and observations that a turn followed."""
  work.prompt_tokens += sum(len(t.prompt_tokens) for t in trajectories)
  if search is None:
    steps = [step for t in trajectories for step in t.steps[:-1]]
    work.llm_calls += sum(len(t.steps) for t in trajectories)
  else:
    parents = {node.parent for node in search.nodes}
    steps = [node.step for node in search.nodes if node.index in parents]
    work.llm_calls += search.calls
  work.observation_tokens += sum(len(step.observation_tokens) for step in steps)


def _add(work: Work, stats: Stats) -> None:
  work.seconds += stats.seconds
  work.device_seconds += stats.device_seconds
  work.tool_wait_seconds += stats.tool_wait_seconds
  work.sampled_tokens += stats.sampled_tokens
  work.forced_tokens += stats.forced_tokens
  work.shared_tokens += stats.shared_tokens
  if isinstance(stats, TreeStats):
    work.diversity_tokens += stats.diversity_tokens
    work.replaced_tokens += stats.replaced_tokens
    work.siblings_without_room += stats.siblings_without_room
    work.replayed_calls += stats.replayed_calls
