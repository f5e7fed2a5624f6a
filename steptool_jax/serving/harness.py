"""Environment 'harness': an agent of the user's own, unchanged, around the policy's server.

    async def run(task, base_url, api_key) -> reward, or rewards by LLM call (see _paid)

`task` is a line of the tasks file. The agent talks to the policy as to any OpenAI server; what was
sampled is recorded there, and trained on with what `run` returns. A run that raises, hangs, never
calls the model or returns no reward is marked as an infrastructure error, like a tool that is down.
"""

import asyncio
import copy
import dataclasses
import functools
import inspect
import math
import threading
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from absl import logging

from steptool_jax.config import Config
from steptool_jax.environments.base import SPLITS, Split, check_split
from steptool_jax.environments.custom import load_module, task_lines
from steptool_jax.files import parse_json
from steptool_jax.rollout.chain import Interrupted
from steptool_jax.rollout.setting import Sampling, Setting, Stats, step_seed
from steptool_jax.serving.decoding import Decoder
from steptool_jax.serving.recording import Session
from steptool_jax.serving.server import Opened, PolicyServer
from steptool_jax.simulators.runner import TooManyStuck
from steptool_jax.types import Status, Task, Trajectory

NAME, FUNCTION = "harness", "run"
_GRACE_S = 5.0  # after the time-out, for a run to clean up; later it blocks its thread
_MOST_STUCK = 3  # threads that runs block for ever
_IDLE_S = 0.05  # without a turn to sample, between looks at what has ended

Run = Callable[[dict[str, Any], str, str], Awaitable[Any]]


class Harness:
  """The environment: tasks, and the function that attempts one.

  functions: "pkg.mod" or "file.py" with `async def run(task, base_url, api_key)`. tasks_path: JSON
  lines with an id, a split by choice, and whatever `run` reads. All that is wrong with either is a
  ValueError here.
  """

  name = NAME

  def __init__(
    self, functions: str, tasks_path: str | Path, heldout_share: float, timeout_s: float
  ):
    module = load_module(functions)
    self.run: Run = getattr(module, FUNCTION, None)
    if not inspect.iscoroutinefunction(self.run):
      raise ValueError(f"{functions} has no 'async def {FUNCTION}(task, base_url, api_key)'")
    try:
      inspect.signature(self.run).bind({}, "", "")
    except TypeError as error:
      raise ValueError(f"{functions}: {FUNCTION}(task, base_url, api_key): {error}") from None
    self.timeout_s = timeout_s
    self._tasks = _read(Path(tasks_path), heldout_share)

  def tasks(self, split: Split) -> Sequence[Task]:
    return self._tasks[check_split(split)]

  def open(self, task: Task, sample: int) -> Any:
    raise ValueError(
      f"environment {self.name!r} has no sessions to open: its agent calls its tools itself, and "
      "so nothing can be replayed or searched in it"
    )


def _read(path: Path, heldout_share: float) -> dict[str, tuple[Task, ...]]:
  tasks: dict[str, list[Task]] = {split: [] for split in SPLITS}
  where: dict[str, int] = {}
  for number, line in enumerate(task_lines(path), start=1):
    if not line.strip():
      continue
    try:
      record = parse_json(line)
      name = record.get("id") if isinstance(record, dict) else None
      if not isinstance(name, str) or not name.strip():
        raise ValueError("a task must be a JSON object with an 'id', a non-empty text")
      if name in where:
        raise ValueError(f"id {name!r} is already used in line {where[name]}")
      split = record.get("split")
      if split is None:
        # By the id, so that adding a task moves no other one to the other split.
        share = zlib.crc32(name.encode()) % 10_000 / 10_000
        split = "heldout" if share < heldout_share else "train"
      check_split(split)
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{path}:{number}: {error}") from None
    where[name] = number
    query = record.get("query")
    shown = query if isinstance(query, str) else ""
    tasks[split].append(Task(name, NAME, shown, (), {}, metadata={"record": record}))
  if not where:
    raise ValueError(f"{path}: holds no task")
  return {split: tuple(found) for split, found in tasks.items()}


def from_config(config: Config, services: Any) -> Harness:
  """The row of base.ENVIRONMENTS."""
  del services
  c = config.environment
  return Harness(c.functions, c.tasks, c.heldout_share, c.harness_timeout)


# --- rollouts ----------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class _Job:
  task: Task
  sample: int
  opened: Opened
  future: Future
  deadline: float


