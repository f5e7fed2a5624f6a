"""Files: written whole or not at all; read so that an error names the file."""

import contextlib
import itertools
import json
import lzma
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any


def read_text(path: str | pathlib.Path) -> str:
  """The file's text, `.xz` unpacked; OSError when there is none, ValueError when it is broken."""
  path = pathlib.Path(path)
  try:
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
  except (lzma.LZMAError, UnicodeDecodeError) as error:
    raise ValueError(f"{path}: cannot be read ({error}): fetch it again") from error


def parse_json(text: str, most_deep: int = 100, finite: bool = True) -> Any:
  """The JSON value in `text`; ValueError with the reason where there is none.

  Stricter than json.loads, whose leniency is a silent loss or a crash later on: no key twice in an
  object, nothing nested deeper than `most_deep`, and, if `finite`, no NaN, Infinity or 1e999.
  """

  def constant(name: str) -> float:
    if finite:
      raise ValueError(f"{name} is no JSON number; write a finite one")
    return float(name)

  def number(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else constant(digits)

  try:
    value = json.loads(
      text, parse_constant=constant, parse_float=number, object_pairs_hook=_without_twins
    )
  except RecursionError:
    raise ValueError("nested without end; flatten it") from None
  level, depth = [value], 0
  while level:
    level = [c for c in level if isinstance(c, dict | list)]
    level = [e for c in level for e in (c.values() if isinstance(c, dict) else c)]
    depth += 1
    if depth > most_deep + 1:
      raise ValueError(f"nested deeper than {most_deep} levels; flatten it")
  return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    twin = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"the key {twin!r:.60} stands twice in one object; keep one")
  return found


def read_json(path: str | pathlib.Path, kind: type = dict, finite: bool = True) -> Any:
  """The file's JSON value, which must be of this kind; errors as of read_text and parse_json.

  finite=False for files of our own figures, which may hold NaN.
  """
  text = read_text(path)
  try:
    value = parse_json(text, 500, finite)  # an official answer nests its turns
  except ValueError as error:
    raise ValueError(f"{path}: not valid JSON ({error}): mend it, or fetch it again") from error
  if not isinstance(value, kind):
    raise ValueError(f"{path}: must hold a JSON {kind.__name__}, found {type(value).__name__}")
  return value


def read_lines(
  path: str | pathlib.Path, parse: Callable[[str], Any], most: int | None = None
) -> tuple[list[Any], list[int], int]:
  """(what `parse` makes of each line, numbers of the damaged lines from 1 on, lines read).

  Reads the first `most` lines. A line is damaged where it is no UTF-8 or where `parse` raises
  ValueError or RecursionError. OSError where the file cannot be read.
  """
  found, damaged, number = [], [], 0
  with pathlib.Path(path).open("rb") as file:
    for number, line in enumerate(itertools.islice(file, most), start=1):
      try:
        found.append(parse(line.decode("utf-8")))
      except (ValueError, RecursionError):
        damaged.append(number)
  return found, damaged, number


@contextlib.contextmanager
def replacing(path: str | pathlib.Path, mode: str = "w", **arguments: Any) -> Iterator[IO]:
  """A file to write that takes the place of `path` when the block ends well; makes the folder.

  Readers, other processes too, see the old file, no file, or the whole new one. `arguments` go to
  open(), for texts with UTF-8 as the default encoding.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if "b" not in mode:
    arguments = {"encoding": "utf-8"} | arguments
  handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
  try:
    with open(handle, mode, **arguments) as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)  # mkstemp makes private files
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


@contextlib.contextmanager
def replacing_folder(folder: pathlib.Path, mine: bool = True) -> Iterator[pathlib.Path]:
  """A new folder to write to, which takes the place of `folder` once it is whole.

  What an interrupted one left is removed. mine: on several hosts, whether this one moves folders.
  """
  new = folder.with_name(f"{folder.name}.new")
  if mine and new.exists():
    shutil.rmtree(new)
  yield new
  if mine:
    if folder.exists():
      shutil.rmtree(folder)
    new.rename(folder)


def write_text(path: str | pathlib.Path, text: str, **arguments: Any) -> None:
  """Puts a text file in the place of `path`, as `replacing` does."""
  with replacing(path, **arguments) as file:
    file.write(text)
