"""Config -> optimizer, learner and train state, and packed batches on the mesh."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.sharding import Mesh

from steptool_jax.config import Config, Optimizer
from steptool_jax.learning import algorithms, batching, steptable
from steptool_jax.learning.programs import learners
from steptool_jax.learning.steptable import StepTable
from steptool_jax.policy import lora, model, sharding
from steptool_jax.run.hosts import agreement
from steptool_jax.run.parts.build import Policy
from steptool_jax.run.training import replay
from steptool_jax.types import TokenBatch, TrainState, Trajectory


def build_optimizer(
  c: Optimizer, total_steps: int, critic_rate: float = 1.0, head_passes: bool = False
) -> optax.GradientTransformation:
  """AdamW (Muon for the layers' kernels if asked for) after a clip of the gradient's global norm.

  The schedule spans `total_steps`. critic_rate: of a critic's heads, in multiples of the others'.
  head_passes: the value head takes steps of its own (update.fit_values), and its moments are
  corrected by their number.
  """
  rate = _schedule(c, c.learning_rate, total_steps)
  common = {"weight_decay": c.weight_decay, "mu_dtype": c.first_moment or None}
  parts = [optax.clip_by_global_norm(c.max_grad_norm)] if c.max_grad_norm else []
  if c.muon_rate:
    muon = optax.contrib.muon(
      _schedule(c, c.muon_rate, total_steps),
      eps=c.eps,
      muon_weight_dimension_numbers=_muon_dimensions,
      adam_b1=c.b1,
      adam_b2=c.b2,
      adam_weight_decay=c.weight_decay,
      adam_learning_rate=rate,
      **common,
    )
    parts.append(muon)
  elif head_passes:
    adam = optax.scale_by_adam(c.b1, c.b2, c.eps, mu_dtype=common["mu_dtype"])
    parts.append(optax.partition({"value_head": adam, "policy": adam}, _value_head))
    parts += [optax.add_decayed_weights(c.weight_decay), optax.scale_by_learning_rate(rate)]
  else:
    parts.append(optax.adamw(rate, c.b1, c.b2, c.eps, **common))
  if critic_rate != 1:
    parts.append(optax.masked(optax.scale(critic_rate), _critic_heads))
  return optax.chain(*parts)


def refuse_lost_steps(config: Config, optimizer: Optimizer, field: str) -> None:
  """ValueError where all weights are trained and kept in bfloat16: at a weight of .02 its numbers
  are 1e-4 apart, so most weights would never move, and no figure would show it."""
  if not config.lora.rank and config.model.param_dtype == "bfloat16":
    raise ValueError(
      f"config.model.param_dtype: 'bfloat16', but with lora.rank = 0 all weights are trained, and "
      f"steps of {field}.learning_rate = {optimizer.learning_rate:g} are lost in its rounding; set "
      "it to 'float32' (model.dtype may stay 'bfloat16'), or lora.rank above 0"
    )


def _schedule(c: Optimizer, peak: float, total_steps: int) -> optax.Schedule:
  warmup = round(c.warmup * total_steps)
  rest = max(total_steps - warmup, 1)
  main = {
    "constant": lambda: optax.constant_schedule(peak),
    "linear": lambda: optax.linear_schedule(peak, c.floor * peak, rest),
    "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=c.floor),
  }[c.schedule]()
  if not warmup:
    return main
  # Starts above 0, so that the first step already learns.
  ramp = optax.linear_schedule(peak / warmup, peak, warmup - 1)
  return optax.join_schedules([ramp, main], [warmup])


def _critic_heads(params: dict) -> dict:
  """A mask that is True at PPO's value head and at ArCHer's three heads."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: {"value_head", "critic"} & {*sharding.path_string(path).split("/")} != set(),
    params,
  )


