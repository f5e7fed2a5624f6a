"""Slots of several sizes: which is where, has room, and belongs to which process. No jax."""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Room:
  """classes: (number of slots, tokens of each), ascending in tokens; slots are numbered through."""

  classes: Sequence[tuple[int, int]]

  @functools.cached_property
  def first(self) -> list[int]:
    """The number of each class's first slot."""
    return [0, *itertools.accumulate(slots for slots, _ in self.classes[:-1])]

  def place(self, slot: int) -> tuple[int, int]:
    """(class of a slot, its number there)."""
    number = bisect.bisect_right(self.first, slot) - 1
    return number, slot - self.first[number]

  def tokens(self, slot: int) -> int:
    """How many the slot holds."""
    return self.classes[self.place(slot)[0]][1]

  def outgrown(self, slot: int, tokens: int) -> bool:
    """Whether nothing can follow so many tokens here, and there are larger slots."""
    number, _ = self.place(slot)
    return number + 1 < len(self.classes) and tokens >= self.classes[number][1]

  def owner(self, slot: int, processes: int) -> int:
    """The process that runs the slot's tools: each has its share of every class."""
    number, at = self.place(slot)
    return at * processes // self.classes[number][0]

  def fitting(self, tokens: int) -> range:
    """The slots of the smallest class that holds so many."""
    sizes = [size for _, size in self.classes]
    number = min(bisect.bisect_left(sizes, tokens), len(sizes) - 1)
    first = self.first[number]
    return range(first, first + self.classes[number][0])
