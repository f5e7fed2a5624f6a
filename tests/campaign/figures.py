"""What the campaign counted, for the table at its end and a file of one's choice."""

import collections
from collections.abc import Mapping

ROWS: list[tuple[str, int, dict[str, int]]] = []


def add(name: str, count: int, outcomes: Mapping[str, int]) -> None:
  """name: "<group>, <what>". count: its cases. outcomes: how many of them ended how."""
  ROWS.append((name, count, dict(outcomes)))


def totals() -> dict[str, int]:
  """Cases by group."""
  found: collections.Counter[str] = collections.Counter()
  for name, count, _ in ROWS:
    found[name.partition(",")[0]] += count
  return dict(found)
