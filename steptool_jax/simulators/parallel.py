"""Several calls of one turn: side by side where sessions allow it, and one Observation of them all.

Results must not depend on timing. So calls run side by side only in sessions that say so
(`side_by_side = True`: their tools share nothing that a call could change); in all others each
waits for the one before it, in the order of the turn.
"""

import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from steptool_jax.simulators.runner import Callee, ToolRunner
from steptool_jax.types import Code, Observation, ToolCall, ToolCalls


def combined(parts: Sequence[Observation]) -> Observation:
  """What a turn's calls came to: OK where all were; else INFRASTRUCTURE, or the first failure's.

  Costs add up; seconds and latency are those of the slowest, since calls are made side by side.
  """
  codes = [part.code for part in parts]
  failed = [code for code in codes if code is not Code.OK]
  code = Code.INFRASTRUCTURE if Code.INFRASTRUCTURE in failed else (failed or [Code.OK])[0]
  return Observation(
    text="\n".join(part.text for part in parts),
    code=code,
    value=[part.value for part in parts] if code is Code.OK else None,
    changed=any(part.changed for part in parts),
    injected=any(part.injected for part in parts),
    seconds=max(part.seconds for part in parts),
    cost=math.fsum(part.cost for part in parts),
    latency=max(part.latency for part in parts),
    parts=tuple(parts),
  )


def call(session: Callee, action: ToolCall | ToolCalls) -> Observation:
  """The answer to a turn's call or calls, one after the other, in this thread."""
  if isinstance(action, ToolCall):
    return session.call(action)
  return combined([session.call(one) for one in action.calls])


def submit(runner: ToolRunner, session: Callee, action: ToolCall | ToolCalls) -> Future:
  """Future[Observation] of a turn's call or calls, each with the runner's time-out and retries.

  Raises as ToolRunner.submit.
  """
  if isinstance(action, ToolCall):
    return runner.submit(session, action)
  turn = _Turn(runner, session, action.calls)
  turn.begin()
  return turn.whole


class _Turn:
  """The calls of a turn on their way. Callbacks run in the runner's threads."""

  def __init__(self, runner: ToolRunner, session: Callee, calls: Sequence[ToolCall]):
    self._runner, self._session, self._calls = runner, session, calls
    self._answers: list[Future | None] = [None] * len(calls)
    self._at_once = getattr(session, "side_by_side", False)
    self._lock = threading.Lock()
    self.whole: Future = Future()

  def begin(self) -> None:
    for k in range(len(self._calls) if self._at_once else 1):
      self._submit(k)

  def _submit(self, k: int) -> None:
    self._answers[k] = self._runner.submit(self._session, self._calls[k])
    self._answers[k].add_done_callback(lambda done: self._answered(k, done))

  def _answered(self, k: int, answer: Future) -> None:
    try:
      answer.result()
      if not self._at_once and k + 1 < len(self._calls):
        self._submit(k + 1)
      if all(a is not None and a.done() for a in self._answers):
        self._settle(combined([a.result() for a in self._answers]))
    except Exception as error:
      self._settle(error)

  def _settle(self, found: Observation | Exception) -> None:
    with self._lock:  # the last two may come at the same time
      if self.whole.done():
        return
      if isinstance(found, Exception):
        self.whole.set_exception(found)
      else:
        self.whole.set_result(found)
