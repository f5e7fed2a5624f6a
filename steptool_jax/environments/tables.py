"""Typed tables in memory and the tools over them: load, filter, join, aggregate, sort, write.

Conditions, aggregates and orders are written as short strings ("amount > 40", "sum amount by
city", "amount desc") and read by fixed patterns: nothing is evaluated.
"""

import csv
import dataclasses
import io
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steptool_jax.simulators.functions import NotFound, Result, Tool, tool

Cell = str | int | float
_OPS: Mapping[str, Callable[[Any, Any], bool]] = {
  "<=": operator.le,
  ">=": operator.ge,
  "!=": operator.ne,
  "<": operator.lt,
  ">": operator.gt,
  "=": operator.eq,
}
_WHERE = re.compile(r"\s*(\w+)\s*(<=|>=|!=|<|>|=)\s*(.+?)\s*")
_AGGREGATE = re.compile(r"\s*(sum|mean|max|min|count)\s+(\w+)\s+by\s+(\w+)\s*")
_SORT = re.compile(r"\s*(\w+)\s+(asc|desc)\s*")
_AGGREGATES: Mapping[str, Callable[[Sequence[Any]], Cell]] = {
  "sum": sum,
  "mean": lambda cells: sum(cells) / len(cells),
  "max": max,
  "min": min,
  "count": len,
}


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows with named columns; a column is all text or all numbers."""

  columns: tuple[str, ...]
  rows: tuple[tuple[Cell, ...], ...]

  def column(self, name: str) -> int:
    if name not in self.columns:
      raise NotFound(f"no column {name}")
    return self.columns.index(name)

  def numeric(self, index: int) -> bool:
    return all(not isinstance(row[index], str) for row in self.rows)


_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]+)?")
_MAX_ROWS = 10_000


def _cell(text: str) -> Cell:
  # Python's own int() and float() take "1_000", "nan" and "infinity" too.
  match = _NUMBER.fullmatch(text.strip())
  if match is None:
    return text
  return float(text) if match.group(1) else int(text)


def read_csv(text: str) -> Table:
  """A column whose every cell is a number is numeric. ValueError for ragged or empty text."""
  lines = list(csv.reader(io.StringIO(text)))
  if not lines or not lines[0]:
    raise ValueError("the CSV has no header line")
  header, body = lines[0], lines[1:]
  for number, line in enumerate(body, start=2):
    if len(line) != len(header):
      raise ValueError(f"CSV line {number}: {len(line)} cells, the header has {len(header)}")
  typed = []
  for cells in zip(*body, strict=True):
    parsed = [_cell(cell) for cell in cells]
    typed.append(cells if any(isinstance(c, str) for c in parsed) else parsed)
  rows = tuple(zip(*typed, strict=True)) if typed else ()
  return Table(tuple(header), rows)


def filter_table(table: Table, where: str) -> Table:
  match = _WHERE.fullmatch(where)
  if match is None:
    raise ValueError("where must look like 'amount > 40' or 'city = karo'")
  name, op, text = match.groups()
  index, value = table.column(name), text.strip("'\"")
  if table.rows and table.numeric(index):
    value = _cell(value)
    if isinstance(value, str):
      raise ValueError(f"{name} holds numbers, {value} is none")
  compare = _OPS[op]
  return Table(table.columns, tuple(row for row in table.rows if compare(row[index], value)))


def join_tables(left: Table, right: Table) -> Table:
  """Inner join over all columns that both have; the right side's other columns follow."""
  shared = [c for c in left.columns if c in right.columns]
  if not shared:
    raise ValueError("the tables share no column")
  extra = [i for i, c in enumerate(right.columns) if c not in shared]
  matches: dict[tuple[Cell, ...], list[tuple[Cell, ...]]] = {}
  at = [right.columns.index(c) for c in shared]
  for row in right.rows:
    matches.setdefault(tuple(row[i] for i in at), []).append(tuple(row[i] for i in extra))
  at = [left.columns.index(c) for c in shared]
  found = ((row, matches.get(tuple(row[i] for i in at), ())) for row in left.rows)
  rows: list[tuple[Cell, ...]] = []
  for row, tails in found:
    rows.extend((*row, *tail) for tail in tails)
    if len(rows) > _MAX_ROWS:  # joins of joins of duplicates grow doubly exponentially
      raise ValueError(f"the result has more than {_MAX_ROWS} rows")
  return Table((*left.columns, *(right.columns[i] for i in extra)), tuple(rows))


