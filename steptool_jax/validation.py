"""ConfigDict -> frozen Config, with every value checked, and saved configurations compared."""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from steptool_jax.config import Config, Filters
from steptool_jax.dialogue import template
from steptool_jax.environments.base import ENVIRONMENTS
from steptool_jax.environments.markets.specialists import TIERS
from steptool_jax.learning import importance
from steptool_jax.learning.advantages import LEVELS
from steptool_jax.learning.algorithms import (
  Algorithm,
  changes_history,
  get_algorithm,
  refuse_segments,
)
from steptool_jax.learning.critics import CRITICS
from steptool_jax.learning.losses import AGGREGATIONS, SURROGATES, UNITS
from steptool_jax.learning.selection import EVERYTHING
from steptool_jax.policy import families, lora
from steptool_jax.rewards.assembly import SCHEMES, SOURCES, refuse_hindsight
from steptool_jax.rewards.shaping import SHAPINGS

# Name in config.py -> the table whose keys, or entries, are the choices.
TABLES: Mapping[str, Iterable[str]] = {
  "adapter targets": lora.TARGETS,
  "advantage levels": LEVELS,
  "aggregations": AGGREGATIONS,
  "chat formats": template.FORMATS,
  "critics": CRITICS,
  "dtypes": families.DTYPES,
  "environments": ENVIRONMENTS,
  "importance levels": importance.LEVELS,
  "model families": families.FAMILIES,
  "remat policies": families.REMATS,
  "reward sources": SOURCES,
  "schemes": SCHEMES,
  "shapings": SHAPINGS,
  "specialists": TIERS,
  "surrogates": SURROGATES,
  "thinking": template.THINKING,
  "tool lists": template.TOOL_LISTS,
  "units": UNITS,
}


# Removed field -> what stands in its place.
_RENAMED = {
  "config.rewards.normalization": "config.rewards.shaping: 'none' is now 'sum', and 'mean', which "
  "reads the future, is 'episode_mean'",
}


def validate(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
  """ConfigDict (or nested mapping) -> frozen Config.

  Raises:
    ValueError: an unknown field (names the nearest valid one), a wrong type or a value that makes
      no sense, each with the field's full name.
  """
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  checked = _build(Config, config, "config")
  _check(checked)
  return checked


def to_json(config: Config) -> str:
  return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)


def differences(config: Config, saved: Mapping[str, Any]) -> list[str]:
  """Names of fields whose value is not that of a saved config (a parsed to_json).

  A field that only the saved config has is passed over: those that were removed are constants now
  that change nothing in a folder with a run. One that it lacks came later: it had our default.
  """
  mine, theirs = _flatten(json.loads(to_json(config))), _flatten(saved)
  if "rewards.normalization" in theirs:  # the rewards of before had other defaults than ours
    theirs |= {
      "rewards.shaping": {"mean": "episode_mean"}.get(theirs["rewards.normalization"], "sum"),
      "rewards.source": "hindsight",
      "advantage.bootstrap": ["step_budget", "token_budget"],
    }
  usual = _flatten(json.loads(to_json(Config())))
  return sorted(name for name, value in mine.items() if value != theirs.get(name, usual[name]))


