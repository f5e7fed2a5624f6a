"""One phase of a run learns: its learner, the state, and what an iteration's trajectories do to it.

Book-keeping, rollouts and phases are run/train.py's.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from steptool_jax.config import Config
from steptool_jax.learning import algorithms, batching, update
from steptool_jax.policy import lora, sharding
from steptool_jax.run.parts.build import Policy
from steptool_jax.run.training import setup
from steptool_jax.run.training.progress import Progress
from steptool_jax.run.training.record import Recorder
from steptool_jax.types import TokenBatch, TrainState, Trajectory


class Phase:
  """The learner of progress.phase and the state that its updates change.

  iterations: which the schedule spans; conversations: most of an iteration. `progress` counts what
  was learnt and skipped. The state is None until `start` or a restore.
  """

  def __init__(
    self,
    config: Config,
    policy: Policy,
    mesh: Mesh,
    recorder: Recorder,
    progress: Progress,
    iterations: int,
    conversations: int,
  ):
    self.config, self.policy, self.mesh = config, policy, mesh
    self.recorder, self.progress, self.conversations = recorder, progress, conversations
    self.algorithm = algorithms.get_algorithm(config.algorithm)
    name = "sft" if progress.phase == "sft" else config.algorithm
    self.learner = setup.build_learner(config, policy.model, name, iterations)
    self.programs = update.compile_programs(self.learner)
    self.state: TrainState | None = None
    self.past: Sequence[Trajectory] = []  # ArCHer's replay
    self.skipped_in_a_row = 0

  def start(self, variables: dict) -> None:
    """A fresh state over these variables."""
    self.state = setup.start_phase(self.config, self.mesh, self.learner, variables)

  def abstract_state(self) -> TrainState:
    """The state's shapes and shardings, for a restore."""
    return setup.abstract_state(self.policy, self.mesh, self.learner)

  def variables(self) -> dict:
    """The policy's variables as they are now."""
    return lora.join_variables(self.state.trainable, self.state.frozen)

  def imitate(self, trajectories: Sequence[Trajectory], capacity: int) -> dict[str, float]:
    """One optimizer step of SFT; capacity: micro-batches of the largest batch."""
    batch = batching.pack(trajectories, self.config.train.row_tokens).batch
    on_device = self._to_device(batch, self.config.sft.micro_rows, capacity)
    return self.update(on_device, batch.tokens.shape[0])

  def learn(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """prepare, then epochs x minibatches of update: one iteration's figures."""
    t, done = self.config.train, self.progress.done
    packed, self.past = setup.pack(self.config, trajectories, self.past, done)
    if packed is None:
      return {"nothing_to_learn": 1.0}
    self.progress.learnt += 1
    rows = packed.batch.tokens.shape[0]
    most = self.conversations * self.algorithm.select.rows
    if self.algorithm.critic == "double":
      most += self.config.archer.batch
    device_batch = self._to_device(packed.batch, t.micro_rows, -(-most // t.micro_rows))
    prepare, _ = self.programs
    prepared, prepare_metrics = prepare(
      self.state, device_batch, np.int32(-(-rows // t.micro_rows))
    )
    if self.recorder.wants(done):
      advantages = prepared.advantages
      if advantages is not None:
        advantages = sharding.to_host(advantages).reshape(-1, t.row_tokens)
      self.recorder.training(done, trajectories, packed, advantages)
    per_update: list[dict[str, Any]] = []
    for epoch in range(t.epochs):
      parts = setup.minibatches(
        prepared,
        rows,
        t.minibatches,
        self.algorithm.select.rows,
        (self.config.seed, done, epoch),
      )
      for minibatch, count in parts:
        per_update.append(self.update(minibatch, count))
    figures = {k: float(v) for k, v in jax.device_get(prepare_metrics).items()}
    # A NaN would stay in the coefficient for good.
    if self.config.loss.kl_adaptive and math.isfinite(figures["kl"]):
      self.state = self.state._replace(
        kl_coef=algorithms.adapt_kl(
          self.state.kl_coef,
          prepare_metrics["kl"],
          self.config.loss.kl_target,
          self.config.loss.kl_horizon,
          len(trajectories),
        )
      )
    names = per_update[0]
    figures |= {k: float(np.mean([m[k] for m in per_update])) for k in names if k != "entropy"}
    return figures | {
      "kl_coef": float(self.state.kl_coef),
      "padding": batching.padding_share(packed.batch),
      "nothing_to_learn": 0.0,
    }

  def update(self, batch: TokenBatch, rows: int) -> dict[str, float]:
    """One optimizer step on a batch [N, B, T] on the devices, `rows` rows of which are used."""
    count = np.int32(-(-rows // batch.tokens.shape[1]))
    self.state, metrics = self.programs[1](self.state, batch, count)
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    names = [name for name, value in metrics.items() if not math.isfinite(value)]
    reason = f"what is not finite: {', '.join(names) or 'rewards, log-probs or advantages'}"
    self.count_skipped(bool(metrics["skipped"]), reason)
    return metrics

  def count_skipped(self, skipped: bool, reason: str) -> None:
    """Stops the run when updates that were skipped for non-finite numbers come in a row."""
    self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
    self.progress.skipped += skipped
    if self.skipped_in_a_row >= self.config.train.max_skipped:
      raise RuntimeError(
        f"{self.skipped_in_a_row} updates in a row were skipped, the last one because of "
        f"{reason}; lower the learning rate; the last checkpoint holds finite weights"
      )

  def logprobs(self, batch: TokenBatch) -> np.ndarray:
    """Today's log-probs of the sampled tokens of a packed batch, float32 [R, T]."""
    rows, length = batch.tokens.shape
    micro_rows = self.config.train.micro_rows
    on_device = self._to_device(batch, micro_rows, -(-self.conversations // micro_rows))
    values = self._logprobs(self.variables(), on_device, np.int32(-(-rows // micro_rows)))
    return sharding.to_host(values).reshape(-1, length)[:rows]

  @functools.cached_property
  def _logprobs(self):
    return sharding.jit(functools.partial(update.action_logprobs, self.learner))

  def _to_device(self, batch: TokenBatch, micro_rows: int, capacity: int) -> TokenBatch:
    return setup.to_device(batch, micro_rows, capacity, self.mesh)
