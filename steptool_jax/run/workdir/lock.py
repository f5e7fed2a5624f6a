"""One run at a time writes into a workdir.

WORKDIR/lock names the process that has it: host, process id, since when. On one host the system
holds it and lets go of it when that process ends, however it ends. A process of another host counts
as alive as long as it rewrites the file's `beat`; clocks are not compared.
"""

import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

from absl import logging

BEAT_S = 10.0
_NAME = "lock"
_OURS = ("moments", "imported", "answers", "converted", "pass_rate", "results")
# As files.replacing, tensorfile.output_directory and agreement name them.
_TEMPORARY = re.compile(r"\.(.+\.\w{8}\.tmp|export\.new\.\w{8}|shared-[0-9a-f]{16})")
_MACHINE = pathlib.Path("/proc/sys/kernel/random/boot_id")  # another one after a restart


@contextlib.contextmanager
def held(workdir: pathlib.Path, mode: str, wait: bool = False) -> Iterator[None]:
  """The workdir for this process alone; removes what a killed one has left half-written.

  wait: for the end of another process of this host, in the place of an error.

  Raises:
    RuntimeError: another run is alive in it; names its host, process and start.
    ValueError: nobody may write there.
  """
  try:
    (workdir / _NAME).touch()
    file = (workdir / _NAME).open("r+", encoding="utf-8")
  except OSError as error:
    raise ValueError(f"--workdir: {workdir} cannot be written ({error.strerror})") from error
  with file:
    _refuse_the_living(workdir, file, blocked=not _lock(workdir, file, wait))
    mine = {
      "host": socket.gethostname(),
      "machine": _machine(),
      "process": os.getpid(),
      "mode": mode,
      "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    _write(file, mine, 0)
    clear_leftovers(workdir)
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(file, mine, done), name="lock", daemon=True)
    beat.start()
    try:
      yield
    finally:
      done.set()
      beat.join()
      file.truncate(0)


def clear_leftovers(workdir: pathlib.Path) -> None:
  """Removes temporary files and folders of processes that were killed while they wrote.

  A study's cells have locks of their own; a report may be written beside any run.
  """
  for path in [*workdir.glob(".*"), *(p for name in _OURS for p in (workdir / name).rglob(".*"))]:
    if _TEMPORARY.fullmatch(path.name) and not path.name.startswith(".report.html."):
      with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _lock(workdir: pathlib.Path, file: IO, wait: bool) -> bool:
  """Whether no other process of this host holds it."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    return False
  except OSError:  # the beat alone decides
    logging.warning("%s: this file system has no locks; two runs may meet in it", workdir)
  return True


def _refuse_the_living(workdir: pathlib.Path, file: IO, blocked: bool) -> None:
  """RuntimeError where the process that the file names is alive, or nobody can know.

  One of this host that is gone may have left a child behind that still holds the lock.
  """
  before = _read(file)
  here = before.get("machine") == _machine()
  if blocked and (not before or (here and _is_alive(before["process"]))):
    raise RuntimeError(_refusal(workdir, before))
  if not before or (here and not blocked):
    return
  logging.warning(
    "%s was last in use by %s; waiting %.0f s to see whether it lives",
    *(workdir, _who(before), 3 * BEAT_S),
  )
  time.sleep(3 * BEAT_S)
  with (workdir / _NAME).open(encoding="utf-8") as again:  # network file systems: look anew
    now = _read(again)
  if now and now != before:
    raise RuntimeError(_refusal(workdir, now))


def _is_alive(process: int) -> bool:
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True


def _refusal(workdir: pathlib.Path, owner: dict[str, Any]) -> str:
  return (
    f"{workdir} is in use by {_who(owner)}; wait for its end, stop it (SIGTERM saves), or use "
    "another --workdir"
  )


def _who(owner: dict[str, Any]) -> str:
  if not owner:
    return "another process of this host"
  return (
    f"--mode={owner.get('mode')}, process {owner.get('process')} on {owner.get('host')} since "
    f"{owner.get('since')}"
  )


def _beat(file: IO, mine: dict[str, Any], done: threading.Event) -> None:
  for number in itertools.count(1):
    if done.wait(BEAT_S):
      return
    with contextlib.suppress(OSError):  # a full disk is no reason to end
      _write(file, mine, number)


def _read(file: IO) -> dict[str, Any]:
  """Who has it; {} where nobody says so."""
  file.seek(0)
  try:
    found = json.loads(file.read())
  except (ValueError, RecursionError):
    return {}
  number = found.get("process") if isinstance(found, dict) else None
  return found if type(number) is int and 0 < number < 2**31 else {}


def _write(file: IO, owner: dict[str, Any], beat: int) -> None:
  """In one piece: all beats are of one length, so that nobody reads half a text."""
  file.seek(0)
  file.write(json.dumps(owner | {"beat": f"{beat:012d}"}) + "\n")
  file.truncate()
  file.flush()


def _machine() -> str:
  try:
    return _MACHINE.read_text().strip()
  except OSError:
    return socket.gethostname()
