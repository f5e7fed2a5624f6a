"""Chain rollouts: many conversations at once over the engine's slots.

Continuous batching: a slot that is freed takes the next conversation; tools run, sessions open and
answers are graded in threads while other slots decode; samples of one task share the prompt's
prefill by fork. Where slots differ in size (length_classes), a conversation begins in the smallest
that holds its prompt, and waits for a larger one when it has filled its own. A conversation depends
on its (seed, version, task, sample) alone, never on its neighbours or on timing; but for the last
bits of log-probs, see Engine.decode.

On several processes (peers.py) all hold the same conversations and make the same engine calls; the
sessions of a slot live in one of them, which tells the others its observations and grades.
"""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import numpy as np
from absl import logging

from steptool_jax.data.trajectories import observation_document, observation_of
from steptool_jax.environments.base import Session
from steptool_jax.policy.room import Room
from steptool_jax.rollout.conversation import Conversation, State
from steptool_jax.rollout.peers import together
from steptool_jax.rollout.replaying import unopened
from steptool_jax.rollout.seats import Seat, Seats
from steptool_jax.rollout.setting import Setting, Stats, step_seed
from steptool_jax.simulators import parallel
from steptool_jax.simulators.runner import TooManyStuck
from steptool_jax.types import Code, Finish, Observation, Status, Task, Trajectory

# So often several processes look at each other's tools while nothing can be decoded, and a single
# one whether it is asked to stop; seconds.
PATIENCE_S, PATIENCE_ALONE_S = 0.05, 1.0
# What slots have just asked for is waited for so long while others are to be decoded: at most, and
# as a share of a decode call, which is what they lose where the answer comes a moment too late.
QUICK_S, QUICK_SHARE = 0.005, 0.1


class Interrupted(Exception):
  """`should_stop` asked for an end; no trajectory of this rollout was handed out."""


def rollout(
  setting: Setting,
  jobs: Sequence[tuple[Task, int]],
  should_stop: Callable[[], bool] = lambda: False,
  on_done: Callable[[Trajectory], None] = lambda trajectory: None,
  idle: Callable[[], Any] = lambda: None,
) -> tuple[list[Trajectory], Stats]:
  """Trajectories of all (task, sample) jobs, in their order, graded but not yet rewarded.

  should_stop is asked between device calls, and while nothing but tools is waited for its `glance`,
  if it has one; on_done is called with each finished trajectory. idle is called while nothing can
  be decoded, at the same points in all processes; what it returns, if anything, are the variables
  to go on with: the same numbers in other buffers.

  Raises:
    Interrupted: should_stop answered True, in any process.
    TooManyStuck: tools hang beyond what the runner may leave behind.
  """
  loop = Loop(setting)
  return loop.run(jobs, should_stop, on_done, idle), loop.stats


def _why(what: str, error: Exception) -> str:
  return f"{what} ({type(error).__name__}: {str(error)[:300]})"


def judged(trajectory: Trajectory, verdict: dict[str, Any]) -> Trajectory:
  """The trajectory with its verdict."""
  return dataclasses.replace(trajectory, solved=verdict["solved"], status=Status(verdict["status"]))


