"""What learns in one phase of a run: its learner, its state, and the steps that change it.

iteration.py puts the steps of RL in order; run/train.py puts the phases in order.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from steptool_jax.config import Config
from steptool_jax.environments.base import Session
from steptool_jax.learning import algorithms, batching, steptable
from steptool_jax.learning.programs import preparation, update
from steptool_jax.policy import lora, sharding
from steptool_jax.rollout import carrying
from steptool_jax.run.hosts import hang
from steptool_jax.run.parts.build import Policy
from steptool_jax.run.parts.reward_models import RewardModel
from steptool_jax.run.training import ahead, setup
from steptool_jax.run.training.progress import Progress
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
    progress: Progress,
    iterations: int,
    conversations: int,
  ):
    self.config, self.policy, self.mesh = config, policy, mesh
    self.progress, self.conversations = progress, conversations
    self.algorithm = algorithms.get_algorithm(config.algorithm)
    name = "sft" if progress.phase == "sft" else config.algorithm
    self.learner = setup.build_learner(config, policy.model, name, iterations)
    self.programs = tuple(map(ahead.Program, update.compile_programs(self.learner)))
    self.state: TrainState | None = None
    self.past: Sequence[Trajectory] = []  # ArCHer's replay
    self.ahead: Sequence[Trajectory] = []  # paid, for the coming iteration (rollout.lag)
    self.carried = carrying.Carried()  # conversations of several iterations (rollout.carry)
    self.sessions: dict[carrying.Key, Session] = {}  # theirs, open since the last rollout
    self.owners: dict[carrying.Key, int] = {}  # the processes that keep them
    self.skipped_in_a_row = 0
    # Whether programs are for trajectories of several segments in any case; else a batch decides.
    self.segmented = algorithms.changes_history(config)
    self.scorer: RewardModel | None = None  # rewards.source = model

  def close(self) -> None:
    """Ends the sessions of conversations that were to go on."""
    carrying.close(self.sessions)

  def start(self, variables: dict) -> None:
    """A fresh state over these variables."""
    self.state = setup.start_phase(self.config, self.mesh, self.learner, variables)

  def abstract_state(self) -> TrainState:
    """The state's shapes and shardings, for a restore."""
    return setup.abstract_state(self.policy, self.mesh, self.learner)

  def compile_ahead(self, executor: Executor) -> None:
    """Compiles what the phase's first iteration calls, in the executor's thread."""
    prepare, change = self.programs
    c, count = self.config, jax.ShapeDtypeStruct((), np.int32)

    def imitate() -> list[tuple]:
      micro_rows = c.sft.micro_rows
      batch = self._abstract_batch(-(-c.sft.batch // micro_rows), micro_rows)
      return [(self.abstract_state(), batch, count)]

    def learn() -> list[tuple]:
      micro_rows, state = c.train.micro_rows, self.abstract_state()
      most = -(-self._most_rows() // micro_rows)
      batch, table = self._abstract_batch(most, micro_rows), None
      if self.learner.fits is not None:
        row = steptable.empty(1, 1)
        shape = (most, micro_rows, self.progress.table_width)
        table = jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype), row)
      recorded = preparation.abstract_recorded(self.learner, batch, table)
      prepared, _ = jax.eval_shape(prepare.jitted, state, batch, count, table, recorded)
      shape = (-(-most // c.train.minibatches), *batch.tokens.shape[1:])
      mini = jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype), prepared)
      return [(state, batch, count, table, recorded), (state, mini, count)]

    if self.learner.algorithm.rewards == "none":
      ahead.compile_ahead(executor, self.mesh, [change], imitate)
    else:
      ahead.compile_ahead(executor, self.mesh, [prepare, change], learn)

  def _abstract_batch(self, micro_batches: int, micro_rows: int) -> TokenBatch:
    row = batching.empty_batch(1, self.config.train.row_tokens, self.segmented)
    shape = (micro_batches, micro_rows, self.config.train.row_tokens)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype), row)

  def _most_rows(self) -> int:
    """Rows of the largest batch of an iteration of RL."""
    most = self.conversations * self.algorithm.select.rows
    return most + (self.config.archer.batch if self.learner.critic == "double" else 0)

  def variables(self) -> dict:
    """The policy's variables as they are now."""
    return lora.join_variables(self.state.trainable, self.state.frozen)

  def sampler(self) -> Callable[[], dict]:
    """Today's policy for as long as it is wanted: what is called gives its variables, and is to be
    called again after every update, which moves what is frozen to other buffers."""
    trainable = _copied(self.state.trainable)
    return lambda: lora.join_variables(trainable, self.state.frozen)

  def imitate(self, trajectories: Sequence[Trajectory], capacity: int) -> dict[str, float]:
    """One optimizer step of SFT; capacity: micro-batches of the largest batch."""
    row_tokens = self.config.train.row_tokens
    batch = batching.pack(trajectories, row_tokens, segmented=self.segmented).batch
    needed = -(-len(batch.tokens) // self.config.sft.micro_rows)
    on_device = self._to_device(batch, self.config.sft.micro_rows, _room(needed, capacity))
    return self.update(on_device, batch.tokens.shape[0])

  def pack(self, trajectories: Sequence[Trajectory]) -> batching.Packed | None:
    """What an iteration of RL learns from, [R, T] (NumPy); None where there is nothing to learn."""
    packed, self.past = setup.pack(
      self.config, trajectories, self.past, self.progress.done, self.segmented
    )
    self.progress.learnt += packed is not None
    return packed

  def prepare(self, packed: batching.Packed) -> tuple[TokenBatch, dict[str, jax.Array]]:
    """(the batch on the devices [N, B, T] with log-probs, values and advantages, figures)."""
    batch, micro_rows = packed.batch, self.config.train.micro_rows
    needed = -(-len(batch.tokens) // micro_rows)
    capacity = _room(needed, -(-self._most_rows() // micro_rows))
    on_device, table, host = self._to_device(batch, micro_rows, capacity), None, None
    if self.learner.fits is not None:
      host = steptable.build(packed, self.progress.table_width)
      self.progress.table_width = host.position.shape[1]
      table = self._to_device(host, micro_rows, capacity)
    recorded = self._recorded(packed, host)
    if recorded is not None:
      recorded = self._to_device(recorded, micro_rows, capacity)
    count = np.int32(-(-len(batch.tokens) // micro_rows))
    return self.programs[0](self.state, on_device, count, table, recorded)

  def _recorded(
    self, packed: batching.Packed, table: steptable.StepTable | None
  ) -> np.ndarray | None:
    """What the engine recorded for the critic, as preparation.prepare takes it, [R, ...]."""
    match self.learner.records:
      case "values":
        recorded = [np.concatenate([s.values for s in t.steps]) for t in packed.trajectories]
        return batching.lay_out(packed, recorded)
      case "hidden":
        return steptable.recorded_hidden(packed, table)
    return None

  def minibatches(
    self, prepared: TokenBatch, rows: int, epoch: int
  ) -> Iterator[tuple[TokenBatch, int]]:
    """(batch, used rows) of each optimizer step of an epoch, in an order of its own."""
    seed = (self.config.seed, self.progress.done, epoch)
    together = self.algorithm.select.rows
    return setup.minibatches(prepared, rows, self.config.train.minibatches, together, seed)

  def adapt_kl(self, kl: jax.Array, trajectories: int) -> None:
    """Moves the KL coefficient towards its target; a NaN would stay in it for good."""
    c = self.config.loss
    if math.isfinite(kl):
      kl_coef = algorithms.adapt_kl(self.state.kl_coef, kl, c.kl_target, c.kl_horizon, trajectories)
      self.state = self.state._replace(kl_coef=kl_coef)

  def update(self, batch: TokenBatch, rows: int) -> dict[str, float]:
    """One optimizer step on a batch [N, B, T] on the devices, `rows` rows of which are used."""
    hang.stamp()
    count = np.int32(-(-rows // batch.tokens.shape[1]))
    self.state, metrics = self.programs[1](self.state, batch, count)
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    names = [name for name, value in metrics.items() if not math.isfinite(value)]
    reason = f"what is not finite: {', '.join(names) or 'rewards, log-probs or advantages'}"
    self.count_skipped(bool(metrics["skipped"]), reason)
    return metrics

  def fit_values(self, batch: TokenBatch, rows: int) -> None:
    """One more step of the value head alone, on a batch as `update`'s."""
    hang.stamp()
    self.state = self._fit_values(self.state, batch, np.int32(-(-rows // batch.tokens.shape[1])))

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
    hang.stamp()
    rows, length = batch.tokens.shape
    micro_rows = self.config.train.micro_rows
    capacity = _room(-(-rows // micro_rows), -(-self.conversations // micro_rows))
    on_device = self._to_device(batch, micro_rows, capacity)
    values = self._logprobs(self.variables(), on_device, np.int32(-(-rows // micro_rows)))
    return sharding.to_host(values).reshape(-1, length)[:rows]

  @functools.cached_property
  def _logprobs(self):
    return sharding.jit(functools.partial(preparation.action_logprobs, self.learner))

  @functools.cached_property
  def _fit_values(self):
    return sharding.jit(functools.partial(update.fit_values, self.learner), donate_argnums=0)

  def _to_device(self, batch, micro_rows: int, capacity: int):
    return setup.to_device(batch, micro_rows, capacity, self.mesh)


def _room(needed: int, usual: int) -> int:
  """Micro-batches to make room for: as a row a conversation takes, doubled where segments need
  more. It follows from the batch alone, so a run that is resumed computes the same bits."""
  while usual < needed:
    usual *= 2
  return usual


@jax.jit
def _copied(tree: Any) -> Any:
  return jax.tree.map(jnp.copy, tree)
