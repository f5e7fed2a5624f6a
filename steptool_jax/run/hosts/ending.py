"""How all processes of a run stop when one of them does.

A process that stops with an error says so in the store; a thread in every other one looks there
and ends its process with that sentence, even while it waits in a collective. One that dies without
a word is missed by its neighbours' sockets (CPU, GPU) or by its heartbeat (everywhere). Without the
heartbeat, or without process 0, which has the store, jax aborts a process in C++: then its `Will`
speaks.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from steptool_jax.run.hosts import hosts

AGAIN = (
  "start all processes again with the same command: training goes on from its newest whole "
  "checkpoint"
)
_FAILED = "steptool_jax/failed"  # the first error, {"process", "text"}
_LOOK_S, _GRACE_S, _LINGER_S = 0.5, 1.0, 5.0
# What a Will runs. The pipe closes with the process that writes, however it ends.
_EXECUTOR = """
import sys
text = ""
for text in sys.stdin:
  pass
if text.strip():
  sys.stderr.write("\\n" + text)
"""


_speaking = threading.Lock()
_wills: list["Will"] = []  # of this process: none, or one


class Will:
  """A small process that says a sentence for this one, should this one end without a word.

  In a process that is killed, or that jax aborts, no Python runs any more. (jaxlib 0.10.2 has a
  callback for the latter, but cannot hand it its argument: std::bad_cast.)
  """

  def __init__(self, program: str = _EXECUTOR, *arguments: str):
    """program: Python that reads what `write` gets; the usual one says the last of it."""
    # Signals to all of a job mean the run. It inherits that they are blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
      self.process = subprocess.Popen(
        [sys.executable, "-ISc", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
      )
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)

  def write(self, sentence: str) -> None:
    """What it is to say, in the place of what was written before; "" for nothing."""
    with contextlib.suppress(OSError):  # it was killed
      self.process.stdin.write(f"{sentence}\n".encode())
      self.process.stdin.flush()

  def __enter__(self) -> "Will":
    _wills.append(self)
    return self

  def __exit__(self, *_: object) -> None:
    _wills.remove(self)
    self.close()

  def close(self) -> None:
    """Ends it, without a word."""
    self.write("")
    with contextlib.suppress(OSError):
      self.process.stdin.close()
    self.process.wait()


def _failure() -> dict[str, Any] | None:
  """What the first process that failed said, if another one did."""
  try:
    failure = json.loads(hosts.store().key_value_try_get(_FAILED))
  except Exception:  # nothing there, or nobody to ask any more
    return None
  return failure if failure["process"] != hosts.peers().index else None


def watch(done: threading.Event) -> None:
  """Ends this process soon after another one has failed; a thread's work until `done`."""
  while not done.wait(_LOOK_S):
    failure = _failure()
    if failure is not None and not done.wait(_GRACE_S):
      _end(_stopped_with(failure))


def leave(error: BaseException) -> None:
  """Ends this process at once: a normal exit would wait for processes that do not come any more."""
  text = f"{error}" if isinstance(error, ValueError | OSError | RuntimeError) else repr(error)
  if is_lost(error):
    time.sleep(2 * _LOOK_S)  # it may have said why
    failure = _failure()
    if failure is not None:
      text = _stopped_with(failure)
    else:
      text = f"another process died or cannot be reached ({text[:200]}); {AGAIN}"
  end(text)


def end(text: str) -> None:
  """Ends this process at once with a sentence, and with it all others."""
  # Another one may have been first, or there is no store.
  with contextlib.suppress(Exception):
    hosts.store().key_value_set(_FAILED, json.dumps({"process": hosts.peers().index, "text": text}))
  _end(text)


def _stopped_with(failure: dict[str, Any]) -> str:
  return f"process {failure['process']} stopped: {failure['text']}; this one stops with it"


def is_lost(error: BaseException | None) -> bool:
  """Whether a collective or the store failed, and not this process: another one is gone."""
  words = ("gloo", "nccl", "coordination", "socket closed", "connection re", "barrier")
  kinds = RuntimeError | ValueError | TimeoutError
  said = str(error).lower() if isinstance(error, kinds) else ""
  return hosts.peers().count > 1 and any(word in said for word in words)


def signed(index: int, text: str) -> str:
  """A sentence that names its process; index -1: nobody has numbered it yet."""
  return f"steptool_jax: {f'process {index}' if index >= 0 else 'this process'}: {text}"


def _end(text: str) -> None:
  """Ends this process with a sentence; a thread that has another one waits here for the end."""
  _speaking.acquire()
  # On a line of its own, below a progress bar.
  said = signed(hosts.peers().index, text) if _wills else f"steptool_jax: {text}"
  print(f"\n{said}", file=sys.stderr, flush=True)
  for will in _wills:
    will.write("")
  sys.stdout.flush()
  if hosts.primary() and _wills:
    time.sleep(_LINGER_S)  # the store ends with this process, and others may not have looked yet
  os._exit(1)
