"""Rollouts with the parts of a run, their verdicts and rewards; held-out figures of a policy."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from steptool_jax.evaluation.metrics import rollout_metrics
from steptool_jax.learning.algorithms import get_algorithm
from steptool_jax.rewards import assembly
from steptool_jax.rollout import carrying, chain, tree
from steptool_jax.rollout.conversation import Limits
from steptool_jax.rollout.setting import Sampling, Setting, Stats
from steptool_jax.rollout.strategy import Search
from steptool_jax.run.hosts import hosts
from steptool_jax.run.parts.opening import Parts
from steptool_jax.serving import harness
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.types import Status, Task, Trajectory

EVALUATION = -1  # the policy version of evaluation rollouts: the same keys at every evaluation


def roll(
  parts: Parts,
  variables: dict,
  jobs: Sequence[tuple[Task, int]],
  version: int,
  temperature: float,
  label: str,
  limits: Limits | None = None,
  strategy: Search | None = None,
  some: bool = False,
  policy: int | None = None,
  idle: Callable[[], dict | None] = lambda: None,
  stop: Callable[[], bool] | None = None,
  carry: carrying.Carry | None = None,
) -> tuple[list[Any], Stats]:
  """Trajectories of (task, sample) jobs, or SearchResults with a strategy; without rewards.

  limits: in the place of those of the parts. Where a judge gives the verdicts later, `solved` says
  no more than that there is an answer. some: the jobs are a few of those of an earlier rollout.
  policy: the version of the weights, where it is not `version`. idle: as rollout.chain's. stop: in
  the place of that of the parts. carry: conversations may go on, and be unfinished (carrying.py).

  Raises:
    RuntimeError: what tools need is down; no session can be opened, or no answer be graded (all of
      `some` may happen to be odd).
    Interrupted, NonFiniteLogprobs: as rollout.chain.
  """
  word = "pass" if parts.services.judging is None else "answered"
  with hosts.bar(total=len(jobs), desc=label, leave=False, unit="task") as bar:
    solved: list[float] = []

    def on_done(trajectory: Trajectory) -> None:
      solved.append(trajectory.solved)
      bar.set_postfix_str(f"{word} {sum(solved) / len(solved):.0%}", refresh=False)
      bar.update()

    try:
      laid_out = parts.engine.lay_out(variables)
    except InfrastructureError as error:
      raise RuntimeError(f"{label}: {error}") from error

    def moved() -> dict | None:
      """What is laid out for rollouts alone stays where it is while training's buffers move."""
      found = idle()
      return found if laid_out is variables else None

    setting = Setting(
      parts.engine,
      laid_out,
      parts.environment,
      parts.policy.chat_format,
      limits or parts.limits,
      parts.runner,
      Sampling(parts.config.seed, version, temperature, policy),
      parts.config.model.system or None,
      hosts.peers(),
    )
    try:
      if strategy is not None:
        found, stats = tree.search(setting, jobs, strategy, stop or parts.stop, on_done)
      elif isinstance(parts.environment, harness.Harness):
        found, stats = harness.rollout(setting, jobs, stop or parts.stop, on_done)
      elif carry is not None:
        found, stats = carrying.rollout(setting, jobs, carry, stop or parts.stop, on_done)
      else:
        found, stats = chain.rollout(setting, jobs, stop or parts.stop, on_done, moved)
    except InfrastructureError as error:
      raise RuntimeError(f"{label}: {error}") from error
  if len(stats.failures) == len(jobs) and not some:
    raise RuntimeError(f"{label}: every conversation failed, the first: {stats.failures[0]}")
  return found, stats


def judge(
  parts: Parts, tasks: Sequence[Task], trajectories: Sequence[Trajectory]
) -> list[Trajectory]:
  """The same trajectories with the judge's verdicts, where the run has a judge.

  Process 0 asks it, once for all.
  """
  if parts.services.judging is None:
    return list(trajectories)

  def verdicts() -> list[list[Any]]:
    _, marked = parts.services.judging.judge(tasks, trajectories)
    return [[t.solved, t.status] for t in marked]

  return [
    dataclasses.replace(t, solved=solved, status=Status(status))
    for t, (solved, status) in zip(trajectories, hosts.lead(verdicts), strict=True)
  ]


