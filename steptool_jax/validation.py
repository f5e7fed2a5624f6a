"""ConfigDict -> frozen Config, with every value checked, and saved configurations compared."""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from steptool_jax.config import Config, Filters
from steptool_jax.environments.market import SPECIALTIES
from steptool_jax.environments.specialists import TIERS
from steptool_jax.learning.advantages import LEVELS
from steptool_jax.learning.algorithms import Algorithm, get_algorithm
from steptool_jax.learning.losses import AGGREGATIONS
from steptool_jax.rewards.assembly import SCHEMES


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
  """Names of fields whose value is not that of a saved config (a parsed to_json)."""
  mine = _flatten(json.loads(to_json(config)))
  theirs = _flatten(saved)
  return sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))


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


def _of_endpoints(*fields: str) -> list[str]:
  return [f"{group}.{field}" for group in ("simulator.llm", "judge.endpoint") for field in fields]


_POSITIVE = (
  "rollout.tasks rollout.samples rollout.slots rollout.max_tokens rollout.max_steps "
  "rollout.max_step_tokens rollout.max_invalid rollout.max_observation_chars rollout.decode_chunk "
  "rollout.tool_timeout rollout.tool_workers sft.batch sft.micro_rows train.epochs "
  "train.minibatches train.micro_rows train.row_tokens train.max_skipped loss.logprob_chunk "
  "loss.kl_target loss.kl_horizon checkpoint.every checkpoint.keep train.optimizer.learning_rate "
  "rollout.temperature sft.optimizer.learning_rate evaluation.curve_tasks "
  "bench.repeats bench.turns environment.faults.max_consecutive simulator.http_timeout "
  "simulator.http_in_flight judge.runs rollout.search.width "
  "rollout.search.answer_back rollout.search.give_up_back evaluation.attempts evaluation.rollouts "
  "data.passes data.batch dpo.beta archer.tau archer.replay record.every report.trajectories "
  "study.parallel study.attempts train.critic_rate"
).split() + _of_endpoints("timeout", "in_flight")
_NOT_NEGATIVE = (
  "seed lora.rank sft.steps sft.clean_steps sft.tasks train.iterations evaluation.every "
  "evaluation.temperature rollout.top_k rewards.alpha loss.kl_coef loss.value_coef "
  "sft.checkpoint_every train.optimizer.max_grad_norm sft.optimizer.max_grad_norm "
  "train.optimizer.muon_rate sft.optimizer.muon_rate environment.tools_per_task "
  "rollout.tool_retries rollout.max_stuck_tools loss.clip_low loss.clip_high loss.value_clip "
  "simulator.http_retries rollout.budget rollout.search.room serve.port evaluation.tasks "
  "rewards.filters.min_deviation advantage.omega archer.batch archer.warmup record.heldout "
  "record.train study.cores study.hours checkpoint.keep_best"
).split() + _of_endpoints("retries", "prompt_price", "completion_price")
_SHARES = (
  "sft.mistakes environment.faults.rate_limit environment.faults.timeout "
  "environment.faults.transient environment.faults.not_found environment.heldout_share "
  "advantage.gamma advantage.lam archer.tau rollout.top_p train.optimizer.warmup "
  "sft.optimizer.warmup train.optimizer.floor sft.optimizer.floor "
  "rewards.orchestra.outcome rewards.orchestra.cost rewards.orchestra.latency "
  "environment.market.asked"
).split()
_CHOICES = {
  "model.dtype": ("float32", "bfloat16"),
  "model.param_dtype": ("float32", "bfloat16"),
  "model.remat": ("none", "attention", "dots", "full"),
  "model.chat_format": ("auto", "toolllama", "chatml_react", "llama31", "hermes", "compact"),
  "environment.name": ("nested_api", "data_pipeline", "toolbench", "custom"),
  "simulator.llm_style": ("gpt", "mirror"),
  "rollout.strategy": ("chain", "dfsdt"),
  "rewards.normalization": ("mean", "none"),
  "rewards.scheme": tuple(SCHEMES),
  "advantage.level": ("", *LEVELS),
  "loss.kl": ("", "reward", "loss", "none"),
  "loss.aggregation": ("", *AGGREGATIONS),
  "data.format": ("jsonl", "tfds", "tsv", "dialogues"),
  "data.behaviour": ("start", "current"),
  "checkpoint.use": ("newest", "best"),
  "annotate.format": ("jsonl", "converted", "annotations"),
  "annotate.source": ("rules", "judge", "table"),
  "annotate.rule": ("evidence", "lcs", "environment"),
  "annotate.output": ("jsonl", "tfds"),
  "judge.kind": ("rule", "llm"),
  "train.optimizer.first_moment": ("", "float32", "bfloat16"),
  "sft.optimizer.first_moment": ("", "float32", "bfloat16"),
  "train.optimizer.schedule": ("constant", "linear", "cosine"),
  "sft.optimizer.schedule": ("constant", "linear", "cosine"),
}


