"""What crosses the borders between rooms: plain data, no behaviour, no jax import.

Shapes: B rows, T tokens, S steps, L sampled tokens of a step, M observation tokens.
Host records are frozen dataclasses; what goes to a device is a NamedTuple (a pytree without jax).
"""

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Status(enum.StrEnum):
  """How a conversation ended."""

  ANSWERED = "answered"  # terminated: Finish with an answer
  GAVE_UP = "gave_up"  # terminated: Finish without one, or too many invalid calls in a row
  STEP_BUDGET = "step_budget"  # truncated: no LLM call left
  TOKEN_BUDGET = "token_budget"  # truncated: no context or no step tokens left
  INFRASTRUCTURE_ERROR = "infrastructure_error"  # not the policy's doing: never trained on


# What a step reward model scores: SC and Con of a step, IsSolved after the last one.
HEADS = ("success_calling", "contribution", "solved")
TRUNCATED = frozenset({Status.STEP_BUDGET, Status.TOKEN_BUDGET})


class Code(enum.StrEnum):
  """What became of one call. Only OK counts as a successful call."""

  OK = "ok"
  MALFORMED = "malformed"  # the action text did not parse
  UNKNOWN_TOOL = "unknown_tool"
  BAD_ARGUMENTS = "bad_arguments"  # the JSON schema refused them
  NOT_FOUND = "not_found"  # executed, but there is no such thing
  TOOL_ERROR = "tool_error"  # the tool raised
  TIMEOUT = "timeout"
  RATE_LIMIT = "rate_limit"
  UNAVAILABLE = "unavailable"  # transient: try again
  INFRASTRUCTURE = "infrastructure"  # the simulator itself failed, retries included


@dataclasses.dataclass(frozen=True)
class ToolSpec:
  """A tool as the model sees it. `parameters` is a JSON schema of type object."""

  name: str
  description: str
  parameters: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ToolCall:
  name: str
  arguments: Mapping[str, Any]
  thought: str = ""


@dataclasses.dataclass(frozen=True)
class ToolCalls:
  """Two or more calls of one turn, none of which waits for another's result."""

  calls: tuple[ToolCall, ...]
  thought: str = ""


@dataclasses.dataclass(frozen=True)
class Finish:
  """The final answer, or giving up."""

  answer: str
  gave_up: bool = False
  thought: str = ""


@dataclasses.dataclass(frozen=True)
class Malformed:
  """An action text that does not parse; `reason` goes back to the model as an observation."""

  reason: str


Action = ToolCall | ToolCalls | Finish | Malformed


@dataclasses.dataclass(frozen=True)
class Observation:
  """Answer to one call. Only `text` is shown to the model; the rest is for rewards and metrics.

  Of a turn with several calls it sums up `parts`, their own answers in the order of the calls.
  After a final answer it is the user's next message.
  """

  text: str
  code: Code
  value: Any = None  # the structured (JSON-like) result when code is OK
  changed: bool = False  # the call changed the environment's state
  injected: bool = False  # the fault injector caused it
  seconds: float = 0.0  # measured
  cost: float = 0.0  # USD, by the task's price list
  latency: float = 0.0  # seconds, by the task's price list: simulated, nobody waits for them
  parts: tuple["Observation", ...] = ()  # of the calls of one turn
  solved: float | None = None  # a user's message: how well the turn that it answers was solved


@dataclasses.dataclass(frozen=True)
class Task:
  """One query with its tools. `demonstration` is a gold action sequence that ends in Finish."""

  id: str
  environment: str
  query: str
  tools: tuple[ToolSpec, ...]
  checker: Mapping[str, Any]  # JSON data that the environment's checker reads
  demonstration: tuple[Action, ...] = ()
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
  """One interaction. Tokens and log-probs are recorded when sampled, never rebuilt from text."""

  tokens: np.ndarray  # int32[L], the stop token included
  logprobs: np.ndarray  # float32[L], of the distribution sampled from
  action: Action
  observation: Observation | None = None  # None after Finish and after a token budget
  observation_tokens: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(0, np.int32)
  )  # int32[M], forced after this step; where the next one has a prompt of its own, its end
  success_calling: float = 0.0  # SC in [0, 1]
  contribution: float = 0.0  # Con in [0, 1]
  reward: float = 0.0  # r_k, after shaping
  # int32[P], all that stands in front of this step where history was changed (thoughts stripped,
  # results folded, a sub-agent's own); None: what was there before goes on.
  prompt_tokens: np.ndarray | None = None
  # What the engine recorded for a critic (rollout.reuse); no file holds it.
  values: np.ndarray | None = None  # float32[L], V of the state that each token was sampled in
  hidden: np.ndarray | None = None  # float32[D], the state that the first one was sampled in


class Part(NamedTuple):
  """Steps [start, stop) of a trajectory that share a growing context, and what it begins with."""

  start: int
  stop: int
  prompt: np.ndarray  # int32[P]


def calls_of(action: Action) -> tuple[ToolCall, ...]:
  """The calls of a turn: several, one, or none."""
  if isinstance(action, ToolCalls):
    return action.calls
  return (action,) if isinstance(action, ToolCall) else ()


def by_call(steps: Iterable[Step]) -> list[Step]:
  """The steps with every call of a turn as one of its own, for whoever looks at calls.

  The first of them keeps the turn's tokens, the last one its reward and what was forced after it;
  all keep its SC and Con, which are means over its calls.
  """
  return [part for step in steps for part in _parts(step)]