def aggregate_table(table: Table, what: str) -> Table:
  """Two columns: the group's and one that is named as the aggregate ("sum")."""
  match = _AGGREGATE.fullmatch(what)
  if match is None:
    raise ValueError("what must look like 'sum amount by city' (sum, mean, max, min, count)")
  kind, name, by = match.groups()
  index, group = table.column(name), table.column(by)
  if kind in ("sum", "mean") and not table.numeric(index):
    raise ValueError(f"{name} is text: {kind} needs numbers")
  groups: dict[Cell, list[Any]] = {}
  for row in table.rows:
    groups.setdefault(row[group], []).append(row[index])
  return Table((by, kind), tuple((g, _AGGREGATES[kind](cells)) for g, cells in groups.items()))


def sort_table(table: Table, by: str) -> Table:
  match = _SORT.fullmatch(by)
  if match is None:
    raise ValueError("by must look like 'amount asc' or 'amount desc'")
  index = table.column(match.group(1))
  rows = sorted(table.rows, key=lambda row: row[index], reverse=match.group(2) == "desc")
  return Table(table.columns, tuple(rows))


class PipelineTools:
  """The tools of one session: files by name, intermediate tables by handle (t1, t2, ...)."""

  def __init__(self, files: Mapping[str, str]):
    self.files = files
    self.tables: dict[str, Table] = {}
    self.written: dict[str, Table] = {}

  def file(self, name: str) -> Table:
    if name not in self.files:
      raise NotFound(f"no file {name}")
    return read_csv(self.files[name])

  def keep(self, table: Table) -> dict[str, Any]:
    handle = f"t{len(self.tables) + 1}"
    self.tables[handle] = table
    return {"table": handle, "rows": len(table.rows)}

  def _table(self, handle: str) -> Table:
    if handle not in self.tables:
      raise NotFound(f"no table {handle}")
    return self.tables[handle]

  def load_csv(self, file: str) -> dict[str, Any]:
    """Load a file as a table."""
    return self.keep(self.file(file))

  def filter_rows(self, table: str, where: str) -> dict[str, Any]:
    """Keep rows, where is like: amount > 40"""
    return self.keep(filter_table(self._table(table), where))

  def join(self, left: str, right: str) -> dict[str, Any]:
    """Join two tables on the column they share."""
    return self.keep(join_tables(self._table(left), self._table(right)))

  def aggregate(self, table: str, what: str) -> dict[str, Any]:
    """Group rows, what is like: sum amount by city"""
    return self.keep(aggregate_table(self._table(table), what))

  def sort(self, table: str, by: str) -> dict[str, Any]:
    """Sort rows, by is like: amount desc"""
    return self.keep(sort_table(self._table(table), by))

  def write_table(self, table: str, name: str) -> Result:
    """Write a table under a name."""
    content = self._table(table)
    # Without a change there is no value at all: such a call earns nothing (rewards/rules.py).
    if self.written.get(name) == content:
      return Result({"changed": []})
    self.written[name] = content
    return Result({"written": name, "rows": len(content.rows)}, changed=True)

  def list_files(self) -> dict[str, Any]:
    """Names of the files."""
    return {"files": list(self.files)}

  def describe(self, table: str) -> dict[str, Any]:
    """Columns of a table."""
    return {"columns": list(self._table(table).columns)}

  def first_row(self, table: str) -> dict[str, Any]:
    """First row of a table."""
    content = self._table(table)
    return {"row": list(content.rows[0]) if content.rows else []}

  def plot(self, table: str) -> dict[str, Any]:
    """Draw a table."""
    self._table(table)
    return {"plot": []}


_OWN = ("file", "keep")
_NAMES = tuple(
  name
  for name, member in vars(PipelineTools).items()
  if callable(member) and name[0] != "_" and name not in _OWN
)
SPECS = {name: tool(getattr(PipelineTools({}), name)).spec for name in _NAMES}


def tools(owner: PipelineTools) -> list[Tool]:
  """All tools over this owner's tables; the specs are shared."""
  return [Tool(spec, getattr(owner, name)) for name, spec in SPECS.items()]
