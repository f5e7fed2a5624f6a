"""Rollouts: budgets, conversations that change or go on, engines, evaluation."""

from steptool_jax.config import Config
from steptool_jax.environments.base import AGENTS
from steptool_jax.learning.algorithms import (
  Algorithm,
  changes_history,
  recorded,
  refuse_segments,
  resolve,
)
from steptool_jax.rewards.assembly import SOURCES

# Rewards of an algorithm whose loss has no importance weights -> the nearest one that has them.
_CORRECTED = {"outcome": "'rloo'", "none": "'steptool'"}


def check(config: Config, algorithm: Algorithm) -> None:
  if config.rollout.max_tokens > config.train.row_tokens:
    raise ValueError(
      f"config.train.row_tokens: {config.train.row_tokens} is less than rollout.max_tokens = "
      f"{config.rollout.max_tokens}; a conversation must fit a packed row"
    )
  _check_history(config)
  _check_classes(config)
  if config.rollout.lag:
    _check_lag(config, algorithm)
  if config.rollout.carry:
    _check_carry(config, algorithm)
  if config.rollout.reuse:
    _check_reuse(config, algorithm)
  if config.rollout.engine == "http":
    _check_http(config)
  _check_evaluation(config)


def _check_history(config: Config) -> None:
  """What needs a conversation that only grows."""
  if not changes_history(config):
    return
  which = f"model.thinking = {config.model.thinking!r}"
  off = "'kept'"
  if config.rollout.fold:
    which, off = f"rollout.fold = {config.rollout.fold}", "0"
  refuse_segments(config, which)
  for name, value in (
    (f"environment.name = {config.environment.name!r}", config.environment.name in AGENTS),
    ("rollout.strategy = 'dfsdt'", config.rollout.strategy == "dfsdt"),
    (f"rewards.source = {config.rewards.source!r}", SOURCES[config.rewards.source].device),
    ("annotate.source = 'monte_carlo'", config.annotate.source == "monte_carlo"),
  ):
    if value:
      raise ValueError(
        f"config.{which}: changes what earlier turns look like, but {name} needs a conversation "
        f"that only grows; set it to {off}, or leave the other at its default"
      )


def _check_classes(config: Config) -> None:
  """Slots of two sizes."""
  r = config.rollout
  if not r.slot_tokens and not r.long_slots:
    return
  if not r.slot_tokens or not r.long_slots:
    raise ValueError(
      f"config.rollout.slot_tokens: {r.slot_tokens}, and rollout.long_slots: {r.long_slots}; slots "
      "of two sizes need both, and slots of one size neither: set both above 0, or both to 0"
    )
  if r.slot_tokens >= r.max_tokens:
    raise ValueError(
      f"config.rollout.slot_tokens: {r.slot_tokens} is not less than rollout.max_tokens = "
      f"{r.max_tokens}, so that no conversation outgrows its slot; set it and long_slots to 0"
    )
  for name, value in (
    ("rollout.engine = 'http'", r.engine == "http"),
    ("rollout.strategy = 'dfsdt'", r.strategy == "dfsdt"),
    (f"environment.name = {config.environment.name!r}", config.environment.name in AGENTS),
  ):
    if value:
      raise ValueError(
        f"config.rollout.slot_tokens: {r.slot_tokens}, but with {name} all slots are alike; set it "
        "and long_slots to 0"
      )


def _check_lag(config: Config, algorithm: Algorithm) -> None:
  if config.data.path:
    raise ValueError(
      f"config.rollout.lag: 1, but stored trajectories (data.path = {config.data.path!r}) are not "
      "rolled out; leave it at 0"
    )
  if config.environment.name in AGENTS:
    raise ValueError(
      "config.rollout.lag: 1, but a harness asks when it likes, and an update cannot go on in its "
      "gaps; set it to 0"
    )
  if config.rollout.rounds > 1 or SOURCES[config.rewards.source].device:
    field = "rollout.rounds" if config.rollout.rounds > 1 else "rewards.source"
    raise ValueError(
      f"config.rollout.lag: 1, but with this {field} what is rolled out depends on the update that "
      "goes on meanwhile; set it to 0"
    )
  if algorithm.advantage is None:
    raise ValueError(
      f"config.rollout.lag: 1, but the loss of algorithm {config.algorithm!r} has no importance "
      f"weights to correct for it; set it to 0, or use {_CORRECTED[algorithm.rewards]}"
    )


