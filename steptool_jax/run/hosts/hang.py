"""A run that makes no progress for too long ends with a sentence, whatever holds it.

The loops of rollout, update, SFT and evaluation call `stamp`; a thread looks at the newest stamp.
Where the interpreter itself is held (a tool in C code), no thread runs: then parts/watchdog.py ends
the process. Work that has time-outs of its own, or may take any time, calls `rest` first: nothing
is watched until the next stamp.
"""

import contextlib
import faulthandler
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

_LOOK_S = 5.0
_newest: float | None = None  # time of the newest stamp; None: nothing is watched


def stamp() -> None:
  """There is progress."""
  global _newest
  _newest = time.monotonic()


def rest() -> None:
  """What comes next is not watched."""
  global _newest
  _newest = None


@contextlib.contextmanager
def watched(limit_s: float, workdir: pathlib.Path, end: Callable[[str], None]) -> Iterator[None]:
  """Calls `end` with a sentence, from a thread, where no stamp comes for limit_s; 0 = never.

  WORKDIR/error.txt then holds the sentence and what every thread was doing.
  """
  rest()
  if not limit_s:
    yield
    return
  done = threading.Event()
  thread = threading.Thread(
    target=_watch, args=(limit_s, workdir, end, done), name="hang", daemon=True
  )
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def _watch(
  limit_s: float, workdir: pathlib.Path, end: Callable[[str], None], done: threading.Event
) -> None:
  look = min(_LOOK_S, limit_s / 4)
  while True:
    started = time.monotonic()
    if done.wait(look):
      return
    newest = _newest
    if time.monotonic() - started > limit_s / 2:  # the whole process was suspended
      if newest is not None:
        stamp()
    elif newest is not None and time.monotonic() - newest > limit_s:
      _speak(limit_s, workdir, end)
      return


def _speak(limit_s: float, workdir: pathlib.Path, end: Callable[[str], None]) -> None:
  text = (
    f"no progress for {limit_s:g} s (config.hang_after): a tool, the devices or another process "
    f"hangs; {workdir / 'error.txt'} says where; the same command goes on from the newest whole "
    "checkpoint"
  )
  with contextlib.suppress(OSError), (workdir / "error.txt").open("w") as file:
    file.write(f"{text}\n\n")
    file.flush()
    faulthandler.dump_traceback(file)
  end(text)