def _check(config: Config) -> None:
  flat = _flatten(dataclasses.asdict(config))
  for name in _POSITIVE:
    if not flat[name] > 0:
      raise ValueError(f"config.{name}: must be above 0, found {flat[name]!r}")
  for name in _NOT_NEGATIVE:
    if not flat[name] >= 0:
      raise ValueError(f"config.{name}: must not be negative, found {flat[name]!r}")
  for name in _SHARES:
    if not 0 <= flat[name] <= 1:
      raise ValueError(f"config.{name}: must be in [0, 1], found {flat[name]!r}")
  for name, valid in _CHOICES.items():
    if flat[name] not in valid:
      near = difflib.get_close_matches(str(flat[name]), valid, n=1)
      hint = f" (did you mean {near[0]!r}?)" if near else ""
      raise ValueError(
        f"config.{name}: {flat[name]!r} is not one of {', '.join(map(repr, valid))}{hint}"
      )
  _check_algorithm(config)
  if config.rollout.max_tokens > config.train.row_tokens:
    raise ValueError(
      f"config.train.row_tokens: {config.train.row_tokens} is less than rollout.max_tokens = "
      f"{config.rollout.max_tokens}; a conversation must fit a packed row"
    )
  if config.rollout.top_p == 0:
    raise ValueError("config.rollout.top_p: must be above 0; 1 = off")
  _check_environment(config)
  _check_market(config)
  _check_rewards(config, get_algorithm(config.algorithm))
  _check_evaluation(config)


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
  if config.advantage.level and algorithm.critic != "value" and algorithm.rewards != "none":
    raise ValueError(
      f"config.advantage.level: {config.advantage.level!r}, but algorithm {config.algorithm!r} has "
      "no GAE; leave it empty, or use 'ppo' or 'steptool'"
    )
  if config.train.micro_rows % algorithm.select.rows:
    raise ValueError(
      f"config.train.micro_rows: {config.train.micro_rows}, but algorithm {config.algorithm!r} "
      f"needs pairs of rows; use {config.train.micro_rows + 1}"
    )
  if algorithm.critic == "double" and config.archer.replay < config.archer.batch:
    raise ValueError(
      f"config.archer.replay: keeps {config.archer.replay} trajectories, fewer than the "
      f"{config.archer.batch} of archer.batch; raise it, or lower archer.batch"
    )


def _check_environment(config: Config) -> None:
  c = config.environment
  if c.name == "custom":
    for name, value in (("functions", c.functions or c.mcp), ("tasks", c.tasks)):
      if not value:
        raise ValueError(f"config.environment.{name}: a file is needed for environment 'custom'")
    if c.functions and c.mcp:
      raise ValueError("config.environment.mcp: set together with functions; give one of the two")
  elif c.mcp:
    raise ValueError(f"config.environment.mcp: is for environment 'custom', not {c.name!r}")
  if c.name == "toolbench":
    for name in ("folder", "subsets"):
      if not getattr(c.toolbench, name):
        raise ValueError(
          f"config.environment.toolbench.{name}: is empty, needed for environment 'toolbench'"
        )


def _check_market(config: Config) -> None:
  m = config.environment.market
  where = "config.environment.market"
  if not m.spread >= 1:
    raise ValueError(f"{where}.spread: must be at least 1 (all prices as usual), found {m.spread}")
  for name in ("specialists", "preferences", "asked"):
    if getattr(m, name) and not m.prices:
      raise ValueError(f"{where}.{name}: set, but {where}.prices is False, so there is no market")
  if m.specialists and config.environment.name not in SPECIALTIES:
    raise ValueError(
      f"{where}.specialists: they know {' and '.join(SPECIALTIES)}, not "
      f"{config.environment.name!r}; leave it empty"
    )
  for tier in m.specialists:
    if tier not in TIERS:
      near = difflib.get_close_matches(tier, TIERS, n=1, cutoff=0.0)
      raise ValueError(f"{where}.specialists: there is no {tier!r}; did you mean {near[0]!r}?")
  if m.asked and not m.specialists:
    raise ValueError(f"{where}.asked: {m.asked:g}, but there are no specialists to ask")


def _check_rewards(config: Config, algorithm: Algorithm) -> None:
  r, name, paid = config.rewards, config.algorithm, algorithm.rewards
  where = f"config.rewards.scheme: {r.scheme!r}"
  if config.data.path and (r.scheme != "steptool" or r.filters != Filters()):
    raise ValueError(
      "config.rewards: stored trajectories (config.data.path) are trained on with the rewards of "
      "their file; leave scheme and filters at their defaults"
    )
  if r.filters.min_deviation and config.rollout.samples < 2:
    raise ValueError(
      "config.rewards.filters.min_deviation: with config.rollout.samples = 1 no group deviates, so "
      "all would be left out; set it to 0, or samples to 2 or more"
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


def _check_evaluation(config: Config) -> None:
  e = config.evaluation
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
  for name, value in (("attempts", e.attempts), ("rollouts", e.rollouts)):
    if value > 1 and not e.temperature:
      raise ValueError(
        f"config.evaluation.{name}: {value}, but at temperature 0 all are the same; set "
        "evaluation.temperature above 0"
      )
