"""Specialists: simulated models in three price tiers that do a task's work, or a part of it.

Every question asks for a chain of facts, each of which needs a skill. A specialist gets a fact
right with its accuracy at that skill, else it goes on with a wrong one, so that long questions go
wrong more often. What it gets wrong is fixed by (seed, task, tier, fact): asked again, it says the
same.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any

from steptool_jax.types import Action, Task


@dataclasses.dataclass(frozen=True)
class Tier:
  """Usual price (US cents) and latency (seconds) of a question."""

  cents: float
  seconds: float


TIERS: Mapping[str, Tier] = {
  "small": Tier(0.3, 1.0),
  "medium": Tier(1.0, 2.0),
  "large": Tier(3.0, 3.0),
}


@dataclasses.dataclass(frozen=True)
class Knowledge:
  """What one specialist knows in one task. seed: tells seed, task and tier apart."""

  accuracy: Mapping[str, float]
  seed: str

  def of(self, skill: str, fact: str) -> tuple[bool, random.Random]:
    """(whether it is right there, what draws its mistake)."""
    rng = random.Random(f"{self.seed}/{fact}")
    return rng.random() < self.accuracy[skill], rng


@dataclasses.dataclass(frozen=True)
class Specialty:
  """Specialists of one environment.

  example: a question. accuracy: tier -> skill -> share right. question_of: the question that a task
  comes down to, or None. ask: (session, knowledge, question) -> the observation's value; raises
  NotFound where the question is not understood. rest: what a demonstration does with that value.
  """

  example: str
  accuracy: Mapping[str, Mapping[str, float]]
  question_of: Callable[[Task], str | None]
  ask: Callable[[Any, Knowledge, str], dict[str, Any]]
  rest: Callable[[Task, Mapping[str, Any]], tuple[Action, ...]]
