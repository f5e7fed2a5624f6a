"""What was said over the server, as ids: recorded when sampled, never rebuilt from text.

A session's request is matched against its recorded conversations by its messages. One that extends
a conversation appends only what is new; any other one opens a conversation of its own, with a
prompt of its own: history that a client has changed (thoughts stripped, a summary) is another
prompt, and what was sampled after the old one stays as it was. All calls of the model, in their
order, are the session's trajectory; one that does not go on where the call before it ended begins a
segment (types.Step.prompt_tokens).
"""

import collections
import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from steptool_jax.config import INT_MOST, Limits
from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.rollout.conversation import INVALID
from steptool_jax.serving import stops
from steptool_jax.serving.messages import ApiError, Call, ChatRequest, Message, call_of
from steptool_jax.simulators.render import shorten
from steptool_jax.types import (
  Action,
  Code,
  Finish,
  Malformed,
  Observation,
  Status,
  Step,
  ToolCall,
  ToolCalls,
  Trajectory,
  calls_of,
)

# No token of a tokenizer in use is longer; what cannot fit is refused before it is tokenized.
_LONGEST_TOKEN = 256  # characters
# What a session that is over says to a further request: (code, message).
_OVER = {
  Status.STEP_BUDGET: ("step_budget", "the session has made its LLM calls (rollout.max_steps)"),
  Status.TOKEN_BUDGET: (
    "context_length_exceeded",
    "the context of this session is full (rollout.max_tokens)",
  ),
  Status.GAVE_UP: ("gave_up", "too many invalid calls in a row (rollout.max_invalid)"),
  Status.INFRASTRUCTURE_ERROR: ("infrastructure_error", "a tool's infrastructure failed"),
}


def unlimited(size: int) -> Limits:
  """The limits of a client that nobody trains with: what a slot of so many tokens can hold."""
  return Limits(size, INT_MOST, size, INT_MOST, INT_MOST)


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
  """One growing list of ids; every turn makes another one.

  messages: all that the ids stand for, the model's own last. closed: the last turn ended with a
  stop token. calls: the session's number of each step's LLM call. invalid: invalid calls in a row.
  """

  number: int  # in its session
  tools_key: str
  messages: tuple[Message, ...]
  prompt: np.ndarray  # int32[P]
  steps: tuple[Step, ...] = ()
  closed: bool = True
  calls: tuple[int, ...] = ()
  invalid: int = 0

  @property
  def key(self) -> tuple:
    return self.tools_key, self.messages

  def ids(self) -> np.ndarray:
    pieces = [piece for s in self.steps for piece in (s.tokens, s.observation_tokens)]
    return np.concatenate([self.prompt, *pieces])


@dataclasses.dataclass(frozen=True, eq=False)
class Ask:
  """A request in its conversation; nothing of it is recorded before it is answered."""

  request: ChatRequest
  conversation: Conversation  # the new messages' ids and observation included, but not the messages
  forced: tuple[int, ...]  # the beginning of the turn that tool_choice has forced
  limit: int
  # Number of the conversation, of the turn in it, and of the request that is answered there: the
  # second of two equal requests is another draw.
  draw: tuple[int, int, int]


@dataclasses.dataclass(eq=False)
class _Taken:
  """A call of the model. before: int32[N], all that stood in front of it; after: number of the call
  whose conversation it goes on, None at the beginning of one."""

  step: Step
  before: np.ndarray
  after: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
  """One turn, answered. finish: stop, tool_calls or length, as OpenAI says it."""

  action: Action
  text: str
  calls: tuple[Call, ...]
  finish: str


