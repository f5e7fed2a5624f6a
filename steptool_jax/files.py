"""Files that are written whole or not at all."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import IO, Any


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
