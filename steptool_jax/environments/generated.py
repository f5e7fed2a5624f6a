"""Environments whose tasks are generated: what nested_api and data_pipeline have in common.

A task is a composition (which operations, in which order) drawn in a world (names and values). Both
are functions of (seed, split, number) only; some compositions are left to held-out tasks.
"""

import abc
import dataclasses
import random
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from steptool_jax.environments.base import Split, check_split
from steptool_jax.simulators.functions import Tool, Toolbox
from steptool_jax.types import Action, Observation, Task, ToolCall, ToolSpec

_TASKS_PER_WORLD = 16


class Composition(Protocol):
  """What a task does, without names and values. depth: number of its gold calls."""

  @property
  def name(self) -> str: ...

  @property
  def depth(self) -> int: ...


C = TypeVar("C", bound=Composition)
W = TypeVar("W")


class Stale(Exception):
  """This draw makes no good task: an operation would change nothing or leave something open."""


@dataclasses.dataclass(frozen=True)
class Draw:
  """A task's own part. frame: the wording that the query was put into."""

  query: str
  frame: str
  calls: Sequence[ToolCall]
  last: Action
  checker: Mapping[str, Any]
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def checked_counts(num_train: int, num_heldout: int) -> dict[Split, int]:
  """Numbers of tasks by split; ValueError for negative ones."""
  if min(num_train, num_heldout) < 0:
    raise ValueError("num_train and num_heldout must not be negative")
  return {"train": num_train, "heldout": num_heldout}


def checked_depths(depths: tuple[int, int] | None, gold_calls: tuple[int, int]) -> range:
  """Those of `depths` (None = all) that tasks of `gold_calls` have; ValueError for none."""
  (low, high), (lowest, highest) = depths or gold_calls, gold_calls
  found = range(max(low, lowest), min(high, highest) + 1)
  if not found:
    raise ValueError(f"depths is {low} to {high}: tasks have {lowest} to {highest} gold calls")
  return found


class SerialSession:
  """Answers calls one after the other, by those of `tools` that the task offers."""

  def __init__(self, task: Task, tools: Iterable[Tool], max_chars: int):
    self._task = task
    self._lock = threading.Lock()
    offered = {spec.name for spec in task.tools}
    self._box = Toolbox([tool for tool in tools if tool.spec.name in offered], max_chars)

  def call(self, call: ToolCall) -> Observation:
    with self._lock:
      return self._box.call(call)


class Generated(abc.ABC, Generic[W, C]):
  """The environment. Tasks are generated once per split and are a function of the arguments only.

  num_train, num_heldout: numbers of tasks. depths: fewest and most gold calls of a task, within
  `gold_calls` (None = all of it). tools_per_task: how many tools a task offers (its own and random
  others; None = all). ValueError for numbers outside their range.
  """

  name: ClassVar[str]
  gold_calls: ClassVar[tuple[int, int]]  # fewest and most of any task
  specs: ClassVar[Mapping[str, ToolSpec]]  # every tool, by name
  compositions: ClassVar[Sequence[Composition]]
  heldout_compositions: ClassVar[frozenset[str]]  # names of those that no train task has

  def __init__(
    self,
    num_train: int = 5000,
    num_heldout: int = 400,
    seed: int = 0,
    depths: tuple[int, int] | None = None,
    tools_per_task: int | None = None,
    max_observation_chars: int = 512,
  ):
    self._counts = checked_counts(num_train, num_heldout)
    self._depths = checked_depths(depths, self.gold_calls)
    # The deepest task needs as many tools as it has calls.
    least, most = self._depths[-1], len(self.specs)
    if tools_per_task is not None and not least <= tools_per_task <= most:
      raise ValueError(
        f"config.environment.tools_per_task: {tools_per_task}, but tasks of up to {least} calls "
        f"take {least} to {most} tools; 0 = all"
      )
    self._tools_per_task = tools_per_task
    self._seed, self._max_chars = seed, max_observation_chars
    self._lock = threading.RLock()
    self._tasks: dict[str, tuple[Task, ...]] = {}
    self._worlds: dict[tuple[str, int], W] = {}

  @abc.abstractmethod
  def make_world(self, rng: random.Random, split: Split) -> W:
    """A world whose names and ids belong to the split."""

  @abc.abstractmethod
  def draw(self, rng: random.Random, split: Split, world: W, composition: C) -> Draw:
    """A task of this composition in this world; Stale where the draw makes no good one."""

  def tasks(self, split: Split) -> Sequence[Task]:
    check_split(split)
    with self._lock:
      if split not in self._tasks:
        self._tasks[split] = tuple(self._generate(split))
      return self._tasks[split]

  def world(self, split: Split, index: int) -> W:
    """The world that task.metadata's "split" and "world" name."""
    with self._lock:
      if (split, index) not in self._worlds:
        rng = random.Random(f"{self._seed}/{split}/{index}")
        self._worlds[split, index] = self.make_world(rng, split)
      return self._worlds[split, index]

  def _generate(self, split: Split) -> Iterator[Task]:
    rng = random.Random(f"{self._seed}/{split}/tasks")
    count = self._counts[split]
    worlds = max(8, count // _TASKS_PER_WORLD)
    by_depth: dict[int, list[C]] = {}
    for composition in self.compositions:
      allowed = split == "heldout" or composition.name not in self.heldout_compositions
      if allowed and composition.depth in self._depths:
        by_depth.setdefault(composition.depth, []).append(composition)
    depths = sorted(by_depth)
    seen: set[tuple[int, str]] = set()
    while len(seen) < count:
      composition = rng.choice(by_depth[rng.choice(depths)])
      index = rng.randrange(worlds)
      try:
        draw = self.draw(rng, split, self.world(split, index), composition)
      except Stale:
        continue
      tools = self._choose_tools(rng, draw.calls)
      if (index, draw.query) in seen:
        continue
      yield Task(
        id=f"{self.name}/{split}/{len(seen):05d}",
        environment=self.name,
        query=draw.query,
        tools=tools,
        checker=draw.checker,
        demonstration=(*draw.calls, draw.last),
        metadata={
          "split": split,
          "world": index,
          "composition": composition.name,
          "template": f"{composition.name} | {draw.frame}",
          "depth": composition.depth,
          **draw.metadata,
        },
      )
      seen.add((index, draw.query))

  def _choose_tools(self, rng: random.Random, calls: Sequence[ToolCall]) -> tuple[ToolSpec, ...]:
    """The tools of these calls and random others, in a fixed order."""
    if self._tools_per_task is None:
      return tuple(self.specs.values())
    chosen = dict.fromkeys(call.name for call in calls)
    others = [name for name in self.specs if name not in chosen]
    chosen |= dict.fromkeys(rng.sample(others, self._tools_per_task - len(chosen)))
    return tuple(spec for name, spec in self.specs.items() if name in chosen)
