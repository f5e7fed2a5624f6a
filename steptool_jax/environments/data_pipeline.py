"""data_pipeline: load, filter, join, aggregate, sort and write CSV tables, 3 to 6 calls.

The written table is checked by content; row order counts only where the query asks for sorting.
Wordings, some compositions and all names are disjoint between train and held-out tasks.
"""

import collections
import dataclasses
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from steptool_jax.config import Config
from steptool_jax.environments import names, tables
from steptool_jax.environments.base import Split, generator_fields
from steptool_jax.environments.checkers import same_table
from steptool_jax.environments.generated import Draw, Generated, SerialSession, Stale
from steptool_jax.environments.tables import Table
from steptool_jax.types import Finish, Task, ToolCall

# Each: files to join (or one), numeric columns, text columns to group or filter by. The text
# columns of a join come from the second file, so that no task can be solved without joining.
_SOURCES: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
  (("sales",), ("amount",), ("city", "item")),
  (("staff",), ("pay",), ("city",)),
  (("items",), ("price",), ("kind",)),
  (("sales", "stores"), ("amount",), ("area",)),
  (("sales", "items"), ("amount", "price"), ("kind",)),
  (("staff", "stores"), ("pay",), ("area",)),
)
# Operations between loading and writing.
_PLANS = (
  ("filter",),
  ("aggregate",),
  ("sort",),
  ("filter", "aggregate"),
  ("filter", "sort"),
  ("aggregate", "sort"),
  ("filter", "aggregate", "sort"),
)
_FRAMES: dict[Split, tuple[str, ...]] = {
  "train": (
    "load {x}, {ops}, write {name}.",
    "from {x}: {ops}, then write it to {name}.",
    "please load {x}, {ops} and write {name}.",
    "write {name} from {x}: {ops}.",
  ),
  "heldout": (
    "please write {name}: load {x}, {ops}.",
    "from {x}, {ops}, and write it to {name}.",
    "load {x}: {ops}, then please write {name}.",
  ),
}
_HELDOUT_COMPOSITIONS = frozenset(
  {"sales+stores>aggregate>sort", "staff>filter>aggregate", "sales+items>filter>sort"}
)
_KINDS = ("lamp", "desk", "chair", "rug", "clock")


@dataclasses.dataclass(frozen=True)
class _Composition:
  """A row of _SOURCES, and the operations between loading and writing."""

  source: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
  plan: tuple[str, ...]

  @property
  def name(self) -> str:
    return ">".join(["+".join(self.source[0]), *self.plan])

  @property
  def depth(self) -> int:
    loading = 3 if len(self.source[0]) == 2 else 1
    return loading + len(self.plan) + 1


def _compositions() -> Iterator[_Composition]:
  for source in _SOURCES:
    for plan in (*_PLANS, ()) if len(source[0]) == 2 else _PLANS:
      yield _Composition(source, plan)


@dataclasses.dataclass(frozen=True)
class _World:
  files: Mapping[str, str]  # name -> CSV text
  names: tuple[str, ...]  # for written tables


def _generate_world(rng: random.Random, split: Split) -> _World:
  pool = rng.sample(names.words(split), 26)
  cities, items, areas, targets = pool[:5], pool[5:11], pool[11:14], pool[14:]
  people = names.full_names(rng, split, 10)
  # Distinct numbers, so that no order is left open.
  amounts, pays, prices = (rng.sample(range(10, 1000), n) for n in (12, 10, 6))

  def csv(header: str, rows: Sequence[tuple]) -> str:
    return "\n".join([header, *(",".join(map(str, row)) for row in rows), ""])

  return _World(
    {
      "sales": csv(
        "item,city,amount", [(rng.choice(items), rng.choice(cities), a) for a in amounts]
      ),
      "items": csv(
        "item,kind,price", [(i, rng.choice(_KINDS), p) for i, p in zip(items, prices, strict=True)]
      ),
      "stores": csv("city,area", [(c, rng.choice(areas)) for c in cities]),
      "staff": csv(
        "person,city,pay", [(n, rng.choice(cities), p) for n, p in zip(people, pays, strict=True)]
      ),
    },
    tuple(targets),
  )


class _Draft:
  """Gold calls, their handles, and the table that the last one gave."""

  def __init__(self, files: Mapping[str, str]):
    self.files = files
    self.calls: list[ToolCall] = []
    self.handles: list[str] = []
    self.table = Table((), ())

  def add(self, name: str, arguments: dict[str, str], table: Table) -> str:
    self.calls.append(ToolCall(name, arguments))
    self.handles.append(f"t{len(self.handles) + 1}")
    self.table = table
    return self.handles[-1]

  def load(self, file: str) -> tuple[str, Table]:
    table = tables.read_csv(self.files[file])
    return self.add("load_csv", {"file": file}, table), table


