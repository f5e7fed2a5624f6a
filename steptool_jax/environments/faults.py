"""Injected faults: rate limits, time-outs, transient errors, not-found with a way out.

A faulted call is not executed. Every draw depends on (seed, task, sample, number of the call)
only, so that a run repeats exactly and a trajectory does not depend on its neighbours. A call that
its infrastructure failed does not count: whoever tries it again gets the same draw.
"""

import dataclasses
import random
import threading
from collections.abc import Sequence

from steptool_jax.environments.base import Environment, Session, Split
from steptool_jax.types import Code, Observation, Task, ToolCall


@dataclasses.dataclass(frozen=True)
class Faults:
  """Probabilities per call; their sum is at most 1. The sum 0 switches injection off."""

  seed: int = 0
  rate_limit: float = 0.0
  timeout: float = 0.0  # answers at once, without waiting
  transient: float = 0.0
  not_found: float = 0.0  # its text names a way out
  max_consecutive: int = 2  # then a call gets through, so that trying again always helps

  def __post_init__(self):
    for kind in ("rate_limit", "timeout", "transient", "not_found"):
      if not 0 <= getattr(self, kind) <= 1:
        raise ValueError(f"faults.{kind} is {getattr(self, kind)}: must be in [0, 1]")
    if self.total > 1 + 1e-9:
      raise ValueError(f"faults: the probabilities add up to {self.total:g}: at most 1")
    if self.max_consecutive < 1:
      raise ValueError(f"faults.max_consecutive is {self.max_consecutive}: must be at least 1")

  @property
  def total(self) -> float:
    return self.rate_limit + self.timeout + self.transient + self.not_found


class FaultInjector:
  """A session around a session."""

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
      faulted = draw < self._faults.total and self._consecutive < self._faults.max_consecutive
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

  def grade(self, answer: str | None) -> float:
    return self._session.grade(answer)

  def close(self) -> None:
    self._session.close()


class FaultyEnvironment:
  """An environment whose sessions inject faults; tasks and checkers stay as they are."""

  def __init__(self, environment: Environment, faults: Faults):
    self._environment, self._faults = environment, faults
    self.name = environment.name

  def tasks(self, split: Split) -> Sequence[Task]:
    return self._environment.tasks(split)

  def open(self, task: Task, sample: int) -> Session:
    session = self._environment.open(task, sample)
    if self._faults.total == 0:
      return session
    return FaultInjector(session, self._faults, task, sample)
