"""How a policy uses its tools: transitions, recovery, repeats, cost, before and after.

Everything is counted on trajectories; those that ended in an infrastructure error are left out.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from steptool_jax.evaluation.metrics import action_key
from steptool_jax.types import (
  Action,
  Code,
  Finish,
  Malformed,
  Status,
  Step,
  ToolCall,
  Trajectory,
  by_call,
)

START, ANSWER, GIVE_UP = "(start)", "(answer)", "(give up)"
MALFORMED, UNKNOWN, CUT = "(malformed)", "(unknown tool)", "(out of budget)"

# What follows an error, in the order of the panel.
RETRIED, CHANGED, OTHER = "same call again", "same tool, other arguments", "other tool"
ANSWERED, GAVE_UP, BROKEN, ENDED = "answer", "give up", "malformed", "out of budget"
REACTIONS = (RETRIED, CHANGED, OTHER, ANSWERED, GAVE_UP, BROKEN, ENDED)


Transitions = collections.Counter[tuple[str, str]]


def transitions(trajectories: Iterable[Trajectory]) -> Transitions:
  """How often an action of the first kind was followed by one of the second (see `kind`)."""
  pairs: Transitions = collections.Counter()
  for trajectory in _healthy(trajectories):
    kinds = [START, *(kind(step) for step in by_call(trajectory.steps))]
    if trajectory.truncated:
      kinds.append(CUT)
    pairs.update(itertools.pairwise(kinds))
  return pairs


def kind(step: Step) -> str:
  """Name of the tool, or one of the names in brackets."""
  if isinstance(step.action, Finish):
    return GIVE_UP if step.action.gave_up else ANSWER
  if isinstance(step.action, Malformed):
    return MALFORMED
  unknown = step.observation is not None and step.observation.code is Code.UNKNOWN_TOOL
  return UNKNOWN if unknown else step.action.name


@dataclasses.dataclass(frozen=True)
class Recovery:
  """What a policy did after errors of one sort.

  recovered: share after which the same tool answered OK. solved: tasks with such an error that
  were solved. (Of the injector's errors: recovered_from_fault, solved_after_fault in figures.py.)
  extra_calls: mean number of calls from the error to that OK.
  """

  errors: int
  tasks: int
  recovered: float
  solved: float
  extra_calls: float
  reactions: dict[str, float]  # share of errors, over REACTIONS


def recovery(trajectories: Iterable[Trajectory], injected: bool = True) -> Recovery:
  """What was done after errors of the fault injector, or (injected=False) after all others."""
  reactions: collections.Counter[str] = collections.Counter()
  recovered, extra, solved = [], [], []
  for trajectory in _healthy_calls(trajectories):
    errors = [k for k, step in enumerate(trajectory.steps) if _failed(step, injected)]
    if errors:
      solved.append(trajectory.solved)
    for k in errors:
      reactions[_reaction(trajectory, k)] += 1
      later = _answered_later(trajectory, k)
      recovered.append(later is not None)
      if later is not None:
        extra.append(later - k)
  count = max(len(recovered), 1)
  return Recovery(
    errors=len(recovered),
    tasks=len(solved),
    recovered=_mean(recovered),
    solved=_mean(solved),
    extra_calls=_mean(extra),
    reactions={name: reactions[name] / count for name in REACTIONS},
  )


def repeated_after_ok(trajectories: Iterable[Trajectory]) -> float:
  """The figure of this name: where faults are injected, a retry is the right thing to do."""
  calls = repeats = 0
  for trajectory in _healthy(trajectories):
    answered: set[str] = set()
    for step in by_call(trajectory.steps):
      if not isinstance(step.action, ToolCall):
        continue
      calls += 1
      repeats += action_key(step.action) in answered
      if step.observation is not None and step.observation.code is Code.OK:
        if step.observation.changed:
          answered.clear()
        answered.add(action_key(step.action))
  return repeats / calls if calls else 0.0


def spent_per_solved(trajectories: Iterable[Trajectory]) -> dict[str, float]:
  """Totals over all trajectories, failed ones too, for each solved task; NaN where none is solved.

  The names are those of figures.CELLS.
  """
  healthy = list(_healthy(trajectories))
  solved = sum(t.solved for t in healthy) or float("nan")
  steps = [step for t in healthy for step in t.steps]
  answers = [step.observation for step in steps if step.observation is not None]
  return {
    "llm_calls_per_solved": len(steps) / solved,
    "tokens_per_solved": sum(len(step.tokens) for step in steps) / solved,
    "cost_per_solved": sum(o.cost for o in answers) / solved,
    "latency_per_solved": sum(o.latency for o in answers) / solved,
  }


@dataclasses.dataclass(frozen=True)
class Case:
  """A task that failed before training and is solved after it."""

  task_id: str
  sample: int
  step: int  # the first step whose action is another one
  change: str  # in words
  again: str  # a tool that was called twice or more before, and more often than after; or ""
  corrected: bool  # the paper's case study: the step that changed calls another tool than `again`


def turned_cases(before: Iterable[Trajectory], after: Iterable[Trajectory]) -> list[Case]:
  """Tasks that turned from failed to solved, the most telling first.

  First those that were corrected (the paper's case study), then others that had called a tool again
  and again, then other tools, then the rest; within these by task.
  """
  old = {(t.task_id, t.sample): t for t in _healthy(before)}
  cases = []
  for new in _healthy(after):
    then = old.get((new.task_id, new.sample))
    if then is None or then.solved >= 1 or new.solved < 1 or not new.steps:
      continue
    step = first_change(then, new)
    was = then.steps[step] if step < len(then.steps) else None
    now = new.steps[step] if step < len(new.steps) else None
    again = _called_again(then, new)
    cases.append(
      Case(
        task_id=new.task_id,
        sample=new.sample,
        step=step,
        change=_change(was, now),
        again=again,
        corrected=bool(again and was and now)
        and kind(was) == again
        and kind(now) not in (again, ANSWER),
      )
    )

  def telling(case: Case) -> tuple:
    other = "instead of" in case.change
    return not case.corrected, not case.again, not other, case.task_id, case.sample

  return sorted(cases, key=telling)


def first_change(before: Trajectory, after: Trajectory) -> int:
  """Number of the first step whose action differs (thoughts apart), or where one has ended."""
  shared = min(len(before.steps), len(after.steps))
  for k in range(shared):
    if action_key(before.steps[k].action) != action_key(after.steps[k].action):
      return k
  return shared


# --- parts -----------------------------------------------------------------------------------


def _healthy(trajectories: Iterable[Trajectory]) -> Iterable[Trajectory]:
  return (t for t in trajectories if t.status is not Status.INFRASTRUCTURE_ERROR)


def _healthy_calls(trajectories: Iterable[Trajectory]) -> Iterable[Trajectory]:
  """The same with a step a call."""
  return (dataclasses.replace(t, steps=tuple(by_call(t.steps))) for t in _healthy(trajectories))


def _failed(step: Step, injected: bool) -> bool:
  observation = step.observation
  if observation is None or observation.code is Code.OK:
    return False
  return observation.injected == injected


def _reaction(trajectory: Trajectory, k: int) -> str:
  if k + 1 >= len(trajectory.steps):
    return ENDED if trajectory.truncated else GAVE_UP
  failed, action = trajectory.steps[k].action, trajectory.steps[k + 1].action
  if isinstance(action, Finish):
    return GAVE_UP if action.gave_up else ANSWERED
  if isinstance(action, Malformed):
    return BROKEN
  if not isinstance(failed, ToolCall) or action.name != failed.name:
    return OTHER
  return RETRIED if action_key(action) == action_key(failed) else CHANGED


def _answered_later(trajectory: Trajectory, k: int) -> int | None:
  """The step at which the tool of step k (any tool after a malformed one) answers OK."""
  failed = trajectory.steps[k].action
  for later in range(k + 1, len(trajectory.steps)):
    step = trajectory.steps[later]
    if step.observation is None or step.observation.code is not Code.OK:
      continue
    if not isinstance(failed, ToolCall) or _tool_name(step.action) == failed.name:
      return later
  return None


def _called_again(before: Trajectory, after: Trajectory) -> str:
  then = collections.Counter(_tool_name(step.action) for step in before.steps)
  now = collections.Counter(_tool_name(step.action) for step in after.steps)
  less = {name: n - now[name] for name, n in then.items() if name and n > 1 and n > now[name]}
  return max(less, key=lambda name: (less[name], name), default="")


def _change(was: Step | None, now: Step | None) -> str:
  old, new = (kind(step).strip("()") if step is not None else "" for step in (was, now))
  if not old or not new:
    return f"goes on with {new}" if new else f"stops before {old}"
  if old == new:
    return f"{new} with other arguments" if _tool_name(now.action) else f"another {new}"
  return f"{new} instead of {old}"


def _tool_name(action: Action) -> str:
  return action.name if isinstance(action, ToolCall) else ""


def _mean(values: Sequence[float]) -> float:
  return float(np.mean(values)) if len(values) else float("nan")