def _value_head(params: dict) -> dict:
  """Labels; fit_values finds the state of the part that is named like the head."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: "value_head" if "value_head" in sharding.path_string(path) else "policy", params
  )


def _muon_dimensions(params: dict) -> dict:
  """Stacked kernels [layer, in, out] are matrices for Muon; None leaves the rest to AdamW."""

  def leaf(path, x):
    name = sharding.path_string(path)
    is_kernel = "layers/" in name and name.endswith("/kernel")
    return optax.contrib.MuonDimensionNumbers(1, 2) if is_kernel and np.ndim(x) == 3 else None

  return jax.tree_util.tree_map_with_path(leaf, params)


def build_learner(
  config: Config, model_config: model.ModelConfig, algorithm: str, iterations: int | None = None
) -> learners.Learner:
  """The learner of a phase: algorithm 'sft' for the warm-up, config.algorithm for RL.

  iterations: those that the schedule spans, of RL or of SFT on stored trajectories; None takes
  train.iterations.
  """
  row, t = algorithms.get_algorithm(algorithm), config.train
  iterations = t.iterations if iterations is None else iterations
  if algorithm == "sft":
    # Without steps of its own, SFT runs through stored trajectories.
    optimizer = build_optimizer(config.sft.optimizer, config.sft.steps or iterations)
  else:
    steps = iterations * t.epochs * t.minibatches
    optimizer = build_optimizer(t.optimizer, steps, t.critic_rate, config.critic.passes > 1)
  return learners.Learner(model_config, row, algorithms.resolve(row, config), optimizer)


def start_phase(
  config: Config, mesh: Mesh, learner: learners.Learner, variables: dict
) -> TrainState:
  """A fresh TrainState over these variables, laid out on the mesh."""
  trainable, frozen = _split(learner, variables)
  make = functools.partial(learners.init_state, learner, seed=config.seed)
  layout = sharding.shardings(jax.eval_shape(make, trainable, frozen), mesh)
  return jax.jit(make, out_shardings=layout)(trainable, frozen)


def _split(learner: learners.Learner, variables: dict) -> tuple[dict, dict]:
  return lora.split_variables(variables, train_values=learner.critic == "value")


def abstract_state(policy: Policy, mesh: Mesh, learner: learners.Learner) -> TrainState:
  """The TrainState of a phase as ShapeDtypeStructs with shardings, for a restore."""

  def make():
    variables = {"params": model.init_params(policy.model, jax.random.key(0))}
    if policy.lora is not None:
      variables["lora"] = lora.init_lora(policy.model, policy.lora, jax.random.key(0))
    return learners.init_state(learner, *_split(learner, variables))

  state = jax.eval_shape(make)
  return sharding.abstract(state, sharding.shardings(state, mesh))


def pack(
  config: Config,
  trajectories: Sequence[Trajectory],
  past: Sequence[Trajectory],
  done: int,
  segmented: bool = False,
) -> tuple[batching.Packed | None, Sequence[Trajectory]]:
  """(what the algorithm learns from in iteration `done`, the past of the next one).

  The first is None where there is nothing to learn from; only ArCHer has a past. segmented: see
  batching.pack_units. ValueError where a trajectory has several segments and the algorithm cannot
  learn from such.
  """
  if any(len(t.parts) > 1 for t in trajectories):
    algorithms.refuse_segments(config, "a trajectory whose history was changed")
  algorithm = algorithms.get_algorithm(config.algorithm)
  units = algorithm.select.pick(trajectories)
  if not units:
    return None, past
  pack_units = functools.partial(
    batching.pack_units,
    units,
    config.train.row_tokens,
    bootstrap=config.advantage.bootstrap,
    spread=config.rewards.spread,
    segmented=segmented,
  )
  if algorithms.resolve(algorithm, config).critic.kind != "double":
    return pack_units(share=algorithms.shares_prompts(algorithm, config.train)), past
  replayed = replay.draw(past, config.archer.batch, (config.seed, done))
  packed = pack_units(replayed=replayed, whole_actions=True)
  return packed, replay.remember(past, trajectories, config.archer.replay)


def to_device(
  batch: TokenBatch | StepTable | np.ndarray, micro_rows: int, capacity: int, mesh: Mesh
) -> TokenBatch | StepTable | np.ndarray:
  """A packed batch [R, T] as [capacity, micro_rows, T] on the mesh, padded with empty rows.

  Likewise a step table [R, K], and an array with a row for each of the batch's, padded with 0.
  """
  rows, length = jax.tree.leaves(batch)[0].shape[:2]
  more = capacity * micro_rows - rows
  if isinstance(batch, np.ndarray):
    padding = np.zeros((more, *batch.shape[1:]), batch.dtype)
  elif isinstance(batch, StepTable):
    padding = steptable.empty(more, length)
  else:
    padding = batching.empty_batch(more, length, segmented=batch.part_ids is not None)
  placement = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, sharding.ROWS))
  whole = jax.tree.map(
    lambda x, pad: np.concatenate([x, pad]).reshape(capacity, micro_rows, *x.shape[1:]),
    batch,
    padding,
  )
  agreement.refuse_different_batches(whole)
  return jax.tree.map(lambda x: sharding.place(x, placement), whole)


def minibatches(
  batch_NBT: TokenBatch, rows: int, parts: int, together: int, seed: Sequence[int]
) -> Iterator[tuple[TokenBatch, int]]:
  """(batch [M, B, T], used rows) of each optimizer step: rows dealt out in a seeded order.

  batch_NBT: `rows` used rows first, padding after them. together: so many neighbouring rows are not
    parted.
  """
  if parts == 1:
    yield batch_NBT, rows
    return
  order = np.random.default_rng(seed).permutation(rows // together)
  micro_batches, micro_rows, _ = batch_NBT.tokens.shape
  shape = (-(-micro_batches // parts), micro_rows)
  for start in range(min(parts, len(order))):
    chosen = (together * order[start::parts, None] + np.arange(together)).reshape(-1)
    index, valid = np.zeros(shape, np.int32), np.zeros(shape, bool)
    index.flat[: len(chosen)] = chosen
    valid.flat[: len(chosen)] = True
    yield _select_rows(batch_NBT, index, valid), len(chosen)


@jax.jit
def _select_rows(batch_NBT: TokenBatch, index_NB: jax.Array, valid_NB: jax.Array) -> TokenBatch:
  """Rows by number, as a new [N, B, T] batch; invalid ones become padding."""

  def take(x):
    return x.reshape(-1, x.shape[-1])[index_NB]

  chosen = jax.tree.map(take, batch_NBT)
  valid = valid_NB[..., None]
  return chosen._replace(
    segment_ids=jnp.where(valid, chosen.segment_ids, 0),
    action_mask=chosen.action_mask & valid,
    step_ids=jnp.where(valid, chosen.step_ids, -1),
    step_end=chosen.step_end & valid,
    bootstrap=chosen.bootstrap & valid,
  )
