"""Slots of several sizes: few that hold the longest conversation, and many that hold most.

Memory goes by what conversations use and not by the longest that one of them may be. Each class is
an engine of its own; a conversation that outgrows its slot is copied into a larger one.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from steptool_jax.policy import kv_slots, sharding
from steptool_jax.policy.engine import Engine
from steptool_jax.policy.kv_slots import Decoded, EngineState
from steptool_jax.policy.room import Room

States = tuple[EngineState, ...]  # one a class


@dataclasses.dataclass(frozen=True)
class LengthClasses:
  """Engines as one, with Engine's methods; slots are numbered through, the smallest first.

  engines: ascending in size, of one model and one mesh. move_program: (state of one class, state of
  a larger one, source int32 of each of its slots) -> the latter, see kv_slots.move.
  """

  engines: tuple[Engine, ...]
  move_program: Callable

  @property
  def classes(self) -> tuple[tuple[int, int], ...]:
    """(number of slots, positions of each), ascending."""
    return tuple((engine.slots, engine.size) for engine in self.engines)

  @functools.cached_property
  def room(self) -> Room:
    return Room(self.classes)

  @property
  def slots(self) -> int:
    return sum(engine.slots for engine in self.engines)

  @property
  def size(self) -> int:
    """Positions of the largest slots."""
    return self.engines[-1].size

  def init(self) -> States:
    """Empty slots."""
    return tuple(engine.init() for engine in self.engines)

  def lay_out(self, variables: dict) -> dict:
    """As Engine's: once for all."""
    return self.engines[0].lay_out(variables)

  def append(self, variables: dict, state: States, pieces: dict[int, np.ndarray]) -> States:
    return self._each(
      state, pieces, lambda n, own, part: self.engines[n].append(variables, own, part)
    )

  def rewind(self, state: States, lengths: dict[int, int]) -> States:
    return self._each(state, lengths, lambda n, own, part: self.engines[n].rewind(own, part))

  def fork(self, state: States, sources: dict[int, int]) -> States:
    """As Engine's; a source in another class is in a smaller one."""
    states, inside = list(state), {}
    beyond: dict[tuple[int, int], dict[int, int]] = {}
    for slot, source in sources.items():
      (origin, origin_at), (to, at) = self.room.place(source), self.room.place(slot)
      if origin == to:
        inside[slot] = origin_at
      else:
        beyond.setdefault((origin, to), {})[at] = origin_at
    for origin, to in sorted(beyond, key=lambda pair: -pair[1]):  # read before it is written
      moved = beyond[origin, to]
      source_N = np.full(self.engines[to].slots, -1, np.int32)
      source_N[list(moved)] = list(moved.values())
      with self.engines[to].here():
        states[to] = self.move_program(states[origin], states[to], source_N)
    return self._each(tuple(states), inside, lambda n, own, part: self.engines[n].fork(own, part))

  def decode(
    self,
    variables: dict,
    state: States,
    limits: dict[int, int],
    seeds: Mapping[int, np.ndarray],
    stop_ids: Sequence[int],
    temperature: float,
  ) -> tuple[States, Decoded]:
    """As Engine's, class by class: each ends its call by itself (`leave`)."""
    found: dict[int, Decoded] = {}  # by the number of the class's first slot

    def one(n: int, own: EngineState, named: dict[int, int]) -> EngineState:
      first = self.room.first[n]
      keys = {slot: seeds[first + slot] for slot in named}
      own, found[first] = self.engines[n].decode(variables, own, named, keys, stop_ids, temperature)
      return own

    state = self._each(state, limits, one)

    def together(*parts: np.ndarray) -> np.ndarray:
      whole = np.zeros((self.slots, *parts[0].shape[1:]), parts[0].dtype)
      for first, part in zip(found, parts, strict=True):
        whole[first : first + len(part)] = part
      return whole

    return state, jax.tree.map(together, *found.values())

  def _each(self, state: States, named: Mapping[int, Any], one: Callable) -> States:
    """`one` (class, its state, its part of `named`) where slots of the class are named."""
    parts: list[dict[int, Any]] = [{} for _ in self.engines]
    for slot, value in named.items():
      number, at = self.room.place(slot)
      parts[number][at] = value
    pairs = enumerate(zip(state, parts, strict=True))
    return tuple(one(n, own, part) if part else own for n, (own, part) in pairs)


def of_sizes(make: Callable[[int, int], Engine], sizes: Sequence[tuple[int, int]]) -> LengthClasses:
  """Classes of (slots, positions), ascending, by `make`."""
  engines = tuple(make(*size) for size in sizes)
  last = engines[-1]
  where = None
  if last.mesh is not None:
    sized = last.slots, last.size
    where = kv_slots.state_shardings(last.config, *sized, last.mesh, last.kv_cache)
  move = sharding.jit(kv_slots.move, donate_argnums=1, out_shardings=where)
  return LengthClasses(engines, move)