class Session:
  """The conversations of one client, all of them recorded, until a budget of `limits` ends it.

  system: the task description where a request has no system message. keep: of the server that is
  open to everyone: its newest conversations stay so that they can be extended, and nothing ends.
  """

  def __init__(
    self,
    name: str,
    chat_format: ChatFormat,
    limits: Limits,
    system: str | None,
    keep: int | None = None,
  ):
    self.name, self.limits = name, limits
    self._format, self._system, self._keep = chat_format, system, keep
    self._conversations: dict[tuple, Conversation] = {}  # by what a request must begin with
    self.last: Conversation | None = None  # the one that was extended last
    self._taken: list[_Taken] = []  # all calls of a session that is trained on
    self.opened = 0  # conversations so far
    self.turns = 0
    self._asked = 0  # requests that are being answered
    self.ended: Status | None = None
    self._drawn: collections.Counter[tuple[int, int]] = collections.Counter()

  def ask(self, request: ChatRequest) -> Ask:
    """What is to be sampled; ApiError where that cannot be.

    Where a budget ends the session, what came last is recorded all the same, as in a rollout.
    """
    if self.ended is not None:
      code, message = _OVER[self.ended]
      raise ApiError(400, message, code=code)
    if request.tools and not request.several_calls and self._format.results is not None:
      raise ApiError(
        400,
        "parallel_tool_calls: this policy may make several calls a turn (model.parallel_calls); "
        "leave it out, or true",
        "parallel_tool_calls",
      )
    found, new = self._match(request)
    try:
      forced = self._forced(request)
      if found is None:
        self._refuse_another_conversation()
        prompt = self._opening(request)
        conversation = Conversation(self.opened, request.tools_key, (), prompt)
      else:
        conversation = self._extended(found, new, request)
    except ValueError as error:
      raise ApiError(400, str(error), "messages") from None
    ids = len(conversation.ids()) + len(forced)
    if ids >= self.limits.max_tokens:
      raise self._too_long(f"{ids} tokens before the model's turn")
    limit = min(self.limits.max_tokens - ids, self.limits.max_step_tokens - len(forced))
    if request.max_tokens is not None:
      limit = min(limit, request.max_tokens)
    if limit < 1:
      raise ApiError(400, "rollout.max_step_tokens leaves no token beside tool_choice's call")
    at = (conversation.number, len(conversation.steps))
    if self._keep is None:
      self._drawn[at] += 1
    self._asked += 1
    return Ask(request, conversation, tuple(forced), limit, (*at, self._drawn[at] - 1))

  def answered(
    self, ask: Ask, tokens: Sequence[int], logprobs: Sequence[float], stopped: bool, call_id: str
  ) -> Answer:
    """Records a sampled turn and says what it means; logprobs as long as tokens.

    What tool_choice forced stands before the step, not in it: it was not sampled.
    """
    self._asked -= 1
    conversation, request = ask.conversation, ask.request
    answer = self._read(ask, [*ask.forced, *tokens], stopped, call_id)
    if ask.forced:
      conversation = _with_forced(conversation, np.asarray(ask.forced, np.int32))
    step = Step(np.asarray(tokens, np.int32), np.asarray(logprobs, np.float32), answer.action)
    said = Message("assistant", answer.text.strip(), answer.calls)
    grown = dataclasses.replace(
      conversation,
      messages=(*request.messages, said),
      steps=(*conversation.steps, step),
      closed=stopped,
      calls=(*conversation.calls, self.turns),
    )
    if self._keep is None:
      before = conversation.ids()
      after = conversation.calls[-1] if conversation.calls else None
      if after is not None:
        self._heard_after(after, conversation.steps[-1])
      self._taken.append(_Taken(step, before, after))
    self.turns += 1
    self.opened = max(self.opened, grown.number + 1)
    self._conversations[grown.key] = self.last = grown
    if self._keep is not None and len(self._conversations) > self._keep:
      del self._conversations[next(iter(self._conversations))]
    if not stopped and len(grown.ids()) >= self.limits.max_tokens:
      self._end(Status.TOKEN_BUDGET)
    return answer

  def dropped(self) -> None:
    """What `ask` gave is not answered: the client went away, or the server could not."""
    self._asked -= 1

  @property
  def _spent(self) -> bool:
    """Whether there is no call left, those included that are under way."""
    return self.turns + self._asked >= self.limits.max_steps

  def trajectory(self, task_id: str, sample: int, version: int) -> Trajectory:
    """All calls of the model, in their order, with what came of them.

    Where nothing but the client ended them: ANSWERED after an answer or a call (nobody has told
    what came of it), GAVE_UP after a turn that was neither, STEP_BUDGET where no call was left.
    """
    if not self._taken:
      nothing = np.zeros(0, np.int32)
      return Trajectory(task_id, sample, nothing, (), self.ended or Status.INFRASTRUCTURE_ERROR)
    action = self._taken[-1].step.action
    status = Status.ANSWERED
    if self.ended is not None:
      status = self.ended
    elif isinstance(action, Finish):
      status = Status.GAVE_UP if action.gave_up else Status.ANSWERED
    elif self.turns >= self.limits.max_steps:
      status = Status.STEP_BUDGET
    elif isinstance(action, Malformed):
      status = Status.GAVE_UP
    steps = tuple(
      dataclasses.replace(said.step, prompt_tokens=said.before)
      if self._breaks(number)
      else said.step
      for number, said in enumerate(self._taken)
    )
    prompt = self._taken[0].before
    return Trajectory(task_id, sample, prompt, steps, status, policy_version=version)

  def _breaks(self, number: int) -> bool:
    """Whether a call begins a segment, but for the first one."""
    return number > 0 and self._taken[number].after != number - 1

  def _heard_after(self, number: int, step: Step) -> None:
    """What came of a call, unless the next one has gone on from another answer to it."""
    if number + 1 == len(self._taken) or self._breaks(number + 1):
      self._taken[number].step = step

  # --- what a request adds -------------------------------------------------------------------

  def _match(self, request: ChatRequest) -> tuple[Conversation | None, tuple[Message, ...]]:
    """(the conversation that the messages extend, what is new in them)."""
    messages = request.messages
    count = max((k + 1 for k, m in enumerate(messages) if m.role == "assistant"), default=0)
    return self._conversations.get((request.tools_key, messages[:count])), messages[count:]

  def _opening(self, request: ChatRequest) -> np.ndarray:
    """The ids of a conversation from its beginning, turns of an assistant that others said too."""
    self._refuse_hopeless(request.messages)
    messages = list(request.messages)
    system = [messages.pop(0).whole for _ in range(_leading(messages, "system"))]
    query = [messages.pop(0).whole for _ in range(_leading(messages, "user"))]
    described = "\n\n".join(system) if system else self._system
    open_with = "\n\n".join(query)
    f = self._format
    if request.tools:
      ids = [f.prompt(described, request.tools, open_with)]
    else:
      ids = [f.talk(described, open_with)]
    while messages:
      ids.append(self._said(messages.pop(0), bool(request.tools)))
      others = [messages.pop(0) for _ in range(_before_assistant(messages))]
      ids.append(self._heard(others))
    return np.concatenate(ids)

  def _extended(
    self, found: Conversation, new: tuple[Message, ...], request: ChatRequest
  ) -> Conversation:
    """With what came after its last turn; ends the session where a budget is spent with it."""
    last = found.steps[-1]
    observation = self._observation(new, last.action)
    closing = () if found.closed else self._format.stop_ids[:1]
    if observation.code is Code.INFRASTRUCTURE:
      self._record_end(found, observation, (), Status.INFRASTRUCTURE_ERROR)
    invalid = found.invalid + 1 if observation.code in INVALID else 0
    if invalid >= self.limits.max_invalid:
      self._record_end(found, observation, (), Status.GAVE_UP)
    try:
      self._refuse_hopeless(new)
    except ApiError:
      self._record_end(found, observation, (), Status.TOKEN_BUDGET)
    forced = np.concatenate([np.asarray(closing, np.int32), self._heard(new)])
    length = len(found.ids()) + len(forced)
    if length > self.limits.max_tokens:
      self._record_end(found, observation, (), Status.TOKEN_BUDGET)
    if self._spent:
      self._record_end(found, observation, forced, Status.STEP_BUDGET)
    if length == self.limits.max_tokens:
      self._record_end(found, observation, forced, Status.TOKEN_BUDGET)
    return dataclasses.replace(_observed(found, observation, forced), invalid=invalid)

  def _observation(self, new: Sequence[Message], action: Action) -> Observation:
    observation = Observation("\n".join(m.whole for m in new), self._code(new, action))
    results = [Observation(m.whole, m.code) for m in new if m.role == "tool"]
    if isinstance(action, ToolCalls) and len(results) == len(action.calls):
      return dataclasses.replace(observation, parts=tuple(results))
    return observation

  def _code(self, new: Sequence[Message], action: Action) -> Code:
    """What became of a step: as its client says, the worst where there were several results."""
    if isinstance(action, Malformed):
      return Code.MALFORMED
    codes = [message.code for message in new if message.role == "tool"]
    return next((code for code in codes if code is not Code.OK), Code.OK)

  def _heard(self, messages: Sequence[Message]) -> np.ndarray:
    """Everyone else's turns and the header. A system message in mid-conversation is a user's."""
    most = self.limits.max_observation_chars
    return self._format.others(
      [
        ("function", shorten(m.whole, most)) if m.role == "tool" else ("user", m.whole)
        for m in messages
      ]
    )

  def _said(self, message: Message, tools: bool) -> np.ndarray:
    """An assistant's turn that was not sampled here."""
    f = self._format
    if not tools and not message.calls:
      return np.append(f.codec.join([message.whole]), np.int32(f.stop_ids[0]))
    if len(message.calls) > 1 and f.results is None:
      raise ValueError(
        f"messages: an assistant's message has {len(message.calls)} calls; chat format {f.name!r} "
        "has one call a turn"
      )
    if not message.calls:
      return f.render_action(Finish(message.whole))
    calls = [ToolCall(call.name, json.loads(call.arguments)) for call in message.calls]
    if len(calls) > 1:
      return f.render_action(ToolCalls(tuple(calls), message.text))
    return f.render_action(dataclasses.replace(calls[0], thought=message.text))

  def _forced(self, request: ChatRequest) -> list[int]:
    """The beginning of a call of the tool that tool_choice names."""
    if not request.named:
      return []
    text = self._format.write(ToolCall(request.named, {}))
    begun = text[: text.rindex("{}")]
    bare = begun.rstrip(" ")
    # Most tokenizers have the last space in one token with what follows; but it may end the name.
    return self._format.spell(begun if bare.endswith(request.named) else bare).tolist()

  # --- what a turn means ---------------------------------------------------------------------

  def _read(self, ask: Ask, turn: list[int], stopped: bool, call_id: str) -> Answer:
    f, request = self._format, ask.request
    body = turn[:-1] if stopped else turn
    text = f.codec.decode(body)
    at = stops.first_stop(text, request.stops)
    whole = stopped
    if at is not None:
      text, whole = text[:at], True
    if not request.tools:
      return Answer(Finish(text), text, (), "stop" if whole else "length")
    if not whole:
      return Answer(self._cut(ask), text, (), "length")
    action = f.parse(turn)
    if at is not None:
      action = f.read(text) if text.strip() else Malformed("the turn is empty")
    if isinstance(action, (ToolCall, ToolCalls)) and request.calls_allowed:
      called = tuple(
        call_of(call.name, call.arguments, f"{call_id}{f'_{k}' if k else ''}")
        for k, call in enumerate(calls_of(action))
      )
      return Answer(action, action.thought, called, "tool_calls")
    return Answer(action, action.answer if isinstance(action, Finish) else text, (), "stop")

  def _cut(self, ask: Ask) -> Malformed:
    most = len(ask.conversation.ids()) + len(ask.forced) + ask.limit
    if most >= self.limits.max_tokens:
      return Malformed(f"the context of {self.limits.max_tokens} tokens is full")
    return Malformed(
      f"the turn was cut at {ask.limit + len(ask.forced)} tokens: write less, one action a turn"
    )

  # --- ends ----------------------------------------------------------------------------------

  def _end(self, status: Status) -> None:
    if self._keep is None:
      self.ended = status

  def _record_end(
    self, found: Conversation, observation: Observation, forced: Sequence[int], status: Status
  ) -> None:
    self._end(status)
    if self.ended is not None:
      self.last = _observed(found, observation, forced)
      self._heard_after(found.calls[-1], self.last.steps[-1])
    code, message = _OVER[status]
    raise ApiError(400, message, "messages", code)

  def _refuse_another_conversation(self) -> None:
    """An agent that changes history at every turn must not go on for ever."""
    if self._spent:
      self._end(Status.STEP_BUDGET)
      code, message = _OVER[Status.STEP_BUDGET]
      raise ApiError(400, message, code=code)

  def _refuse_hopeless(self, messages: Sequence[Message]) -> None:
    """ApiError for texts that cannot fit, before they are tokenized."""
    most = self.limits.max_observation_chars
    count = sum(min(len(m.whole), most) if m.role == "tool" else len(m.whole) for m in messages)
    if count > self.limits.max_tokens * _LONGEST_TOKEN:
      raise self._too_long(f"messages of {count} characters")

  def _too_long(self, what: str) -> ApiError:
    """A session whose very first prompt is too long is over: nothing can be learnt from it."""
    if self.last is None:
      self._end(Status.TOKEN_BUDGET)
    most = self.limits.max_tokens
    message = f"{what}, but the context has {most} tokens, the model's turn included"
    return ApiError(400, message, "messages", "context_length_exceeded")


def _observed(
  conversation: Conversation, observation: Observation, forced: Sequence[int] | np.ndarray
) -> Conversation:
  """The conversation whose last step was answered by `observation`, shown as the ids `forced`."""
  step = dataclasses.replace(
    conversation.steps[-1],
    observation=observation,
    observation_tokens=np.asarray(forced, np.int32),
  )
  return dataclasses.replace(conversation, steps=(*conversation.steps[:-1], step))


def _with_forced(conversation: Conversation, ids: np.ndarray) -> Conversation:
  if not conversation.steps:
    return dataclasses.replace(conversation, prompt=np.concatenate([conversation.prompt, ids]))
  last = conversation.steps[-1]
  step = dataclasses.replace(
    last, observation_tokens=np.concatenate([last.observation_tokens, ids])
  )
  return dataclasses.replace(conversation, steps=(*conversation.steps[:-1], step))


def _leading(messages: Sequence[Message], role: str) -> int:
  return next((k for k, m in enumerate(messages) if m.role != role), len(messages))


def _before_assistant(messages: Sequence[Message]) -> int:
  return next((k for k, m in enumerate(messages) if m.role == "assistant"), len(messages))
