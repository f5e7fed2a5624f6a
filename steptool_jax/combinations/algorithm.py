"""The algorithm, its loss and its critic."""

from steptool_jax.config import Config
from steptool_jax.learning.algorithms import Algorithm, resolve


def check(config: Config, algorithm: Algorithm) -> None:
  _check_data(config, algorithm)
  _check_loss(config, algorithm)
  _check_critic(config, algorithm)


def _check_data(config: Config, algorithm: Algorithm) -> None:
  """What it learns from."""
  if algorithm.rewards == "none" and not config.sft.steps and not config.data.path:
    raise ValueError(
      f"config.sft.steps: 0, but algorithm {config.algorithm!r} learns from demonstrations only; "
      "set it above 0, or name stored ones with data.path"
    )
  if algorithm.rewards == "none" and config.data.path and config.sft.steps:
    raise ValueError(
      f"config.sft.steps: {config.sft.steps} together with data.path = {config.data.path!r}; with "
      f"stored trajectories, data.passes and data.batch decide the steps of algorithm "
      f"{config.algorithm!r}: set it to 0"
    )
  if algorithm.rewards != "none" and config.data.path and config.data.format == "dialogues":
    raise ValueError(
      f"config.data.format: 'dialogues' hold no rewards, which algorithm {config.algorithm!r} "
      "learns from; use algorithm sft, or a format with rewards (jsonl, tsv)"
    )
  if algorithm.compares and not config.data.path and config.rollout.samples < 2:
    alone = "rft" if algorithm.select.rows > 1 else "reinforce"
    alone = "steptool" if algorithm.rewards == "step" else alone
    raise ValueError(
      f"config.rollout.samples: {config.rollout.samples}, but algorithm {config.algorithm!r} "
      f"compares samples of a task; set it to 2 or more (4 is usual), or use {alone!r}"
    )
  if config.train.micro_rows % algorithm.select.rows:
    raise ValueError(
      f"config.train.micro_rows: {config.train.micro_rows}, but algorithm {config.algorithm!r} "
      f"needs pairs of rows; use {config.train.micro_rows + 1}"
    )


def _check_loss(config: Config, algorithm: Algorithm) -> None:
  if algorithm.advantage is None and config.loss.kl == "reward":
    raise ValueError(
      f"config.loss.kl: 'reward', but algorithm {config.algorithm!r} reads no rewards; leave it "
      "empty, or use 'loss'"
    )
  if config.loss.kl == "reward" and resolve(algorithm, config).critic.kind == "double":
    raise ValueError(
      f"config.loss.kl: 'reward', but the double critic of algorithm {config.algorithm!r} learns "
      "from replayed steps too, whose rewards have no penalty; leave it empty, use 'loss', or set "
      "config.critic.kind to 'ridge'"
    )
  if algorithm.rewards == "none" and config.loss.aggregation:
    raise ValueError(
      f"config.loss.aggregation: {config.loss.aggregation!r}, but it belongs to RL, and algorithm "
      f"{config.algorithm!r} imitates, token by token; leave it empty"
    )
  if algorithm.standardises and config.loss.kl == "reward":
    raise ValueError(
      f"config.loss.kl: 'reward', but algorithm {config.algorithm!r} divides by the deviation of a "
      "task's samples, so that samples which earn the same would learn from the penalty alone, at "
      "full size whatever loss.kl_coef; leave it empty, or use 'loss'"
    )
  if algorithm.advantage is None:
    for name in ("surrogate", "ratio"):
      if getattr(config.loss, name):
        raise ValueError(
          f"config.loss.{name}: {getattr(config.loss, name)!r}, but the loss of algorithm "
          f"{config.algorithm!r} has no ratio to an old policy; leave it empty, or use 'grpo'"
        )
  if config.advantage.level == "released" and algorithm.step_episodes:
    raise ValueError(
      f"config.advantage.level: 'released' knows no episodes of one step, which algorithm "
      f"{config.algorithm!r} learns from; leave it empty"
    )
  if config.advantage.level and not algorithm.gae and algorithm.rewards != "none":
    raise ValueError(
      f"config.advantage.level: {config.advantage.level!r}, but algorithm {config.algorithm!r} has "
      "no GAE; leave it empty, or use 'ppo' or 'steptool'"
    )


def _check_critic(config: Config, algorithm: Algorithm) -> None:
  kind = config.critic.kind
  if kind and not algorithm.takes(kind) and algorithm.rewards != "none":
    instead = "leave it empty, or use 'ppo' or 'steptool'"
    if algorithm.critic == "double":
      instead = "leave it empty, or use 'ridge'"
    raise ValueError(
      f"config.critic.kind: {kind!r}, but algorithm {config.algorithm!r} has no GAE that would "
      f"read its values; {instead}"
    )
  critic = kind or algorithm.critic
  for name, usual in (("normalise", False), ("passes", 1)):
    value = getattr(config.critic, name)
    if value != usual and critic != "value":
      raise ValueError(
        f"config.critic.{name}: {value!r}, but it belongs to the value head, and the critic of "
        f"algorithm {config.algorithm!r} is {critic!r} here; leave it at {usual!r}, or set "
        "config.critic.kind to 'value'"
      )
  if config.critic.passes > 1 and config.train.optimizer.muon_rate:
    raise ValueError(
      f"config.critic.passes: {config.critic.passes}, but Muon's AdamW, which the value head has, "
      "counts the policy's steps alone; set it to 1, or train.optimizer.muon_rate to 0"
    )
  if config.advantage.bootstrap and critic == "none" and algorithm.rewards != "none":
    raise ValueError(
      f"config.advantage.bootstrap: {config.advantage.bootstrap}, but algorithm "
      f"{config.algorithm!r} has no critic to say what a spent budget is worth; leave it empty, or "
      "use 'steptool'"
    )
  if config.advantage.bootstrap and critic == "group" and algorithm.rewards != "none":
    raise ValueError(
      f"config.advantage.bootstrap: {config.advantage.bootstrap}, but critic 'group' takes what a "
      "state is worth from other samples at the same step, and none goes on where a budget is "
      "spent; leave it empty, or set config.critic.kind to 'value'"
    )
  if config.advantage.bootstrap and algorithm.step_episodes:
    raise ValueError(
      f"config.advantage.bootstrap: {config.advantage.bootstrap}, but to algorithm "
      f"{config.algorithm!r} every step is an episode that ends; leave it empty, or use 'steptool'"
    )
  if kind == "group" and config.data.path and not algorithm.compares:
    raise ValueError(
      "config.critic.kind: 'group' compares samples of a task, but of stored trajectories "
      f"(data.path) algorithm {config.algorithm!r} learns in any order; use 'ridge', or algorithm "
      "'grpo'"
    )
  if kind == "group" and not config.data.path and config.rollout.samples < 2:
    raise ValueError(
      "config.critic.kind: 'group' compares samples of a task, and config.rollout.samples is 1; "
      "set it to 2 or more (4 is usual), or use 'ridge'"
    )
  if (kind or algorithm.critic) == "double" and config.archer.replay < config.archer.batch:
    raise ValueError(
      f"config.archer.replay: keeps {config.archer.replay} trajectories, fewer than the "
      f"{config.archer.batch} of archer.batch; raise it, or lower archer.batch"
    )
