"""One asyncio loop in a thread of its own, for clients whose callers are ordinary threads.

On a loop, one time limit bounds all that a client waits for: the look-up of a name, the connection,
each byte of a head, each piece of a body. On a blocking socket it bounds one piece only.
"""

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_running: dict[int, asyncio.AbstractEventLoop] = {}  # by process: no thread crosses a fork


def loop() -> asyncio.AbstractEventLoop:
  """The loop, which runs."""
  with _lock:
    running = _running.get(os.getpid())
    if running is None:
      running = _running[os.getpid()] = asyncio.new_event_loop()
      threading.Thread(target=running.run_forever, name="background-loop", daemon=True).start()
  return running


def run(coroutine: Coroutine[Any, Any, T], seconds: float) -> T:
  """Its result; blocks. TimeoutError, and the coroutine is cancelled, when it takes longer."""
  future = asyncio.run_coroutine_threadsafe(coroutine, loop())
  try:
    return future.result(seconds)
  finally:
    future.cancel()
