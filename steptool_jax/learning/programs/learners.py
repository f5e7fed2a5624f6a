"""What both jitted programs share: the learner, its state, a forward pass over a micro-batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from steptool_jax.config import Config
from steptool_jax.learning import critics, double_critic, steptable
from steptool_jax.learning.algorithms import Algorithm, shares_prompts
from steptool_jax.learning.outputs import Outputs, policy_outputs
from steptool_jax.learning.steptable import StepTable
from steptool_jax.policy import lora, model, sharding
from steptool_jax.types import TokenBatch, TrainState

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Learner:
  """What the two programs close over; all static. config: `algorithms.resolve`d for the row."""

  model: model.ModelConfig
  algorithm: Algorithm
  config: Config
  optimizer: optax.GradientTransformation

  @property
  def with_reference(self) -> bool:
    """Whether a reference policy is evaluated: for a KL penalty, or because the loss reads it."""
    return self.algorithm.reference or self.config.loss.kl != "none"

  @property
  def temperature(self) -> float:
    """The behaviour policy's temperature, which all log-probs take; demonstrations have none."""
    return 1.0 if self.algorithm.rewards == "none" else self.config.rollout.temperature

  @property
  def fixed_behaviour(self) -> bool:
    """Whether old log-probs are the batch's behaviour_logprobs, and not those of today's policy."""
    return bool(self.config.data.path) and self.config.data.behaviour == "start"

  @property
  def critic(self) -> str:
    """Where values come from; `algorithms.resolve` has filled it in."""
    return self.config.critic.kind

  @property
  def fits(self) -> Callable[..., jax.Array] | None:
    """What makes values out of a step table; None: the critic needs no table."""
    return critics.get_critic(self.critic).fit

  @property
  def records(self) -> str:
    """What the engine has recorded for the critic."""
    return critics.recorded(self.config)

  @property
  def critic_steps(self) -> int:
    """First optimizer steps, which train ArCHer's critic alone."""
    t = self.config.train
    return self.config.archer.warmup * t.epochs * t.minibatches


def init_state(learner: Learner, trainable: Any, frozen: Any, seed: int = 0) -> TrainState:
  """A fresh optimizer, today's policy as the reference where one is needed, ArCHer's critic.

  With adapters the reference is the same weights with adapters off, so nothing is copied.
  """
  needs_copy = learner.with_reference and "lora" not in trainable
  reference, target = {}, ()
  if needs_copy:
    reference = jax.tree.map(jnp.copy, model.in_compute_dtype(learner.model, trainable))
  if learner.critic == "double":
    heads = double_critic.init_critic(learner.model.hidden_size, jax.random.key(seed))
    trainable, target = trainable | {"critic": heads}, jax.tree.map(jnp.copy, heads)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    trainable=trainable,
    frozen=frozen,
    reference=reference,
    opt_state=learner.optimizer.init(trainable),
    kl_coef=jnp.asarray(learner.config.loss.kl_coef, jnp.float32),
    target=target,
  )


def reference_variables(state: TrainState) -> dict:
  """The reference policy's variables: the frozen copy, or the base model with adapters off."""
  if state.reference:
    return lora.join_variables(state.reference, {})
  return lora.adapters_off(lora.join_variables(state.trainable, state.frozen))


def critic_reads(
  learner: Learner,
  variables: dict,
  micro: TokenBatch,
  heads: tuple[Any, ...],
  table: StepTable | None = None,
) -> Callable[[jax.Array], Any] | None:
  """hidden states -> what the critic reads of them; heads: ArCHer's, each of which gives values."""
  if learner.critic == "value":
    return lambda hidden_BTD: model.project_values(variables, hidden_BTD)
  if learner.critic == "double":
    return lambda hidden_BTD: tuple(double_critic.project(h, hidden_BTD, micro) for h in heads)
  if table is not None and critics.get_critic(learner.critic).hidden:
    return lambda hidden_BTD: steptable.gather(hidden_BTD.astype(jnp.float32), table)
  return None


def forward(
  learner: Learner,
  variables: dict,
  micro: TokenBatch,
  heads: Callable[[jax.Array], Any] | None = None,
) -> Outputs:
  """The policy's outputs for a micro-batch [B, T]; `values` are what `heads` makes of its hidden
  states [B, T, D]."""
  if sharding.platform() == "tpu" and not shares_prompts(learner.algorithm, learner.config.train):
    micro = micro._replace(until=None)  # segments say it all, to a kernel that asks for less
  return policy_outputs(
    learner.model,
    variables,
    micro,
    temperature=learner.temperature,
    chunk=learner.config.loss.logprob_chunk,
    heads=heads,
  )


def zero_outputs(
  learner: Learner, shape: tuple[int, ...], heads: int, table: StepTable | None = None
) -> Outputs:
  """What `forward` gives, as zeros of this shape; a forward pass need not be traced to know it."""
  zeros, values = jnp.zeros(shape, jnp.float32), None
  if learner.critic == "value":
    values = zeros
  elif learner.critic == "double":
    values = (double_critic.Utterances(zeros, zeros, zeros),) * heads
  elif table is not None and critics.get_critic(learner.critic).hidden:
    values = jnp.zeros((*table.position.shape, learner.model.hidden_size), jnp.float32)
  return Outputs(zeros, zeros, values)


def micro_of(batch_NBT: Any, index: jax.Array) -> Any:
  """Micro-batch `index` of a batch, or of its step table."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, index, axis=0, keepdims=False), batch_NBT
  )
