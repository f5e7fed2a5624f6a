"""The contract of an environment: tasks with tools, private sessions, a checker made of rules.

Everything here is host side. A session belongs to one conversation and shares no state with any
other, so that the result of a rollout never depends on its neighbours.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from steptool_jax.types import Observation, Task, ToolCall

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


@runtime_checkable
class Session(Protocol):
  """One attempt at one task: a private copy of the world."""

  def call(self, call: ToolCall) -> Observation:
    """Answers one call; blocks; safe from any thread. A tool failure is an observation."""
    ...

  def grade(self, answer: str | None) -> float:
    """IsSolved in {0, .5, 1} for this final answer in the present state; None = no answer."""
    ...

  def close(self) -> None:
    """Frees the private state; harmless when repeated."""
    ...


@runtime_checkable
class Environment(Protocol):
  name: str

  def tasks(self, split: Split) -> Sequence[Task]:
    """The tasks of a split, always in the same order; ValueError for another split name."""
    ...

  def open(self, task: Task, sample: int) -> Session:
    """A fresh session; `sample` numbers the attempts at one task (for seeds of simulators)."""
    ...


def check_split(split: str) -> Split:
  if split not in SPLITS:
    raise ValueError(f"split {split!r} does not exist: use one of {', '.join(SPLITS)}")
  return split
