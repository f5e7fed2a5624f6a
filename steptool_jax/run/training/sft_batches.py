"""Batches of demonstrated trajectories for the supervised warm-up (SFT)."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging

from steptool_jax.data.trajectories import AnnotatedTrajectory, from_document, to_document
from steptool_jax.environments.base import TURNS
from steptool_jax.environments.mistakes import imperfect
from steptool_jax.rollout.peers import together
from steptool_jax.rollout.replaying import hung, replay_actions
from steptool_jax.run.data.order import Order
from steptool_jax.run.hosts import hosts
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.training.usable import usable
from steptool_jax.types import TRUNCATED, Action, Status, Task, Trajectory


class SftBatches:
  """batch(step): demonstrated trajectories, decided by the step's number alone."""

  def __init__(self, parts: Parts):
    self._parts, self._sft = parts, parts.config.sft
    tasks = [task for task in parts.environment.tasks("train") if task.demonstration]
    self._tasks = usable(parts, tasks[: self._sft.tasks or None])
    self._dropped = self._seen = 0

  def batch(self, step: int) -> list[Trajectory]:
    """Those of optimizer step `step` that fit and whose tools answer.

    RuntimeError where the tools of all of them are down: they answered when the run began.
    """
    kept = self._kept(step, self._draw)
    if not kept and self._sft.mistakes:  # mistakes make conversations longer
      kept = self._kept(step, self._clean)
    if not kept:
      raise RuntimeError(
        f"sft: the tools of all {self._sft.batch} demonstrations of a batch are down or hang; they "
        "answered when the run began. Run the same command again to go on"
      )
    return kept

  def _kept(self, step: int, draw: Callable[[int, int], Trajectory]) -> list[Trajectory]:
    size = self._sft.batch
    order = Order(len(self._tasks), self._parts.config.seed)
    peers = hosts.peers()

    def share() -> list[Any]:
      numbers = range(step * size + peers.index, (step + 1) * size, peers.count)
      return [[k, to_document(AnnotatedTrajectory(draw(order[k], k)))] for k in numbers]

    if peers.count == 1:
      drawn = [draw(order[k], k) for k in range(step * size, (step + 1) * size)]
    else:  # every process runs the tools of its share
      found = dict(pair for part in together(peers, share) for pair in part)
      drawn = [from_document(found[k]).trajectory for k in sorted(found)]
    unfit = TRUNCATED | {Status.INFRASTRUCTURE_ERROR}
    kept = [t for t in drawn if t.status not in unfit and not hung(t)]
    self._seen, self._dropped = self._seen + len(drawn), self._dropped + len(drawn) - len(kept)
    return kept

  def report(self) -> None:
    """Warns of those that were left out."""
    if self._dropped:
      logging.warning(
        "%d of %d demonstrations did not fit, or their tools were down", self._dropped, self._seen
      )

  def _draw(self, index: int, position: int) -> Trajectory:
    task = self._tasks[index]
    actions = task.demonstration
    if self._sft.mistakes and position >= self._sft.clean_steps * self._sft.batch:
      rng = np.random.default_rng((self._parts.config.seed, position))
      actions = imperfect(self._parts.environment, task, rng, self._sft.mistakes)
      if task.metadata.get(TURNS):
        # A user who looks at what has happened may go on after the last of spoilt actions.
        with contextlib.suppress(ValueError):
          return self._replayed(task, actions)
        actions = task.demonstration
    return self._replayed(task, actions)

  def _clean(self, index: int, position: int) -> Trajectory:
    """The demonstration without mistakes."""
    del position
    return self._replayed(self._tasks[index], self._tasks[index].demonstration)

  def _replayed(self, task: Task, actions: Sequence[Action]) -> Trajectory:
    return replay_actions(
      self._parts.environment,
      task,
      actions,
      self._parts.policy.chat_format,
      self._parts.limits,
      self._parts.config.model.system or None,
      runner=self._parts.runner,
    )