def check_name(name: str) -> None:
  """ValueError, with the nearest valid one, for a field that does not exist ("rollout.taks")."""
  names = _flatten(dataclasses.asdict(Config()))
  if name not in names:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    raise ValueError(f"config.{name}: no such field; did you mean config.{near[0]}?")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= _flatten(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for name in values:
    if name not in fields:
      if f"{path}.{name}" in _RENAMED:
        raise ValueError(f"{path}.{name}: no such field; use {_RENAMED[f'{path}.{name}']}")
      near = difflib.get_close_matches(name, fields, n=1, cutoff=0.4)
      hint = f"; did you mean {path}.{near[0]}?" if near else f"; valid: {', '.join(fields)}"
      raise ValueError(f"{path}.{name}: no such field{hint}")
  defaults = cls()
  out = {}
  for name in fields:
    default = getattr(defaults, name)
    value = values.get(name, default)
    where = f"{path}.{name}"
    if dataclasses.is_dataclass(default):
      if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
      if not isinstance(value, Mapping):
        raise ValueError(f"{where}: a group of fields is needed, found {value!r}")
      out[name] = _build(type(default), value, where)
    else:
      out[name] = _typed(default, value, where)
      _check_value(fields[name], out[name], where)
  return cls(**out)


def _typed(default: Any, value: Any, where: str) -> Any:
  kind = type(default)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if kind is tuple and isinstance(value, list):
    value = tuple(value)
  if type(value) is not kind:
    raise ValueError(f"{where}: {kind.__name__} is needed, found {type(value).__name__} {value!r}")
  if kind is float and not math.isfinite(value):
    raise ValueError(f"{where}: must be finite, found {value!r}")
  if kind is tuple and not all(isinstance(entry, str) for entry in value):
    raise ValueError(f"{where}: a tuple of strings is needed, found {value!r}")
  return value


def _check_value(field: dataclasses.Field, value: Any, where: str) -> None:
  """Against the bounds and choices that config.option gave the field."""
  above, least, most, below = (field.metadata[b] for b in ("above", "least", "most", "below"))
  if above is not None and not value > above:
    raise ValueError(f"{where}: must be above {above}, found {value!r}")
  if below is not None and not value < below:
    raise ValueError(f"{where}: must be below {below}, found {value!r}")
  if (least, most) == (0, 1) and not 0 <= value <= 1:
    raise ValueError(f"{where}: must be in [0, 1], found {value!r}")
  if least is not None and not value >= least:
    wanted = "not be negative" if least == 0 else f"be at least {least}"
    raise ValueError(f"{where}: must {wanted}, found {value!r}")
  if most is not None and not value <= most:
    raise ValueError(f"{where}: must be at most {most}, found {value!r}")
  choices = field.metadata["choices"]
  choices = list(TABLES[choices] if isinstance(choices, str) else choices)
  if choices and isinstance(value, tuple):
    for entry in value:
      if entry not in choices:
        near = difflib.get_close_matches(entry, choices, n=1, cutoff=0.0)
        raise ValueError(f"{where}: there is no {entry!r}; did you mean {near[0]!r}?")
      if value.count(entry) > 1:
        raise ValueError(f"{where}: names {entry!r} twice; once is enough")
  elif choices and value not in (field.default, *choices):
    near = difflib.get_close_matches(value, choices, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    valid = ", ".join(map(repr, dict.fromkeys((field.default, *choices))))
    raise ValueError(f"{where}: {value!r} is not one of {valid}{hint}")


def _check(config: Config) -> None:
  """Combinations of fields that make no sense."""
  _check_algorithm(config)
  _check_sizes(config)
  if config.rollout.max_tokens > config.train.row_tokens:
    raise ValueError(
      f"config.train.row_tokens: {config.train.row_tokens} is less than rollout.max_tokens = "
      f"{config.rollout.max_tokens}; a conversation must fit a packed row"
    )
  if config.lora.rank and not config.lora.targets:
    raise ValueError(f"config.lora.targets: empty; choose from {', '.join(lora.TARGETS)}")
  _check_environment(config)
  _check_addresses(config)
  _check_http(config)
  _check_market(config)
  _check_rewards(config, get_algorithm(config.algorithm))
  _check_evaluation(config)
  if changes_history(config):
    _check_history(config)


def _check_history(config: Config) -> None:
  """What needs a conversation that only grows."""
  which = f"model.thinking = {config.model.thinking!r}"
  off = "'kept'"
  if config.rollout.fold:
    which, off = f"rollout.fold = {config.rollout.fold}", "0"
  refuse_segments(config, which)
  for name, value in (
    ("environment.name = 'harness'", config.environment.name == "harness"),
    ("rollout.strategy = 'dfsdt'", config.rollout.strategy == "dfsdt"),
    (f"rewards.source = {config.rewards.source!r}", SOURCES[config.rewards.source].device),
    ("annotate.source = 'monte_carlo'", config.annotate.source == "monte_carlo"),
  ):
    if value:
      raise ValueError(
        f"config.{which}: changes what earlier turns look like, but {name} needs a conversation "
        f"that only grows; set it to {off}, or leave the other at its default"
      )


def _check_sizes(config: Config) -> None:
  a = config.model.architecture
  where = "config.model.architecture"
  if a.num_heads % a.num_kv_heads:
    raise ValueError(
      f"{where}.num_kv_heads: {a.num_kv_heads} does not divide num_heads = {a.num_heads}"
    )
  if a.head_dim % 2:
    raise ValueError(f"{where}.head_dim: {a.head_dim} must be even (rotary pairs)")
  axes = dataclasses.asdict(config.mesh)
  for axis, size in axes.items():
    if not size or (size == -1 and list(axes.values()).count(-1) > 1):
      raise ValueError(
        f"config.mesh.{axis}: {size}; give a number of devices, or -1 (all that are left) for one "
        "axis"
      )
  c = config.environment
  if c.min_calls > c.max_calls:
    raise ValueError(
      f"config.environment.min_calls: {c.min_calls} is more than max_calls = {c.max_calls}"
    )


def _check_algorithm(config: Config) -> None:
  """Combinations with the algorithm that make no sense."""
  algorithm = get_algorithm(config.algorithm)
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
  if algorithm.advantage is None and config.loss.kl == "reward":
    raise ValueError(
      f"config.loss.kl: 'reward', but algorithm {config.algorithm!r} reads no rewards; leave it "
      "empty, or use 'loss'"
    )
  if algorithm.advantage is None:
    for name in ("surrogate", "ratio"):
      if getattr(config.loss, name):
        raise ValueError(
          f"config.loss.{name}: {getattr(config.loss, name)!r}, but the loss of algorithm "
          f"{config.algorithm!r} has no ratio to an old policy; leave it empty, or use 'grpo'"
        )
  if config.advantage.level and not algorithm.gae and algorithm.rewards != "none":
    raise ValueError(
      f"config.advantage.level: {config.advantage.level!r}, but algorithm {config.algorithm!r} has "
      "no GAE; leave it empty, or use 'ppo' or 'steptool'"
    )
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
  if kind == "group" and not config.data.path and config.rollout.samples < 2:
    raise ValueError(
      "config.critic.kind: 'group' compares samples of a task, and config.rollout.samples is 1; "
      "set it to 2 or more (4 is usual), or use 'ridge'"
    )
  if config.train.micro_rows % algorithm.select.rows:
    raise ValueError(
      f"config.train.micro_rows: {config.train.micro_rows}, but algorithm {config.algorithm!r} "
      f"needs pairs of rows; use {config.train.micro_rows + 1}"
    )
  if config.rollout.lag and config.data.path:
    raise ValueError(
      f"config.rollout.lag: 1, but stored trajectories (data.path = {config.data.path!r}) are not "
      "rolled out; leave it at 0"
    )
  if config.rollout.lag and config.environment.name == "harness":
    raise ValueError(
      "config.rollout.lag: 1, but a harness asks when it likes, and an update cannot go on in its "
      "gaps; set it to 0"
    )
  if config.rollout.lag and (config.rollout.rounds > 1 or SOURCES[config.rewards.source].device):
    field = "rollout.rounds" if config.rollout.rounds > 1 else "rewards.source"
    raise ValueError(
      f"config.rollout.lag: 1, but with this {field} what is rolled out depends on the update that "
      "goes on meanwhile; set it to 0"
    )
  if config.rollout.lag and algorithm.advantage is None:
    instead = {"outcome": "'rloo'", "none": "'steptool'"}[algorithm.rewards]
    raise ValueError(
      f"config.rollout.lag: 1, but the loss of algorithm {config.algorithm!r} has no importance "
      f"weights to correct for it; set it to 0, or use {instead}"
    )
  if config.rollout.carry:
    _check_carry(config, algorithm)
  if (kind or algorithm.critic) == "double" and config.archer.replay < config.archer.batch:
    raise ValueError(
      f"config.archer.replay: keeps {config.archer.replay} trajectories, fewer than the "
      f"{config.archer.batch} of archer.batch; raise it, or lower archer.batch"
    )


def _check_carry(config: Config, algorithm: Algorithm) -> None:
  r, why = config.rollout, ""
  if config.data.path:
    why = f"stored trajectories (data.path = {config.data.path!r}) are not rolled out"
  elif config.environment.name == "harness":
    why = "a harness runs its conversations itself, each to its end"
  elif r.lag or r.rounds > 1:
    field = "lag" if r.lag else "rounds"
    why = f"with rollout.{field} = {getattr(r, field)} another rollout follows in the iteration"
  elif changes_history(config):
    why = "a conversation whose history is changed (model.thinking, rollout.fold) cannot go on"
  elif algorithm.advantage is None:
    instead = {"outcome": "'rloo'", "none": "'steptool'"}[algorithm.rewards]
    why = (
      f"the loss of algorithm {config.algorithm!r} has no importance weights to correct for older "
      f"tokens (use {instead})"
    )
  if why:
    raise ValueError(f"config.rollout.carry: {r.carry}, but {why}; set it to 0")


def _check_environment(config: Config) -> None:
  c = config.environment
  if c.name in ("custom", "harness"):
    tools = c.functions or (c.mcp if c.name == "custom" else "")
    for name, value in (("functions", tools), ("tasks", c.tasks)):
      if not value:
        raise ValueError(f"config.environment.{name}: a file is needed for environment {c.name!r}")
  if c.name == "harness":
    _check_harness(config)
  if c.mcp and c.name != "custom":
    raise ValueError(f"config.environment.mcp: is for environment 'custom', not {c.name!r}")
  if c.mcp_shared and not c.mcp:
    raise ValueError("config.environment.mcp_shared: set, but environment.mcp names no server")
  if c.name == "toolbench":
    for name in ("folder", "subsets"):
      if not getattr(c.toolbench, name):
        raise ValueError(
          f"config.environment.toolbench.{name}: is empty, needed for environment 'toolbench'"
        )


def _check_harness(config: Config) -> None:
  """Its agents call their tools themselves: nothing here can stand between."""
  c, f = config.environment, config.environment.faults
  for name, value in (
    ("environment.market.prices", c.market.prices),
    ("environment.faults", f.rate_limit + f.timeout + f.transient + f.not_found),
    ("sft.steps", config.sft.steps and not config.data.path),
    ("model.tokenizer = 'compact'", config.model.tokenizer == "compact"),
    ("rollout.strategy = 'dfsdt'", config.rollout.strategy != "chain"),
  ):
    if value:
      raise ValueError(
        f"config.{name}: is not for environment 'harness', whose agent calls its own tools; leave "
        "it at its default"
      )


def _check_addresses(config: Config) -> None:
  """Before a password in one is written to a run's folder."""
  (mcp,) = config.environment.mcp if len(config.environment.mcp) == 1 else ("",)
  for name, url, form in (
    ("simulator.http", config.simulator.http, "http://host:port/virtual"),
    ("simulator.llm.base_url", config.simulator.llm.base_url, "http://host:port/v1"),
    ("judge.endpoint.base_url", config.judge.endpoint.base_url, "http://host:port/v1"),
    ("environment.user.base_url", config.environment.user.base_url, "http://host:port/v1"),
    ("environment.mcp", mcp if mcp.startswith("http") and "//" in mcp else "", "http://host/mcp"),
  ):
    if url:
      from steptool_jax.simulators.posting import check_address  # slow: httpx

      check_address(url, f"config.{name}", form)
  if not config.serve.host:
    raise ValueError("config.serve.host: is empty; name 0.0.0.0 to listen on every address")


def _check_http(config: Config) -> None:
  """rollout.engine 'http'."""
  h = config.rollout.http
  if config.rollout.engine != "http":
    return
  if not h.servers:
    raise ValueError("config.rollout.http.servers: empty; name vLLM's addresses: http://host:8000")
  from steptool_jax.simulators.posting import check_address  # slow: httpx

  for address in h.servers:
    check_address(address, "config.rollout.http.servers", "http://host:8000")
  if h.weights == "adapter" and (not config.lora.rank or config.sft.steps):
    raise ValueError(
      "config.rollout.http.weights: 'adapter' sends LoRA's adapters to servers that have the base; "
      "without lora.rank there are none, and SFT (sft.steps) changes the base; use 'reload'"
    )


def _check_market(config: Config) -> None:
  m = config.environment.market
  where = "config.environment.market"
  for name in ("specialists", "preferences", "asked"):
    if getattr(m, name) and not m.prices:
      raise ValueError(f"{where}.{name}: set, but {where}.prices is False, so there is no market")
  if m.specialists:
    from steptool_jax.environments.markets.market import SPECIALTIES  # slow: all their environments

    if config.environment.name not in SPECIALTIES:
      raise ValueError(
        f"{where}.specialists: they know {' and '.join(SPECIALTIES)}, not "
        f"{config.environment.name!r}; leave it empty"
      )
  if m.asked and not m.specialists:
    raise ValueError(f"{where}.asked: {m.asked:g}, but there are no specialists to ask")


def _check_rewards(config: Config, algorithm: Algorithm) -> None:
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
  if r.spread and (not algorithm.gae or (level == "step" and config.advantage.broadcast)):
    raise ValueError(
      "config.rewards.spread: True, but with one advantage a step, or none by GAE, tokens share "
      "a reward anyway; set advantage.level to 'token', or advantage.broadcast to False"
    )
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
  if r.source == "info_gain" and algorithm.rewards != "step":
    raise ValueError(
      f"{where} is about steps, but algorithm {name!r} is paid for the outcome alone; use "
      "'steptool', or source 'progress'"
    )


def _check_evaluation(config: Config) -> None:
  e = config.evaluation
  if 0 < e.temperature < 1e-4:
    raise ValueError(
      f"config.evaluation.temperature: must be 0 (greedy) or at least 0.0001, found {e.temperature}"
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
