"""Turns of any number of clients over one engine's slots, by continuous batching.

One thread owns the engine and calls `step` for ever; others `submit` turns and wait for their
futures. A turn says all ids that stand before it, and a slot that holds a beginning of them keeps
it: so a conversation that goes on appends only what is new, samples of one prompt share its
prefill, and nobody has to say which slot is whose.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from steptool_jax.rollout.conversation import NonFiniteLogprobs
from steptool_jax.rollout.setting import Stats

# A beginning of fewer ids is computed again: a fork copies every slot's cache, and a prompt that is
# computed in one piece has the same log-probs to the last bit, wherever it is computed.
_WORTH_KEEPING = 32
# Where all conversations are away, at their tools, all are quick or one is slow: a moment's
# patience fills the batch. It costs at most this share of what the last round took, or _MOMENT_S.
_PATIENCE, _MOMENT_S, _LONGEST_S = 0.25, 0.02, 0.5
# While others go on sampling, those whose turns have just ended are waited for so long, as a share
# of the round and at most: one that comes a moment too late has to wait for a whole round.
_QUICK_SHARE, _QUICK_S = 0.1, 0.05


@dataclasses.dataclass(eq=False)
class Turn:
  """One turn that is asked for, and what was sampled of it. Its future is done with itself.

  A future that is cancelled (its client went away) frees the slot at the next step.
  """

  ids: np.ndarray  # int32[P], at least one; all that stands before the turn
  limit: int  # tokens at most, so that the whole fits a slot
  seed: np.ndarray  # uint32[2]
  temperature: float
  owner: object = None  # whose it is, for `forget`
  # How many of the tokens so far to keep where they end the turn (a stop text), else 0.
  cut: Callable[[list[int]], int] = lambda tokens: 0
  heard: Callable[[list[int]], None] = lambda tokens: None  # in the engine's thread
  future: Future = dataclasses.field(default_factory=Future)
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  stopped: bool = False  # the last token is a stop token
  cached: int = 0  # of `ids`, those that a slot held already


class Decoder:
  """The scheduler. variables: of the policy. stop_ids: of its chat format."""

  def __init__(self, engine: Any, variables: Any, stop_ids: Sequence[int]):
    self._engine, self._variables, self._stop_ids = engine, variables, tuple(stop_ids)
    self.stats = Stats()
    self.broken: Exception | None = None  # why nothing can be sampled any more
    self._changed = threading.Condition()
    self._arrived: list[Turn] = []
    self._forgotten: set[object] = set()
    self._news = False
    # Of the engine's thread alone:
    self._state = engine.init()
    self._waiting: list[Turn] = []
    self._active: dict[int, Turn] = {}
    nothing = np.zeros(0, np.int32)
    self._held = [nothing] * engine.slots  # ids that each slot begins with
    self._length = [0] * engine.slots  # of the engine's slots, at least that of _held
    self._used = [0.0] * engine.slots  # when; 0 = of nobody
    self._owner: list[object] = [None] * engine.slots
    self._expected: set[object] = set()  # who is away and comes back soon
    self._quick: set[object] = set()  # of these, whose turn ended in the last round, until then:
    self._quick_until = 0.0
    self._round_s = 0.0
    self._first_arrival: float | None = None  # of the batch that is being filled

  @property
  def size(self) -> int:
    """Positions of a slot."""
    return self._engine.size

  def submit(self, turn: Turn) -> None:
    """From any thread."""
    with self._changed:
      self._arrived.append(turn)
      self._changed.notify()

  def forget(self, owner: object) -> None:
    """From any thread: cancels the owner's turns and gives its slots away first."""
    with self._changed:
      self._forgotten.add(owner)
      self._changed.notify()

  def wake(self) -> None:
    """From any thread: a step that waits for turns returns."""
    with self._changed:
      self._news = True
      self._changed.notify()

  def expect(self, owner: object) -> None:
    """From the engine's thread: its first turn comes soon."""
    self._expected.add(owner)
    self._quick.add(owner)

  @property
  def busy(self) -> int:
    """Turns that have a slot."""
    return len(self._active)

  def step(self, wait_s: float) -> None:
    """Takes what has arrived, appends it and decodes once; waits so long where there is nothing."""
    if not self._take(wait_s) or not (self._active or self._waiting):
      return
    started = time.monotonic()
    self._seat()
    self._decode()
    ended = time.monotonic()
    self._round_s = ended - started
    self._quick_until = ended + min(_QUICK_SHARE * self._round_s, _QUICK_S)

  def close(self) -> None:
    """Cancels what is left."""
    with self._changed:
      left = [*self._arrived, *self._waiting, *self._active.values()]
      self._arrived = []
    for turn in left:
      turn.future.cancel()

  # --- arrivals ------------------------------------------------------------------------------

  def _filled(self) -> bool:
    """Waits until as many turns are here as were hoped for, but no longer than patience lasts."""
    patience = min(max(_MOMENT_S, _PATIENCE * self._round_s), _LONGEST_S)
    if self._arrived:
      if self._first_arrival is None:
        self._first_arrival = time.monotonic()
      if not self._here(self._expected, self._first_arrival + patience):
        return False
    self._first_arrival = None
    return True

  def _here(self, hoped: set[object], until: float) -> bool:
    """Waits for as many turns as are hoped for, or until then, when nobody is hoped for any more;
    False where there are news before."""
    while len(self._arrived) < min(len(hoped), self._engine.slots):
      left = until - time.monotonic()
      if left <= 0:
        hoped.clear()
        break
      if self._news or self._forgotten:
        return False
      self._changed.wait(left)
    return True

  def _take(self, wait_s: float) -> bool:
    """What has arrived; False where the owner has news to look at before the batch is full."""
    started = time.monotonic()
    full = True
    with self._changed:
      if not self._active and not self._waiting:
        if not self._arrived and not self._news and not self._forgotten:
          self._changed.wait(wait_s)
        full = self._filled()
      else:
        full = self._here(self._quick, self._quick_until)
      arrived, self._arrived = (self._arrived, []) if full else ([], self._arrived)
      forgotten, self._forgotten = self._forgotten, set()
      self._news, still_waiting = False, list(self._arrived)
    self.stats.tool_wait_seconds += time.monotonic() - started
    self._waiting += arrived
    self._quick -= {turn.owner for turn in arrived}
    self._expected -= forgotten
    self._quick -= forgotten
    for slot, owner in enumerate(self._owner):
      if owner is not None and owner in forgotten:
        self._owner[slot], self._used[slot] = None, 0.0
    for turn in [*self._waiting, *self._active.values(), *still_waiting]:
      if turn.owner is not None and turn.owner in forgotten:
        turn.future.cancel()
    self._waiting = [turn for turn in self._waiting if not turn.future.cancelled()]
    for slot, turn in list(self._active.items()):
      if turn.future.cancelled():
        self._free(slot, turn)
        self._used[slot] = 0.0
    return full

  # --- slots ---------------------------------------------------------------------------------

  def _seat(self) -> None:
    """Waiting turns into free slots, first come first served, and what they lack into the cache."""
    rewinds: dict[int, int] = {}
    pieces: dict[int, np.ndarray] = {}
    forks: dict[int, int] = {}
    while self._waiting and len(self._active) < self._engine.slots:
      turn = self._waiting.pop(0)
      common = [_common(held, turn.ids) for held in self._held]
      free = [s for s in range(self._engine.slots) if s not in self._active]
      going_on = [s for s in free if 0 < common[s] == len(self._held[s])]
      if going_on:
        slot = max(going_on, key=common.__getitem__)
      else:
        # What is copied in this round stays as it is.
        free = [slot for slot in free if slot not in forks.values()]
        if not free:
          self._waiting.insert(0, turn)
          break
        slot = min(free, key=lambda s: (self._used[s], -common[s]))
        # A slot that will be a copy itself is no source yet.
        source = max((s for s in range(len(common)) if s not in forks), key=common.__getitem__)
        if common[source] < _WORTH_KEEPING:
          common[slot] = 0
        elif common[source] > common[slot]:
          forks[slot] = source
          common[slot] = common[source]
          self.stats.shared_prefills += 1
        self.stats.shared_tokens += common[slot]
      turn.cached = common[slot]
      if slot not in forks:
        if turn.cached < self._length[slot]:
          rewinds[slot] = turn.cached
        if turn.cached < len(turn.ids):
          pieces[slot] = turn.ids[turn.cached :]
      self._expected -= {turn.owner, ("slot", slot)}
      self._quick.discard(("slot", slot))
      self._active[slot], self._held[slot], self._owner[slot] = turn, turn.ids, turn.owner
      self._length[slot] = len(turn.ids)
    if rewinds:
      with self.stats.device():
        self._state = self._engine.rewind(self._state, rewinds)
    self._append(pieces)
    if forks:
      with self.stats.device():
        self._state = self._engine.fork(self._state, forks)
        cached = {slot: self._active[slot].cached for slot in forks}
        self._state = self._engine.rewind(self._state, cached)
      late = {slot: self._active[slot].ids[count:] for slot, count in cached.items()}
      self._append({slot: ids for slot, ids in late.items() if len(ids)})

  def _append(self, pieces: dict[int, np.ndarray]) -> None:
    if pieces:
      self.stats.forced_tokens += sum(map(len, pieces.values()))
      with self.stats.device():
        self._state = self._engine.append(self._variables, self._state, pieces)

  def _free(self, slot: int, turn: Turn) -> None:
    del self._active[slot]
    sampled = np.asarray(turn.tokens, np.int32)
    self._held[slot] = np.concatenate([turn.ids, sampled])
    self._used[slot] = time.monotonic()

  # --- sampling ------------------------------------------------------------------------------

  def _decode(self) -> None:
    """One call for each temperature that is asked for: the engine takes one at a time."""
    for temperature in dict.fromkeys(turn.temperature for turn in self._active.values()):
      group = {s: turn for s, turn in self._active.items() if turn.temperature == temperature}
      with self.stats.device():
        self._state, decoded = self._engine.decode(
          self._variables,
          self._state,
          {slot: turn.limit - len(turn.tokens) for slot, turn in group.items()},
          {slot: turn.seed for slot, turn in group.items()},
          self._stop_ids,
          temperature,
        )
      for slot, turn in group.items():
        count = int(decoded.count[slot])
        tokens, logprobs = decoded.tokens[slot, :count], decoded.logprobs[slot, :count]
        self._hear(slot, turn, tokens, logprobs, bool(decoded.stopped[slot]))

  def _hear(
    self, slot: int, turn: Turn, tokens: np.ndarray, logprobs: np.ndarray, stopped: bool
  ) -> None:
    self.stats.sampled_tokens += len(tokens)
    self._length[slot] += len(tokens)
    if not np.isfinite(logprobs).all():
      self.broken = NonFiniteLogprobs(
        "the sampler's log-probs are not finite, the policy is broken"
      )
      self._free(slot, turn)
      _settle(turn, self.broken)
      return
    turn.tokens += tokens.tolist()
    turn.logprobs += logprobs.tolist()
    keep = turn.cut(turn.tokens)
    if keep and keep < len(turn.tokens) - stopped:
      del turn.tokens[keep:], turn.logprobs[keep:]
      stopped = False
    turn.stopped = stopped
    turn.heard(turn.tokens)
    if keep or stopped or len(turn.tokens) >= turn.limit:
      self._free(slot, turn)
      self.expect(("slot", slot) if turn.owner is None else turn.owner)
      _settle(turn, None)


def _settle(turn: Turn, error: Exception | None) -> None:
  if not turn.future.set_running_or_notify_cancel():
    return
  if error is None:
    turn.future.set_result(turn)
  else:
    turn.future.set_exception(error)


def _common(held: np.ndarray, ids: np.ndarray) -> int:
  """Ids that both begin with."""
  count = min(len(held), len(ids))
  differ = np.flatnonzero(held[:count] != ids[:count])
  return int(differ[0]) if len(differ) else count
