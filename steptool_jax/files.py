"""Files: written whole or not at all; read so that an error names the file."""

import contextlib
import itertools
import json
import lzma
import os
import pathlib
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


def read_json(path: str | pathlib.Path, kind: type = dict) -> Any:
  """The file's JSON value, which must be of this kind; errors as of read_text."""
  try:
    value = json.loads(read_text(path))
  except (json.JSONDecodeError, RecursionError) as error:
    raise ValueError(f"{path}: not valid JSON ({error}): fetch it again") from error
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


def write_text(path: str | pathlib.Path, text: str, **arguments: Any) -> None:
  """Puts a text file in the place of `path`, as `replacing` does."""
  with replacing(path, **arguments) as file:
    file.write(text)
