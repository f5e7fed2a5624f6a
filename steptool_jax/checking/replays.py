"""One task's demonstration replayed: does it fit, what fails, what is it paid, is it right."""

import dataclasses
from typing import Any

from steptool_jax.checking.findings import ERROR, WARNING, Finding
from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.environments import checkers
from steptool_jax.environments.base import Environment
from steptool_jax.rewards import rules
from steptool_jax.rollout.conversation import Limits
from steptool_jax.rollout.replaying import perform, replay_actions, unopened
from steptool_jax.simulators.render import clean_text
from steptool_jax.simulators.runner import ToolRunner, TooManyStuck
from steptool_jax.types import Code, Finish, Status, Step, Task, ToolCalls, Trajectory

_WITHOUT_END = 2**30  # tokens and steps of a replay that is measured, not cut
# Codes of a call that nobody should learn from, even where the task is solved in the end.
_NEVER = frozenset({Code.TIMEOUT, Code.INFRASTRUCTURE, Code.MALFORMED})


@dataclasses.dataclass(frozen=True)
class Size:
  """What a demonstration needs; 0 where there is no chat format to count tokens with."""

  prompt: int  # tokens
  tokens: int  # of the whole conversation, prompt included
  steps: int  # LLM calls
  longest: int  # tokens of the longest turn, its stop token included

  def broken(self, limits: Limits) -> dict[str, tuple[int, int]]:
    """limit -> (what is needed, what there is), of the limits that it does not fit."""
    asked = {
      "max_tokens": (self.tokens, limits.max_tokens),
      "max_steps": (self.steps, limits.max_steps),
      "max_step_tokens": (self.longest, limits.max_step_tokens),
    }
    return {name: pair for name, pair in asked.items() if pair[0] > pair[1]}


@dataclasses.dataclass(frozen=True)
class Replay:
  """A whole demonstration, cut by nothing, with SC and Con on its steps."""

  trajectory: Trajectory
  size: Size
  problem: str = ""  # why there is no whole one


def size_of(trajectory: Trajectory) -> Size:
  """Tokens (of the longest context) and steps of a whole trajectory."""
  return Size(
    prompt=len(trajectory.prompt_tokens),
    tokens=trajectory.longest,
    steps=len(trajectory.steps),
    longest=max((len(step.tokens) for step in trajectory.steps), default=0),
  )


def replay(
  environment: Environment,
  task: Task,
  chat_format: ChatFormat | None,
  limits: Limits,
  runner: ToolRunner,
  system: str | None = None,
) -> Replay:
  """Replays the task's demonstration without limits of tokens and steps.

  chat_format: None where the model is not there; then tokens are not counted. TooManyStuck as the
  runner; every other failure is the replay's `problem`.
  """
  endless = Limits(
    max_steps=_WITHOUT_END,
    max_step_tokens=_WITHOUT_END,
    max_tokens=_WITHOUT_END,
    max_invalid=_WITHOUT_END,
    max_observation_chars=limits.max_observation_chars,
    fold=limits.fold,
  )
  try:
    if chat_format is None:
      trajectory = perform(environment, task, task.demonstration, runner=runner)
    else:
      trajectory = replay_actions(
        *(environment, task, task.demonstration, chat_format, endless, system), runner=runner
      )
    trajectory = rules.annotate(task, trajectory)
  except TooManyStuck:
    raise
  except Exception as error:
    lost = unopened(task, 0)
    return Replay(lost, size_of(lost), str(error) or type(error).__name__)
  return Replay(trajectory, size_of(trajectory))


def prompt_tokens(task: Task, chat_format: ChatFormat, system: str | None) -> int:
  """Tokens of the task's prompt, the header of the first turn included."""
  whole = task.metadata.get("system")
  return len(chat_format.prompt(system, task.tools, task.query, whole=whole))


def findings_of(task: Task, found: Replay, limits: Limits) -> list[Finding]:
  """What is wrong with one demonstration."""
  if found.problem:
    return [_finding(ERROR, "replay", task, found.problem, "mend tools, checker or demonstration")]
  trajectory = found.trajectory
  findings = [*_calls(task, trajectory), *_verdict(task, trajectory)]
  if found.size.prompt < limits.max_tokens:
    findings += _fit(task, found.size, limits)
  return [*findings, *_paid(task, trajectory), *_unseen(task, trajectory)]


