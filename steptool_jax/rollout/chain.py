"""Chain rollouts: many conversations at once over the engine's slots.

Continuous batching: a slot that is freed takes the next conversation, tools run in threads while
other slots decode, samples of one task share the prompt's prefill by fork. A conversation depends
on its (seed, version, task, sample) alone, never on its neighbours or on timing.
"""

import dataclasses
import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import numpy as np

from steptool_jax.dialogue.template import ChatFormat
from steptool_jax.environments.base import Environment, Session
from steptool_jax.rollout.conversation import Conversation, Limits, State
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.runner import ToolRunner, TooManyStuck
from steptool_jax.types import Status, Task, Trajectory


class Interrupted(Exception):
  """`should_stop` asked for an end; no trajectory of this rollout was handed out."""


@dataclasses.dataclass
class Stats:
  """What a rollout cost. Seconds are wall-clock of the main thread."""

  seconds: float = 0.0
  device_seconds: float = 0.0  # in append, decode, fork, rewind
  tool_wait_seconds: float = 0.0  # nothing to decode, waiting for a tool
  tool_seconds: float = 0.0  # in tools, summed over threads
  sampled_tokens: int = 0
  forced_tokens: int = 0
  shared_prefills: int = 0  # prompts that were forked and not computed
  shared_tokens: int = 0  # their tokens


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Seeds and temperature of one rollout; temperature 0 is greedy."""

  seed: int
  version: int  # of the policy: the same task gives new samples after every update
  temperature: float


@dataclasses.dataclass
class Seat:
  """A conversation in its slot. tree.py seats a whole search, with the same methods."""

  conversation: Conversation
  session: Session
  seed: np.ndarray | None = None
  future: Future | None = None


def step_seed(sampling: Sampling, task_id: str, sample: int, step: int) -> np.ndarray:
  """uint32[2], the key of one (task, sample, step): stable across processes and runs."""
  text = f"{sampling.seed}/{sampling.version}/{task_id}/{sample}/{step}"
  return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint32)


def rollout(
  engine: Any,
  variables: Any,
  environment: Environment,
  jobs: Sequence[tuple[Task, int]],
  chat_format: ChatFormat,
  limits: Limits,
  runner: ToolRunner,
  sampling: Sampling,
  *,
  system: str | None = None,
  should_stop: Callable[[], bool] = lambda: False,
  on_done: Callable[[Trajectory], None] = lambda trajectory: None,
) -> tuple[list[Trajectory], Stats]:
  """Trajectories of all (task, sample) jobs, in their order, graded but not yet rewarded.

  Args:
    engine: policy/engine.py Engine, or a fake with its methods.
    should_stop: asked between device calls.
    on_done: called with each finished trajectory (progress bars).

  Raises:
    Interrupted: should_stop answered True.
    TooManyStuck: tools hang beyond what the runner may leave behind.
  """
  loop = Loop(engine, variables, environment, chat_format, limits, runner, sampling, system)
  started = time.monotonic()
  try:
    trajectories = loop.run(jobs, should_stop, on_done)
  finally:
    loop.close()
  loop.stats.seconds = time.monotonic() - started
  return trajectories, loop.stats


def graded(trajectory: Trajectory, grade: Callable[[], float]) -> Trajectory:
  """The trajectory with IsSolved; a checker (a judge) that is down is not the policy's failure."""
  if trajectory.status is Status.INFRASTRUCTURE_ERROR:
    return trajectory
  try:
    return dataclasses.replace(trajectory, solved=grade())
  except TooManyStuck:
    raise
  except InfrastructureError:
    return dataclasses.replace(trajectory, status=Status.INFRASTRUCTURE_ERROR)