def rollout(
  setting: Setting,
  jobs: Sequence[tuple[Task, int]],
  should_stop: Callable[[], bool] = lambda: False,
  on_done: Callable[[Trajectory], None] = lambda trajectory: None,
) -> tuple[list[Trajectory], Stats]:
  """Trajectories of all (task, sample) jobs, in their order, with the rewards that `run` returned.

  As many runs as the engine has slots are under way. A key belongs to (task, sample, turn), as in
  chain.rollout, so that an agent that asks the same has the same answers.

  Where an agent has opened several conversations (it changed history, or has sub-agents), all its
  calls of the model are steps of its trajectory, which has several segments then.

  Raises:
    Interrupted, TooManyStuck: as chain.rollout.
    NonFiniteLogprobs: the policy is broken.
    ValueError: on several processes.
  """
  if setting.peers.count > 1:
    raise ValueError("environment 'harness' runs in one process: its agents talk to one server")
  harness, slots = setting.environment, setting.engine.slots
  started = time.monotonic()
  decoder = Decoder(setting.engine, setting.variables, setting.chat_format.stop_ids)
  stats = decoder.stats
  waiting = deque(enumerate(jobs))
  running: dict[int, _Job] = {}
  results: dict[int, Trajectory] = {}
  with (
    PolicyServer(decoder, setting.chat_format, system=setting.system) as server,
    _Runs(harness, decoder.wake) as runs,
  ):
    while waiting or running:
      if should_stop():
        raise Interrupted
      while waiting and len(running) < slots:
        index, (task, sample) = waiting.popleft()
        running[index] = _start(setting, server, runs, task, sample, f"s{index}")
        decoder.expect(f"s{index}")
      decoder.step(_IDLE_S)
      if decoder.broken is not None:
        raise decoder.broken
      blocked = runs.blocked(job.future for job in _late(running))
      for index, job in list(running.items()):
        if job.future in blocked and not job.future.done():
          job.future.cancel()
        if job.future.done():
          del running[index]
          server.close_session(job.opened)
          results[index], why = _finished(job, setting, harness)
          if why:
            stats.failures.append(why)
          on_done(results[index])
  stats.seconds = time.monotonic() - started
  _warn(stats, len(jobs))
  return [results[index] for index in range(len(jobs))], stats


def _start(
  setting: Setting, server: PolicyServer, runs: "_Runs", task: Task, sample: int, name: str
) -> _Job:
  keys = functools.partial(_key, setting.sampling, task.id, sample)
  opened = server.open(name, setting.limits, keys, setting.sampling.temperature)
  future = runs.start(task.metadata["record"], opened.url, opened.key)
  deadline = time.monotonic() + setting.environment.timeout_s + _GRACE_S
  return _Job(task, sample, opened, future, deadline)


def _key(sampling: Sampling, task_id: str, sample: int, conversation: int, turn: int, draw: int):
  first = not conversation and not draw
  return step_seed(sampling, task_id, sample, turn if first else f"{turn}.{conversation}.{draw}")


def _late(running: dict[int, _Job]) -> list[_Job]:
  now = time.monotonic()
  return [job for job in running.values() if now > job.deadline]


def _finished(job: _Job, setting: Setting, harness: Harness) -> tuple[Trajectory, str]:
  """(the trajectory of a run that has ended, why it is marked or "")."""
  session = job.opened.session
  trajectory = session.trajectory(job.task.id, job.sample, setting.sampling.version)
  returned: Any = None
  why = ""
  if job.future.cancelled():
    why = "its thread was blocked by a run that does not await; use async calls"
  elif job.future.exception() is not None:
    error = job.future.exception()
    why = f"{type(error).__name__}: {str(error)[:300]}"
    if isinstance(error, TimeoutError):
      why = f"it takes longer than {harness.timeout_s:g} s (environment.harness_timeout)"
    if session.ended in (Status.STEP_BUDGET, Status.TOKEN_BUDGET, Status.GAVE_UP):
      why = ""  # it was told that a budget is spent, which is the policy's doing
      returned = 0.0
  else:
    returned = job.future.result()
  if not why and session.ended is Status.INFRASTRUCTURE_ERROR:
    why = "it said that a tool's infrastructure failed"
  if not why and session.last is None and session.ended is None:
    why = "it never had an answer of the model"
  if not why:
    try:
      return _paid(trajectory, returned, session), ""
    except ValueError as error:
      why = str(error)
  marked = dataclasses.replace(trajectory, status=Status.INFRASTRUCTURE_ERROR, solved=0.0)
  return marked, f"task {job.task.id}: run: {why}"


