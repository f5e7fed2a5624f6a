"""Imperfect action sequences, for corpora that a base model learns the manners from, not the skill.

Actions only: their observations come from a replay through a session.
"""

from typing import Any, Protocol

from steptool_jax.environments.base import Environment
from steptool_jax.types import Action, Finish, Task, ToolCall, ToolSpec


class _Random(Protocol):
  """random.Random and numpy.random.Generator both fit."""

  def random(self) -> float: ...


_VALUES = (str, int, float)


def imperfect(env: Environment, task: Task, rng: _Random, rate: float) -> tuple[Action, ...]:
  """The demonstration with a plausible mistake at each action with probability `rate`.

  Mistakes: a wrong or distractor tool before the right call or instead of it, the right call twice,
  a wrong value before the right one, a premature or wrong answer. Every value that is used was
  known by then (an argument so far), so the copying is right where the choice is wrong. Ends in
  Finish. rate in [0, 1].
  """
  if not 0 <= rate <= 1:
    raise ValueError(f"rate is {rate}: must be in [0, 1]")
  if task.environment != env.name:
    raise ValueError(f"task {task.id} belongs to {task.environment}, not to {env.name}")
  if not task.demonstration:
    raise ValueError(f"task {task.id} has no demonstration to spoil")
  actions: list[Action] = []
  known: dict[Any, None] = {}
  for action in task.demonstration:
    if isinstance(action, ToolCall):
      known |= dict.fromkeys(v for v in action.arguments.values() if isinstance(v, _VALUES))
    if rng.random() >= rate:
      actions.append(action)
    elif isinstance(action, ToolCall):
      actions.extend(_spoil(action, task, list(known), rng))
      if isinstance(actions[-1], Finish):
        break
    else:
      actions.append(_guess(list(known), rng))
  return tuple(actions)


def _pick(options: list, rng: _Random) -> Any:
  return options[min(int(rng.random() * len(options)), len(options) - 1)]


def _spoil(call: ToolCall, task: Task, known: list, rng: _Random) -> list[Action]:
  kind = _pick(["before", "twice", "wrong value", "lost", "answer"], rng)
  if kind == "before":
    return [_other_tool(call, task, known, rng), call]
  if kind == "twice":
    return [call, call]
  if kind == "wrong value":
    return [_wrong_value(call, known, rng), call]
  if kind == "lost":
    return [_other_tool(call, task, known, rng), _guess(known, rng)]
  return [_guess(known, rng)]


def _other_tool(call: ToolCall, task: Task, known: list, rng: _Random) -> ToolCall:
  """Another tool with as many arguments, so that the call looks right."""

  def width(spec: ToolSpec) -> int:
    return len(spec.parameters.get("properties", {}))

  others = [spec for spec in task.tools if spec.name != call.name]
  alike = [spec for spec in others if width(spec) == len(call.arguments)]
  if not others:
    return call
  spec = _pick(alike or others, rng)
  values = [*call.arguments.values()] or known or ["none"]
  names = list(spec.parameters.get("properties", {}))
  return ToolCall(spec.name, {n: values[i % len(values)] for i, n in enumerate(names)})


def _wrong_value(call: ToolCall, known: list, rng: _Random) -> ToolCall:
  """One argument replaced by another known value of its type, where there is one."""
  arguments = dict(call.arguments)
  if arguments:
    name = _pick(list(arguments), rng)
    right = arguments[name]
    alike = [v for v in known if v != right and type(v) is type(right)]
    if alike:
      arguments[name] = _pick(alike, rng)
  return ToolCall(call.name, arguments)


def _guess(known: list, rng: _Random) -> Finish:
  return Finish(str(_pick([*known, "none"], rng)))