class Loop:
  """The scheduler's state; lives for one rollout. Searches over trees (tree.py) extend it."""

  def __init__(self, engine, variables, environment, chat_format, limits, runner, sampling, system):
    self.engine, self.variables, self.environment = engine, variables, environment
    self.format, self.limits, self.runner = chat_format, limits, runner
    self.sampling, self.system = sampling, system
    self.seats: dict[int, Seat] = {}
    self.state = engine.init()
    self.stats = Stats()

  def run(self, jobs, should_stop, on_done) -> list[Trajectory]:
    waiting = deque(enumerate(jobs))
    order: dict[int, int] = {}  # slot -> index of its job
    results: dict[int, Trajectory] = {}
    while waiting or self.seats:
      if should_stop():
        raise Interrupted
      fresh = []
      for slot in range(self.engine.slots):
        while slot not in self.seats and waiting:
          index, (task, sample) = waiting.popleft()
          try:
            self._sit(slot, task, sample)
          except TooManyStuck:
            raise
          except InfrastructureError:
            results[index] = self._lost(task, sample)
            on_done(results[index])
            continue
          order[slot] = index
          fresh.append(slot)
      if fresh:
        self._start(fresh)
      self._collect()
      self._append()
      self._decode()
      for slot in [s for s, seat in self.seats.items() if seat.conversation.state is State.DONE]:
        trajectory = self._stand(slot)
        results[order.pop(slot)] = trajectory
        on_done(trajectory)
    return [results[index] for index in range(len(jobs))]

  def close(self) -> None:
    for seat in self.seats.values():
      seat.session.close()

  def _sit(self, slot: int, task: Task, sample: int) -> None:
    conversation = Conversation(task, sample, self.format, self.limits, self.system)
    session = self._within(
      "opening a session", lambda: self.environment.open(task, sample), lambda late: late.close()
    )
    self.seats[slot] = Seat(conversation, session)

  def _lost(self, task: Task, sample: int) -> Trajectory:
    """Of a conversation whose session could not be opened."""
    nothing = np.zeros(0, np.int32)
    return Trajectory(
      task.id,
      sample,
      nothing,
      (),
      Status.INFRASTRUCTURE_ERROR,
      policy_version=self.sampling.version,
    )

  def _within(self, what: str, function: Callable, late: Callable | None = None) -> Any:
    """The environment's work that a slot waits for, with the time-out of a tool call."""
    return self.runner.within(function, f"environment {self.environment.name!r}: {what}", late)

  def _stand(self, slot: int) -> Trajectory:
    """Grades and frees a finished conversation."""
    seat = self.seats.pop(slot)
    trajectory = seat.conversation.trajectory(0.0, self.sampling.version)
    try:
      answer = seat.conversation.answer
      return graded(trajectory, lambda: self._within("grading", lambda: seat.session.grade(answer)))
    finally:
      seat.session.close()

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

  def _collect(self) -> None:
    """Takes finished tool calls; waits for one only if no slot has anything else to do."""
    calling = {slot: seat for slot, seat in self.seats.items() if seat.future is not None}
    if not calling:
      return
    busy = any(s.conversation.state in (State.DECODING, State.DONE) for s in self.seats.values())
    if not busy:
      # Where all are calling, all are quick or one is slow; a moment's patience fills the batch.
      started = time.monotonic()
      futures = [seat.future for seat in calling.values()]
      done, pending = wait(futures, timeout=0.02)
      if not done:
        wait(pending, return_when=FIRST_COMPLETED)
      self.stats.tool_wait_seconds += time.monotonic() - started
    for seat in calling.values():
      if seat.future.done():
        observation = seat.future.result()
        seat.future = None
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
      self.state = self.engine.append(self.variables, self.state, pieces)

  def _decode(self) -> None:
    decoding = {
      slot: seat for slot, seat in self.seats.items() if seat.conversation.state is State.DECODING
    }
    if not decoding:
      return
    with self._device():
      self.state, decoded = self.engine.decode(
        self.variables,
        self.state,
        {slot: seat.conversation.budget() for slot, seat in decoding.items()},
        {slot: seat.seed for slot, seat in decoding.items()},
        self.format.stop_ids,
        self.sampling.temperature,
      )
    for slot, seat in decoding.items():
      count = int(decoded.count[slot])
      self.stats.sampled_tokens += count
      state = seat.conversation.sampled(
        decoded.tokens[slot, :count], decoded.logprobs[slot, :count], bool(decoded.stopped[slot])
      )
      if state is State.CALLING:
        seat.future = self._submit(seat)

  def _submit(self, seat: Seat) -> Future:
    """A tool call in a thread."""
    return self.runner.submit(seat.session, seat.conversation.call)

  def _device(self) -> "_Stopwatch":
    return _Stopwatch(self.stats)


class _Stopwatch:
  def __init__(self, stats: Stats):
    self.stats = stats

  def __enter__(self):
    self.started = time.monotonic()

  def __exit__(self, *_):
    self.stats.device_seconds += time.monotonic() - self.started


def _prompt_key(seat: Seat) -> bytes:
  return seat.conversation.prompt_tokens.tobytes()
