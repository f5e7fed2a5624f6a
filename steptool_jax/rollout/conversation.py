"""One conversation as a state machine: ids in, ids out, no model, no engine, no environment.

    NEEDS_APPEND --appended()--> DECODING --sampled()--> CALLING --observe()--> NEEDS_APPEND …
                                    |  ^____| (turn goes on)  |                      DONE
                                    '--- malformed turn: NEEDS_APPEND, finish or budget: DONE

The caller owns the engine's slot: it appends `pending_tokens()`, decodes at most `budget()` tokens,
hands them to `sampled`, runs `call` in the environment and hands the answer to `observe`. Where
history is changed (context.py), it first rewinds the slot to `rewind_to`.
"""

import copy
import enum
import json
from collections.abc import Sequence

import numpy as np

from steptool_jax.config import Limits
from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.environments.base import TURNS
from steptool_jax.rollout import context
from steptool_jax.simulators.render import shorten
from steptool_jax.types import (
  Action,
  Code,
  Finish,
  Malformed,
  Observation,
  Status,
  Step,
  Task,
  ToolCall,
  ToolCalls,
  Trajectory,
)

# What the policy got wrong by itself; a tool that is missing a record or is down is not its doing.
INVALID = frozenset({Code.MALFORMED, Code.UNKNOWN_TOOL, Code.BAD_ARGUMENTS})


class NonFiniteLogprobs(ValueError):
  """The policy's distribution is not one: nothing of this rollout can be trained on."""


class State(enum.StrEnum):
  NEEDS_APPEND = "needs_append"  # append pending_tokens(), then appended()
  DECODING = "decoding"  # decode up to budget() tokens, then sampled()
  CALLING = "calling"  # run `call`, then observe()
  DONE = "done"  # trajectory()


