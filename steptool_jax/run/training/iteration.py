"""One iteration of RL, from tasks to updated weights."""

import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from steptool_jax.config import Config
from steptool_jax.evaluation.metrics import rollout_metrics
from steptool_jax.learning import algorithms, batching
from steptool_jax.policy import sharding
from steptool_jax.rollout.conversation import NonFiniteLogprobs
from steptool_jax.rollout.remote import refuse_gap
from steptool_jax.rollout.setting import Stats
from steptool_jax.run.data import offline
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.training import drawing
from steptool_jax.run.training.phase import Phase
from steptool_jax.run.training.progress import crowding, shares
from steptool_jax.run.training.record import Recorder
from steptool_jax.types import Trajectory


def run_iteration(
  parts: Parts, phase: Phase, recorder: Recorder, data: offline.Data | None = None
) -> dict[str, float]:
  """Learns once from rollouts, or from stored trajectories (`data`); returns the figures.

      Task ──► rollout ──► Trajectory ──► rewards ──► TokenBatch ──► prepare ──► update ──► figures
               ▲    ▲                    (per step)   (packed)      (log-probs,  (PPO)        │
        policy engine  environment                                   values, GAE)             │
        (KV slots)     (tools, checker)                                                       │
               └──────────────────────────── new weights ◄────────────────────────────────────┘

  With rollout.lag = 1 the trajectories were sampled in the iteration before, and those of the next
  one are sampled now, with the weights as they are before the update, which goes on in the gaps.
  The last iteration samples none; a run that is given more goes on as one that begins. With
  rollout.carry some were begun in earlier iterations, and some that are begun go on in the next.

  Everything random follows from (seed, progress.done). `phase` and its progress change.

  Raises:
    RuntimeError: no conversation can be trained on; too many skipped updates in a row.
    Interrupted: the run is asked to stop.
  """
  config, progress = parts.config, phase.progress
  done = progress.done
  started = time.monotonic()

  # Task -> rollout -> Trajectory -> rewards. Stored trajectories come with theirs.
  stats = Stats()
  if data is not None:
    trajectories = kept = data.batch(done)
    figures = rollout_metrics(trajectories)
  else:
    trajectories, phase.ahead = phase.ahead, []
    if trajectories:
      kept, figures = drawing.keep(config, trajectories)
    else:
      try:
        drawn = drawing.draw(parts, phase, done)
      except NonFiniteLogprobs as error:
        phase.count_skipped(True, str(error))
        return {"skipped": 1.0}
      trajectories, kept, stats = drawn.trajectories, drawn.kept, drawn.stats
      figures = drawn.figures
      progress.redrawn += drawn.redrawn
      phase.carried = drawn.carried
    figures = (rollout_metrics(trajectories) if trajectories else {}) | figures
    if "model_outcome" in figures and "model_drift" not in figures:
      del figures["pass_rate"]  # no checker knows it
    if kept and config.rollout.stale:
      figures["staleness"] = float(np.mean([done - t.policy_version for t in kept]))

  # Trajectory -> TokenBatch -> prepare -> update.
  learning = Pieces(_learn(config, phase, recorder, kept, done))
  if config.rollout.lag and done + 1 < config.train.iterations:
    phase.ahead = trajectories  # where the run is asked to stop before anything has changed
    phase.ahead, stats = _sample_ahead(parts, phase, done + 1, learning)
  figures |= learning.finish()

  # What the run has used so far, and where the time went.
  seconds = time.monotonic() - started
  tokens = sum(t.num_tokens for t in kept)
  progress.count(trajectories, tokens)
  if data is not None:
    return figures | {"tokens_per_second": tokens / seconds}
  if "pass_rate" in figures:
    progress.train_curve.append((progress.conversations, figures["pass_rate"]))
  if "model_drift" in figures:
    progress.model_curve.append((progress.conversations, figures["model_outcome"]))
  if config.rollout.long_slots:
    figures |= crowding(stats, config.rollout.slots + config.rollout.long_slots)
  return figures | shares(stats, learning.seconds, seconds, tokens)


class Pieces:
  """Work that is done piece by piece, and how long it takes; `finish` gives what it returns."""

  def __init__(self, work: Generator[None, None, dict[str, float]]):
    self._work = work
    self._result: dict[str, float] | None = None
    self.begun, self.seconds = False, 0.0

  def step(self) -> bool:
    """Does a piece; whether there was one."""
    if self._result is not None:
      return False
    self.begun = True
    started = time.monotonic()
    try:
      next(self._work)
    except StopIteration as end:
      self._result = end.value
    self.seconds += time.monotonic() - started
    return True

  def finish(self) -> dict[str, float]:
    """Does the rest."""
    while self.step():
      pass
    return self._result


def _sample_ahead(
  parts: Parts, phase: Phase, done: int, learning: Pieces
) -> tuple[list[Trajectory], Stats]:
  """(paid trajectories of iteration `done`, sampled with the weights of before `learning`, stats).

  Once the update has begun a request to stop waits for its end: half an iteration is no state to go
  on from. No trajectories where the weights are broken: the next iteration finds that out.
  """
  variables = phase.sampler()

  def idle() -> dict | None:
    return variables() if learning.step() else None

  try:
    drawn = drawing.draw(
      *(parts, phase, done, variables()),
      policy=done - 1,
      idle=idle,
      stop=lambda: parts.stop() and not learning.begun,
    )
  except NonFiniteLogprobs:
    return [], Stats()
  return drawn.trajectories, drawn.stats


def _learn(
  config: Config, phase: Phase, recorder: Recorder, kept: Sequence[Trajectory], done: int
) -> Generator[None, None, dict[str, float]]:
  """Packs, prepares and updates, a program at a time; the figures of that."""
  packed = phase.pack(kept)
  if packed is None:
    return {"nothing_to_learn": 1.0}
  rows = len(packed.batch.tokens)
  prepared, prepare_figures = phase.prepare(packed)
  # Of what an earlier policy has sampled, the gap says how far this one has moved.
  if config.rollout.engine == "http" and all(t.policy_version == done for t in kept):
    refuse_gap(float(prepare_figures["sampler_gap"]), config.rollout.http.gap)
  if recorder.wants(done):
    advantages = prepared.advantages
    if advantages is not None:
      advantages = sharding.to_host(advantages).reshape(-1, config.train.row_tokens)
    recorder.training(done, kept, packed, advantages)
  updates = []
  for epoch in range(config.train.epochs):
    for minibatch, count in phase.minibatches(prepared, rows, epoch):
      yield
      updates.append(phase.update(minibatch, count))
  for more in range(1, config.critic.passes):
    for minibatch, count in phase.minibatches(prepared, rows, config.train.epochs - 1 + more):
      yield
      phase.fit_values(minibatch, count)
  resolved = algorithms.resolve(algorithms.get_algorithm(config.algorithm), config)
  if config.loss.kl_adaptive and resolved.loss.kl != "none":
    phase.adapt_kl(prepare_figures["kl"], len(kept))
  return _learning_figures(prepare_figures, updates) | {
    "kl_coef": float(phase.state.kl_coef),
    "padding": batching.padding_share(packed.batch),
    "nothing_to_learn": 0.0,
  }


def _learning_figures(
  prepared: Mapping[str, Any], updates: Sequence[Mapping[str, float]]
) -> dict[str, float]:
  """Figures of prepare, and means over the optimizer steps of what it does not know."""
  figures = {name: float(value) for name, value in jax.device_get(prepared).items()}
  means = {n: float(np.mean([u[n] for u in updates])) for n in updates[0] if n not in figures}
  return figures | means