class Loop:
  """The scheduler's state; lives for one rollout. Searches over trees (tree.py) extend it."""

  stats_class = Stats

  def __init__(self, setting: Setting):
    self.setting = setting
    self.engine, self.environment, self.runner = setting.engine, setting.environment, setting.runner
    self.sampling, self.peers = setting.sampling, setting.peers
    self.variables = setting.variables
    self.seats = Seats(Room(self.engine.classes), setting.peers.count)
    self.trouble: Exception | None = None  # of this process, until all hear of it
    self.failures: dict[int, str] = {}  # why conversations are marked, by job
    self.glance: Callable[[], bool] = lambda: False
    self.asked: list[Future] = []  # calls and verdicts, since the last exchange
    self.decode_seconds = 0.0  # of the last decode call
    self.state = self.engine.init()
    self.stats = self.stats_class()

  def run(self, jobs, should_stop, on_done, idle=lambda: None) -> list[Trajectory]:
    """All jobs' trajectories, in their order; closes what is open."""
    started = time.monotonic()
    self.glance = getattr(should_stop, "glance", should_stop)
    waiting = deque(enumerate(jobs))
    results: dict[int, Trajectory] = {}
    try:
      while waiting or self.seats:
        if self.seats and not self._decodable():
          self.variables = idle() or self.variables
        for slot, verdict in sorted(self._exchange(should_stop).items()):
          seat = self.seats[slot]
          results[seat.index] = self._release(slot, verdict)
          if verdict["why"]:
            self.failures[seat.index] = verdict["why"]
          on_done(results[seat.index])
        results |= self._leaving()
        self._grow()
        fresh = self._fill(waiting)
        if fresh:
          self._start(fresh)
        self._append()
        self._decode()
    finally:
      for seat in self.seats.values():
        self._close(seat)
    self.stats.seconds = time.monotonic() - started
    self.stats.failures = [why for _, why in sorted(self.failures.items())]
    if self.stats.failures:
      logging.warning(
        "%d of %d conversations are marked as infrastructure errors, the first: %s",
        len(self.stats.failures),
        len(jobs),
        self.stats.failures[0],
      )
    return [results[index] for index in range(len(jobs))]

  def _fill(self, waiting: deque) -> list[int]:
    """Jobs into free slots, whose sessions begin to open."""
    fresh: list[int] = []
    while waiting and len(self.seats) < self.engine.slots:
      index, (task, sample) = waiting[0]
      seat = Seat(self._conversation(task, sample), index)
      slot = self._place(seat.conversation)
      if slot is None:  # those that fit its prompt are taken
        break
      waiting.popleft()
      self.seats[slot] = seat
      if self._mine(slot):
        self._defer_error(functools.partial(self._open, seat))
      fresh.append(slot)
    return fresh

  def _place(self, conversation: Conversation) -> int | None:
    """A free slot for it."""
    return self.seats.free(conversation.length + 1)

  def _grow(self) -> None:
    """Conversations that have outgrown their slots move to larger ones, where some are free."""
    copies, waited = self.seats.grow()
    if copies:
      with self.stats.device():
        self.state = self.engine.fork(self.state, copies)
    self.stats.outgrown += len(copies)
    self.stats.crowded_seconds += waited

  def _leaving(self) -> dict[int, Any]:
    """Conversations that leave their slots before they are done, by job (carrying.py)."""
    return {}

  def _mine(self, slot: int) -> bool:
    """Whether this process runs the slot's tools."""
    return self.seats.owner(slot) == self.peers.index

  def _defer_error(self, work: Callable[[], Any]) -> Any:
    """What `work` of this process returns; with others, an error waits for the next exchange."""
    try:
      return work()
    except Exception as error:
      if self.peers.count == 1:
        raise
      self.trouble = self.trouble or error
      return None

  def _exchange(self, should_stop: Callable[[], bool]) -> dict[int, dict[str, Any]]:
    """Observes what tools have answered; the verdicts on conversations that are done, by slot.

    Interrupted where one process is asked to stop; its error where one has one.
    """
    busy = self._decodable()

    def news() -> dict[str, Any]:
      if self.trouble is not None:
        raise self.trouble
      if should_stop():
        return {"stop": True}
      self._await(busy)
      observed: dict[str, Any] = {}
      verdicts: dict[str, Any] = {}
      for slot, seat in self.seats.items():
        if self._mine(slot):
          self._collect(slot, seat, observed, verdicts)
      return {"stop": False, "observed": observed, "verdicts": verdicts}

    found = together(self.peers, news)
    if any(theirs["stop"] for theirs in found):
      raise Interrupted
    verdicts: dict[int, dict[str, Any]] = {}
    for index, theirs in enumerate(found):
      if index != self.peers.index:
        for slot, document in theirs["observed"].items():
          self._observe(self.seats[int(slot)], observation_of(document))
      verdicts |= {int(slot): verdict for slot, verdict in theirs["verdicts"].items()}
    return verdicts

  def _decodable(self) -> bool:
    """Whether a slot goes on without anybody's answer."""
    return bool(self.seats.in_state(State.DECODING))

  def _await(self, busy: bool) -> None:
    """A moment's patience for quick tools and checkers; without anything to decode, for one."""
    asked, self.asked = self.asked, []
    futures = asked if busy else [f for seat in self.seats.values() for f in seat.pending]
    if not futures:
      return
    started = time.monotonic()
    if busy:
      wait(futures, timeout=min(QUICK_S, QUICK_SHARE * self.decode_seconds))
    else:
      # Where all are calling, all are quick or one is slow; waiting for them fills the batch.
      done, pending = wait(futures, timeout=0.02)
      if not done:
        alone = self.peers.count == 1
        patience = PATIENCE_ALONE_S if alone else PATIENCE_S
        while not wait(pending, patience, FIRST_COMPLETED).done and alone and not self.glance():
          pass
    self.stats.tool_wait_seconds += time.monotonic() - started

  def _collect(
    self, slot: int, seat: Seat, observed: dict[str, Any], verdicts: dict[str, Any]
  ) -> None:
    """Takes what has become ready for a slot of this process, by slot for the others."""
    if seat.opening is not None and seat.opening.done():
      self._opened(seat)
    if seat.calling is not None and seat.calling.done():
      observation, seat.calling = _answer(seat), None
      if self.peers.count > 1:
        observed[str(slot)] = observation_document(observation)
      self._observe(seat, observation)
    self._ask(seat)
    if seat.unopened:
      verdicts[str(slot)] = {"opened": False, "why": seat.unopened}
    elif seat.grading is not None and seat.grading.done():
      verdicts[str(slot)] = self._graded(seat)

  def _ask(self, seat: Seat) -> None:
    """Begins what an open session of this process is wanted for: a call, or the verdict."""
    if seat.session is None:
      return
    if seat.conversation.state is State.CALLING and seat.calling is None:
      seat.calling = self._submit(seat)
      self.asked.append(seat.calling)
    elif seat.conversation.state is State.DONE and seat.grading is None:
      seat.grading = self._grade(seat)
      self.asked.append(seat.grading)

  def _conversation(self, task: Task, sample: int) -> Conversation:
    setting = self.setting
    return Conversation(task, sample, setting.chat_format, setting.limits, setting.system)

  def _open(self, seat: Seat) -> None:
    """Begins to open the seat's session, if need be at a later attempt."""
    task, sample = seat.conversation.task, seat.conversation.sample
    opening = functools.partial(self._session, task, sample)
    opened = functools.partial(self.runner.persist, opening)
    what = f"opening a session of task {task.id}"
    times = 1 + self._repeated(task, sample)
    seat.opening = self._begin(what, opened, lambda late: late.close(), times)

  def _session(self, task: Task, sample: int) -> Session:
    return self.environment.open(task, sample)

  def _repeated(self, task: Task, sample: int) -> int:
    """Recorded steps whose calls are repeated where the session is opened."""
    return 0

  def _opened(self, seat: Seat) -> None:
    opening, seat.opening = seat.opening, None
    try:
      seat.session = opening.result()
    except TooManyStuck:
      raise
    except Exception as error:
      task = seat.conversation.task
      seat.unopened = _why(f"task {task.id}: no session can be opened", error)

  def _close(self, seat: Seat) -> None:
    """Closes the session of a seat, also one that is still being opened."""
    if seat.session is not None:
      seat.session.close()
    elif seat.opening is not None and not seat.opening.cancel():
      seat.opening.add_done_callback(lambda f: f.exception() or f.result().close())

  def _unopened(self, task: Task, sample: int) -> Trajectory:
    """What a conversation leaves whose session never opened."""
    return unopened(task, sample, self.sampling.weights)

  def _begin(
    self,
    what: str,
    function: Callable,
    late: Callable | None = None,
    times: int = 1,
    limit_s: float | None = None,
  ) -> Future:
    """The environment's work that a slot waits for, as ToolRunner.begin."""
    name = f"environment {self.environment.name!r}: {what}"
    return self.runner.begin(function, name, late, times, limit_s)

  def _grade(self, seat: Seat) -> Future:
    """IsSolved of a finished conversation, by the owner of its slot."""
    answer = seat.conversation.answer
    return self._verdict(seat.conversation.status, seat, lambda: seat.session.grade(answer))

  def _verdict(
    self, status: Status, seat: Seat, grade: Callable[[], float], times: int = 1
  ) -> Future:
    """Begins to grade, within so many time-outs; what infrastructure ended is not graded."""
    if status is Status.INFRASTRUCTURE_ERROR:
      future: Future[float] = Future()
      future.set_result(0.0)
      return future
    return self._begin(f"grading task {seat.conversation.task.id}", grade, times=times)

  def _status(self, seat: Seat) -> Status:
    return seat.conversation.status

  def _graded(self, seat: Seat) -> dict[str, Any]:
    """IsSolved, status, and why it could not be graded ("" if it could), as JSON data.

    A checker (a judge) that is down, or raises at an odd answer, is not the policy's failure.
    """
    verdict = {"opened": True, "solved": 0.0, "status": self._status(seat), "why": ""}
    try:
      return verdict | {"solved": float(seat.grading.result())}
    except TooManyStuck:
      raise
    except Exception as error:
      task = seat.conversation.task
      why = _why(f"task {task.id}: the answer cannot be graded", error)
      return verdict | {"status": Status.INFRASTRUCTURE_ERROR, "why": why}

  def _release(self, slot: int, verdict: dict[str, Any]) -> Trajectory:
    """Frees a slot whose conversation is finished and graded, or has no session."""
    seat = self.seats.pop(slot)
    self._close(seat)
    if not verdict["opened"]:
      return self._unopened(seat.conversation.task, seat.conversation.sample)
    return self._finished(seat, verdict)

  def _finished(self, seat: Seat, verdict: dict[str, Any]) -> Trajectory:
    return judged(seat.conversation.trajectory(0.0, self.sampling.weights), verdict)

  def _start(self, fresh: list[int]) -> None:
    """Prompts into new slots; a prompt that stands in another slot is forked, not computed."""
    with self.stats.device():
      self.state = self.engine.rewind(self.state, dict.fromkeys(fresh, 0))
    holders: dict[tuple[int, bytes], int] = {}  # a slot is forked within its class
    for slot, seat in self.seats.items():
      if slot not in fresh and self._holds_prompt(seat):
        holders.setdefault(self._prompt_key(slot), slot)
    copies: dict[int, int] = {}
    prompts: dict[int, np.ndarray] = {}
    for slot in fresh:
      conversation = self.seats[slot].conversation
      if conversation.state is State.DONE:  # the prompt alone is too long
        continue
      key = self._prompt_key(slot)
      if key in holders:
        copies[slot] = holders[key]
      else:
        holders[key] = slot
        prompts[slot] = conversation.pending_tokens()
    if prompts:
      self._append_pieces(prompts)
    if copies:
      lengths = {s: len(self.seats[s].conversation.pending_tokens()) for s in copies}
      with self.stats.device():
        self.state = self.engine.fork(self.state, copies)
        self.state = self.engine.rewind(self.state, lengths)
      self.stats.shared_prefills += len(copies)
      self.stats.shared_tokens += sum(lengths.values())
    for slot in (*prompts, *copies):
      self._open_turn(slot)

  def _open_turn(self, slot: int) -> None:
    seat = self.seats[slot]
    seat.conversation.appended()
    seat.seed = step_seed(
      self.sampling,
      seat.conversation.task.id,
      seat.conversation.sample,
      seat.conversation.turns,
    )

  def _prompt_key(self, slot: int) -> tuple[int, bytes]:
    return self.seats.room.tokens(slot), self.seats[slot].conversation.prompt_tokens.tobytes()

  def _holds_prompt(self, seat: Seat) -> bool:
    """Whether the slot begins with the whole prompt at this moment."""
    return True

  def _observe(self, seat: Seat, observation: Observation | None) -> None:
    if observation is not None:
      self.stats.tool_seconds += observation.seconds
    seat.conversation.observe(observation)

  def _append(self) -> None:
    """Observations into the live cache."""
    fed = self.seats.in_state(State.NEEDS_APPEND)
    pieces = {slot: seat.conversation.pending_tokens() for slot, seat in fed.items()}
    back = {slot: self.seats[slot].conversation.rewind_to for slot in pieces}
    back = {slot: length for slot, length in back.items() if length is not None}
    if back:  # history was changed
      with self.stats.device():
        self.state = self.engine.rewind(self.state, back)
    if pieces:
      self._append_pieces(pieces)
      for slot in pieces:
        self._open_turn(slot)

  def _append_pieces(self, pieces: dict[int, np.ndarray]) -> None:
    self.stats.forced_tokens += sum(map(len, pieces.values()))
    with self.stats.device():
      self.state = self.engine.append(self.variables, self.state, pieces)

  def _decode(self) -> None:
    decoding = self.seats.in_state(State.DECODING)
    if not decoding:
      return
    started = time.monotonic()
    with self.stats.device():
      self.state, decoded = self.engine.decode(
        self.variables,
        self.state,
        {slot: seat.conversation.budget() for slot, seat in decoding.items()},
        {slot: seat.seed for slot, seat in decoding.items()},
        self.setting.chat_format.stop_ids,
        self.sampling.temperature,
      )
    self.decode_seconds = time.monotonic() - started
    for slot, seat in decoding.items():
      count = int(decoded.count[slot])
      values, hidden = decoded.values, decoded.hidden
      self.stats.sampled_tokens += count
      seat.conversation.sampled(
        decoded.tokens[slot, :count],
        decoded.logprobs[slot, :count],
        bool(decoded.stopped[slot]),
        None if values is None else values[slot, :count],
        None if hidden is None else hidden[slot],
      )
      if self._mine(slot):
        self._defer_error(functools.partial(self._ask, seat))

  def _submit(self, seat: Seat) -> Future:
    """A turn's calls, or the user's reply to an answer, in threads."""
    action, session = seat.conversation.call, seat.session
    if isinstance(action, Finish):
      what = f"the user's reply in task {seat.conversation.task.id}"
      reply_s = self.runner.reply_s
      return self._begin(what, lambda: session.reply(action.answer), limit_s=reply_s)
    return parallel.submit(self.runner, session, action)


def _answer(seat: Seat) -> Observation | None:
  """What a call or the user answered; a user that fails is not the policy's failure."""
  try:
    return seat.calling.result()
  except TooManyStuck:
    raise
  except Exception as error:
    if not isinstance(seat.conversation.call, Finish):
      raise
    return Observation(_why("the user's reply", error), Code.INFRASTRUCTURE)