def _calls(task: Task, trajectory: Trajectory) -> list[Finding]:
  findings = []
  for number, step in enumerate(trajectory.steps, start=1):
    observation = step.observation
    if observation is None or observation.code is Code.OK or observation.injected:
      continue
    bad = observation.code in _NEVER or trajectory.solved == 0
    remedy = "mend the call, or the tool"
    if observation.code is Code.TIMEOUT:
      remedy = "give the tool a time-out of its own, or raise rollout.tool_timeout"
    what = f"call {number}, {_name(step)}: {observation.code}, {clean_text(observation.text, 90)}"
    findings.append(_finding(ERROR if bad else WARNING, "call", task, what, remedy))
  if not trajectory.steps:
    what = "no session could be opened in time"
    findings.append(_finding(ERROR, "call", task, what, "let make_tools return its tools"))
  return findings


def _verdict(task: Task, trajectory: Trajectory) -> list[Finding]:
  last = trajectory.steps[-1].observation if trajectory.steps else None
  if not trajectory.steps or (last is not None and last.code is Code.INFRASTRUCTURE):
    return []  # it was said above
  if trajectory.status is Status.INFRASTRUCTURE_ERROR:
    what = "the checker takes longer than rollout.tool_timeout, or is down"
    return [_finding(ERROR, "checker", task, what, "let it end by itself")]
  if trajectory.solved == 1:
    return []
  level = WARNING if trajectory.solved else ERROR
  what = f"its own checker gives its demonstration {trajectory.solved:g}"
  return [_finding(level, "verdict", task, what, "mend the demonstration, or the checker")]


_NEEDS = {
  "max_tokens": "has {} tokens",
  "max_steps": "takes {} turns",
  "max_step_tokens": "has a turn of {} tokens",
}


def _fit(task: Task, size: Size, limits: Limits) -> list[Finding]:
  return [
    _finding(
      *(WARNING, "fit", task),
      f"the demonstration {_NEEDS[name].format(needed)}, rollout.{name} is {there}",
      f"set rollout.{name} to {needed} or more, or shorten it",
    )
    for name, (needed, there) in size.broken(limits).items()
  ]


def _paid(task: Task, trajectory: Trajectory) -> list[Finding]:
  """Steps of a right demonstration that would earn nothing."""
  if trajectory.solved != 1:
    return []
  findings = []
  for number, step in enumerate(trajectory.steps, start=1):
    observation = step.observation
    if isinstance(step.action, Finish) or observation is None or observation.code is not Code.OK:
      continue
    lacks = [n for n, v in (("SC", step.success_calling), ("Con", step.contribution)) if not v]
    if lacks:
      what = (
        f"call {number}, {_name(step)}, has {' and '.join(lacks)} 0: it earns less than it is due"
      )
      remedy = "return what is used later, or Result(value, changed=True); leave useless calls out"
      findings.append(_finding(WARNING, "reward", task, what, remedy))
  return findings


_VERDICTS = frozenset({"yes", "no", "true", "false"})


def _unseen(task: Task, trajectory: Trajectory) -> list[Finding]:
  """A word that a right demonstration answers with, and that nothing has told it.

  Numbers, verdicts and texts of many words may be made from what was seen: they are not looked at.
  """
  gold = checkers.normal(trajectory.steps[-1].action.answer or "") if trajectory.solved == 1 else ""
  made = not gold or " " in gold or checkers.number(gold) is not None or gold in _VERDICTS
  if made or task.checker.get("type") != "exact":
    return []
  shown = [step.observation.text for step in trajectory.steps if step.observation is not None]
  if any(gold in checkers.normal(text) for text in [task.query, *shown]):
    return []
  what = f"its answer {clean_text(gold, 40)!r} is in no result of its calls, nor in the query"
  remedy = "add the call that tells it, or mend the checker"
  return [_finding(WARNING, "answer", task, what, remedy)]


def row_of(task: Task, split: str, found: Replay, limits: Limits) -> dict[str, Any]:
  """JSON data of one replayed task, for WORKDIR/check.jsonl."""
  trajectory, size = found.trajectory, found.size
  answered = [step for step in trajectory.steps if step.observation is not None]
  calls = [step for step in answered if not isinstance(step.action, Finish)]
  return {
    "id": task.id,
    "split": split,
    "prompt_tokens": size.prompt,
    "tokens": size.tokens,
    "steps": size.steps,
    "longest_step_tokens": size.longest,
    "fits": not (found.problem or size.broken(limits)),
    "solved": trajectory.solved,
    "status": str(trajectory.status),
    "calls": [_name(step) for step in calls],
    "codes": [str(step.observation.code) for step in calls],
    "success_calling": [step.success_calling for step in calls],
    "contribution": [step.contribution for step in calls],
    "seconds": sum(step.observation.seconds for step in calls),
    "problem": found.problem,
  }


def _finding(level: str, kind: str, task: Task, what: str, remedy: str) -> Finding:
  return Finding(level, kind, task.id, what, remedy)


def _name(step: Step) -> str:
  if isinstance(step.action, ToolCalls):
    return ", ".join(call.name for call in step.action.calls)
  return getattr(step.action, "name", "malformed turn")
