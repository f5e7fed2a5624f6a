"""What a rollout is done with, by chain.py and tree.py, and what it cost."""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.environments.base import Environment
from steptool_jax.rollout.conversation import Limits
from steptool_jax.rollout.peers import ALONE, Peers
from steptool_jax.simulators.runner import ToolRunner


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
  outgrown: int = 0  # slots that a conversation left for a larger one
  crowded_seconds: float = 0.0  # in wait for one, summed over conversations
  # Why conversations were marked: no session could be opened, or the answer not be graded.
  failures: list[str] = dataclasses.field(default_factory=list)

  @contextlib.contextmanager
  def device(self) -> Iterator[None]:
    """Time in here is time on the device."""
    started = time.monotonic()
    try:
      yield
    finally:
      self.device_seconds += time.monotonic() - started


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Seeds and temperature of one rollout; temperature 0 is greedy."""

  seed: int
  version: int  # of the keys: the same task gives new samples in every iteration
  temperature: float
  policy: int | None = None  # version of the weights; None = that of the keys

  @property
  def weights(self) -> int:
    """The policy version that trajectories keep."""
    return self.version if self.policy is None else self.policy


def step_seed(sampling: Sampling, task_id: str, sample: int, step: int | str) -> np.ndarray:
  """uint32[2], the key of one (task, sample, step): stable across processes and runs."""
  text = f"{sampling.seed}/{sampling.version}/{task_id}/{sample}/{step}"
  return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint32)


@dataclasses.dataclass(frozen=True)
class Setting:
  """Everything that the conversations of one rollout share."""

  engine: Any  # policy/engine.py Engine, or a fake with its methods
  variables: Any  # of the policy
  environment: Environment
  chat_format: ChatFormat
  limits: Limits
  runner: ToolRunner
  sampling: Sampling
  system: str | None = None  # the task description for the chat format
  peers: Peers = ALONE  # the processes that make this very call together; all get everything