def _check_carry(config: Config, algorithm: Algorithm) -> None:
  r, why = config.rollout, ""
  if config.data.path:
    why = f"stored trajectories (data.path = {config.data.path!r}) are not rolled out"
  elif config.environment.name in AGENTS:
    why = "a harness runs its conversations itself, each to its end"
  elif r.lag or r.rounds > 1:
    field = "lag" if r.lag else "rounds"
    why = f"with rollout.{field} = {getattr(r, field)} another rollout follows in the iteration"
  elif changes_history(config):
    why = "a conversation whose history is changed (model.thinking, rollout.fold) cannot go on"
  elif algorithm.advantage is None:
    why = (
      f"the loss of algorithm {config.algorithm!r} has no importance weights to correct for older "
      f"tokens (use {_CORRECTED[algorithm.rewards]})"
    )
  if why:
    raise ValueError(f"config.rollout.carry: {r.carry}, but {why}; set it to 0")


def _check_reuse(config: Config, algorithm: Algorithm) -> None:
  r, kind = config.rollout, resolve(algorithm, config).critic.kind
  others = "'group'" if r.samples > 1 else "'group', with rollout.samples of 2 or more"
  why, remedy = "", ""
  if config.data.path or algorithm.rewards == "none":
    why = f"algorithm {config.algorithm!r} does not learn from rollouts here"
  elif r.stale:
    name = "lag" if r.lag else "carry"
    why = (
      f"with rollout.{name} = {getattr(r, name)} there are tokens of earlier weights, whose "
      "importance needs log-probs of today's"
    )
    remedy = f"rollout.{name} to 0"
  elif kind == "double":
    why = f"the critic of algorithm {config.algorithm!r} reads states of earlier iterations, too"
    remedy = "config.critic.kind to 'ridge'"
  elif recorded(config):
    remedy = f"config.critic.kind to {others}"
    if r.engine == "http" or config.environment.name in AGENTS:
      where = "a vLLM server" if r.engine == "http" else "a harness"
      why = f"nothing of {where} records what the critic ({kind!r}) reads"
    elif config.advantage.bootstrap:
      remedy = "leave config.advantage.bootstrap empty"
      why = (
        f"nothing is sampled in the state that advantage.bootstrap wants the value of, so that the "
        f"engine records nothing there for the critic ({kind!r})"
      )
  if why:
    instead = f"set it to 0, or {remedy}" if remedy else "leave it at 0"
    raise ValueError(f"config.rollout.reuse: {r.reuse}, but {why}; {instead}")


def _check_http(config: Config) -> None:
  h = config.rollout.http
  if not h.servers:
    raise ValueError("config.rollout.http.servers: empty; name vLLM's addresses: http://host:8000")
  if config.rollout.kv_cache != "auto":
    raise ValueError(
      f"config.rollout.kv_cache: {config.rollout.kv_cache!r} is of the run's own engine, and with "
      "rollout.engine = 'http' the servers keep the keys and values (--kv-cache-dtype is vLLM's "
      "flag); set it to 'auto', or the engine to 'own'"
    )
  from steptool_jax.simulators.posting import check_address  # slow: httpx

  for address in h.servers:
    check_address(address, "config.rollout.http.servers", "http://host:8000")
  if h.weights == "adapter" and (not config.lora.rank or config.sft.steps):
    raise ValueError(
      "config.rollout.http.weights: 'adapter' sends LoRA's adapters to servers that have the base; "
      "without lora.rank there are none, and SFT (sft.steps) changes the base; use 'reload'"
    )


def _check_evaluation(config: Config) -> None:
  e = config.evaluation
  if 0 < e.temperature < 1e-4:
    raise ValueError(
      f"config.evaluation.temperature: must be 0 (greedy) or at least 0.0001, found {e.temperature}"
    )
  for name, usual in (("samples", 1), ("selection", 0)):
    if getattr(e, name) > usual and not e.tasks:
      raise ValueError(
        f"config.evaluation.{name}: {getattr(e, name)}, but evaluation.tasks = 0 turns all "
        f"evaluation off; set it to {usual}, or evaluation.tasks above 0"
      )
  if e.against and config.environment.name != "toolbench":
    raise ValueError(
      "config.evaluation.against: a win rate needs a judge, so environment 'toolbench'; leave it "
      "empty"
    )
  if config.rollout.strategy == "dfsdt" and e.attempts > 1:
    raise ValueError(
      f"config.evaluation.attempts: {e.attempts}, but 'dfsdt' searches a task once; set it to 1, "
      "and rollout.budget to what the search may spend"
    )
  for name in ("attempts", "rollouts", "samples"):
    value = getattr(e, name)
    if value > 1 and not e.temperature:
      raise ValueError(
        f"config.evaluation.{name}: {value}, but at temperature 0 all are the same; set "
        "evaluation.temperature above 0"
      )
