"""Rewards: their source, their scheme, and what is left out."""

from steptool_jax.config import Config, Filters
from steptool_jax.environments.base import AGENTS
from steptool_jax.learning.algorithms import Algorithm
from steptool_jax.learning.selection import EVERYTHING
from steptool_jax.rewards.assembly import SOURCES, refuse_hindsight


def check(config: Config, algorithm: Algorithm) -> None:
  r, name, paid = config.rewards, config.algorithm, algorithm.rewards
  where = f"config.rewards.scheme: {r.scheme!r}"
  if config.data.path and (
    r.scheme != "steptool" or SOURCES[r.source].device or r.filters != Filters()
  ):
    raise ValueError(
      "config.rewards: stored trajectories (config.data.path) are trained on with the rewards of "
      "their file; leave source, scheme and filters at their defaults"
    )
  _check_source(config, algorithm)
  if paid == "step" and not (config.data.path or config.annotate.input):
    refuse_hindsight(r)
  level = config.advantage.level or algorithm.level
  alike = not algorithm.gae or (level == "step" and config.advantage.broadcast)
  if r.spread and (alike or level == "released"):
    raise ValueError(
      "config.rewards.spread: True, but with one advantage a step, or none by GAE, tokens share "
      "a reward anyway, and level 'released' weighs the last token's; set advantage.level to "
      "'token', or advantage.broadcast to False"
    )
  if config.advantage.bootstrap and level == "released" and algorithm.gae:
    raise ValueError(
      "config.advantage.bootstrap: level 'released' reads no value of what comes next; leave it "
      "empty, or use advantage.level 'step'"
    )
  if r.shaping == "potential" and paid == "step" and not config.data.path:
    _check_potential(config, algorithm, level)
  if r.filters.min_deviation and config.rollout.samples < 2:
    raise ValueError(
      "config.rewards.filters.min_deviation: with config.rollout.samples = 1 no group deviates, so "
      "all would be left out; set it to 0, or samples to 2 or more"
    )
  if config.rollout.rounds > 1:
    where_rounds = f"config.rollout.rounds: {config.rollout.rounds}"
    if config.data.path:
      raise ValueError(f"{where_rounds}, but stored trajectories are not drawn again; set it to 1")
    if paid == "none":
      raise ValueError(f"{where_rounds}, but algorithm {name!r} rolls nothing out; set it to 1")
    if config.rollout.samples < 2:
      raise ValueError(
        f"{where_rounds}, but with config.rollout.samples = 1 no task has contrast, so all would "
        "be left out; set it to 1, or samples to 2 or more"
      )
  if r.scheme == "steptool":
    return
  if algorithm.advantage is None:
    raise ValueError(f"{where}, but algorithm {name!r} reads no rewards; use 'steptool', or 'grpo'")
  if r.scheme == "orchestra" and paid == "step":
    raise ValueError(
      f"{where} pays the last step only, but algorithm {name!r} is for step rewards; use "
      "'orchestra_steps', or an algorithm with outcome rewards, such as ppo"
    )
  if r.scheme == "orchestra_steps" and paid == "outcome":
    raise ValueError(
      f"{where} pays every step, but algorithm {name!r} is for outcome rewards; use 'orchestra', "
      "or an algorithm with step rewards, such as steptool"
    )
  if config.rollout.samples < 2:
    raise ValueError(
      f"{where} compares the samples of a task, and config.rollout.samples is 1; set it to 2 or "
      "more, or use 'steptool'"
    )
  if not config.environment.market.prices:
    raise ValueError(
      f"{where} weighs cost and latency, but calls have none; set config.environment.market.prices "
      "to True, or use 'steptool'"
    )
  if not (r.orchestra.outcome or r.orchestra.cost or r.orchestra.latency):
    raise ValueError("config.rewards.orchestra: all weights are 0, so nothing is paid; raise one")


def _check_potential(config: Config, algorithm: Algorithm, level: str) -> None:
  """Its rewards cancel out over steps that are discounted as gamma says, and not otherwise."""
  why = ""
  if algorithm.step_episodes:
    why = f"algorithm {config.algorithm!r} ends an episode with every step"
  elif algorithm.gae and (level == "released" or (level == "token" and config.advantage.gamma < 1)):
    why = f"with advantage.level = {level!r} and advantage.gamma = {config.advantage.gamma} they"
    why += " are not weighted step by step"
  if not why and config.rewards.every != 1:
    why = f"with rewards.every = {config.rewards.every} they come later than they are discounted"
  if why:
    raise ValueError(
      f"config.rewards.shaping: 'potential' must cancel out over an episode, but {why}, so that "
      "progress would be paid by itself; use 'progress', or algorithm 'steptool' with "
      "advantage.level 'step' and rewards.every 1"
    )


def _check_source(config: Config, algorithm: Algorithm) -> None:
  r, name = config.rewards, config.algorithm
  where = f"config.rewards.source: {r.source!r}"
  if (r.source == "model") != bool(r.model.path):
    raise ValueError(
      f"config.rewards.model.path: {r.model.path!r} with rewards.source = {r.source!r}; source "
      "'model' needs the folder that --mode=reward_model wrote, no other source reads one"
    )
  if r.model.watch == 1:
    raise ValueError("config.rewards.model.watch: 1 iteration has no trend; use 0 (off), 2 or more")
  if r.source in ("model", "info_gain") and algorithm.rewards == "none":
    raise ValueError(f"{where}, but algorithm {name!r} reads no rewards; use 'steptool', or 'ppo'")
  if r.source == "model" and algorithm.select is not EVERYTHING:
    raise ValueError(
      f"{where} gives chances, but algorithm {name!r} chooses trajectories by whether they are "
      "solved; use 'steptool' or 'ppo', or another source"
    )
  if r.source == "model" and r.scheme != "steptool":
    raise ValueError(
      f"{where} gives chances, but rewards.scheme {r.scheme!r} pays what is surely solved; use "
      "scheme 'steptool', or another source"
    )
  if SOURCES[r.source].device and config.environment.name in AGENTS:
    raise ValueError(
      f"{where}, but environment {config.environment.name!r} pays with its own rewards; leave it "
      "at 'progress'"
    )
  if r.source == "info_gain" and algorithm.rewards != "step":
    raise ValueError(
      f"{where} is about steps, but algorithm {name!r} is paid for the outcome alone; use "
      "'steptool', or source 'progress'"
    )
