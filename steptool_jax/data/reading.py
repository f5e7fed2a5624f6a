"""Checked reading of text, JSON and Python literals: errors name the place and what is wanted."""

import ast
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from steptool_jax.files import read_json

Path = str | pathlib.Path


def objects(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
  """(place, id, object) of a file of {id: {…}} whose objects hold all `fields`."""
  path = pathlib.Path(path)
  for key, entry in read_json(path).items():
    where = f"{path}, id {key!r}"
    for name in fields:
      field(entry, name, where)
    yield where, key, entry


def literal(text: str, kind: type, where: str) -> Any:
  """The Python literal in `text`; ValueError for anything else, names and calls included."""
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
    raise ValueError(f"{where}: not a Python {kind.__name__} literal ({error})") from error
  return typed(value, kind, where)


def field(entry: Any, name: str, where: str) -> Any:
  """entry[name] of a JSON object."""
  if not isinstance(entry, dict) or name not in entry:
    raise ValueError(f"{where}: the field {name!r} is missing")
  return entry[name]


def typed(value: Any, kind: type, where: str) -> Any:
  """`value` itself, which must be of this type (a bool is no int)."""
  wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
  check(not wrong, where, f"of type {kind.__name__}", value)
  return value


def texts(value: Any, where: str) -> list[str]:
  """`value` itself, which must be a list of texts."""
  for entry in typed(value, list, where):
    typed(entry, str, where)
  return value


def check(good: bool, where: str, wanted: str, found: Any) -> None:
  """ValueError "<where>: must be <wanted>, found <found>" unless `good`."""
  if not good:
    raise ValueError(f"{where}: must be {wanted}, found {found!r:.80}")
