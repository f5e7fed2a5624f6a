"""A custom task's demonstration: JSON entries -> actions, checked against the tools' schemas."""

from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema

from steptool_jax.simulators.schemas import validator
from steptool_jax.types import Action, Finish, ToolCall, ToolCalls, ToolSpec


def read(entries: Any, specs: Sequence[ToolSpec], turns: bool = False) -> tuple[Action, ...]:
  """The actions of a task's field `demonstration`; ValueError names the entry.

  turns: the user may go on after an answer, so that there may be several.
  """
  if not isinstance(entries, list):
    raise ValueError("field 'demonstration' must be a list")
  schemas = {spec.name: spec for spec in specs}
  actions: list[Action] = []
  for k, entry in enumerate(entries):
    at = f"demonstration, entry {k}"
    last = k == len(entries) - 1
    answers = isinstance(entry, dict) and set(entry) == {"answer"}
    if (last and not answers) or (answers and not last and not turns):
      raise ValueError(f"{at}: the last entry, and no other, must be {{'answer': ...}}")
    if answers:
      if not isinstance(entry["answer"], str):
        raise ValueError(f"{at}: 'answer' must be a string")
      actions.append(Finish(entry["answer"]))
      continue
    several = entry.get("calls") if isinstance(entry, dict) and set(entry) == {"calls"} else None
    if several is None:
      actions.append(_call(at, entry, schemas))
    elif not isinstance(several, list) or len(several) < 2:
      raise ValueError(f"{at}: 'calls' must be a list of two or more")
    else:
      actions.append(ToolCalls(tuple(_call(at, one, schemas) for one in several)))
  return tuple(actions)


def _call(at: str, entry: Any, schemas: Mapping[str, ToolSpec]) -> ToolCall:
  if not isinstance(entry, dict) or set(entry) != {"tool", "arguments"}:
    raise ValueError(f"{at}: must be {{'tool': ..., 'arguments': {{...}}}}")
  if entry["tool"] not in list(schemas):
    raise ValueError(f"{at}: unknown tool {entry['tool']!r} for this task")
  checked = validator(schemas[entry["tool"]])
  wrong = jsonschema.exceptions.best_match(checked.iter_errors(entry["arguments"]))
  if wrong is not None:
    raise ValueError(f"{at}: {wrong.message}")
  return ToolCall(entry["tool"], entry["arguments"])
