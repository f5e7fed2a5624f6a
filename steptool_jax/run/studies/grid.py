"""The cells of a study: what config.study.cells says, each cell's config, and how far it is.

A line of config.study.cells names a group, an environment and a method, and what sets them apart:

    "core/nested_api/steptool: seeds=5 algorithm=steptool environment.name=nested_api"

It stands for the cells core/nested_api/steptool/0 to …/4, whose config is the study's own with
these fields changed. A cell lives in WORKDIR/cells/<its name>, an ordinary workdir of training.
"""

import collections
import dataclasses
import fnmatch
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from steptool_jax import validation
from steptool_jax.config import Config, Study
from steptool_jax.evaluation.comparison import WAITING
from steptool_jax.files import read_json, write_text

# Fields that the methods of one environment of one group must share: an equal budget.
BUDGET = (
  "model.",
  "environment.",
  "rollout.",
  "sft.",
  "evaluation.",
  "train.iterations",
  "train.epochs",
  "train.minibatches",
  "lora.",
  "data.",
)


@dataclasses.dataclass(frozen=True)
class Planned:
  name: str
  group: str
  environment: str  # a label; the fields are in the overrides
  method: str
  seed: int
  overrides: Mapping[str, str]  # field -> value as on the command line


@dataclasses.dataclass(frozen=True)
class State:
  """A cell's cell.json."""

  status: str = WAITING
  note: str = ""
  attempts: int = 0  # that failed


def plan(study: Study) -> list[Planned]:
  """All cells, in the order of the lines, seed by seed.

  ValueError for a line that cannot be read, two lines of one name or of one method on one
  environment, or no line.
  """
  cells: list[Planned] = []
  for line in study.cells:
    name, colon, rest = line.partition(":")
    parts = name.strip().split("/")
    words = [word.partition("=") for word in rest.split()]
    if not colon or len(parts) != 3 or not all(parts) or not all(k and e for k, e, _ in words):
      raise ValueError(
        f"config.study.cells: {line!r} is not 'group/environment/method: field=value …'"
      )
    overrides = {key: value for key, _, value in words}
    seeds = overrides.pop("seeds", "1")
    if "seed" in overrides:
      raise ValueError(
        f"config.study.cells: {line!r}: seed is the cell's own, 0 to seeds - 1; with one seed for "
        "all, runs that are the same would be compared as if they were several"
      )
    if not seeds.isdecimal() or seeds == "0":
      raise ValueError(f"config.study.cells: {line!r}: seeds={seeds} must be a number above 0")
    for seed in range(int(seeds)):
      cells.append(Planned(f"{'/'.join(parts)}/{seed}", *parts, seed, overrides))
  if not cells:
    raise ValueError(
      "config.study.cells: is empty; --mode=study needs cells, as in configs/study.py"
    )
  twice = [n for n, count in collections.Counter(c.name for c in cells).items() if count > 1]
  if twice:
    raise ValueError(f"config.study.cells: {twice[0]} is named twice; give one line another name")
  _refuse_mixed(cells)
  return cells


def _refuse_mixed(cells: Sequence[Planned]) -> None:
  """Methods are compared by environment, over all groups: two cells must not be one there."""
  first: dict[tuple[str, str, int], Planned] = {}
  for cell in cells:
    other = first.setdefault((cell.environment, cell.method, cell.seed), cell)
    if other is not cell:
      raise ValueError(
        f"config.study.cells: {other.name} and {cell.name} would be taken for one method of one "
        "environment; give one of the two another name"
      )


def chosen(study: Study, cells: Sequence[Planned]) -> list[Planned]:
  """The cells that match a pattern of study.only; ValueError for a pattern of none."""
  for pattern in study.only:
    if not fnmatch.filter([cell.name for cell in cells], pattern):
      raise ValueError(
        f"config.study.only: no cell matches {pattern!r}; the first is {cells[0].name}"
      )
  patterns = study.only or ("*",)
  return [c for c in cells if any(fnmatch.fnmatchcase(c.name, p) for p in patterns)]


