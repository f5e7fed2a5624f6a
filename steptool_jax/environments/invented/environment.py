"""invented: tools that nobody has seen. Every task has a world, tools and wordings of its own.

1 to 4 calls that feed one another. It teaches what all tools have in common: to match a question
with a listed tool, to copy names and results whatever their words, and to stop with the answer.
Made-up words, names and some wordings of held-out tasks are in no training task.
"""

import copy
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from steptool_jax.config import Config
from steptool_jax.environments.base import Split, check_split, generator_fields
from steptool_jax.environments.checkers import same_value
from steptool_jax.environments.generated import checked_counts, checked_depths
from steptool_jax.environments.invented.worlds import Drawn, InventedTool, draw
from steptool_jax.simulators.functions import NotFound, Result, Tool, Toolbox
from steptool_jax.types import Finish, Observation, Task, ToolCall

_GOLD_CALLS = (1, 4)


class Invented:
  """The environment. Tasks are a function of the arguments only; each has a world of its own.

  num_train, num_heldout: numbers of tasks. depths: fewest and most gold calls of a task (None = 1
  to 4). tools_per_task: how many tools a task offers at most (None = all of its world, up to some
  20). ValueError for numbers outside their range.
  """

  name = "invented"

  def __init__(
    self,
    num_train: int = 5000,
    num_heldout: int = 400,
    seed: int = 0,
    depths: tuple[int, int] | None = None,
    tools_per_task: int | None = None,
    max_observation_chars: int = 512,
  ):
    self._counts = checked_counts(num_train, num_heldout)
    self._depths = checked_depths(depths, _GOLD_CALLS)
    if tools_per_task is not None and tools_per_task < self._depths[-1]:
      raise ValueError(
        f"config.environment.tools_per_task: {tools_per_task}, but tasks of up to "
        f"{self._depths[-1]} calls take as many tools; 0 = all"
      )
    self._tools_per_task, self._seed, self._max_chars = tools_per_task, seed, max_observation_chars
    self._lock = threading.Lock()
    self._tasks: dict[str, tuple[Task, ...]] = {}

  def tasks(self, split: Split) -> Sequence[Task]:
    check_split(split)
    with self._lock:
      if split not in self._tasks:
        self._tasks[split] = tuple(self._task(split, n) for n in range(self._counts[split]))
      return self._tasks[split]

  def open(self, task: Task, sample: int) -> "InventedSession":
    """A private copy of the task's world; `sample` changes nothing here."""
    drawn = self._draw(task.metadata["split"], task.metadata["number"])
    return InventedSession(task, drawn, self._max_chars)

  def _draw(self, split: Split, number: int) -> Drawn:
    return draw(self._seed, split, number, self._depths, self._tools_per_task)

  def _task(self, split: Split, number: int) -> Task:
    drawn = self._draw(split, number)
    checker: dict[str, Any] = {"type": "state", "changes": [*map(list, drawn.changes)]}
    if drawn.answer is not None:
      checker |= {"type": "value", "answer": drawn.answer}
    return Task(
      id=f"{self.name}/{split}/{number:05d}",
      environment=self.name,
      query=drawn.query,
      tools=tuple(tool.spec for tool in drawn.world.tools),
      checker=checker,
      demonstration=(*drawn.calls, Finish("done" if drawn.answer is None else str(drawn.answer))),
      metadata={"split": split, "number": number, "depth": len(drawn.calls)},
    )


class InventedSession:
  """A private world. Answers are checked by value, and what has changed must be what was asked."""

  def __init__(self, task: Task, drawn: Drawn, max_chars: int):
    self._task, self._max_chars = task, max_chars
    self._kinds, self._tools = drawn.world.kinds, drawn.world.tools
    self._things = {name: copy.deepcopy(dict(kind.things)) for name, kind in self._kinds.items()}
    self._lock = threading.Lock()

  def call(self, call: ToolCall) -> Observation:
    # Schemas are as new as the tools, and slow to compile: only that of the tool that is called.
    called = [self._tool(tool) for tool in self._tools if tool.spec.name == call.name]
    with self._lock:
      return Toolbox(called, self._max_chars).call(call)

  def grade(self, answer: str | None) -> float:
    """1 or 0. A question must leave the world as it was; a change must do that and no more."""
    if answer is None:
      return 0.0
    expected = {name: copy.deepcopy(dict(kind.things)) for name, kind in self._kinds.items()}
    for kind, key, field, value in self._task.checker["changes"]:
      expected[kind][key][field] = value
    with self._lock:
      right = self._things == expected
    checker = self._task.checker
    return float(right and (checker["type"] == "state" or same_value(answer, checker["answer"])))

  def close(self) -> None:
    """Nothing is kept beyond the session's own memory."""

  def _tool(self, tool: InventedTool) -> Tool:
    run: Callable[..., Any] = self._find if tool.does == "find" else self._get_or_change
    return Tool(tool.spec, functools.partial(run, tool))

  def _find(self, tool: InventedTool, /, **arguments: Any) -> Any:
    (name,) = arguments.values()
    found = {known.casefold(): key for known, key in self._kinds[tool.kind].keys.items()}
    if name.casefold() not in found:
      raise NotFound(f"no {tool.kind} {name}")
    return tool.result({tool.fields[0]: found[name.casefold()]})

  def _get_or_change(self, tool: InventedTool, /, **arguments: Any) -> Any:
    key, *given = (arguments[name] for name in tool.spec.parameters["required"])
    things = self._things[tool.kind]
    found = {str(known).casefold(): known for known in things}
    if str(key).casefold() not in found:
      raise NotFound(f"no {tool.kind} {key}")
    thing = things[found[str(key).casefold()]]
    if not given:
      return tool.result({name: thing[name] for name in tool.fields})
    (field,) = tool.fields
    thing[field] = thing[field] + given[0] if tool.does == "add" else given[0]
    return Result(tool.result({field: thing[field]}), changed=True)


def from_config(config: Config, services: Any) -> Invented:
  """The row of base.ENVIRONMENTS."""
  del services
  return Invented(**generator_fields(config))