class Conversation:
  """State of one (task, sample). Use from one thread at a time.

  system: the task description for the chat format; task.metadata["system"], where there is one, is
  the whole system text instead, in the formats that take one (ChatFormat.prompt's `whole`).

  A task whose user may go on after a final answer (environments/base.py, TURNS) calls that answer
  too: what `observe` gets is the user's next message, or None when there is none.

  A prompt that leaves no room for a single sampled token ends at once: TOKEN_BUDGET, no steps, no
  prompt tokens (nothing was shown to the model).
  """

  def __init__(
    self,
    task: Task,
    sample: int,
    chat_format: ChatFormat,
    limits: Limits,
    system: str | None = None,
  ):
    self.task = task
    self.sample = sample
    self.limits = limits
    self.state = State.NEEDS_APPEND
    self.status: Status | None = None
    self.call: ToolCall | ToolCalls | Finish | None = None
    self.steps: tuple[Step, ...] = ()
    self._format = chat_format
    self._invalid_in_a_row = 0
    self._tokens: list[int] = []
    self._logprobs: list[float] = []
    self._values: list[float] = []  # none, where none are recorded
    self._hidden: np.ndarray | None = None  # as the open turn began
    self._prompt = chat_format.prompt(
      system, task.tools, task.query, whole=task.metadata.get("system")
    )
    self._pending = self._prompt
    self.rewind_to: int | None = None  # ids that the slot keeps before it takes pending_tokens()
    self._before = self._prompt  # ids in front of the open turn, where history is changed
    self._own: np.ndarray | None = None  # the same, where the open turn has a prompt of its own
    self._length = len(self._prompt)
    if self._length >= limits.max_tokens:
      self._prompt = self._pending = np.zeros(0, np.int32)
      self._length = 0
      self._end(Status.TOKEN_BUDGET)

  @property
  def length(self) -> int:
    """Tokens so far, pending ones included: the engine's slot length while DECODING."""
    return self._length

  @property
  def prompt_tokens(self) -> np.ndarray:
    """int32[P], empty when the prompt did not fit."""
    return self._prompt

  @property
  def turns(self) -> int:
    """Turns of the model that have ended."""
    return len(self.steps)

  @property
  def answer(self) -> str | None:
    """The final answer of an ANSWERED conversation, else None."""
    if self.status is not Status.ANSWERED:
      return None
    action = self.steps[-1].action
    return action.answer if isinstance(action, Finish) else None

  def pending_tokens(self) -> np.ndarray:
    """int32[N] to append to the engine: the prompt at first, then each observation."""
    self._expect(State.NEEDS_APPEND)
    return self._pending

  def appended(self) -> None:
    """The engine holds pending_tokens() now."""
    self._expect(State.NEEDS_APPEND)
    self.rewind_to = None
    self.state = State.DECODING

  def budget(self) -> int:
    """Tokens that the coming decode may sample, at least 1: what the turn and the context allow."""
    if self.state not in (State.NEEDS_APPEND, State.DECODING):
      raise RuntimeError(f"budget() in state {self.state}: nothing is to be decoded")
    turn = self.limits.max_step_tokens - len(self._tokens)
    return min(turn, self.limits.max_tokens - self._length)

  def sampled(
    self,
    tokens: Sequence[int] | np.ndarray,
    logprobs: Sequence[float] | np.ndarray,
    stopped: bool,
    values: np.ndarray | None = None,
    hidden: np.ndarray | None = None,
  ) -> State:
    """Takes int32[N] ids and float32[N] log-probs of one decode call; returns the new state.

    values float32[N], hidden float32[D]: what the engine recorded beside them (kv_slots.Decoded).

    A turn may come in several calls; it ends with its stop token (stopped) or with its budget.
    ValueError for more tokens than budget(), log-probs that do not match, and a stop token that is
    not where `stopped` says; NonFiniteLogprobs.
    """
    self._expect(State.DECODING)
    tokens = np.asarray(tokens, np.int32)
    logprobs = np.asarray(logprobs, np.float32)
    if tokens.shape != logprobs.shape or tokens.ndim != 1:
      raise ValueError(f"tokens {tokens.shape} and logprobs {logprobs.shape} must both be [N]")
    if len(tokens) > self.budget():
      raise ValueError(f"{len(tokens)} tokens sampled, the budget was {self.budget()}")
    if not np.isfinite(logprobs).all():
      raise NonFiniteLogprobs(
        f"task {self.task.id}: the sampler's log-probs are not finite, the policy is broken"
      )
    stops = np.isin(tokens, self._format.stop_ids)
    if stops[:-1].any() or bool(len(stops) and stops[-1]) != stopped:
      raise ValueError(f"stopped={stopped} does not fit the ids' stop tokens at {np.where(stops)}")
    if not self._tokens:
      self._hidden = None if hidden is None else hidden.copy()  # and not all slots'
    if values is not None:
      self._values.extend(values.tolist())
    self._tokens.extend(tokens.tolist())
    self._logprobs.extend(logprobs.tolist())
    self._length += len(tokens)
    if stopped:
      self._act(self._format.parse(self._tokens))
    elif self.budget() == 0:
      self._cut()
    return self.state

  def observe(self, observation: Observation | None) -> State:
    """Takes the environment's answer to `call`, or the user's; returns the new state."""
    self._expect(State.CALLING)
    call, self.call = self.call, None
    if observation is None:
      self._record(call, None, ())
      self._end(Status.ANSWERED)
    else:
      self._answer_call(call, observation, closing=())
    return self.state

  def branch(self) -> "Conversation":
    """An independent copy between two turns (NEEDS_APPEND), to go on from the same state twice."""
    self._expect(State.NEEDS_APPEND)
    # All fields but the open turn's lists are immutable, and no turn is open.
    other = copy.copy(self)
    other._tokens, other._logprobs, other._values = [], [], []
    return other

  def trajectory(self, solved: float, policy_version: int) -> Trajectory:
    """The finished conversation. prompt_tokens and every step's tokens and observation_tokens, one
    after the other, are the ids that the engine saw; where a budget was spent, the last observation
    (the state to bootstrap from) was not appended any more.
    """
    self._expect(State.DONE)
    return Trajectory(
      task_id=self.task.id,
      sample=self.sample,
      prompt_tokens=self._prompt,
      steps=self.steps,
      status=self.status,
      solved=solved,
      policy_version=policy_version,
    )

  def _act(self, action: Action) -> None:
    if isinstance(action, Finish) and (action.gave_up or not self.task.metadata.get(TURNS)):
      self._record(action, None, ())
      self._end(Status.GAVE_UP if action.gave_up else Status.ANSWERED)
    elif isinstance(action, (ToolCall, ToolCalls, Finish)):
      self.call = action
      self.state = State.CALLING
    else:
      self._answer_call(action, _malformed(action), closing=())

  def _cut(self) -> None:
    """The turn has spent its tokens without a stop token."""
    if self._length == self.limits.max_tokens:
      action = Malformed(f"the context of {self.limits.max_tokens} tokens is full")
      self._record(action, None, ())
      self._end(Status.TOKEN_BUDGET)
      return
    action = Malformed(
      f"the turn was cut at {self.limits.max_step_tokens} tokens: write less, one action a turn"
    )
    # The turn must be closed before another may follow; this stop token is forced, not sampled.
    self._answer_call(action, _malformed(action), closing=self._format.stop_ids[:1])

  def _answer_call(
    self, action: Action, observation: Observation, closing: tuple[int, ...]
  ) -> None:
    if observation.code is Code.INFRASTRUCTURE:
      self._record(action, observation, ())
      self._end(Status.INFRASTRUCTURE_ERROR)
      return
    self._invalid_in_a_row = self._invalid_in_a_row + 1 if observation.code in INVALID else 0
    if self._invalid_in_a_row >= self.limits.max_invalid:
      self._record(action, observation, ())
      self._end(Status.GAVE_UP)
      return
    if isinstance(action, Finish):  # what the user says is not cut, as it is not by a server
      shown = self._format.others([("user", observation.text)])
    else:
      most = self.limits.max_observation_chars
      shown = self._format.observation(
        *(shorten(o.text, most) for o in observation.parts or (observation,))
      )
    forced = np.concatenate([np.asarray(closing, np.int32), shown])
    here, grown = None, self._length + len(forced)
    if context.changes(self._format, self.limits.fold):
      step = Step(np.asarray(self._tokens, np.int32), np.zeros(0), action, None, forced)
      here = context.shown(self._format, self.limits.fold, self._prompt, (*self.steps, step))
    needed = grown if here is None else len(here)
    if needed > self.limits.max_tokens:
      # All or nothing: half an observation would be a state that no prompt can lead to.
      self._record(action, observation, ())
      self._end(Status.TOKEN_BUDGET)
      return
    full, spent = needed == self.limits.max_tokens, len(self.steps) + 1 >= self.limits.max_steps
    if full or spent:
      # No turn follows: the state to bootstrap from is that of history as it stands, if it fits.
      self._record(action, observation, forced if grown <= self.limits.max_tokens else ())
      self._end(Status.STEP_BUDGET if spent else Status.TOKEN_BUDGET)
      return
    self._record(action, observation, forced)
    self._pending = forced
    if here is not None:
      self._go_on_from(here)
    self.state = State.NEEDS_APPEND

  def _go_on_from(self, here: np.ndarray) -> None:
    """The next turn sees the ids `here`, whatever the slot holds."""
    holds = np.concatenate([self._before, self.steps[-1].tokens])
    same = min(context.common(holds, here), len(here) - 1)
    if same < len(holds):
      self._own, self.rewind_to = here, same
    self._before, self._pending, self._length = here, here[same:], len(here)

  def _record(
    self, action: Action, observation: Observation | None, forced: Sequence[int] | np.ndarray
  ) -> None:
    step = Step(
      tokens=np.asarray(self._tokens, np.int32),
      logprobs=np.asarray(self._logprobs, np.float32),
      action=action,
      observation=observation,
      observation_tokens=np.asarray(forced, np.int32),
      prompt_tokens=self._own,
      values=np.asarray(self._values, np.float32) if self._values else None,
      hidden=self._hidden,
    )
    self._own = self._hidden = None
    self.steps = (*self.steps, step)
    self._length += len(step.observation_tokens)
    self._tokens, self._logprobs, self._values = [], [], []

  def _end(self, status: Status) -> None:
    self.status = status
    self.state = State.DONE

  def _expect(self, state: State) -> None:
    if self.state is not state:
      raise RuntimeError(f"conversation of task {self.task.id} is {self.state}, not {state}")


def _malformed(action: Malformed) -> Observation:
  text = json.dumps({"error": f"malformed action: {action.reason}"}, ensure_ascii=False)
  return Observation(text=text, code=Code.MALFORMED)
