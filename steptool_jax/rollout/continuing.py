"""Rollouts that go on from a state in the middle of a recorded conversation.

For Monte-Carlo values here, and for conversations of two iterations in carrying.py. The value of a
state is the mean outcome of conversations that go on from it under a policy. Their sessions repeat
the recorded calls first (branching.py), so they begin in the state of the world that the recorded
conversation had reached; what was shown and sampled so far stands in their slots as it was
recorded. Those of one state share its prefill as samples of one task do.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from steptool_jax.environments.base import Environment, Session, Split
from steptool_jax.rollout.branching import replay
from steptool_jax.rollout.chain import Loop
from steptool_jax.rollout.conversation import INVALID, Conversation, State
from steptool_jax.rollout.setting import Setting
from steptool_jax.types import Status, Step, Task, Trajectory


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
  """A state: after the steps `path` of a conversation about `task`, recorded as its `sample`."""

  task: Task
  sample: int
  prompt_tokens: np.ndarray
  path: tuple[Step, ...]

  @property
  def shown(self) -> np.ndarray:
    """int32[N], everything up to here."""
    parts = [part for step in self.path for part in (step.tokens, step.observation_tokens)]
    return np.concatenate([self.prompt_tokens, *parts]).astype(np.int32)

  def number(self, attempt: int) -> int:
    """What stands for the sample in an attempt's keys: so they do not depend on other states."""
    text = f"{self.task.id}/{attempt}/".encode() + self.shown.tobytes()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def starts(task: Task, trajectory: Trajectory) -> list[Start]:
  """The states before the first step and after every step but the last one.

  ValueError for a trajectory of several segments: a conversation that goes on would only grow.
  """
  if len(trajectory.parts) > 1:
    raise ValueError(
      f"trajectory of task {trajectory.task_id!r} has {len(trajectory.parts)} segments, since its "
      "history was changed: no conversation can go on from its states; leave out what rolls on "
      "from them (evaluation.rollouts)"
    )
  return [
    Start(task, trajectory.sample, trajectory.prompt_tokens, trajectory.steps[:k])
    for k in range(len(trajectory.steps))
  ]


def outcomes(
  setting: Setting,
  states: Sequence[Start],
  attempts: int,
  should_stop: Callable[[], bool] = lambda: False,
  on_done: Callable[[Trajectory], None] = lambda trajectory: None,
) -> list[list[float]]:
  """IsSolved of `attempts` conversations from each state, without those that the tools failed.

  Equal states are rolled out once. Raises as chain.rollout.
  """
  jobs: dict[int, Start] = {}
  for start in states:
    jobs |= {start.number(attempt): start for attempt in range(attempts)}
  loop = _Continuing(setting, jobs)
  found = loop.run([(s.task, n) for n, s in jobs.items()], should_stop, on_done)
  ended = {
    n: t.solved
    for n, t in zip(jobs, found, strict=True)
    if t.status is not Status.INFRASTRUCTURE_ERROR
  }
  numbers = [[start.number(attempt) for attempt in range(attempts)] for start in states]
  return [[ended[n] for n in wanted if n in ended] for wanted in numbers]


class _Continuing(Loop):
  """The chain's scheduler over conversations that have begun."""

  def __init__(self, setting: Setting, jobs: dict[int, Start]):
    environment = _Begun(setting.environment, jobs)
    super().__init__(dataclasses.replace(setting, environment=environment))
    self._jobs = jobs

  def _conversation(self, task: Task, sample: int) -> Conversation:
    return GoesOn(self._jobs[sample], sample, self.setting)

  def _repeated(self, task: Task, sample: int) -> int:
    return len(self._jobs[sample].path)


class GoesOn(Conversation):
  """What was shown so far is its prompt; its steps are those that are still to come."""

  def __init__(self, start: Start, sample: int, setting: Setting):
    done = len(start.path)
    limits = dataclasses.replace(setting.limits, max_steps=setting.limits.max_steps - done)
    super().__init__(start.task, sample, setting.chat_format, limits, setting.system)
    if done:
      self._prompt = self._pending = start.shown
      self._length = len(start.shown)
      self.state, self.status = State.NEEDS_APPEND, None
      for step in start.path:
        invalid = step.observation is not None and step.observation.code in INVALID
        self._invalid_in_a_row = self._invalid_in_a_row + 1 if invalid else 0


class _Begun:
  """The environment, whose sessions have repeated the calls of a state's path."""

  def __init__(self, environment: Environment, jobs: dict[int, Start]):
    self.name, self._environment, self._jobs = environment.name, environment, jobs

  def tasks(self, split: Split) -> Sequence[Task]:
    return self._environment.tasks(split)

  def open(self, task: Task, sample: int) -> Session:
    """InfrastructureError where a call answers differently than it was recorded."""
    start = self._jobs[sample]
    return replay(self._environment, task, start.sample, start.path)
