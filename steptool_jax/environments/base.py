"""The contract of an environment: tasks with tools, private sessions, a checker made of rules.

Everything here is host side. A session belongs to one conversation and shares no state with any
other, so that the result of a rollout never depends on its neighbours.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

from steptool_jax.types import Observation, Task, ToolCall, ToolSpec

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


def offer_tools(
  rng: random.Random, specs: Mapping[str, ToolSpec], calls: Sequence[ToolCall], count: int | None
) -> tuple[ToolSpec, ...]:
  """The tools of these calls and random others, `count` in all (None = all), in a fixed order."""
  if count is None:
    return tuple(specs.values())
  chosen = dict.fromkeys(call.name for call in calls)
  others = [name for name in specs if name not in chosen]
  chosen |= dict.fromkeys(rng.sample(others, count - len(chosen)))
  return tuple(spec for name, spec in specs.items() if name in chosen)


def check_depths(depths: tuple[int, int], lowest: int, highest: int) -> range:
  """The numbers of gold calls asked for that exist; ValueError when there are none."""
  low, high = depths
  inside = range(max(low, lowest), min(high, highest) + 1)
  if not inside:
    raise ValueError(f"depths is {low} to {high}: tasks have {lowest} to {highest} gold calls")
  return inside


def check_tools_per_task(count: int | None, lowest: int, highest: int) -> int | None:
  if count is not None and not lowest <= count <= highest:
    raise ValueError(f"tools_per_task is {count}: must be {lowest} to {highest}, or None for all")
  return count