def reward(
  parts: Parts,
  tasks: Sequence[Task],
  trajectories: Sequence[Trajectory],
  scheme: str = "steptool",
  marked: bool = False,
) -> list[Trajectory]:
  """The same trajectories with SC, Con and r on every step.

  scheme: as config.rewards.scheme. marked: they have their SC and Con where a model gives them
  (run/training/sources.py); without, such a source is replaced by progress. Those of environment
  'harness' have the rewards that its function returned.
  """
  if isinstance(parts.environment, harness.Harness):
    outcome = get_algorithm(parts.config.algorithm).rewards == "outcome"
    return [harness.outcome_only(t) if outcome else t for t in trajectories]
  options = parts.config.rewards
  if assembly.SOURCES[options.source].device and not marked:
    options = dataclasses.replace(options, source="progress")
  return assembly.pay(
    tasks,
    trajectories,
    options,
    scheme=scheme,
    outcome_only=get_algorithm(parts.config.algorithm).rewards == "outcome",
    texts=parts.services.judging is not None,
    gamma=parts.config.advantage.gamma,
    bootstrap=parts.config.advantage.bootstrap,
  )


def held_out(parts: Parts) -> frozenset[str]:
  """Ids of the tasks that the policy is measured on, and that nothing may learn from."""
  return frozenset(task.id for task in parts.environment.tasks("heldout"))


def selection(parts: Parts) -> Sequence[Task]:
  """The last evaluation.selection held-out tasks, which choose the best checkpoint.

  ValueError where tasks that figures are reported of are among them, or may be.
  """
  e, found = parts.config.evaluation, parts.environment.tasks("heldout")
  if e.selection and max(e.tasks, e.curve_tasks) + e.selection > len(found):
    raise ValueError(
      f"config.evaluation.selection: {e.selection}, but of {len(found)} held-out tasks the first "
      f"{max(e.tasks, e.curve_tasks)} are reported (evaluation.tasks, curve_tasks), and what "
      "chooses a checkpoint must not be among them; lower one of the three, or hold out more"
    )
  return found[len(found) - e.selection :]


def evaluate_policy(
  parts: Parts, variables: dict, tasks: Sequence[Task], label: str, temperature: float
) -> tuple[dict[str, float], list[Trajectory]]:
  """(figures, trajectories) of these held-out tasks, one conversation each.

  They are always paid by scheme 'steptool': Eq. 2 compares a task's samples and says nothing about
  a single one, and so the figures of all schemes are the same.
  """
  if not tasks:
    raise ValueError(
      "no held-out tasks: the environment has none, or config.evaluation.tasks is 0; evaluation "
      "needs at least one"
    )
  jobs = [(task, 0) for task in tasks]
  trajectories, _ = roll(parts, variables, jobs, EVALUATION, temperature, label)
  trajectories = reward(parts, tasks, judge(parts, tasks, trajectories))
  if all(t.status is Status.INFRASTRUCTURE_ERROR for t in trajectories):
    raise RuntimeError("evaluation: every conversation ended in an infrastructure error")
  say_without_room(parts, label, trajectories)
  return rollout_metrics(trajectories), trajectories


def say_without_room(parts: Parts, label: str, trajectories: Sequence[Trajectory]) -> None:
  """A line where prompts left no room for one step: they count as unsolved, whatever the policy."""
  count = int(rollout_metrics(trajectories)["prompts_without_room"])
  if count:
    hosts.say(
      f"{label}: {count} of {len(trajectories)} prompts have no room for one step, and count as "
      f"unsolved: raise rollout.max_tokens ({parts.limits.max_tokens}), or offer fewer tools"
    )
