"""Starts commands of steptool_jax quickly: each is a fork of a process that has imported all of it.

    python tests/campaign/forks.py      # its input: one JSON list a line, [log, word, word, …]

Answers every line with the number of the new process, and with its exit status when it has ended.
A fork parses its own command line, builds its own devices and programs and ends as any process
does; only the imports, two thirds of a small command's time, are shared.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time


class Forks:
  """The process above, and the one command at a time that it runs."""

  def __init__(self, environment: dict[str, str]):
    self._server = subprocess.Popen(
      [sys.executable, __file__],
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def start(self, log: pathlib.Path, words: list[str]) -> int:
    """The number of the new process; what it says goes to `log`."""
    self._server.stdin.write(json.dumps([str(log), *words]) + "\n")
    self._server.stdin.flush()
    return int(self._server.stdout.readline())

  def wait(self) -> int:
    """The exit status of the process, -9 of a killed one."""
    return int(self._server.stdout.readline())

  def close(self) -> None:
    self._server.stdin.close()
    self._server.wait()


def alive(process: int) -> bool:
  """Whether it is at work; one that has ended is no longer, even before its parent knows."""
  try:
    state = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
  except OSError:
    return False
  return state != "Z"


def kill_at(process: int, seconds: float, event, limit_s: float = 60.0) -> bool:
  """Waits for event(), then for `seconds`, and kills; False where it had ended by itself."""
  end = time.monotonic() + limit_s
  while not event():
    if not alive(process) or time.monotonic() > end:
      return False
    time.sleep(0.001)
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if not alive(process):
      return False
    time.sleep(0.001)
  with contextlib.suppress(ProcessLookupError):
    os.kill(process, signal.SIGKILL)
    return True
  return False


def _serve() -> None:
  import matplotlib.pyplot  # noqa: F401

  import steptool_jax.main
  from steptool_jax.run import export, report, train  # noqa: F401

  for line in iter(sys.stdin.readline, ""):
    log, *words = json.loads(line)
    process = os.fork()
    if not process:
      with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
      sys.argv = ["steptool_jax", *words]
      steptool_jax.main.run()  # ends by SystemExit
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
  _serve()
