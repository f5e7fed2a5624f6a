"""Runs blocking calls in daemon threads with a time-out each; hung calls are abandoned, counted."""

import collections
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Protocol, TypeVar

from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.types import Code, Observation, ToolCall

T = TypeVar("T")
Announce = Callable[[str], contextlib.AbstractContextManager]  # takes a call's name, while it runs


class TooManyStuck(InfrastructureError):
  """More abandoned calls hang than max_stuck."""


class Callee(Protocol):
  def call(self, call: ToolCall) -> Observation: ...


@dataclasses.dataclass(eq=False)
class _Job:
  future: Future
  session: Callee
  call: ToolCall
  abandoned: bool = False


class ToolRunner:
  """A pool for tool calls that a hung tool can neither block nor leak through without end.

  timeout_s: seconds for one attempt, counted from its start (waiting in the queue is free).
  workers: calls at the same time, and as many others that `begin` was asked for. retries,
  backoff_s: an INFRASTRUCTURE observation (or a session that raises) is tried again after
  backoff_s, 2 backoff_s, 4 backoff_s, ...
  max_stuck: as soon as more abandoned calls than this hang at the same time, every waiting and
  later submission fails with TooManyStuck.
  announce: hears of all that runs (run/parts/watchdog.py).
  reply_s: the time-out of a user's reply, for `within` and `begin`; None: that of a call.

  Python cannot end a thread: an abandoned call runs on until it returns by itself, and what it
  still does to its session's state is done, but seen by nobody but later calls of that session.
  """

  def __init__(
    self,
    timeout_s: float = 10.0,
    workers: int = 8,
    max_stuck: int = 16,
    retries: int = 2,
    backoff_s: float = 0.05,
    announce: Announce = contextlib.nullcontext,
    reply_s: float | None = None,
  ):
    if not timeout_s > 0:
      raise ValueError(f"timeout_s is {timeout_s}: must be above 0 seconds")
    if workers < 1:
      raise ValueError(f"workers is {workers}: must be at least 1")
    if min(max_stuck, retries) < 0 or not backoff_s >= 0:
      raise ValueError("max_stuck, retries and backoff_s must not be negative")
    self._timeout_s, self._workers, self._max_stuck = timeout_s, workers, max_stuck
    self._retries, self._backoff_s, self._announce = retries, backoff_s, announce
    self.reply_s = timeout_s if reply_s is None else reply_s
    self._state = threading.Condition()
    self._queue: collections.deque[_Job] = collections.deque()
    # Insertion order is deadline order, because the time-out is the same for all.
    self._deadlines: dict[_Job, float] = {}
    self._begun: collections.deque[tuple[Future, tuple]] = collections.deque()
    self._threads = self._idle = self._stuck = self._beginners = 0
    self._closed = False
    self._watching = False

  @property
  def stuck(self) -> int:
    """Abandoned calls that still hang."""
    return self._stuck

  def submit(self, session: Callee, call: ToolCall) -> Future:
    """Future[Observation]. Raises TooManyStuck when too many calls hang."""
    job = _Job(Future(), session, call)
    with self._state:
      if self._closed:
        raise RuntimeError("this ToolRunner is closed")
      if self._stuck > self._max_stuck:
        raise self._overrun()
      self._queue.append(job)
      if self._idle < len(self._queue) and self._threads < self._workers:
        self._start(self._work)
        self._threads += 1
      if not self._watching:
        self._watching = True
        self._start(self._watch)
      self._state.notify_all()
    return job.future

  def within(
    self,
    function: Callable[[], T],
    what: str,
    late: Callable[[T], object] | None = None,
    times: int = 1,
    limit_s: float | None = None,
  ) -> T:
    """function(), which `what` names, in a thread of its own; blocks, and raises what it raises.

    InfrastructureError when it takes longer than limit_s, or else than `times` time-outs, as many
    calls as it makes; should it return all the same, `late` gets its result. Raises TooManyStuck as
    submit.
    """
    future: Future[T] = Future()
    abandoned, timeout_s = False, times * self._timeout_s if limit_s is None else limit_s

    def work() -> None:
      try:
        with self._announce(what):
          settle, outcome = future.set_result, function()
      except BaseException as error:
        settle, outcome = future.set_exception, error
      with self._state:
        settle(outcome)
        self._stuck -= abandoned
      if abandoned and late is not None and future.exception() is None:
        late(outcome)

    with self._state:
      if self._stuck > self._max_stuck:
        raise self._overrun()
    self._start(work)
    wait([future], timeout_s)
    with self._state:
      if not future.done():
        abandoned = True
        self._stuck += 1
        raise InfrastructureError(f"{what} takes longer than {timeout_s:g} s")
    return future.result()

  def begin(
    self,
    function: Callable[[], T],
    what: str,
    late: Callable[[T], object] | None = None,
    times: int = 1,
    limit_s: float | None = None,
  ) -> Future:
    """`within` as a Future: at most `workers` at the same time, the others wait for their turn."""
    future: Future[T] = Future()
    with self._state:
      if self._closed:
        raise RuntimeError("this ToolRunner is closed")
      self._begun.append((future, (function, what, late, times, limit_s)))
      if self._beginners < self._workers:
        self._beginners += 1
        self._start(self._work_through)
    return future

  def _work_through(self) -> None:
    """Does what `begin` was asked for, until nothing waits."""
    while True:
      with self._state:
        if not self._begun:
          self._beginners -= 1
          return
        future, work = self._begun.popleft()
      if not future.set_running_or_notify_cancel():
        continue
      try:
        settle, outcome = future.set_result, self.within(*work)
      except BaseException as error:
        settle, outcome = future.set_exception, error
      settle(outcome)

  def persist(self, function: Callable[[], T]) -> T:
    """function(), with the retries and back-off of a call where it raises."""
    for attempt in range(self._retries):
      try:
        return function()
      except Exception:
        time.sleep(self._backoff_s * 2**attempt)
    return function()

  def close(self) -> None:
    """Cancels waiting calls and lets the threads end; running calls are left to themselves."""
    with self._state:
      self._closed = True
      while self._queue:
        self._queue.popleft().future.cancel()
      while self._begun:
        self._begun.popleft()[0].cancel()
      self._state.notify_all()

  def __enter__(self) -> "ToolRunner":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _start(self, target) -> None:
    threading.Thread(target=target, name="tool-call", daemon=True).start()

  def _overrun(self) -> TooManyStuck:
    return TooManyStuck(
      f"{self._stuck} tool calls hang for longer than {self._timeout_s:g} s, "
      f"max_stuck is {self._max_stuck}: a tool needs a time-out of its own"
    )

  def _work(self) -> None:
    while True:
      with self._state:
        self._idle += 1
        while not self._queue and not self._closed:
          self._state.wait()
        self._idle -= 1
        if not self._queue:
          self._threads -= 1
          return
        job = self._queue.popleft()
      if job.future.set_running_or_notify_cancel() and not self._run(job):
        return  # abandoned: a replacement has this worker's place

  def _run(self, job: _Job) -> bool:
    """Attempts with back-off; False when the watcher gave this worker up meanwhile."""
    for attempt in range(self._retries + 1):
      if attempt:
        time.sleep(self._backoff_s * 2 ** (attempt - 1))
      started = time.monotonic()
      with self._state:
        self._deadlines[job] = started + self._timeout_s
        self._state.notify_all()
      try:
        with self._announce(_name(job.call)):
          observation = job.session.call(job.call)
      except BaseException as error:
        # Tools' own errors are observations already: what arrives here is a broken simulator.
        text = f"error: {type(error).__name__}: {str(error)[:200]}"
        observation = Observation(text, Code.INFRASTRUCTURE)
      with self._state:
        self._deadlines.pop(job, None)
        if job.abandoned:
          self._stuck -= 1
          return False
      if observation.code != Code.INFRASTRUCTURE:
        break
    seconds = time.monotonic() - started
    job.future.set_result(dataclasses.replace(observation, seconds=seconds))
    return True

  def _watch(self) -> None:
    while True:
      expired: list[_Job] = []
      doomed: list[_Job] = []
      with self._state:
        if self._closed and not self._deadlines:
          self._watching = False
          return
        now = time.monotonic()
        while self._deadlines:
          job, deadline = next(iter(self._deadlines.items()))
          if deadline > now:
            break
          del self._deadlines[job]
          job.abandoned = True
          self._stuck += 1
          expired.append(job)
          if not self._closed:
            self._start(self._work)
        if self._stuck > self._max_stuck:
          doomed, self._queue = list(self._queue), collections.deque()
        if not expired and not doomed:
          self._state.wait(deadline - now if self._deadlines else None)
      # Futures run their callbacks in place: never under the lock.
      for job in expired:
        text = f"error: timeout after {self._timeout_s:g} s"
        job.future.set_result(Observation(text, Code.TIMEOUT, seconds=self._timeout_s))
      for job in doomed:
        if job.future.set_running_or_notify_cancel():
          job.future.set_exception(self._overrun())


def _name(call: ToolCall) -> str:
  return f"{call.name} {json.dumps(dict(call.arguments), ensure_ascii=False, default=str)}"