def _parts(step: Step) -> list[Step]:
  calls = calls_of(step.action)
  if len(calls) < 2:
    return [step]
  answers = step.observation.parts if step.observation is not None else ()
  none = (None,) * (len(calls) - len(answers))
  parts = [
    dataclasses.replace(
      step, action=call, observation=answer, tokens=step.tokens[:0], logprobs=step.logprobs[:0]
    )
    for call, answer in zip(calls, (*answers, *none), strict=True)
  ]
  parts[0] = dataclasses.replace(parts[0], tokens=step.tokens, logprobs=step.logprobs)
  nothing = step.observation_tokens[:0]
  parts[:-1] = [
    dataclasses.replace(part, reward=0.0, observation_tokens=nothing) for part in parts[:-1]
  ]
  parts[1:] = [dataclasses.replace(part, prompt_tokens=None) for part in parts[1:]]
  return parts


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
  task_id: str
  sample: int
  prompt_tokens: np.ndarray  # int32[P]
  steps: tuple[Step, ...]
  status: Status
  solved: float = 0.0  # IsSolved in {0, .5, 1}
  policy_version: int = 0
  # What the rewards are made of, by component; their sum is that of the steps' rewards.
  reward_parts: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def cost(self) -> float:
    """USD of all calls."""
    return math.fsum(s.observation.cost for s in self.steps if s.observation is not None)

  @property
  def latency(self) -> float:
    """Simulated seconds of all calls."""
    return math.fsum(s.observation.latency for s in self.steps if s.observation is not None)

  @property
  def truncated(self) -> bool:
    return self.status in TRUNCATED

  @property
  def parts(self) -> tuple[Part, ...]:
    """The segments: a new one where a step has a prompt of its own. One, where none has."""
    own = [k for k, step in enumerate(self.steps) if k and step.prompt_tokens is not None]
    prompts = (self.prompt_tokens, *(self.steps[k].prompt_tokens for k in own))
    return tuple(map(Part, (0, *own), (*own, len(self.steps)), prompts))

  def part_tokens(self, part: Part) -> int:
    """Tokens of a segment, the last observation included only where nothing follows it."""
    steps = self.steps[part.start : part.stop]
    count = len(part.prompt) + sum(len(s.tokens) + len(s.observation_tokens) for s in steps)
    return count if part.stop == len(self.steps) else count - len(steps[-1].observation_tokens)

  @property
  def num_tokens(self) -> int:
    """Of all segments."""
    return sum(map(self.part_tokens, self.parts))

  @property
  def longest(self) -> int:
    """Tokens of its longest segment: the context that it needs."""
    return max(map(self.part_tokens, self.parts))


class TokenBatch(NamedTuple):
  """Packed trajectories. Every field is [B, T] and aligned with `targets`: value[t] belongs to
  the state that emits targets[t]. Segment 0 is padding; positions run along a trajectory.

  A trajectory is one segment, or several, of several rows, where a step has a prompt of its own
  (Trajectory.parts). Where samples of a task share their prompt, it stands in front of them, but
  for its last token, as a segment of its own that they see (`until`).

  A trajectory that only a critic reads (ArCHer's replay) has step ids and an empty action mask.
  The second group is None until `prepare` has filled what the algorithm needs of it.
  """

  tokens: Any  # int32, the inputs
  targets: Any  # int32, the next tokens
  segment_ids: Any  # int32, 1.. inside a row, 0 = padding
  until: Any  # int32, end of the token's subtree: those in [t, until[t]) see it
  positions: Any  # int32
  action_mask: Any  # bool, targets[t] was sampled by the policy that learns
  step_ids: Any  # int32, index of the step of targets[t] in its trajectory, -1 outside
  step_end: Any  # bool, targets[t] is the last sampled token of its step
  bootstrap: Any  # bool, position after the last target of a truncated trajectory: V of next state
  rewards: Any  # float32, r_k on the last sampled token of step k, else 0 (or spread over all)
  behaviour_logprobs: Any  # float32, as sampled, 0 outside the action mask
  group_ids: Any  # int32, 1.. the task of the trajectory, one number over all rows; 0 = padding
  anchor_ids: Any  # int32, 1.. task and last observation before the step; 0 outside steps

  # None where every trajectory is one segment. Numbers are over all rows.
  part_ids: Any = None  # int32, 1.. those of a trajectory one after the other, in its order
  trajectory_ids: Any = None  # int32, 1..
  trajectory_tokens: Any = None  # int32, sampled tokens of the position's whole trajectory

  old_logprobs: Any = None  # float32
  ref_logprobs: Any = None  # float32
  values: Any = None  # float32
  advantages: Any = None  # float32
  returns: Any = None  # float32, what the critic's values (ArCHer: its Q) are fitted to
  value_targets: Any = None  # float32, what ArCHer's V is fitted to


class TrainState(NamedTuple):
  """Everything that the jitted update reads and writes; donated.

  `trainable` and `frozen` together are the policy's variables (policy/lora.py joins them);
  `reference` is the frozen copy for the KL term; {} where that is "adapters off", or unused.
  ArCHer's critic is trainable["critic"].
  """

  step: Any  # int32[], optimizer steps done
  trainable: Any
  frozen: Any
  reference: Any
  opt_state: Any
  kl_coef: Any  # float32[], coefficient of the KL penalty (moved by the adaptive controller)
  target: Any = ()  # slow copy of the critic (ArCHer); () elsewhere
