"""Checked reading of text, JSON and Python literals: errors name the place and what is wanted."""

import ast
import json
import lzma
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

Path = str | pathlib.Path


def read_text(path: pathlib.Path) -> str:
  """The file's text, `.xz` unpacked; OSError when there is none, ValueError when it is broken."""
  try:
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
  except (lzma.LZMAError, UnicodeDecodeError) as error:
    raise ValueError(f"{path}: cannot be read ({error}): fetch it again") from error


def read_json(path: pathlib.Path) -> Any:
  """The file's JSON value; ValueError that names the file when it holds none."""
  try:
    return json.loads(read_text(path))
  except (json.JSONDecodeError, RecursionError) as error:
    raise ValueError(f"{path}: not valid JSON ({error}): fetch it again") from error


def objects(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
  """(place, id, object) of a file of {id: {…}} whose objects hold all `fields`."""
  path = pathlib.Path(path)
  for key, entry in typed(read_json(path), dict, str(path)).items():
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
