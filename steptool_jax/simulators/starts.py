"""A task's own start: the value of its field `state`, handed to what makes the tools."""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.render import clean_text

STATE = "state"  # field of a task record, and name of the parameter


def takes_state(make: Callable[..., Any]) -> bool:
  """Whether `make` receives a task's state: its first parameter has no default or is named `state`.

  ValueError for a function that needs more than one argument.
  """
  try:
    parameters = list(inspect.signature(make).parameters.values())
  except (TypeError, ValueError):  # a callable without a signature
    return False
  named = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  needed = [p for p in parameters if p.default is p.empty and p.kind not in named]
  if len(needed) > 1 or any(p.kind is p.KEYWORD_ONLY for p in needed):
    name = getattr(make, "__name__", "make_tools")
    names = ", ".join(p.name for p in needed)
    raise ValueError(f"{name} needs {names}: it may take one argument, the task's state")
  return bool(needed) or any(p.name == STATE for p in parameters[:1])


def made(make: Callable[..., Any], with_state: bool, state: Any) -> list[Any]:
  """The functions of one session; the state is a copy of its own, so no other session sees changes.

  ValueError where `make` raises, which names it; InfrastructureError as it is.
  """
  try:
    return list(make(copy.deepcopy(state)) if with_state else make())
  except InfrastructureError:
    raise  # what is down for now is no mistake of make_tools
  except Exception as error:
    name = getattr(make, "__name__", "make_tools")
    given = f"({STATE} = {clean_text(repr(state), 60)})" if with_state else "()"
    raise ValueError(f"{name}{given} raised {type(error).__name__}: {error}") from error


def metadata_of(record: Mapping[str, Any], with_state: bool) -> dict[str, Any]:
  """What the task keeps of its record's state. ValueError where nothing receives it."""
  state = record.get(STATE)
  if state is None:
    return {}
  if not with_state:
    raise ValueError(
      "has a 'state', but nothing receives it: let the tools come from a function "
      "`def make_tools(state)`, which is called with it for every conversation"
    )
  return {STATE: state}
