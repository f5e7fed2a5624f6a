"""Injected faults: rate limits, time-outs, transient errors, not-found with a way out.

A faulted call is not executed. Every draw depends on (seed, task, sample, number of the call)
only, so that a run repeats exactly and a trajectory does not depend on its neighbours. A call that
its infrastructure failed does not count: whoever tries it again gets the same draw.
"""

import random
import threading
from collections.abc import Sequence

from steptool_jax.config import Faults
from steptool_jax.environments.base import Environment, Session, Split
from steptool_jax.types import Code, Observation, Task, ToolCall


def total(faults: Faults) -> float:
  """Probability that a call gets any fault; 0 switches injection off."""
  return faults.rate_limit + faults.timeout + faults.transient + faults.not_found


class FaultInjector:
  """A session around a session. Draws count calls, so that those of a turn keep their order."""

  def __init__(self, session: Session, faults: Faults, task: Task, sample: int):
    self._session, self._faults = session, faults
    self._task, self._sample = task, sample
    self._lock = threading.Lock()
    self._calls = self._consecutive = 0

  def call(self, call: ToolCall) -> Observation:
    with self._lock:
      before = self._calls, self._consecutive
      index = self._calls
      self._calls += 1
      rng = random.Random(f"{self._faults.seed}/{self._task.id}/{self._sample}/{index}")
      draw = rng.random()
      faulted = draw < total(self._faults) and self._consecutive < self._faults.max_consecutive
      self._consecutive = self._consecutive + 1 if faulted else 0
    if not faulted:
      answered = False
      try:
        observation = self._session.call(call)
        answered = observation.code is not Code.INFRASTRUCTURE
        return observation
      finally:
        if not answered:
          self._forget(before)
    code, text = self._fault(draw, rng, call)
    return Observation(f"error: {text}", code, injected=True)

  def _forget(self, before: tuple[int, int]) -> None:
    with self._lock:
      if self._calls == before[0] + 1:  # an abandoned call may come back long after later ones
        self._calls, self._consecutive = before

  def _fault(self, draw: float, rng: random.Random, call: ToolCall) -> tuple[Code, str]:
    faults = self._faults
    if draw < faults.rate_limit:
      return Code.RATE_LIMIT, "rate limit, try again"
    if draw < faults.rate_limit + faults.timeout:
      return Code.TIMEOUT, "timeout, try again"
    if draw < faults.rate_limit + faults.timeout + faults.transient:
      return Code.UNAVAILABLE, "service unavailable, try again"
    finders = [spec.name for spec in self._task.tools if spec.name.startswith("find_")]
    if finders and rng.random() < 0.5:
      return Code.NOT_FOUND, f"not found, {rng.choice(finders)} gives ids, then try again"
    return Code.NOT_FOUND, "not found yet, try again"

  def reply(self, answer: str) -> Observation | None:
    return self._session.reply(answer)

  def grade(self, answer: str | None) -> float:
    return self._session.grade(answer)

  def close(self) -> None:
    self._session.close()


class FaultyEnvironment:
  """An environment whose sessions inject faults; tasks and checkers stay as they are."""

  def __init__(self, environment: Environment, faults: Faults):
    if total(faults) > 1 + 1e-9:
      raise ValueError(f"faults: the probabilities add up to {total(faults):g}: at most 1")
    self._environment, self._faults = environment, faults
    self.name = environment.name

  def tasks(self, split: Split) -> Sequence[Task]:
    return self._environment.tasks(split)

  def open(self, task: Task, sample: int) -> Session:
    session = self._environment.open(task, sample)
    if total(self._faults) == 0:
      return session
    return FaultInjector(session, self._faults, task, sample)
