"""Sessions that follow a search tree: every call runs in the state its node's path has led to.

An environment whose sessions can copy themselves offers `fork`. All others are replayed: where the
search has backed up, a fresh session repeats the calls of the path before the next one. That is
right only if it answers as it did before, so every repeated answer is compared with the recorded
one; a difference ends the search as an infrastructure error, never as the model's failure.
"""

import threading
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from steptool_jax.environments.base import Environment, Session
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.types import (
  Code,
  Finish,
  Malformed,
  Observation,
  Step,
  Task,
  ToolCall,
  by_call,
)

ROOT = -1  # the node in front of the first turn


@runtime_checkable
class Forkable(Protocol):
  """A session that can go on twice from one state (and a Session besides)."""

  def fork(self) -> Session:
    """An independent session in the same state; neither sees what the other does later."""
    ...


def replay(environment: Environment, task: Task, sample: int, path: Sequence[Step]) -> Session:
  """A fresh session that has repeated the calls of `path`; InfrastructureError if it differs."""
  session = environment.open(task, sample)
  try:
    for step in by_call(path):
      action, seen = step.action, step.observation
      if seen is None or isinstance(action, Malformed):
        continue
      asked = isinstance(action, Finish)
      got = session.reply(action.answer) if asked else session.call(action)
      if got is None or (got.text, got.code) != (seen.text, seen.code):
        who = "the user" if asked else repr(action.name)
        raise InfrastructureError(
          f"environment {environment.name!r}: {who} answered differently when a recorded call was "
          "repeated; what goes on from a recorded state (a tree search, Monte-Carlo values, "
          "rollout.carry after a stop) needs deterministic tools and users, or sessions with fork()"
        )
  except BaseException:
    session.close()
    raise
  return session


def _called(step: Step) -> bool:
  return isinstance(step.action, ToolCall) and step.observation is not None


class Branches:
  """The sessions of one search. Used by one thread; only a Branch's `call` runs in any thread."""

  def __init__(self, environment: Environment, task: Task, sample: int):
    self._environment, self._task, self._sample = environment, task, sample
    root = self._open()
    self._forks = isinstance(root, Forkable)
    # Forkable: the session of every node. Else: one live session and the path that it has gone.
    self._sessions: dict[int, Session] = {ROOT: root} if self._forks else {}
    self._live: Session | None = None if self._forks else root
    self._live_path: tuple[Step, ...] = ()
    self._running: Branch | None = None
    self.replayed_calls = 0

  def branch(self, node: int, path: Sequence[Step]) -> "Branch":
    """What runs the next call after `node`, whose steps are `path`; then comes `enter`."""
    path = tuple(path)
    if self._forks:
      session = self._sessions[node].fork()
    else:
      session = self._live if self._live_path == path else None
    self._running = Branch(self, path, session)
    return self._running

  def repeats(self, path: Sequence[Step]) -> int:
    """Steps that have to be repeated before the state after `path` is graded."""
    return 0 if self._forks or self._live_path == tuple(path) else len(path)

  def enter(self, node: int, parent: int, path: Sequence[Step]) -> None:
    """The search has made `node` below `parent`, by the call of `branch` or without a call."""
    branch, self._running = self._running, None
    if self._forks:
      self._sessions[node] = self._sessions[parent] if branch is None else branch.take()
    elif branch is None:
      if self._live_path == tuple(path[:-1]):
        self._live_path = tuple(path)  # a turn without a call changes nothing
    else:
      session = branch.take()
      if session is not None:  # None: the runner gave it up while it was replaying
        if self._live is not session:
          self._drop_live()
        self._live, self._live_path = session, tuple(path)

  def grade(self, node: int, path: Sequence[Step], answer: str | None) -> float:
    """IsSolved after `node`. InfrastructureError when the calls of its path cannot be repeated."""
    if self._forks:
      return self._sessions[node].grade(answer)
    if self._live is None or self._live_path != tuple(path):
      self._drop_live()
      self._live, self._live_path = self.replay(tuple(path)), tuple(path)
    return self._live.grade(answer)

  def replay(self, path: tuple[Step, ...]) -> Session:
    """A fresh session that has repeated the calls of `path`; InfrastructureError if it differs."""
    session = replay(self._environment, self._task, self._sample, path)
    self.replayed_calls += sum(map(_called, by_call(path)))
    return session

  def close(self) -> None:
    """Frees all sessions; harmless when repeated."""
    if self._running is not None:
      late = self._running.take()
      if late is not None and late is not self._live:
        late.close()
      self._running = None
    for session in {id(s): s for s in self._sessions.values()}.values():
      session.close()
    self._sessions = {}
    self._drop_live()

  def _open(self) -> Session:
    return self._environment.open(self._task, self._sample)

  def _drop_live(self) -> None:
    live, self._live = self._live, None
    if live is not None:
      live.close()


class Branch:
  """Runs one call of a search in the right state; the tool runner may try it several times."""

  def __init__(self, branches: Branches, path: tuple[Step, ...], session: Session | None):
    self._branches, self._path, self._session = branches, path, session
    self._lock = threading.Lock()
    self._taken = False

  @property
  def repeats(self) -> int:
    """Steps of the path that have to be repeated before the call."""
    return len(self._path) if self._session is None else 0

  def go_back(self) -> None:
    """Repeats the path, where that is needed. InfrastructureError when it cannot be."""
    if self._session is not None:
      return
    session = self._branches.replay(self._path)
    with self._lock:
      if not self._taken:
        self._session = session
        return
    session.close()  # the runner gave this up: nobody else closes it
    raise InfrastructureError("the call was given up")

  def call(self, call: ToolCall) -> Observation:
    """The environment's answer; INFRASTRUCTURE when the path cannot be repeated."""
    try:
      self.go_back()
    except InfrastructureError as error:
      return Observation(f"error: {error}", Code.INFRASTRUCTURE)
    return self._session.call(call)

  def take(self) -> Session | None:
    """The call's session, which the caller owns now; None while it is being replayed."""
    with self._lock:
      self._taken = True
      return self._session
