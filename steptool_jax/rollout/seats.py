"""Who sits in which slot of an engine."""

import dataclasses
import itertools
import time
from concurrent.futures import Future

import numpy as np

from steptool_jax.environments.base import Session
from steptool_jax.policy.room import Room
from steptool_jax.rollout.conversation import Conversation, State


@dataclasses.dataclass
class Seat:
  """A conversation in its slot. tree.py seats a whole search, with the same methods.

  Its session is opened while the prompt is computed and its first turn sampled. opening, calling,
  grading: what this process waits for; all None in the processes that do not own the slot.
  """

  conversation: Conversation
  index: int  # of its job
  session: Session | None = None  # None until it is open
  seed: np.ndarray | None = None
  opening: Future | None = None
  calling: Future | None = None
  grading: Future | None = None
  unopened: str = ""  # why the session cannot be opened
  crowded: float | None = None  # since when it has waited for a larger slot

  @property
  def pending(self) -> list[Future]:
    return [f for f in (self.opening, self.calling, self.grading) if f is not None]


class Seats(dict[int, Seat]):
  """Seats by slot. processes: those that share the slots."""

  def __init__(self, room: Room, processes: int):
    super().__init__()
    self.room, self.processes = room, processes
    self._dealt: dict[range, list[int]] = {}  # the slots of a class, in the order of their use

  def owner(self, slot: int) -> int:
    """The process that runs the slot's tools."""
    return self.room.owner(slot, self.processes)

  def free(self, tokens: int, owner: int | None = None) -> int | None:
    """A free slot of the smallest class that holds so many; of this process's, if given.

    Slots are dealt to the processes in turn, so that few conversations use the tools of all.
    """
    fitting = self.room.fitting(tokens)
    if fitting not in self._dealt:
      groups = [list(group) for _, group in itertools.groupby(fitting, self.owner)]
      turns = itertools.chain.from_iterable(itertools.zip_longest(*groups))
      self._dealt[fitting] = [slot for slot in turns if slot is not None]
    for slot in self._dealt[fitting]:
      if slot not in self and owner in (None, self.owner(slot)):
        return slot
    return None

  def in_state(self, state: State) -> dict[int, Seat]:
    """Those in this state that have room in their slots."""
    return {
      slot: seat
      for slot, seat in self.items()
      if seat.conversation.state is state and not self._crowded(slot)
    }

  def grow(self) -> tuple[dict[int, int], float]:
    """Moves conversations that have outgrown their slots into free larger ones; others wait.

    (the slot that each new one is a copy of, seconds that these conversations have waited)
    """
    copies: dict[int, int] = {}
    waited = 0.0
    for slot in [slot for slot in self if self._crowded(slot)]:
      seat, now = self[slot], time.monotonic()
      seat.crowded = seat.crowded or now
      larger = self.free(seat.conversation.length + 1, self.owner(slot))
      if larger is not None:
        self[larger] = self.pop(slot)
        copies[larger] = slot
        waited += now - seat.crowded
        seat.crowded = None
    return copies, waited

  def _crowded(self, slot: int) -> bool:
    """Whether the conversation has outgrown its slot."""
    conversation = self[slot].conversation
    going_on = conversation.state in (State.NEEDS_APPEND, State.DECODING)
    return going_on and self.room.outgrown(slot, conversation.length)
