"""Chain rollouts: many conversations at once over the engine's slots.

Continuous batching: a slot that is freed takes the next conversation, tools run in threads while
other slots decode, samples of one task share the prompt's prefill by fork. A conversation depends
on its (seed, version, task, sample) alone, never on its neighbours or on timing; but for the last
bits of log-probs, see Engine.decode.

On several processes (peers.py) all hold the same conversations and make the same engine calls; the
sessions of a slot live in one of them, which tells the others its observations and grades.
"""

import contextlib
import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import numpy as np
from absl import logging

from steptool_jax.data.trajectories import observation_document, observation_of
from steptool_jax.environments.base import Session
from steptool_jax.rollout.conversation import Conversation, State
from steptool_jax.rollout.peers import together
from steptool_jax.rollout.replaying import unopened
from steptool_jax.rollout.setting import Setting, Stats, step_seed
from steptool_jax.simulators.runner import TooManyStuck
from steptool_jax.types import Observation, Status, Task, Trajectory

# Several processes look at each other's tools so often while nothing can be decoded, seconds.
PATIENCE_S = 0.05


class Interrupted(Exception):
  """`should_stop` asked for an end; no trajectory of this rollout was handed out."""


@dataclasses.dataclass
class Seat:
  """A conversation in its slot. tree.py seats a whole search, with the same methods."""

  conversation: Conversation
  session: Session | None  # None in the processes that do not own the slot
  seed: np.ndarray | None = None
  future: Future | None = None


