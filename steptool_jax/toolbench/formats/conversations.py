"""Official rows -> training trajectories, tokenised as one conversation.

The files spell one model family's scaffolding (`<|im_start|>` and so on). Here a row is taken apart
into messages and put together again in the layout of a chat format, so that any of them trains any
model: one BOS, control tokens as control ids, a stop token after every response, and a tool's text
as plain text even where it spells a control token. What the messages say is not changed.

A conversation that is longer than the limit is left out whole and reported: a cut one would be
another conversation, with other rewards.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from steptool_jax.data.trajectories import AnnotatedTrajectory
from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.dialogue.parser import FINISH
from steptool_jax.toolbench.formats.converted import Converted
from steptool_jax.toolbench.formats.judged import Annotation, StoredStep
from steptool_jax.toolbench.formats.scaffolding import split_row, tokenise
from steptool_jax.toolbench.formats.training_rows import Dialogue, Message, StepRow
from steptool_jax.types import Code, Finish, Malformed, Observation, Status, Step, Trajectory


@dataclasses.dataclass(frozen=True, eq=False)
class Conversion:
  """What became of `total` rows: records[i] comes from row kept[i]; too_long holds (row, tokens)
  of those that were left out because of `max_tokens`, unusable (row, reason) of those whose texts
  the file does not hold.
  """

  records: tuple[AnnotatedTrajectory, ...]
  kept: tuple[int, ...]
  too_long: tuple[tuple[int, int], ...]
  total: int
  max_tokens: int
  unusable: tuple[tuple[int, str], ...] = ()

  def report(self) -> str:
    """One line for the log."""
    line = f"{len(self.kept)} of {self.total} rows converted"
    if self.too_long:
      rows = ", ".join(f"{row} ({tokens})" for row, tokens in self.too_long[:10])
      more = ", …" if len(self.too_long) > 10 else ""
      line += (
        f"; {len(self.too_long)} left out, longer than {self.max_tokens} tokens: row {rows}{more}"
      )
    if self.unusable:
      rows = ", ".join(f"row {row} ({reason})" for row, reason in self.unusable[:10])
      line += f"; {len(self.unusable)} not usable: {rows}"
    return line


def from_step_rows(
  rows: Sequence[StepRow], chat_format: ChatFormat, max_tokens: int, source: str
) -> Conversion:
  """Annotated rows as trajectories whose steps hold `reward`; row n is task "<source>:<n>".

  SC and Con cannot be told from their sum: they stay 0, so do not shape these rewards again. The
  annotators scored every last step as final, so each trajectory is terminated (GAVE_UP where it
  does not end in an answer). Behaviour log-probs are NaN and flagged unknown.

  ValueError that names the row, for scaffolding of no known family and a final reward outside
  [0, 1]; and for a chat format that is not a ReAct one.
  """

  def convert(n: int, row: StepRow) -> AnnotatedTrajectory:
    where = f"{source}, row {n + 1}"
    messages = split_row(row, where)
    if not 0 <= row.rewards[-1] <= 1:
      raise ValueError(f"{where}: the final reward is {row.rewards[-1]}, must be in [0, 1]")
    prompt, turns = tokenise(messages[:2], messages[2:], chat_format)
    steps = []
    for k, (reward, response) in enumerate(zip(row.rewards, turns[::2], strict=True)):
      forced = turns[2 * k + 1] if 2 * k + 1 < len(turns) else None
      observation = messages[2 * k + 3].text if forced is not None else None
      steps.append(_step(response, forced, observation, reward, chat_format))
    return _record(f"{source}:{n + 1}", messages, prompt, steps, row.rewards[-1])

  return _fitting([convert(n, row) for n, row in enumerate(rows)], max_tokens)


@dataclasses.dataclass(frozen=True)
class Calls:
  """A stored trajectory as its calls; the last one is Finish where it ended in one."""

  query_id: str
  query: str
  tool_names: tuple[str, ...]
  calls: tuple[StoredStep, ...]


def calls_of_converted(entry: Converted) -> Calls:
  """The calls of a converted answer; a text without a call becomes a call without a name."""
  calls = tuple(
    message if isinstance(message, StoredStep) else StoredStep("", "", message)
    for role, message in entry.chain
    if role not in ("system", "user")
  )
  return Calls(entry.query_id, entry.query, entry.tool_names, calls)


def calls_of_annotation(entry: Annotation) -> Calls:
  """The calls of an official annotation; a last one that is not Finish has no scores: left out."""
  final = (entry.final,) if entry.final.name == FINISH else ()
  return Calls(entry.query_id, entry.query, entry.tool_names, (*entry.steps, *final))


def from_calls(entries: Sequence[Calls], chat_format: ChatFormat, max_tokens: int) -> Conversion:
  """Stored calls as trajectories without rewards; task ids are the query ids.

  The files hold no thoughts and no prompts. As in the released training rows, thoughts are empty
  and the system text is the list of function names. Without Finish a trajectory is truncated
  (STEP_BUDGET: the official runs end so). Log-probs are NaN and flagged unknown. Left out as
  unusable, since their texts cannot be known: trajectories with a turn that named no function, a
  Finish that is no JSON, or no call at all.
  """
  records: list[AnnotatedTrajectory] = []
  rows: list[int] = []
  unusable: list[tuple[int, str]] = []
  for n, entry in enumerate(entries, start=1):
    record = _from_calls(entry, chat_format)
    if isinstance(record, str):
      unusable.append((n, record))
    else:
      records.append(record)
      rows.append(n)
  fitting = _fitting(records, max_tokens)
  return dataclasses.replace(
    fitting,
    kept=tuple(rows[n - 1] for n in fitting.kept),
    too_long=tuple((rows[n - 1], tokens) for n, tokens in fitting.too_long),
    total=len(entries),
    unusable=tuple(unusable),
  )


def _from_calls(entry: Calls, chat_format: ChatFormat) -> AnnotatedTrajectory | str:
  """The record, or why there is none."""
  if not entry.calls:
    return "it has no call"
  if not all(call.name for call in entry.calls):
    return "a turn names no function"
  system = f"Specifically, you have access to the following APIs: {list(entry.tool_names)}"
  messages = [Message("system", system), Message("user", f"\n{entry.query}\nBegin!\n")]
  for call in entry.calls:
    text = f"Thought: \nAction: {call.name}\nAction Input: {call.arguments}"
    messages += [Message("assistant", text), Message("function", call.response)]
  finished = entry.calls[-1].name == FINISH
  prompt, turns = tokenise(messages[:2], messages[2:-1], chat_format)
  last = None if finished else chat_format.observation(entry.calls[-1].response)
  forced = [*turns[1::2], last]
  steps = [
    _step(turn, shown, None if shown is None else call.response, 0.0, chat_format)
    for turn, shown, call in zip(turns[::2], forced, entry.calls, strict=True)
  ]
  if finished and not isinstance(steps[-1].action, Finish):
    return "the arguments of Finish are no JSON"
  record = _record(entry.query_id, messages, prompt, steps, 0.0)
  if finished:
    return record
  cut = dataclasses.replace(record.trajectory, status=Status.STEP_BUDGET)
  return dataclasses.replace(record, trajectory=cut)


def from_dialogues(
  dialogues: Sequence[Dialogue], chat_format: ChatFormat, max_tokens: int
) -> Conversion:
  """SFT and RFT instances: all before the last message is the prompt, the last one the only step.

  Task ids are "<query id>:<number>"; rewards are 0.
  """

  def convert(dialogue: Dialogue) -> AnnotatedTrajectory:
    prompt, (response,) = tokenise(dialogue.messages[:-1], dialogue.messages[-1:], chat_format)
    steps = [_step(response, None, None, 0.0, chat_format)]
    task_id = f"{dialogue.query_id}:{dialogue.number}"
    return _record(task_id, dialogue.messages, prompt, steps, 0.0)

  return _fitting([convert(dialogue) for dialogue in dialogues], max_tokens)


def _fitting(records: Sequence[AnnotatedTrajectory], max_tokens: int) -> Conversion:
  """Keeps what is no longer than max_tokens."""
  lengths = [record.trajectory.num_tokens for record in records]
  kept = [n for n, length in enumerate(lengths) if length <= max_tokens]
  return Conversion(
    records=tuple(records[n] for n in kept),
    kept=tuple(n + 1 for n in kept),
    too_long=tuple((n + 1, length) for n, length in enumerate(lengths) if length > max_tokens),
    total=len(records),
    max_tokens=max_tokens,
  )


def _record(
  task_id: str,
  messages: Sequence[Message],
  prompt: np.ndarray,
  steps: Sequence[Step],
  solved: float,
) -> AnnotatedTrajectory:
  last = steps[-1].action
  answered = isinstance(last, Finish) and not last.gave_up
  status = Status.ANSWERED if answered else Status.GAVE_UP
  trajectory = Trajectory(task_id, 0, prompt, tuple(steps), status, solved)
  return AnnotatedTrajectory(trajectory, logprobs_known=False, query=_query(messages[1].text))


def _step(response, forced, text: str | None, reward: float, chat_format: ChatFormat) -> Step:
  action = chat_format.parse(response)
  observation = None
  if text is not None:
    code = Code.MALFORMED if isinstance(action, Malformed) else observation_code(text)
    observation = Observation(text, code)
  return Step(
    tokens=response,
    logprobs=np.full(len(response), np.nan, np.float32),
    action=action,
    observation=observation,
    observation_tokens=np.zeros(0, np.int32) if forced is None else forced,
    reward=reward,
  )


def _query(text: str) -> str:
  """The query of the official user text "{query}\\nBegin!"."""
  return text.strip().removesuffix("Begin!").strip()


# What the official server puts into "error".
_ERRORS = (
  ("timeout error", Code.TIMEOUT),
  ("too many requests", Code.RATE_LIMIT),
  ("rate limit", Code.RATE_LIMIT),
  ("api not working", Code.UNAVAILABLE),
  ("no such function", Code.UNKNOWN_TOOL),
)


def observation_code(text: str) -> Code:
  """The code of a stored observation `{"error": "…", "response": …}`, cut or whole.

  OK is an empty error, whatever the response says; text of another shape is TOOL_ERROR.
  """
  match = re.match(r"""\{\s*["']error["']\s*:\s*(["'])(.*?)\1""", text.strip(), re.DOTALL)
  if match is None:
    return Code.TOOL_ERROR
  error = match[2].casefold()
  if not error:
    return Code.OK
  return next((code for phrase, code in _ERRORS if phrase in error), Code.TOOL_ERROR)
