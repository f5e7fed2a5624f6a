"""Names the tool call that froze this process, or ended it.

Code in C that holds the interpreter's lock (a regular expression that backtracks for hours) stops
all Python threads, time-outs included, and os._exit lets none of them speak. So a small process
beside this one hears of every call, and of a thread's beat. Without a beat for a while in a call,
and for config.hang_after outside of one, it names the calls in work, lets this process show where
its threads are, and kills it: the same command goes on from the newest checkpoint. It speaks, too,
when this process is gone in a call. It counts its own time, in which neither a machine that sleeps
nor a run that is suspended has a part.
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
import os, select, signal, subprocess, sys, time
pid, path, show = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
limit, held = float(sys.argv[4]), float(sys.argv[5])
calls, silent, rest = {}, 0.0, b""

def say(what, advice):
  named = f": {'; '.join(calls.values())}" if calls else ""
  text = f"steptool_jax: {what}{named}; {advice}; the same command goes on from the newest "
  text += "checkpoint\\n"
  sys.stderr.write("\\n" + text)
  sys.stderr.flush()
  with open(path, "w") as file:
    file.write(text)

def asleep():
  # A process that is stopped, by Ctrl-Z for instance, is not frozen.
  try:
    if os.path.exists("/proc/self/stat"):
      return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] in "Tt"
    state = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip().startswith("T")
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
  elif calls or held:
    most = limit if calls else max(held, limit)
    silent += 0.1
    if silent > most and asleep():
      silent = 0.0
    if silent > most:
      what, advice = "something in C", "config.hang_after says how long it may"
      if calls:
        what, advice = "a call", "mend the tool, or give it a time-out of its own"
      say(f"no Python has run for {most:g} s, {what} holds the interpreter's lock", advice)
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

  report: a file that gets the sentence, too, and is said, and removed, at the next start. limit_s,
  held_s: how long no Python may run in a call, and, where that is longer, outside of one (0: as
  long as it likes).
  """

  def __init__(self, report: pathlib.Path, limit_s: float = LIMIT_S, held_s: float = 0.0):
    if report.exists():
      logging.warning("the run before this one: %s", report.read_text(errors="replace").strip())
      report.unlink()
    faulthandler.register(_SHOW, sys.__stderr__, all_threads=True)
    arguments = (os.getpid(), report, int(_SHOW), limit_s, held_s)
    self._will = Will(_KEEPER, *map(str, arguments))
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