def rollout(
  setting: Setting,
  jobs: Sequence[tuple[Task, int]],
  should_stop: Callable[[], bool] = lambda: False,
  on_done: Callable[[Trajectory], None] = lambda trajectory: None,
) -> tuple[list[Trajectory], Stats]:
  """Trajectories of all (task, sample) jobs, in their order, graded but not yet rewarded.

  should_stop is asked between device calls; on_done is called with each finished trajectory.

  Raises:
    Interrupted: should_stop answered True, in any process.
    TooManyStuck: tools hang beyond what the runner may leave behind.
  """
  loop = Loop(setting)
  return loop.run(jobs, should_stop, on_done), loop.stats


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
    self.seats: dict[int, Seat] = {}
    self.trouble: Exception | None = None  # of this process, until all hear of it
    self.unopened: dict[int, str] = {}  # why, by slot of this process
    self.state = self.engine.init()
    self.stats = self.stats_class()

  def run(self, jobs, should_stop, on_done) -> list[Trajectory]:
    """All jobs' trajectories, in their order; closes what is open."""
    started = time.monotonic()
    waiting = deque(enumerate(jobs))
    order: dict[int, int] = {}  # slot -> index of its job
    results: dict[int, Trajectory] = {}
    try:
      while waiting or self.seats:
        for slot, verdict in sorted(self._exchange(should_stop).items()):
          trajectory = self._release(slot, verdict)
          self._note(verdict["why"])
          results[order.pop(slot)] = trajectory
          on_done(trajectory)
        fresh = self._fill(waiting, order, results, on_done)
        if fresh:
          self._start(fresh)
        self._append()
        self._decode()
    finally:
      for seat in self.seats.values():
        if seat.session is not None:
          seat.session.close()
    self.stats.seconds = time.monotonic() - started
    if self.stats.failures:
      logging.warning(
        "%d of %d conversations are marked as infrastructure errors, the first: %s",
        len(self.stats.failures),
        len(jobs),
        self.stats.failures[0],
      )
    return [results[index] for index in range(len(jobs))]

  def _fill(self, waiting, order, results, on_done) -> list[int]:
    """Jobs into free slots; a conversation whose session cannot be opened ends at once."""
    fresh: list[int] = []
    while waiting and len(self.seats) < self.engine.slots:
      seated = []
      for slot in range(self.engine.slots):
        if slot not in self.seats and waiting:
          order[slot], (task, sample) = waiting.popleft()
          self._seat(slot, task, sample)
          seated.append(slot)
      unopened = together(self.peers, self._unopened_slots)
      lost = {int(slot): why for theirs in unopened for slot, why in theirs.items()}
      for slot, why in sorted(lost.items()):
        self._note(why)
        conversation = self.seats.pop(slot).conversation
        index = order.pop(slot)
        results[index] = self._unopened(conversation.task, conversation.sample)
        on_done(results[index])
      fresh += [slot for slot in seated if slot in self.seats]
    return fresh

  def _unopened_slots(self) -> dict[str, str]:
    """Why sessions of this process could not be opened, by slot."""
    if self.trouble is not None:
      raise self.trouble
    lost, self.unopened = self.unopened, {}
    return {str(slot): why for slot, why in lost.items()}

  def _note(self, why: str) -> None:
    if why:
      self.stats.failures.append(why)

  def _mine(self, slot: int) -> bool:
    """Whether this process runs the slot's tools."""
    return slot * self.peers.count // self.engine.slots == self.peers.index

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
    wait_for_tools = not any(
      seat.conversation.state in (State.DECODING, State.DONE) for seat in self.seats.values()
    )

    def news() -> dict[str, Any]:
      if self.trouble is not None:
        raise self.trouble
      if should_stop():
        return {"stop": True}
      observed = self._collect(wait_for_tools)
      verdicts = {
        str(slot): self._grade(seat)
        for slot, seat in self.seats.items()
        if self._mine(slot) and seat.conversation.state is State.DONE
      }
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

  def _seat(self, slot: int, task: Task, sample: int) -> None:
    self.seats[slot] = Seat(self._conversation(task, sample), None)
    if self._mine(slot):
      opening = functools.partial(self.environment.open, task, sample)
      self.seats[slot].session = self._opened(slot, task, opening)

  def _conversation(self, task: Task, sample: int) -> Conversation:
    setting = self.setting
    return Conversation(task, sample, setting.chat_format, setting.limits, setting.system)

  def _opened(self, slot: int, task: Task, opening: Callable[[], Any]) -> Any:
    """What `opening` returns, perhaps at a later attempt; None where it cannot be had."""

    def within() -> Any:
      opened = functools.partial(self.runner.persist, opening)
      try:
        return self._within(
          f"opening a session of task {task.id}", opened, lambda late: late.close()
        )
      except TooManyStuck:
        raise
      except Exception as error:
        self.unopened[slot] = _why(f"task {task.id}: no session can be opened", error)
        return None

    return self._defer_error(within)

  def _unopened(self, task: Task, sample: int) -> Trajectory:
    """What a conversation leaves whose session never opened."""
    return unopened(task, sample, self.sampling.version)

  def _within(self, what: str, function: Callable, late: Callable | None = None) -> Any:
    """The environment's work that a slot waits for, with the time-out of a tool call."""
    return self.runner.within(function, f"environment {self.environment.name!r}: {what}", late)

  def _grade(self, seat: Seat) -> dict[str, Any]:
    """The verdict on a finished conversation, by the owner of its slot."""
    trajectory = seat.conversation.trajectory(0.0, self.sampling.version)
    answer = seat.conversation.answer
    return self._verdict(trajectory, lambda: seat.session.grade(answer))

  def _verdict(self, trajectory: Trajectory, grade: Callable[[], float]) -> dict[str, Any]:
    """IsSolved, status, and why it could not be graded ("" if it could), as JSON data.

    A checker (a judge) that is down, or raises at an odd answer, is not the policy's failure.
    """
    verdict = {"solved": 0.0, "status": trajectory.status, "why": ""}
    if trajectory.status is Status.INFRASTRUCTURE_ERROR:
      return verdict
    try:
      return verdict | {"solved": float(self._within(f"grading task {trajectory.task_id}", grade))}
    except TooManyStuck:
      raise
    except Exception as error:
      why = _why(f"task {trajectory.task_id}: the answer cannot be graded", error)
      return verdict | {"status": Status.INFRASTRUCTURE_ERROR, "why": why}

  def _release(self, slot: int, verdict: dict[str, Any]) -> Trajectory:
    """Frees a slot whose conversation is finished and graded."""
    seat = self.seats.pop(slot)
    if seat.session is not None:
      seat.session.close()
    return judged(seat.conversation.trajectory(0.0, self.sampling.version), verdict)

  def _start(self, fresh: list[int]) -> None:
    """Prompts into new slots; a prompt that stands in another slot is forked, not computed."""
    with self._device():
      self.state = self.engine.rewind(self.state, dict.fromkeys(fresh, 0))
    holders: dict[bytes, int] = {}
    for slot, seat in self.seats.items():
      if slot not in fresh and self._holds_prompt(seat):
        holders.setdefault(_prompt_key(seat), slot)
    copies: dict[int, int] = {}
    prompts: dict[int, np.ndarray] = {}
    for slot in fresh:
      conversation = self.seats[slot].conversation
      if conversation.state is State.DONE:  # the prompt alone is too long
        continue
      key = _prompt_key(self.seats[slot])
      if key in holders:
        copies[slot] = holders[key]
      else:
        holders[key] = slot
        prompts[slot] = conversation.pending_tokens()
    if prompts:
      self._append_pieces(prompts)
    if copies:
      lengths = {s: len(self.seats[s].conversation.pending_tokens()) for s in copies}
      with self._device():
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

  def _holds_prompt(self, seat: Seat) -> bool:
    """Whether the slot begins with the whole prompt at this moment."""
    return True

  def _collect(self, wait_for_tools: bool) -> dict[str, Any]:
    """Takes this process's finished tool calls, as {slot: observation} for the others.

    wait_for_tools: no slot has anything else to do.
    """
    calling = {slot: seat for slot, seat in self.seats.items() if seat.future is not None}
    if calling and wait_for_tools:
      # Where all are calling, all are quick or one is slow; a moment's patience fills the batch.
      started = time.monotonic()
      futures = [seat.future for seat in calling.values()]
      done, pending = wait(futures, timeout=0.02)
      if not done:
        patience = None if self.peers.count == 1 else PATIENCE_S
        wait(pending, timeout=patience, return_when=FIRST_COMPLETED)
      self.stats.tool_wait_seconds += time.monotonic() - started
    observed = {}
    for slot, seat in calling.items():
      if seat.future.done():
        observation = seat.future.result()
        seat.future = None
        if self.peers.count > 1:
          observed[str(slot)] = observation_document(observation)
        self._observe(seat, observation)
    return observed

  def _observe(self, seat: Seat, observation: Observation) -> None:
    self.stats.tool_seconds += observation.seconds
    seat.conversation.observe(observation)

  def _append(self) -> None:
    """Observations into the live cache."""
    pieces = {
      slot: seat.conversation.pending_tokens()
      for slot, seat in self.seats.items()
      if seat.conversation.state is State.NEEDS_APPEND
    }
    if pieces:
      self._append_pieces(pieces)
      for slot in pieces:
        self._open_turn(slot)

  def _append_pieces(self, pieces: dict[int, np.ndarray]) -> None:
    self.stats.forced_tokens += sum(map(len, pieces.values()))
    with self._device():
      self.state = self.engine.append(self.setting.variables, self.state, pieces)

  def _decode(self) -> None:
    decoding = {
      slot: seat for slot, seat in self.seats.items() if seat.conversation.state is State.DECODING
    }
    if not decoding:
      return
    with self._device():
      self.state, decoded = self.engine.decode(
        self.setting.variables,
        self.state,
        {slot: seat.conversation.budget() for slot, seat in decoding.items()},
        {slot: seat.seed for slot, seat in decoding.items()},
        self.setting.chat_format.stop_ids,
        self.sampling.temperature,
      )
    for slot, seat in decoding.items():
      count = int(decoded.count[slot])
      self.stats.sampled_tokens += count
      state = seat.conversation.sampled(
        decoded.tokens[slot, :count], decoded.logprobs[slot, :count], bool(decoded.stopped[slot])
      )
      if state is State.CALLING and self._mine(slot):
        seat.future = self._defer_error(functools.partial(self._submit, seat))

  def _submit(self, seat: Seat) -> Future:
    """A tool call in a thread."""
    return self.runner.submit(seat.session, seat.conversation.call)

  @contextlib.contextmanager
  def _device(self) -> Iterator[None]:
    """Time in here is time on the device."""
    started = time.monotonic()
    try:
      yield
    finally:
      self.stats.device_seconds += time.monotonic() - started


def _prompt_key(seat: Seat) -> bytes:
  return seat.conversation.prompt_tokens.tobytes()