class DataPipeline(Generated[_World, _Composition]):
  """The environment: 3 to 6 gold calls a task, 10 tools."""

  name = "data_pipeline"
  gold_calls = (3, 6)
  specs = tables.SPECS
  compositions = tuple(_compositions())
  heldout_compositions = _HELDOUT_COMPOSITIONS

  def open(self, task: Task, sample: int) -> "PipelineSession":
    """A session without tables; `sample` changes nothing here."""
    world = self.world(task.metadata["split"], task.metadata["world"])
    return PipelineSession(task, world.files, self._max_chars)

  def make_world(self, rng: random.Random, split: Split) -> _World:
    return _generate_world(rng, split)

  def draw(
    self, rng: random.Random, split: Split, world: _World, composition: _Composition
  ) -> Draw:
    (files, numbers, texts), plan = composition.source, composition.plan
    draft, words = _Draft(world.files), []
    handle, table = draft.load(files[0])
    if len(files) == 2:
      other, right = draft.load(files[1])
      joined = tables.join_tables(table, right)
      handle = draft.add("join", {"left": handle, "right": other}, joined)
    kind, group = rng.choice(("sum", "mean", "max", "count")), rng.choice(texts)
    what = f"{kind} {rng.choice(numbers)} by {group}"
    # An aggregate's column is named after it.
    column = kind if "aggregate" in plan else rng.choice(numbers)
    by = f"{column} {rng.choice(('asc', 'desc'))}"
    unfiltered = draft.table
    for operation in plan:
      before = draft.table
      if operation == "filter":
        text = _condition(rng, before, numbers, texts)
        words.append(f"keep {text}")
        result = tables.filter_table(before, text)
        handle = draft.add("filter_rows", {"table": handle, "where": text}, result)
        continue
      if operation == "aggregate":
        words.append(what)
        result = tables.aggregate_table(before, what)
        unfiltered = tables.aggregate_table(unfiltered, what)
        if len(result.rows) < 2 or len(result.rows) == len(before.rows):
          raise Stale
        handle = draft.add("aggregate", {"table": handle, "what": what}, result)
      else:
        words.append(f"sort {by}")
        result = tables.sort_table(before, by)
        unfiltered = tables.sort_table(unfiltered, by)
        keys = [row[result.column(column)] for row in result.rows]
        if result == before or len(set(keys)) < len(keys):
          raise Stale
        handle = draft.add("sort", {"table": handle, "by": by}, result)
    if "filter" in plan and sorted(unfiltered.rows) == sorted(draft.table.rows):
      raise Stale
    if not draft.table.rows:
      raise Stale
    name = rng.choice(world.names)
    draft.calls.append(ToolCall("write_table", {"table": handle, "name": name}))
    frame = rng.choice(_FRAMES[split])
    if len(files) == 2:
      words.insert(0, f"join {files[1]}")
    return Draw(
      query=frame.format(x=files[0], ops=", ".join(words), name=name),
      frame=frame,
      calls=draft.calls,
      last=Finish("done"),
      checker={
        "type": "table",
        "name": name,
        "columns": list(draft.table.columns),
        "rows": [list(row) for row in draft.table.rows],
        "ordered": "sort" in plan,
      },
      metadata={"handles": (*draft.handles, "")},
    )


def _condition(
  rng: random.Random, table: Table, numbers: Sequence[str], texts: Sequence[str]
) -> str:
  """A condition that keeps some rows and drops some."""
  if rng.random() < 0.5:
    name = rng.choice(numbers)
    cells = sorted(row[table.column(name)] for row in table.rows)
    # A threshold between two cells: > and >= mean the same.
    low, high = rng.choice(list(itertools.pairwise(cells)) or [(0, 0)])
    if high - low < 2:
      raise Stale
    return f"{name} {rng.choice('<>')} {rng.randint(low + 1, high - 1)}"
  name = rng.choice(texts)
  counts = collections.Counter(row[table.column(name)] for row in table.rows)
  if len(counts) < 2:
    raise Stale
  return f"{name} {rng.choice(('=', '!='))} {rng.choice(sorted(counts))}"


class PipelineSession(SerialSession):
  """Private tables by handle; the table written under the asked name is what counts."""

  def __init__(self, task: Task, files: Mapping[str, str], max_chars: int):
    self._owner = tables.PipelineTools(files)
    super().__init__(task, tables.tools(self._owner), max_chars)

  def file(self, name: str) -> Table:
    """A file as a table, which gets no handle; raises NotFound."""
    with self._lock:
      return self._owner.file(name)

  def keep(self, table: Table) -> dict[str, Any]:
    """Gives a table a handle: {"table": handle, "rows": count}."""
    with self._lock:
      return self._owner.keep(table)

  def grade(self, answer: str | None) -> float:
    """1 when the table is there with the right content and the agent finished, else 0."""
    checker = self._task.checker
    with self._lock:
      written = self._owner.written.get(checker["name"])
    if answer is None or written is None:
      return 0.0
    expected = (checker["columns"], [tuple(row) for row in checker["rows"]])
    got = (list(written.columns), list(written.rows))
    return float(same_table(got, expected, checker["ordered"]))

  def close(self) -> None:
    with self._lock:
      self._owner.tables.clear()
      self._owner.written.clear()


def from_config(config: Config, services: Any) -> DataPipeline:
  """The row of base.ENVIRONMENTS."""
  del services
  return DataPipeline(**generator_fields(config))
