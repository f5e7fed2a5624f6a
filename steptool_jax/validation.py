"""ConfigDict -> frozen Config, with every value checked, and saved configurations compared."""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from steptool_jax.combinations import algorithm, environment, model, rewards, rollouts
from steptool_jax.config import Config
from steptool_jax.dialogue import chatformat, template
from steptool_jax.environments.base import ENVIRONMENTS
from steptool_jax.environments.markets.specialists import TIERS
from steptool_jax.learning import importance
from steptool_jax.learning.advantages import LEVELS
from steptool_jax.learning.algorithms import get_algorithm
from steptool_jax.learning.critics import CRITICS
from steptool_jax.learning.losses import AGGREGATIONS, SURROGATES, UNITS
from steptool_jax.policy import families, lora
from steptool_jax.rewards.assembly import SCHEMES, SOURCES
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
  "thinking": chatformat.THINKING,
  "tool lists": chatformat.TOOL_LISTS,
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
  chosen = get_algorithm(checked.algorithm)
  algorithm.check(checked, chosen)
  model.check(checked)
  rollouts.check(checked, chosen)
  environment.check(checked)
  rewards.check(checked, chosen)
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
