"""Names the tool call that froze this process, or ended it.

Code in C that holds the interpreter's lock (a regular expression that backtracks for hours) stops
all Python threads, time-outs included, and os._exit lets none of them speak. So a small process
beside this one hears of every call, and of a thread's beat. Without a beat for a while in a call it
names the calls in work, lets this process show where its threads are, and kills it: the same
command goes on from the newest checkpoint. It speaks, too, when this process is gone in a call.
"""

import contextlib
import faulthandler
import itertools
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator

from absl import logging

from steptool_jax.run.hosts.ending import Will

LIMIT_S = 60.0
_SHOW = signal.SIGUSR2  # write the threads' stacks to stderr
# Reads lines "<number> <call>", "<number> " when it is over, "" for a beat, "bye".
_KEEPER = """
import os, select, signal, sys, time
pid, limit, path, show = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], int(sys.argv[4])
calls, silent, rest = {}, 0.0, b""

def say(what, advice):
  text = f"steptool_jax: {what}: {'; '.join(calls.values())}; {advice}; the same command goes on "
  text += "from the newest checkpoint\\n"
  sys.stderr.write("\\n" + text)
  sys.stderr.flush()
  with open(path, "w") as file:
    file.write(text)

def asleep():
  try:  # a process that is stopped, by Ctrl-Z for instance, is not frozen
    return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] in "Tt"
  except OSError:
    return False

while True:
  if select.select([0], [], [], 0.1)[0]:
    data = os.read(0, 65536)
    if not data:
      break
    silent = 0.0
    *lines, rest = (rest + data).split(b"\\n")
    for line in lines:
      number, _, what = line.decode(errors="replace").partition(" ")
      if number == "bye":
        calls = {}
      elif what:
        calls[number] = what
      else:
        calls.pop(number, None)
  elif calls:
    silent = 0.0 if asleep() else silent + 0.1
    if silent > limit:
      what = f"no Python has run for {limit:g} s, a call holds the interpreter's lock"
      say(what, "mend the tool, or give it a time-out of its own")
      os.kill(pid, show)
      time.sleep(1)
      os.kill(pid, signal.SIGKILL)
      sys.exit()
if calls:
  what = "the process ended, or was killed, in the middle of a call"
  say(what, "if nobody killed it, a tool did (os._exit)")
"""


class Watchdog:
  """Watches this process between `with` and its end.

  report: a file that gets the sentence, too, and is said, and removed, at the next start.
  """

  def __init__(self, report: pathlib.Path, limit_s: float = LIMIT_S):
    if report.exists():
      logging.warning("the run before this one: %s", report.read_text(errors="replace").strip())
      report.unlink()
    faulthandler.register(_SHOW, sys.__stderr__, all_threads=True)
    self._will = Will(_KEEPER, str(os.getpid()), str(limit_s), str(report), str(int(_SHOW)))
    self._pipe = self._will.process.stdin.fileno()
    os.set_blocking(self._pipe, False)
    self._numbers, self._done = itertools.count(), threading.Event()
    self._beat = threading.Thread(target=self._live, args=(limit_s / 4,), daemon=True)
    self._beat.start()

  @contextlib.contextmanager
  def during(self, what: str) -> Iterator[None]:
    """A call, which `what` names, is in work."""
    number = next(self._numbers)
    self._tell(f"{number} {' '.join(what.split())[:300]}")
    try:
      yield
    finally:
      self._tell(f"{number} ")

  def __enter__(self) -> "Watchdog":
    return self

  def __exit__(self, *_: object) -> None:
    self._done.set()
    self._beat.join()
    self._tell("bye")
    self._will.close()

  def _live(self, every_s: float) -> None:
    while not self._done.wait(every_s):
      self._tell("")

  def _tell(self, line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # it was killed, or is over
      os.write(self._pipe, f"{line}\n".encode()[-4096:])  # in one piece
