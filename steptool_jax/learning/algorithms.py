"""All algorithms as rows of one literal table: name -> (rewards, advantage, loss).

To add one, write its advantage or loss as a function and give it a row. Nothing is subclassed.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from steptool_jax.learning import advantages, losses, segments
from steptool_jax.learning.outputs import Outputs
from steptool_jax.types import TokenBatch

Terms = dict[str, losses.SumAndDenominator]


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
  """The numbers that advantages and losses read; static under jit. Meanings: config.py."""

  gamma: float
  lam: float
  level: str  # "" = as the algorithm's row says
  broadcast: bool
  whiten: bool
  clip_low: float
  clip_high: float
  value_clip: float
  value_coef: float
  entropy_coef: float
  kl_placement: str  # "reward", "loss" or "none"
  aggregation: losses.Aggregation


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """One row.

  rewards: what the rollout's steps are paid: "step" (every call), "outcome" (the last step only),
    "none" (it learns from demonstrations).
  advantage: (batch, rewards, values, hyperparameters) -> (advantages, returns); None if unused.
  loss: (outputs, batch, hyperparameters) -> (terms to add up, metrics), (sum, denominator) each.
  needs_values: the value head is part of the update.
  """

  rewards: Literal["step", "outcome", "none"]
  advantage: Callable | None
  loss: Callable[[Outputs, TokenBatch, Hyperparameters], tuple[Terms, Terms]]
  needs_values: bool


def _gae(level: advantages.Level, step_episodes: bool = False) -> Callable:
  def advantage(batch, rewards_BT, values_BT, hp: Hyperparameters):
    return advantages.gae(
      batch,
      rewards_BT,
      values_BT,
      gamma=hp.gamma,
      lam=hp.lam,
      level=hp.level or level,
      broadcast=hp.broadcast,
      step_episodes=step_episodes,
    )

  return advantage


def _sft_loss(outputs: Outputs, batch: TokenBatch, hp: Hyperparameters) -> tuple[Terms, Terms]:
  weights_BT = losses.action_weights(batch, hp.aggregation)
  loss = losses.cross_entropy(outputs.logprobs, weights_BT)
  return {"loss": loss}, {"entropy": losses.weighted(outputs.entropy, weights_BT)}


def _ppo_loss(level: advantages.Level) -> Callable:
  def loss(outputs: Outputs, batch: TokenBatch, hp: Hyperparameters) -> tuple[Terms, Terms]:
    weights_BT = losses.action_weights(batch, hp.aggregation)
    policy, metrics = losses.ppo_policy(
      outputs.logprobs,
      batch.old_logprobs,
      batch.advantages,
      weights_BT,
      hp.clip_low,
      hp.clip_high,
    )
    # A broadcast advantage reads V at step starts only, so only those values are fitted.
    value_mask_BT = batch.action_mask
    if (hp.level or level) == "step" and hp.broadcast:
      value_mask_BT = segments.step_starts(batch.action_mask, batch.step_ids, batch.segment_ids)
    value = losses.clipped_value(
      outputs.values, batch.values, batch.returns, value_mask_BT, hp.value_clip
    )
    entropy = losses.weighted(outputs.entropy, weights_BT)
    terms = {
      "policy_loss": policy,
      "value_loss": _scale(value, hp.value_coef),
      "entropy_loss": _scale(entropy, -hp.entropy_coef),
    }
    return terms, metrics | {"entropy": entropy, "value_error": value}

  return loss


def _scale(term: losses.SumAndDenominator, factor: float) -> losses.SumAndDenominator:
  return factor * term[0], term[1]


ALGORITHMS: dict[str, Algorithm] = {
  # Supervised fine-tuning on demonstrations.
  "sft": Algorithm("none", None, _sft_loss, needs_values=False),
  # Outcome-only PPO: IsSolved on the last token, GAE over tokens.
  "ppo": Algorithm("outcome", _gae("token"), _ppo_loss("token"), needs_values=True),
  # StepTool: step rewards, GAE over steps.
  "steptool": Algorithm("step", _gae("step"), _ppo_loss("step"), needs_values=True),
  # Ablation "without step rewards": intermediate rewards are 0.
  "steptool_no_step_rewards": Algorithm(
    "outcome", _gae("step"), _ppo_loss("step"), needs_values=True
  ),
  # Ablation "without step-grained optimisation": sub-trajectories, plain PPO on each.
  "steptool_no_step_grained": Algorithm(
    "step", _gae("token", step_episodes=True), _ppo_loss("token"), needs_values=True
  ),
}


def get_algorithm(name: str) -> Algorithm:
  """Row of the table.

  Raises:
    ValueError: no such row; lists the valid names.
  """
  if name not in ALGORITHMS:
    raise ValueError(f"algorithm: no {name!r}; choose one of {', '.join(sorted(ALGORITHMS))}")
  return ALGORITHMS[name]


def adapt_kl(
  kl_coef: jax.Array, kl: jax.Array, target: float, horizon: float, trajectories: int
) -> jax.Array:
  """Adaptive KL controller (Ziegler et al. 2019, section 2.2).

  coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * trajectories / horizon, where kl is the mean over
  trajectories of the summed log(pi / ref), and horizon counts trajectories.
  """
  error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
  return kl_coef * (1.0 + error * trajectories / horizon)
