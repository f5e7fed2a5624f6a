"""One iteration of RL, from tasks to updated weights."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from steptool_jax.evaluation.metrics import rollout_metrics
from steptool_jax.learning import batching
from steptool_jax.policy import sharding
from steptool_jax.rollout.conversation import NonFiniteLogprobs
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.training import drawing, offline
from steptool_jax.run.training.phase import Phase
from steptool_jax.run.training.progress import shares
from steptool_jax.run.training.record import Recorder


def run_iteration(
  parts: Parts, phase: Phase, recorder: Recorder, data: offline.Data | None = None
) -> dict[str, float]:
  """Learns once from rollouts, or from stored trajectories (`data`); returns the figures.

      Task ──► rollout ──► Trajectory ──► rewards ──► TokenBatch ──► prepare ──► update ──► figures
               ▲    ▲                    (per step)   (packed)      (log-probs,  (PPO)        │
        policy engine  environment                                   values, GAE)             │
        (KV slots)     (tools, checker)                                                       │
               └──────────────────────────── new weights ◄────────────────────────────────────┘

  Everything random follows from (seed, progress.done). `phase` and its progress change.

  Raises:
    RuntimeError: no conversation can be trained on; too many skipped updates in a row.
    Interrupted: the run is asked to stop.
  """
  config, progress = parts.config, phase.progress
  done = progress.done
  started = time.monotonic()

  # Task -> rollout -> Trajectory -> rewards. Stored trajectories come with theirs.
  if data is None:
    try:
      drawn = drawing.draw(parts, phase)
    except NonFiniteLogprobs as error:
      phase.count_skipped(True, str(error))
      return {"skipped": 1.0}
    trajectories, kept, stats = drawn.trajectories, drawn.kept, drawn.stats
    figures = rollout_metrics(trajectories) | drawn.figures
    progress.redrawn += drawn.redrawn
    if "model_outcome" in figures and "model_drift" not in figures:
      del figures["pass_rate"]  # no checker knows it
  else:
    trajectories = kept = data.batch(done)
    figures = rollout_metrics(trajectories)

  # Trajectory -> TokenBatch -> prepare -> update.
  update_started = time.monotonic()
  packed = phase.pack(kept)
  if packed is None:
    figures["nothing_to_learn"] = 1.0
  else:
    rows = len(packed.batch.tokens)
    prepared, prepare_figures = phase.prepare(packed)
    if recorder.wants(done):
      advantages = prepared.advantages
      if advantages is not None:
        advantages = sharding.to_host(advantages).reshape(-1, config.train.row_tokens)
      recorder.training(done, kept, packed, advantages)
    updates = [
      phase.update(minibatch, count)
      for epoch in range(config.train.epochs)
      for minibatch, count in phase.minibatches(prepared, rows, epoch)
    ]
    if config.loss.kl_adaptive:
      phase.adapt_kl(prepare_figures["kl"], len(kept))
    figures |= _learning_figures(prepare_figures, updates)
    figures |= {
      "kl_coef": float(phase.state.kl_coef),
      "padding": batching.padding_share(packed.batch),
      "nothing_to_learn": 0.0,
    }

  # What the run has used so far, and where the time went.
  now = time.monotonic()
  tokens = sum(t.num_tokens for t in kept)
  progress.count(trajectories, tokens)
  if data is not None:
    return figures | {"tokens_per_second": tokens / (time.monotonic() - started)}
  if "pass_rate" in figures:
    progress.train_curve.append((progress.conversations, figures["pass_rate"]))
  if "model_drift" in figures:
    progress.model_curve.append((progress.conversations, figures["model_outcome"]))
  return figures | shares(stats, now - update_started, now - started, tokens)


def _learning_figures(
  prepared: Mapping[str, Any], updates: Sequence[Mapping[str, float]]
) -> dict[str, float]:
  """Figures of prepare, and means over the optimizer steps (the entropy is that of prepare)."""
  figures = {name: float(value) for name, value in jax.device_get(prepared).items()}
  means = {n: float(np.mean([u[n] for u in updates])) for n in updates[0] if n != "entropy"}
  return figures | means
