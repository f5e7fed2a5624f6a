"""Where an evaluation's time and tokens went."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from steptool_jax.rollout.setting import Stats
from steptool_jax.types import Step, Trajectory


@dataclasses.dataclass
class Work:
  """Sums over rollouts; the names that rollout.setting.Stats and tree.TreeStats have are theirs."""

  seconds: float = 0.0
  device_seconds: float = 0.0
  tool_wait_seconds: float = 0.0
  llm_calls: int = 0
  sampled_tokens: int = 0
  forced_tokens: int = 0  # all that were appended and not sampled; of these:
  prompt_tokens: int = 0  # every prompt once
  observation_tokens: int = 0  # every observation that a turn followed, once
  diversity_tokens: int = 0  # dfsdt: prompts in front of siblings
  replaced_tokens: int = 0  # dfsdt: siblings' turns, put where such a prompt stood
  shared_tokens: int = 0  # of prompts that were forked and not appended
  siblings_without_room: int = 0
  replayed_calls: int = 0

  @property
  def prefilled_again_tokens(self) -> int:
    """Forced tokens that had been computed before: 0, because backing up is a rewind."""
    once = self.prompt_tokens + self.observation_tokens - self.shared_tokens
    return self.forced_tokens - once - self.diversity_tokens - self.replaced_tokens

  @property
  def device_share(self) -> float:
    return self.device_seconds / max(self.seconds, 1e-9)

  @property
  def host_share(self) -> float:
    """The share of the time that went neither into the model nor into waiting for a tool."""
    return max(0.0, 1 - (self.device_seconds + self.tool_wait_seconds) / max(self.seconds, 1e-9))

  def add(
    self,
    stats: Stats,
    trajectories: Sequence[Trajectory],
    followed: Iterable[Step],
    llm_calls: int,
  ) -> None:
    """Adds one rollout; `followed` are the steps after which there was another turn."""
    self.llm_calls += llm_calls
    self.prompt_tokens += sum(len(t.prompt_tokens) for t in trajectories)
    self.observation_tokens += sum(len(step.observation_tokens) for step in followed)
    for name in _NAMES & vars(stats).keys():
      setattr(self, name, getattr(self, name) + getattr(stats, name))


_NAMES = {field.name for field in dataclasses.fields(Work)}


def document(works: Sequence[Work]) -> dict[str, Any]:
  """The sums over `works` and what follows from them, as JSON data."""
  names = [field.name for field in dataclasses.fields(Work)]
  total = Work(**{name: sum(getattr(work, name) for work in works) for name in names})
  shares = ("device_share", "host_share", "prefilled_again_tokens")
  return dataclasses.asdict(total) | {name: getattr(total, name) for name in shares}
