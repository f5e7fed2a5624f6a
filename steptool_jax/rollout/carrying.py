"""Rollouts whose long conversations go on in the next iteration (rollout.carry).

A conversation that has had its LLM calls of an iteration leaves its slot, and goes on in the next
one from what it has recorded, with the weights of then. Its tokens keep the log-probs that they
were sampled with, and its trajectory the version of the policy that began it. Its session stays
open meanwhile; where a run was stopped, a fresh one repeats the recorded calls.
"""

import dataclasses
import json
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from absl import logging

from steptool_jax.data.trajectories import with_values
from steptool_jax.environments.base import Session
from steptool_jax.rollout.branching import replay
from steptool_jax.rollout.chain import Loop, Seat
from steptool_jax.rollout.continuing import GoesOn, Start
from steptool_jax.rollout.conversation import Conversation, State
from steptool_jax.rollout.setting import Setting, Stats
from steptool_jax.types import Status, Step, Task, Trajectory

Key = tuple[str, int]  # task, sample


@dataclasses.dataclass(frozen=True, eq=False)
class Unfinished:
  """A conversation that goes on: what is recorded of it so far. Its status says nothing."""

  trajectory: Trajectory


@dataclasses.dataclass(frozen=True, eq=False)
class Carried:
  """What an iteration hands on to the next one; a checkpoint holds it.

  waiting: finished trajectories, not yet paid, of groups that are not complete.
  """

  unfinished: tuple[Trajectory, ...] = ()
  waiting: tuple[Trajectory, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Carry:
  """How a rollout carries conversations over.

  calls: LLM calls that each may have in this rollout; 0 = as many as it needs. begun: those that go
  on, unfinished so far. sessions: those that are open from the rollout before; afterwards those of
  what is unfinished then, as many as the engine has slots, and none where the rollout failed.
  owners: the processes that keep them, the same in all processes.
  """

  calls: int
  begun: Sequence[Trajectory]
  sessions: MutableMapping[Key, Session]
  owners: MutableMapping[Key, int] = dataclasses.field(default_factory=dict)


def rollout(
  setting: Setting,
  jobs: Sequence[tuple[Task, int]],
  carry: Carry,
  should_stop: Callable[[], bool] = lambda: False,
  on_done: Callable[[Trajectory], None] = lambda trajectory: None,
) -> tuple[list[Trajectory | Unfinished], Stats]:
  """As chain.rollout; jobs that have begun before go on, and some may be unfinished again."""
  loop = _Carrying(setting, carry)
  try:
    found = loop.run(jobs, should_stop, on_done)
  except BaseException:
    close(loop.left)
    raise
  finally:
    close(carry.sessions)  # of slots that are another process's now, or that were never filled
  carry.sessions.update(loop.left)
  carry.owners.clear()
  carry.owners.update(loop.owners)
  return found, loop.stats


def close(sessions: MutableMapping[Key, Session]) -> None:
  """Ends all of them; one that fails at that is nobody's loss."""
  while sessions:
    try:
      sessions.popitem()[1].close()
    except Exception as error:
      logging.warning("a session could not be closed: %s", error)


def complete_groups(
  found: Sequence[Trajectory | Unfinished], waiting: Sequence[Trajectory], samples: int
) -> tuple[list[Trajectory], Carried]:
  """(trajectories of the groups whose samples have all ended, group by group, what is handed on).

  A group is what one place of the order drew: `samples` samples of a task in a row.
  """
  unfinished = [f.trajectory for f in found if isinstance(f, Unfinished)]
  groups: dict[Key, list[Trajectory]] = {}
  for trajectory in (*waiting, *(f for f in found if isinstance(f, Trajectory))):
    groups.setdefault((trajectory.task_id, trajectory.sample // samples), []).append(trajectory)
  whole = [sorted(g, key=lambda t: t.sample) for g in groups.values() if len(g) == samples]
  left = [_recorded(t) for g in groups.values() if len(g) < samples for t in g]
  return [t for group in whole for t in group], Carried(tuple(unfinished), tuple(left))


class _Carrying(Loop):
  """The chain's scheduler over conversations that may have begun, and need not end."""

  def __init__(self, setting: Setting, carry: Carry):
    super().__init__(setting)
    self._calls, self._kept, self._before = carry.calls, carry.sessions, carry.owners
    self.left: dict[Key, Session] = {}  # open ones, of conversations that have left
    self.owners: dict[Key, int] = {}
    self._begun = {_key(t): t for t in carry.begun}

  def _conversation(self, task: Task, sample: int) -> Conversation:
    before = self._begun.get((task.id, sample))
    if before is None:
      return super()._conversation(task, sample)
    start = Start(task, sample, before.prompt_tokens, before.steps)
    return GoesOn(start, sample, self.setting)

  def _place(self, conversation: Conversation) -> int | None:
    """A slot of the process that keeps its session, where one is free."""
    owner = self._before.get(_key_of(conversation))
    kept = None if owner is None else self.seats.free(conversation.length + 1, owner)
    return super()._place(conversation) if kept is None else kept

  def _open(self, seat: Seat) -> None:
    seat.session = self._kept.pop(_key_of(seat.conversation), None)
    if seat.session is None:
      super()._open(seat)

  def _session(self, task: Task, sample: int) -> Session:
    return replay(self.environment, task, sample, self._path(task, sample))

  def _repeated(self, task: Task, sample: int) -> int:
    return len(self._path(task, sample))

  def _path(self, task: Task, sample: int) -> tuple[Step, ...]:
    before = self._begun.get((task.id, sample))
    return () if before is None else before.steps

  def _leaving(self) -> dict[int, Unfinished]:
    """Those whose next LLM call would be one too many for this rollout."""
    left = {}
    for slot, seat in list(self.seats.items()):
      spent = 0 < self._calls <= seat.conversation.turns
      if spent and seat.conversation.state is State.NEEDS_APPEND:
        self.owners[_key_of(seat.conversation)] = self.seats.owner(slot)
        left[seat.index] = self._leave(self.seats.pop(slot))
    return left

  def _leave(self, seat: Seat) -> Unfinished:
    conversation, version = seat.conversation, self.sampling.weights
    key = _key_of(conversation)
    if seat.session is not None and len(self.left) < self.engine.slots:
      self.left[key] = seat.session
    else:  # enough are open, or this one is still being opened: malformed turns need none
      self._close(seat)
    shown, steps = conversation.prompt_tokens, conversation.steps
    new = Trajectory(*key, shown, steps, Status.STEP_BUDGET, policy_version=version)
    return Unfinished(_recorded(self._whole(new)))

  def _finished(self, seat: Seat, verdict: dict[str, Any]) -> Trajectory:
    return self._whole(super()._finished(seat, verdict))

  def _unopened(self, task: Task, sample: int) -> Trajectory:
    return self._whole(super()._unopened(task, sample))

  def _whole(self, trajectory: Trajectory) -> Trajectory:
    """With what earlier rollouts have recorded of it."""
    before = self._begun.get(_key(trajectory))
    if before is None:
      return trajectory
    return dataclasses.replace(
      trajectory,
      prompt_tokens=before.prompt_tokens,
      steps=before.steps + trajectory.steps,
      policy_version=before.policy_version,
    )


def _key_of(conversation: Conversation) -> Key:
  return conversation.task.id, conversation.sample


def _key(trajectory: Trajectory) -> Key:
  return trajectory.task_id, trajectory.sample


def _recorded(trajectory: Trajectory) -> Trajectory:
  """As a checkpoint holds it, so that a run that was stopped pays what one that was not pays."""
  return with_values(trajectory, _as_json)


def _as_json(value: Any) -> Any:
  """The value as JSON gives it back; None for what JSON cannot hold."""
  try:
    return json.loads(json.dumps(value, allow_nan=False))
  except (TypeError, ValueError, RecursionError):
    return None
