"""Batches of demonstrated trajectories for the supervised warm-up (SFT)."""

from typing import Any

import numpy as np
from absl import logging

from steptool_jax.data.trajectories import AnnotatedTrajectory, from_document, to_document
from steptool_jax.environments.mistakes import imperfect
from steptool_jax.rollout.peers import together
from steptool_jax.rollout.replaying import replay_actions
from steptool_jax.run.hosts import hosts
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.training.order import Order
from steptool_jax.types import TRUNCATED, Status, Trajectory


class SftBatches:
  """batch(step): demonstrated trajectories, decided by the step's number alone."""

  def __init__(self, parts: Parts):
    self._parts, self._sft = parts, parts.config.sft
    tasks = parts.environment.tasks("train")
    tasks = [task for task in tasks if task.demonstration]
    if self._sft.steps and not tasks:
      raise ValueError(
        "sft.steps: above 0, but no training task has a demonstration; set it to 0 or add them"
      )
    self._tasks = tasks[: self._sft.tasks or None]
    self._dropped = self._seen = 0

  def batch(self, step: int) -> list[Trajectory]:
    """Those that fit; ValueError where none does."""
    size = self._sft.batch
    order = Order(len(self._tasks), self._parts.config.seed)
    peers = hosts.peers()

    def share() -> list[Any]:
      numbers = range(step * size + peers.index, (step + 1) * size, peers.count)
      return [[k, to_document(AnnotatedTrajectory(self._draw(order[k], k)))] for k in numbers]

    if peers.count == 1:
      drawn = [self._draw(order[k], k) for k in range(step * size, (step + 1) * size)]
    else:  # every process runs the tools of its share
      found = dict(pair for part in together(peers, share) for pair in part)
      drawn = [from_document(found[k]).trajectory for k in sorted(found)]
    kept = [t for t in drawn if t.status not in TRUNCATED | {Status.INFRASTRUCTURE_ERROR}]
    self._seen, self._dropped = self._seen + len(drawn), self._dropped + len(drawn) - len(kept)
    if not kept:
      raise ValueError(
        "sft: no demonstration of this batch fits rollout.max_tokens / max_steps / "
        "max_step_tokens (raise them), or their tools are down"
      )
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
    return replay_actions(
      self._parts.environment,
      task,
      actions,
      self._parts.policy.chat_format,
      self._parts.limits,
      self._parts.config.model.system or None,
    )