def configs(config: Config, cells: Sequence[Planned]) -> dict[str, Config]:
  """name -> validated config of every cell.

  ValueError that names all lines that are no valid config (an algorithm that is not in the table,
  for one), or lines of one environment with unequal budgets.
  """
  found: dict[str, Config] = {}
  wrong: dict[str, None] = {}
  for cell in cells:
    try:
      found[cell.name] = cell_config(config, cell)
    except ValueError as error:
      wrong[f"{cell.group}/{cell.environment}/{cell.method}: {error}"] = None
  if wrong:
    raise ValueError(
      "config.study.cells: cannot be run:\n  "
      + "\n  ".join(wrong)
      + "\n(--config.study.only names the cells to run)"
    )
  _check_budgets(cells, found)
  return found


def cell_config(config: Config, cell: Planned) -> Config:
  """The study's config with the cell's fields; ValueError where they make no valid one."""
  return validation.validate(cell_fields(config, cell))


def cell_fields(config: Config, cell: Planned) -> dict[str, Any]:
  """The fields of a cell's config as nested mappings, not validated yet."""
  tree = json.loads(validation.to_json(dataclasses.replace(config, study=Study(), seed=cell.seed)))
  for name, text in cell.overrides.items():
    validation.check_name(name)
    *groups, last = name.split(".")
    target = tree
    for group in groups:
      target = target[group]
    target[last] = _read_value(name, target[last], text)
  return tree


def folder(workdir: pathlib.Path, name: str) -> pathlib.Path:
  return workdir / "cells" / name


def read_state(cell_folder: pathlib.Path) -> State:
  """What cell.json says; the state of a cell that waits where there is none or a damaged one."""
  try:
    return State(**read_json(cell_folder / "cell.json"))
  except (FileNotFoundError, ValueError, TypeError):
    return State()


def write_state(cell_folder: pathlib.Path, state: State) -> None:
  write_text(cell_folder / "cell.json", json.dumps(dataclasses.asdict(state)))


def write_plan(workdir: pathlib.Path, cells: Sequence[Planned]) -> None:
  plan_ = {"cells": [dataclasses.asdict(cell) for cell in cells]}
  write_text(workdir / "study.json", json.dumps(plan_, indent=1))


def read_plan(workdir: pathlib.Path) -> list[Planned] | None:
  """The cells of the study in this folder; None where there is no study."""
  path = workdir / "study.json"
  if not path.exists():
    return None
  try:
    cells = [Planned(**cell) for cell in read_json(path)["cells"]]
    for c in cells:
      names = (c.name, c.group, c.environment, c.method)
      texts = [*names, *c.overrides, *c.overrides.values()]
      if not all(isinstance(text, str) for text in texts) or type(c.seed) is not int:
        raise ValueError(f"cell {c.name!r:.60} has a field of another type")
    return cells
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{path} is damaged ({error}); start the study's command again, it writes the file anew"
    ) from error


def _read_value(name: str, default: Any, text: str) -> Any:
  """The text of an override as the type of the field."""
  try:
    if isinstance(default, bool):
      return {"True": True, "true": True, "False": False, "false": False}[text]
    if isinstance(default, int | float):
      return type(default)(text)
  except (KeyError, ValueError):
    kind = type(default).__name__
    raise ValueError(f"config.{name}: {kind} is needed, found {text!r}") from None
  return text.split(",") if isinstance(default, list) else text


def _check_budgets(cells: Sequence[Planned], found: Mapping[str, Config]) -> None:
  first: dict[str, Planned] = {}
  for cell in cells:
    other = first.setdefault(cell.environment, cell)
    theirs = json.loads(validation.to_json(found[other.name]))
    names = validation.differences(found[cell.name], theirs)
    unequal = [name for name in names if name.startswith(BUDGET)]
    if unequal:
      raise ValueError(
        f"config.study.cells: {cell.name} and {other.name} are to be compared, but differ in "
        f"{', '.join(unequal)}; give both the same, or one environment another name"
      )
