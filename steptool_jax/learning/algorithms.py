"""All algorithms as rows of one literal table: name -> (selection, advantage, loss).

To add one, write its advantage or loss as a function and give it a row. Nothing is subclassed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from steptool_jax.config import Config, Train
from steptool_jax.learning import advantages, critics, double_critic, groups, losses, segments
from steptool_jax.learning.outputs import Outputs
from steptool_jax.learning.selection import EVERYTHING, PAIRS, SOLVED, Selection
from steptool_jax.types import TokenBatch

Terms = dict[str, losses.SumAndDenominator]


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """One row.

  rewards: what the rollout's steps are paid: "step" (every call), "outcome" (the last step only),
    "none" (it learns from demonstrations).
  loss: (outputs, batch, config) -> (terms to add up, metrics), (sum, denominator) each.
  advantage: (batch, rewards, critic's values, config) -> fields of the batch; None: the
    loss reads none. Whitened where there is a critic; without one the baseline sets the scale.
  select: which trajectories are learnt from, and which of them stay together.
  critic: where config.critic.kind is empty: "value" (the policy's value head), "double" (ArCHer's,
    with replay), "none", or another of critics.CRITICS. An algorithm with GAE takes any of these.
  compares: it learns from differences between samples of a task.
  reference: the loss itself reads the reference policy.
  step_episodes: its advantage and returns end with each step, as if that were an episode.
  standardises: its advantage divides by the deviation of a task's samples.
  level, kl, aggregation, ratio, surrogate: where the config's word is empty.
  """

  rewards: Literal["step", "outcome", "none"]
  loss: Callable[[Outputs, TokenBatch, Config], tuple[Terms, Terms]]
  advantage: Callable[..., dict[str, jax.Array]] | None = None
  select: Selection = EVERYTHING
  critic: Literal["none", "value", "group", "ridge", "double"] = "none"
  compares: bool = False
  reference: bool = False
  step_episodes: bool = False
  standardises: bool = False
  level: advantages.Level = "token"
  kl: Literal["reward", "loss", "none"] = "reward"
  aggregation: losses.Aggregation = "token"
  ratio: losses.Unit = "token"
  surrogate: str = "ppo"

  @property
  def gae(self) -> bool:
    """Whether its advantage is GAE, which takes any critic that gives V."""
    return self.critic not in ("none", "double")

  def takes(self, kind: str) -> bool:
    """Whether config.critic.kind may be this: with GAE any, with ArCHer's advantage of one step one
    that is fitted to states, in the place of its double critic: what other samples earned is the
    same at neighbouring steps."""
    return self.gae or (self.critic == "double" and kind == "ridge")


# --- advantages ------------------------------------------------------------------------------


def _gae(step_episodes: bool = False) -> Callable:
  def advantage(batch, rewards_BT, values_BT, c: Config):
    advantages_BT, returns_BT = advantages.gae(
      batch,
      rewards_BT,
      values_BT,
      gamma=c.advantage.gamma,
      lam=c.advantage.lam,
      level=c.advantage.level,
      broadcast=c.advantage.broadcast,
      step_episodes=step_episodes,
    )
    return {"advantages": advantages_BT, "values": values_BT, "returns": returns_BT}

  return advantage


def _baseline(function: Callable, discounted: bool = False) -> Callable:
  """An advantage without a critic; `discounted`: over steps, with gamma."""

  def advantage(batch, rewards_BT, values: None, c: Config):
    gamma = (c.advantage.gamma,) if discounted else ()
    return {"advantages": function(batch, rewards_BT, *gamma)}

  return advantage


def _centred(batch, rewards_BT):
  """R - mean of the task's samples, not divided by their deviation: Dr. GRPO (Liu et al. 2025)."""
  returns_BT, one_BT = groups.episode_returns(batch, rewards_BT)
  centred_BT, _, _ = groups.relative(returns_BT, one_BT, batch.group_ids)
  return groups.on_trajectory(batch, centred_BT, one_BT)


def _gigpo(batch, rewards_BT, values: None, c: Config):
  """Feng et al. 2025: episode-relative + omega step-relative."""
  episode_BT = groups.group_relative(batch, rewards_BT)
  step_BT = groups.anchor_relative(batch, rewards_BT, c.advantage.gamma)
  return {"advantages": episode_BT + c.advantage.omega * step_BT}


def _archer(batch, rewards_BT, values: Any, c: Config):
  if c.critic.kind != "double":
    # Tools decide what follows an utterance, not chance: Q(s, a) is r + gamma V(s').
    return _gae()(batch, rewards_BT, values, _one_step(c))
  online, target = values
  returns_BT, value_targets_BT = double_critic.targets(batch, rewards_BT, target, c.advantage.gamma)
  return {
    "advantages": double_critic.utterance_advantages(batch, online),
    "values": online.q,
    "returns": returns_BT,
    "value_targets": value_targets_BT,
  }


def _one_step(c: Config) -> Config:
  advantage = dataclasses.replace(c.advantage, level="step", lam=0.0, broadcast=True)
  return dataclasses.replace(c, advantage=advantage)


# --- losses ----------------------------------------------------------------------------------


def _sft_loss(outputs: Outputs, batch: TokenBatch, c: Config) -> tuple[Terms, Terms]:
  loss = losses.aggregate(-outputs.logprobs, batch, c)
  return {"loss": loss}, {"entropy": _mean(outputs.entropy, batch, c)}


def _policy_loss(outputs: Outputs, batch: TokenBatch, c: Config) -> tuple[Terms, Terms]:
  """The surrogate and the entropy bonus.

  At the policy that sampled, every surrogate's gradient is REINFORCE's, - A grad log pi; after the
  first minibatch its ratio makes up for how far the policy has moved.
  """
  loss_BT, metrics = losses.policy(outputs.logprobs, batch, c.loss)
  entropy = losses.aggregate(outputs.entropy, batch, c)
  terms = {
    "policy_loss": losses.aggregate(loss_BT, batch, c),
    "entropy_loss": _scale(entropy, -c.loss.entropy_coef),
  }
  return terms, metrics | {"entropy": _mean(outputs.entropy, batch, c)}


def _ppo_loss(outputs: Outputs, batch: TokenBatch, c: Config) -> tuple[Terms, Terms]:
  terms, metrics = _policy_loss(outputs, batch, c)
  if c.critic.kind != "value":  # the others have no weights that a gradient would reach
    return terms, metrics
  # A broadcast advantage reads V at step starts only, so only those values are fitted.
  value_mask_BT = batch.action_mask
  if c.advantage.level == "step" and c.advantage.broadcast:
    value_mask_BT = segments.step_starts(batch)
  value = losses.clipped_value(
    outputs.values, batch.values, batch.returns, value_mask_BT, c.loss.value_clip
  )
  terms |= {"value_loss": _scale(value, c.loss.value_coef)}
  return terms, metrics | {"value_error": value}


def _archer_loss(outputs: Outputs, batch: TokenBatch, c: Config) -> tuple[Terms, Terms]:
  if c.critic.kind != "double":
    return _policy_loss(outputs, batch, c)
  (online,) = outputs.values
  q, v = double_critic.q_loss(online, batch), double_critic.v_loss(online, batch)
  terms, metrics = _policy_loss(outputs, batch, c)
  terms |= {"q_loss": _scale(q, c.loss.value_coef), "v_loss": _scale(v, c.loss.value_coef)}
  return terms, metrics | {"q_error": q, "v_error": v}


def _dpo_loss(outputs: Outputs, batch: TokenBatch, c: Config) -> tuple[Terms, Terms]:
  loss, metrics = losses.dpo(outputs.logprobs, batch.ref_logprobs, batch, c.dpo.beta)
  return {"loss": loss}, metrics | {"entropy": _mean(outputs.entropy, batch, c)}


def _mean(x_BT, batch: TokenBatch, c: Config) -> losses.SumAndDenominator:
  """A figure's mean over sampled tokens, weighted as in the loss."""
  return losses.weighted(x_BT, losses.action_weights(batch, c.loss.aggregation))


def _scale(term: losses.SumAndDenominator, factor: float) -> losses.SumAndDenominator:
  return factor * term[0], term[1]


# --- the table -------------------------------------------------------------------------------

# Without a critic: KL as a loss of its own (k3), and no trajectory weighs more for being longer.
_GROUP: dict[str, Any] = {
  "compares": True,
  "standardises": True,
  "kl": "loss",
  "aggregation": "trajectory",
}

ALGORITHMS: dict[str, Algorithm] = {
  # Supervised fine-tuning on demonstrations.
  "sft": Algorithm("none", _sft_loss, kl="none"),
  # Rejection sampling (Yuan et al. 2023): SFT on the policy's own solved trajectories, every time.
  "rft": Algorithm("outcome", _sft_loss, select=SOLVED, kl="none"),
  # Outcome-only PPO: IsSolved on the last token, GAE over tokens.
  "ppo": Algorithm("outcome", _ppo_loss, _gae(), critic="value"),
  # StepTool: step rewards, GAE over steps, a critic that is fitted anew to each batch.
  "steptool": Algorithm("step", _ppo_loss, _gae(), critic="ridge", level="step"),
  # Ablation "without step rewards": intermediate rewards are 0.
  "steptool_no_step_rewards": Algorithm("outcome", _ppo_loss, _gae(), critic="ridge", level="step"),
  # Ablation "without step-grained optimisation": sub-trajectories, plain PPO on each.
  "steptool_no_step_grained": Algorithm(
    "step", _ppo_loss, _gae(step_episodes=True), critic="value", step_episodes=True
  ),
  # Outcome minus the batch's mean outcome.
  "reinforce": Algorithm("outcome", _policy_loss, _baseline(groups.batch_relative)),
  # Outcome minus the mean outcome of the task's other samples.
  "rloo": Algorithm("outcome", _policy_loss, _baseline(groups.leave_one_out), compares=True),
  # Outcome, normalised over the task's samples.
  "grpo": Algorithm("outcome", _policy_loss, _baseline(groups.group_relative), **_GROUP),
  # grpo with one ratio a trajectory (Zheng et al. 2025); its clip wants about 3e-4.
  "gspo": Algorithm(
    "outcome", _policy_loss, _baseline(groups.group_relative), ratio="trajectory", **_GROUP
  ),
  # grpo without its two biases: no division by the deviation, none by a trajectory's length.
  "dr_grpo": Algorithm(
    "outcome", _policy_loss, _baseline(_centred), compares=True, kl="none", aggregation="constant"
  ),
  # grpo with a clipped weight in the place of a clipped objective (MiniMax-M1 2025).
  "cispo": Algorithm(
    "outcome",
    _policy_loss,
    _baseline(groups.group_relative),
    compares=True,
    standardises=True,
    kl="none",
    surrogate="cispo",
  ),
  # Step rewards, normalised over all steps of the task's samples, then summed up from each step on.
  "grpo_step": Algorithm(
    "step", _policy_loss, _baseline(groups.step_relative, discounted=True), **_GROUP
  ),
  # grpo, plus omega times returns-to-go normalised over steps that begin in the same state.
  "gigpo": Algorithm("outcome", _policy_loss, _gigpo, **_GROUP),
  # DPO on a success and a failure of the same task.
  "eto": Algorithm("outcome", _dpo_loss, select=PAIRS, compares=True, reference=True, kl="none"),
  # Utterance-level double critic with replay, token-level actor; with critic.kind = ridge the same
  # advantage of one step, over values that are fitted anew to each batch, without replay.
  # A penalty in the rewards would be missing in replayed steps, which Q learns from as well.
  "archer": Algorithm("outcome", _archer_loss, _archer, critic="double", level="step", kl="loss"),
}


def resolve(algorithm: Algorithm, config: Config) -> Config:
  """The config with the row's words where its own are empty.

  loss.kl and loss.aggregation are the config's words on RL: where demonstrations are imitated, the
  row's stand, so that runs with other words begin RL at the same policy.
  """
  a, c = config.advantage, config.loss
  imitates = algorithm.rewards == "none"
  loss = dataclasses.replace(
    c,
    kl=algorithm.kl if imitates else c.kl or algorithm.kl,
    aggregation=algorithm.aggregation if imitates else c.aggregation or algorithm.aggregation,
    ratio=c.ratio or algorithm.ratio,
    surrogate=c.surrogate or algorithm.surrogate,
  )
  advantage = dataclasses.replace(a, level=a.level or algorithm.level)
  kind = config.critic.kind if algorithm.takes(config.critic.kind) else ""
  critic = dataclasses.replace(config.critic, kind=kind or algorithm.critic)
  return dataclasses.replace(config, advantage=advantage, loss=loss, critic=critic)


def recorded(config: Config) -> Literal["", "values", "hidden"]:
  """As `critics.recorded`, of a config that is not resolved yet."""
  return critics.recorded(resolve(get_algorithm(config.algorithm), config))


def get_algorithm(name: str) -> Algorithm:
  """Row of the table.

  Raises:
    ValueError: no such row; lists the valid names.
  """
  if name not in ALGORITHMS:
    raise ValueError(f"algorithm: no {name!r}; choose one of {', '.join(sorted(ALGORITHMS))}")
  return ALGORITHMS[name]


def changes_history(config: Config) -> bool:
  """Whether the config's own rollouts take back what was shown, so that steps have prompts of their
  own. (An agent of environment 'harness', or a stored trajectory, may do so anyhow.)"""
  return config.model.thinking != "kept" or bool(config.rollout.fold)


def refuse_segments(config: Config, why: str) -> None:
  """ValueError where `why` gives trajectories of several segments, and something that reads them
  needs all of a trajectory in one place."""
  row = get_algorithm(config.algorithm)
  resolved = resolve(row, config)
  if row.select.rows > 1:
    raise ValueError(
      f"config.algorithm: {config.algorithm!r} compares two whole trajectories in one loss, but "
      f"with {why} their segments lie in different rows; use 'rft' or 'grpo'"
    )
  if row.advantage is not None and resolved.loss.ratio == "trajectory":
    raise ValueError(
      f"config.loss.ratio: 'trajectory' (algorithm {config.algorithm!r}) is a mean over all tokens "
      f"of a trajectory, but with {why} its segments lie in different rows; use 'step'"
    )
  if resolved.loss.aggregation == "constant" and config.train.minibatches > 1:
    raise ValueError(
      f"config.loss.aggregation: 'constant' (algorithm {config.algorithm!r}) counts trajectories, "
      f"but with {why} a minibatch may hold later segments alone; set train.minibatches to 1, or "
      "loss.aggregation to 'trajectory'"
    )
  if row.gae and resolved.advantage.level == "released":
    raise ValueError(
      "config.advantage.level: 'released' counts the positions of one conversation, but with "
      f"{why} there are several; use 'step' or 'token'"
    )


def shares_prompts(algorithm: Algorithm, train: Train) -> bool:
  """Whether rows hold trees, in which a prompt stands once for all samples of its task."""
  return train.share_prompts and algorithm.select.rows == 1 and algorithm.critic != "double"


def adapt_kl(
  kl_coef: jax.Array, kl: jax.Array, target: float, horizon: float, trajectories: int
) -> jax.Array:
  """Adaptive KL controller (Ziegler et al. 2019, section 2.2).

  coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * trajectories / horizon, where kl is the mean over
  trajectories of the summed log(pi / ref), and horizon counts trajectories.
  """
  error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
  return kl_coef * (1.0 + error * trajectories / horizon)
