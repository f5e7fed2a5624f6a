"""Imperfect action sequences, for corpora that a base model learns the manners from, not the skill.

Actions only: their observations come from a replay through a session.
"""

import random
from typing import Any

import numpy as np

from steptool_jax.environments.base import TURNS, Environment
from steptool_jax.types import Action, Finish, Task, ToolCall, ToolCalls, ToolSpec

Random = random.Random | np.random.Generator
_GIVE_UP = Finish("none")


def imperfect(env: Environment, task: Task, rng: Random, rate: float) -> tuple[Action, ...]:
  """The demonstration with a plausible mistake at each action with probability `rate`.

  Mistakes: another tool before the right call or instead of it, the right call twice, giving up
  with the answer "none". All are bad choices and none is bad copying: a value is used only where it
  is known by then, so that an imitator does not learn to make values up. Ends in Finish. rate in
  [0, 1].
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
      actions.extend(_spoil(action, task, rng))
    elif isinstance(action, ToolCalls):  # one of them is forgotten
      left = _without_one(action.calls, rng)
      actions.append(ToolCalls(left) if len(left) > 1 else left[0])
    else:
      actions.append(_GIVE_UP)
    if actions[-1] is _GIVE_UP:
      break
  if actions[-1] is _GIVE_UP and task.metadata.get(TURNS):
    actions[-1] = Finish("none", gave_up=True)  # else the user would go on
  return tuple(actions)


def _pick(options: list, rng: Random) -> Any:
  return options[min(int(rng.random() * len(options)), len(options) - 1)]


def _without_one(calls: tuple[ToolCall, ...], rng: Random) -> tuple[ToolCall, ...]:
  gone = _pick([*range(len(calls))], rng)
  return calls[:gone] + calls[gone + 1 :]


def _spoil(call: ToolCall, task: Task, rng: Random) -> list[Action]:
  kind = _pick(["before", "twice", "instead", "give up"], rng)
  if kind in ("before", "instead"):
    return [_other_tool(call, task, rng), call if kind == "before" else _GIVE_UP]
  return [call, call] if kind == "twice" else [_GIVE_UP]


def _other_tool(call: ToolCall, task: Task, rng: Random) -> ToolCall:
  """Another tool with as many arguments, so that the call looks right."""

  def width(spec: ToolSpec) -> int:
    return len(spec.parameters.get("properties", {}))

  others = [spec for spec in task.tools if spec.name != call.name]
  alike = [spec for spec in others if width(spec) == len(call.arguments)]
  if not others:
    return call
  spec = _pick(alike or others, rng)
  values = [*call.arguments.values()] or ["none"]
  names = list(spec.parameters.get("properties", {}))
  return ToolCall(spec.name, {n: values[i % len(values)] for i, n in enumerate(names)})
