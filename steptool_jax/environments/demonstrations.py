"""Imperfect action sequences, for corpora that a base model learns the manners from, not the skill.

Actions only: their observations come from a replay through a session.
"""

from typing import Any, Protocol

from steptool_jax.environments.base import Environment
from steptool_jax.types import Action, Finish, Task, ToolCall, ToolSpec


class _Random(Protocol):
  """random.Random and numpy.random.Generator both fit."""

  def random(self) -> float: ...


def imperfect(env: Environment, task: Task, rng: _Random, rate: float) -> tuple[Action, ...]:
  """The demonstration with a plausible mistake at each action with probability `rate`.

  Mistakes: a wrong or distractor tool (instead of the right call or before it), the right call
  twice, a wrong id, a skipped call, a premature or wrong answer. Ends in Finish. rate in [0, 1].
  """
  if not 0 <= rate <= 1:
    raise ValueError(f"rate is {rate}: must be in [0, 1]")
  if task.environment != env.name:
    raise ValueError(f"task {task.id} belongs to {task.environment}, not to {env.name}")
  if not task.demonstration:
    raise ValueError(f"task {task.id} has no demonstration to spoil")
  actions: list[Action] = []
  for action in task.demonstration:
    if rng.random() >= rate:
      actions.append(action)
    elif isinstance(action, ToolCall):
      spoiled = _spoil(action, task, rng)
      actions.extend(spoiled)
      if spoiled and isinstance(spoiled[-1], Finish):
        break
    else:
      actions.append(Finish(_guess(task, rng)))
  return tuple(actions)


def _pick(options: list, rng: _Random) -> Any:
  return options[min(int(rng.random() * len(options)), len(options) - 1)]


def _spoil(call: ToolCall, task: Task, rng: _Random) -> list[Action]:
  kind = _pick(["other", "before", "twice", "wrong value", "skip", "answer"], rng)
  if kind == "other":
    return [_other_tool(call, task, rng)]
  if kind == "before":
    return [_other_tool(call, task, rng), call]
  if kind == "twice":
    return [call, call]
  if kind == "wrong value":
    return [ToolCall(call.name, _wrong_values(call, task, rng)), *_pick([[], [call]], rng)]
  if kind == "skip":
    return []
  return [Finish(_guess(task, rng))]


def _other_tool(call: ToolCall, task: Task, rng: _Random) -> ToolCall:
  """Another tool with as many arguments, so that the call looks right."""

  def width(spec: ToolSpec) -> int:
    return len(spec.parameters.get("properties", {}))

  others = [spec for spec in task.tools if spec.name != call.name]
  alike = [spec for spec in others if width(spec) == len(call.arguments)]
  if not others:
    return call
  spec = _pick(alike or others, rng)
  values = [*call.arguments.values()] or [_guess(task, rng)]
  names = list(spec.parameters.get("properties", {}))
  return ToolCall(spec.name, {n: values[i % len(values)] for i, n in enumerate(names)})


def _wrong_values(call: ToolCall, task: Task, rng: _Random) -> dict[str, Any]:
  """One argument replaced by another value of the same task."""
  arguments = dict(call.arguments)
  if not arguments:
    return arguments
  name = _pick(list(arguments), rng)
  others = [v for v in _values(task) if v != arguments[name]]
  alike = [v for v in others if type(v) is type(arguments[name])]
  if alike:
    arguments[name] = _pick(alike, rng)
  return arguments


def _guess(task: Task, rng: _Random) -> str:
  return str(_pick([*_values(task), "none"], rng))


def _values(task: Task) -> list[Any]:
  """Values that the demonstration passes around, each once, without the answer."""
  calls = [action for action in task.demonstration if isinstance(action, ToolCall)]
  values = (
    v for call in calls for v in call.arguments.values() if isinstance(v, (str, int, float))
  )
  return list(dict.fromkeys(values))