def _paid(trajectory: Trajectory, returned: Any, session: Session) -> Trajectory:
  """With r on every step, from what `run` returned. ValueError for what it may not return.

  x                              how well the task was solved, in [0, 1]; the last step earns it,
                                 of a truncated conversation none, as in rewards/shaping.py
  [r, …]                         rewards of all LLM calls in their order; the last says the same
  {"solved": x, "rewards": […]}  both
  {"solved": x, "rewards": r}    r is earned by the last step, of a truncated conversation as well
  """
  rewards, solved = None, returned
  if isinstance(returned, Mapping) and returned.keys() == {"solved", "rewards"}:
    rewards, solved = returned["rewards"], returned["solved"]
    if _finite(rewards) and session.turns:
      rewards = [0.0] * (session.turns - 1) + [rewards]
  elif isinstance(returned, (list, tuple)):
    rewards, solved = returned, returned[-1] if returned else 0.0
  if not _finite(solved) or not (
    rewards is None or (isinstance(rewards, (list, tuple)) and all(map(_finite, rewards)))
  ):
    raise ValueError(
      f"it returned {returned!r:.80}; return a number, a list of numbers, or "
      '{"solved": number, "rewards": list of numbers}'
    )
  if not 0 <= solved <= 1:
    raise ValueError(
      f"it returned {returned!r:.80}, where {solved:g} says how well the task was solved, so must "
      'be in [0, 1]; rewards of another scale go beside it: {"solved": …, "rewards": […]}'
    )
  if rewards is not None and len(rewards) != session.turns:
    raise ValueError(f"it returned {len(rewards)} rewards, but had {session.turns} LLM calls")
  if not trajectory.steps:
    return dataclasses.replace(trajectory, solved=float(solved))
  if rewards is None:
    paid = [0.0] * len(trajectory.steps)
    paid[-1] = 0.0 if trajectory.truncated else float(solved)
  else:
    paid = [float(reward) for reward in rewards]
  steps = tuple(
    dataclasses.replace(step, reward=reward)
    for step, reward in zip(trajectory.steps, paid, strict=True)
  )
  parts = {"harness": math.fsum(paid)}
  return dataclasses.replace(trajectory, steps=steps, solved=float(solved), reward_parts=parts)


def _finite(value: Any) -> bool:
  return isinstance(value, (bool, int, float)) and math.isfinite(value)


def outcome_only(trajectory: Trajectory) -> Trajectory:
  """Without what the steps before the last one earn, for algorithms that read no step rewards."""
  if not trajectory.steps:
    return trajectory
  *before, last = trajectory.steps
  steps = (*(dataclasses.replace(step, reward=0.0) for step in before), last)
  return dataclasses.replace(trajectory, steps=steps, reward_parts={"harness": last.reward})


def _warn(stats: Stats, jobs: int) -> None:
  if stats.failures:
    logging.warning(
      "%d of %d runs are marked as infrastructure errors, the first: %s",
      *(len(stats.failures), jobs, stats.failures[0]),
    )


def _forever(loop: asyncio.AbstractEventLoop) -> None:
  """The loop to its end; a task of an agent's own that calls sys.exit() is not that."""
  while True:
    try:
      loop.run_forever()
      return
    except SystemExit as error:
      logging.warning("a task of an agent called sys.exit(%r)", error.code)


class _Runs:
  """Runs of the function on one event loop in a thread; another thread where a run blocks it."""

  def __init__(self, harness: Harness, wake: Callable[[], None]):
    self._harness, self._wake = harness, wake
    self._loop: asyncio.AbstractEventLoop | None = None
    self._mine: set[Future] = set()  # under way on this loop
    self._stuck = 0

  def start(self, record: dict[str, Any], url: str, key: str) -> Future:
    if self._loop is None:
      self._loop, self._mine = asyncio.new_event_loop(), set()
      threading.Thread(target=_forever, args=(self._loop,), name="harness", daemon=True).start()

    async def whole() -> Any:
      try:
        return await self._harness.run(copy.deepcopy(record), url, key)
      except SystemExit as error:  # asyncio would end the loop, and all runs on it
        raise RuntimeError(f"the agent called sys.exit({error.code!r})") from error

    async def one() -> Any:
      return await asyncio.wait_for(whole(), self._harness.timeout_s)

    future = asyncio.run_coroutine_threadsafe(one(), self._loop)
    future.add_done_callback(lambda _: self._wake())
    self._mine.add(future)
    return future

  def blocked(self, late: Any) -> set[Future]:
    """All that share a loop with a run that is late: it was not even cancelled in time."""
    if not any(future in self._mine and not future.done() for future in late):
      return set()
    self._stuck += 1
    lost, self._loop = self._mine, None
    if self._stuck > _MOST_STUCK:
      raise TooManyStuck(
        f"runs of environment 'harness' have blocked {self._stuck} threads for longer than "
        f"{self._harness.timeout_s:g} s: use async calls in `run`, or time-outs of its own"
      )
    return lost

  def __enter__(self) -> "_Runs":
    return self

  def __exit__(self, *_: object) -> None:
    loop = self._loop
    if loop is None:
      return

    async def end() -> None:
      left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
      for task in left:
        task.cancel()
      await asyncio.wait(left, timeout=_GRACE_S) if left else None
      await loop.shutdown_asyncgens()
      loop.call_soon(loop.stop)

    asyncio.run_coroutine_threadsafe(end(), loop)
