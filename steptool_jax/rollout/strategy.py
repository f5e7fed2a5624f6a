"""What a tree search is asked for and what it gives back: plain records."""

import dataclasses

import numpy as np

from steptool_jax import config
from steptool_jax.rollout.branching import ROOT
from steptool_jax.types import Status, Step, Trajectory

CANDIDATES = "{candidates}"
DIVERSITY = (
  "You have been at this point before, and what you did then did not lead to an answer. Earlier "
  "actions at this point, with their results:\n"
  f"{CANDIDATES}\n"
  "Think again and choose an action that differs from all of these."
)


@dataclasses.dataclass(frozen=True)
class Search(config.Search):
  """config.Search with what a run adds. Limits.max_steps bounds the depth of a chain.

  max_calls: bounds the whole tree. answers: the search ends with that many. diversity: the user's
  turn in front of a sibling; "{candidates}" becomes the earlier ones. Any end of a chain but an
  answer and giving up goes up 1 level.
  """

  max_calls: int = 30
  answers: int = 1
  diversity: str = DIVERSITY

  def __post_init__(self):
    if CANDIDATES not in self.diversity:
      raise ValueError(f"search.diversity: must contain {CANDIDATES}, the place of the candidates")


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
  """One LLM call. Its context is the prompt and the turns and observations of its ancestors."""

  index: int  # calls are numbered in the order of the search
  parent: int  # ROOT for the first turn
  depth: int  # the first turn has depth 1
  step: Step
  status: Status | None  # how the chain ends here, None where it can go on
  diversity_tokens: np.ndarray  # int32[D], what this turn saw besides its context; mostly empty


@dataclasses.dataclass(frozen=True, eq=False)
class SearchResult:
  """nodes in pre-order; `trajectory` is the chain that the search decided for.

  That is the first answer; else the first chain that gave up; else the one visited last, with
  STEP_BUDGET where the calls ran out in its middle.
  """

  nodes: tuple[Node, ...]
  leaf: int  # index of the chosen chain's last node; ROOT when the prompt did not fit
  trajectory: Trajectory

  @property
  def calls(self) -> int:
    """LLM calls that the whole search took."""
    return len(self.nodes)

  def path(self, leaf: int) -> tuple[Node, ...]:
    """The nodes of the chain that ends in `leaf`, first turn first."""
    out: list[Node] = []
    while leaf != ROOT:
      out.append(self.nodes[leaf])
      leaf = self.nodes[leaf].parent
    return tuple(out[::-1])
