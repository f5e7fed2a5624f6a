"""Specialists for data_pipeline: they compute a table and give its handle.

A question names a file and what to do with it, as the tasks put it: "sales: join stores, keep area
= karo, sum amount by area, sort sum desc". Where a specialist gets a step wrong, it goes on with a
wrong table: a join or an aggregate without one of its rows, the rows that a filter should have
dropped, the reverse order.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from steptool_jax.environments import tables
from steptool_jax.environments.data_pipeline import PipelineSession
from steptool_jax.environments.markets.specialists import Knowledge, Specialty
from steptool_jax.environments.tables import Table
from steptool_jax.simulators.functions import NotFound
from steptool_jax.types import Action, Finish, Task, ToolCall

_EXAMPLE = "sales: join stores, keep amount > 40, sum amount by area, sort sum desc"


def question_of(task: Task) -> str | None:
  """A task's whole question, from its demonstration."""
  calls = [action for action in task.demonstration if isinstance(action, ToolCall)]
  produced = zip(calls, task.metadata["handles"], strict=True)
  files = {handle: c.arguments["file"] for c, handle in produced if c.name == "load_csv"}
  said = {
    "join": lambda a: f"join {files[a['right']]}",
    "filter_rows": lambda a: f"keep {a['where']}",
    "aggregate": lambda a: a["what"],
    "sort": lambda a: f"sort {a['by']}",
  }
  operations = [said[c.name](c.arguments) for c in calls if c.name in said]
  return f"{next(iter(files.values()))}: {', '.join(operations)}"


def ask(session: PipelineSession, knowledge: Knowledge, question: str) -> dict[str, Any]:
  """{"table": handle, "rows": count} of the table that it takes for the right one.

  Raises:
    NotFound: it does not understand, or there is no such file or column.
  """
  file, colon, rest = question.strip(" ?.").partition(":")
  if not colon:
    raise NotFound(f"I do not understand; ask like: {_EXAMPLE}")
  said = f"{file.strip()}:"
  table = session.file(file.strip())
  for operation in filter(None, map(str.strip, rest.split(","))):
    said += f" {operation}"
    skill, right, wrong = _step(session, table, operation)
    knows, rng = knowledge.of(skill, said)
    table = right if knows else next((t for t in wrong(rng) if t != right), right)
  return session.keep(table)


_Mistakes = Callable[[random.Random], Iterator[Table]]


def _step(session: PipelineSession, table: Table, operation: str) -> tuple[str, Table, _Mistakes]:
  """(skill, the right table, wrong ones to choose from)."""
  verb, _, words = operation.partition(" ")
  try:
    if verb == "join":
      joined = tables.join_tables(table, session.file(words))
      return "join", joined, lambda rng: _shorter(joined, rng)
    if verb == "keep":
      kept = tables.filter_table(table, words)
      dropped = Table(table.columns, tuple(row for row in table.rows if row not in kept.rows))
      return "filter", kept, lambda rng: iter((dropped,))
    if verb == "sort":
      ordered = tables.sort_table(table, words)
      return "sort", ordered, lambda rng: iter((Table(ordered.columns, ordered.rows[::-1]),))
    grouped = tables.aggregate_table(table, operation)

    def mistakes(rng: random.Random) -> Iterator[Table]:
      return (tables.aggregate_table(t, operation) for t in _shorter(table, rng))

    return "aggregate", grouped, mistakes
  except ValueError as error:
    raise NotFound(f"I do not understand {operation!r}; ask like: {_EXAMPLE}") from error


def _shorter(table: Table, rng: random.Random) -> Iterator[Table]:
  """The tables that lack one of its rows."""
  for i in rng.sample(range(len(table.rows)), len(table.rows)):
    yield Table(table.columns, table.rows[:i] + table.rows[i + 1 :])


def rest(task: Task, value: Mapping[str, Any]) -> tuple[Action, ...]:
  write = ToolCall("write_table", {"table": value["table"], "name": task.checker["name"]})
  return (write, Finish("done"))


PIPELINE = Specialty(
  _EXAMPLE,
  {
    "small": {"join": 0.9, "filter": 0.8, "aggregate": 0.7, "sort": 0.8},
    "medium": {"join": 0.95, "filter": 0.9, "aggregate": 0.85, "sort": 0.9},
    "large": {"join": 0.99, "filter": 0.98, "aggregate": 0.97, "sort": 0.98},
  },
  question_of,
  ask,
  rest,
)
