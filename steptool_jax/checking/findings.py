"""What a check has found, and the table that says so to a person."""

import collections
import dataclasses
import textwrap
from collections.abc import Iterable, Sequence

ERROR, WARNING = LEVELS = ("error", "warning")
_ALIKE = 8  # findings of one kind that a table shows


@dataclasses.dataclass(frozen=True)
class Finding:
  """One thing that is wrong, of one task ("" = of the tools, or of all tasks)."""

  level: str  # one of LEVELS
  kind: str  # a word that is the same for all findings alike
  task: str
  what: str
  remedy: str

  def __post_init__(self):
    if self.level not in LEVELS:
      raise ValueError(f"level {self.level!r} is not one of {', '.join(LEVELS)}")


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
  """Errors, then warnings; inside of a level what concerns all tasks comes first."""
  return sorted(findings, key=lambda f: (LEVELS.index(f.level), f.task != ""))


def spread(findings: Sequence[Finding], most: int) -> list[Finding]:
  """The first `most` of worst_first, of every kind at most _ALIKE.

  Where even these are too many, one of every kind comes before a second one of any.
  """
  ordered = worst_first(findings)
  seen: collections.Counter[tuple[str, str]] = collections.Counter()
  rounds = []
  for finding in ordered:
    rounds.append(seen[finding.level, finding.kind])
    seen[finding.level, finding.kind] += 1
  numbers = sorted(
    range(len(ordered)), key=lambda n: (LEVELS.index(ordered[n].level), rounds[n], n)
  )
  few = [n for n in numbers if rounds[n] < _ALIKE]
  return [ordered[n] for n in sorted(few[:most])]


def count(findings: Iterable[Finding], level: str) -> int:
  return sum(f.level == level for f in findings)


def table(findings: Sequence[Finding], most: int = 40, width: int = 110) -> str:
  """Lines for a terminal: level, task, what and remedy of at most `most` findings.

  width: characters of a line, at least 60. A cell that is longer goes on in the next line; what is
  left out is counted by kind.
  """
  if not findings:
    return "nothing is wrong"
  shown = spread(findings, most)
  name = min(max(4, *(len(f.task) for f in shown)), 28)
  rest = width - len(WARNING) - name - 6
  columns = (len(WARNING), name, rest * 3 // 5, rest - rest * 3 // 5)
  rows = [("level", "task", "what", "remedy"), tuple("-" * c for c in columns)]
  lines = [_line(row, columns) for row in rows]
  for f in shown:
    cells = (f.level, f.task or "all", f.what, f.remedy)
    wrapped = [textwrap.wrap(_plain(c), w) or [""] for c, w in zip(cells, columns, strict=True)]
    for k in range(max(map(len, wrapped))):
      lines.append(_line([w[k] if k < len(w) else "" for w in wrapped], columns))
  left = collections.Counter((f.level, f.kind) for f in findings)
  left.subtract((f.level, f.kind) for f in shown)
  more = [f"{n} {level}s of {kind}" for (level, kind), n in left.items() if n]
  if more:
    lines.append(f"and {', '.join(more)}")
  return "\n".join(lines)


def first_words(findings: Sequence[Finding], most: int = 3) -> str:
  """The first errors as one sentence."""
  errors = [f for f in findings if f.level == ERROR]
  named = "; ".join(f"{f.task}: {f.what}" if f.task else f.what for f in spread(errors, most))
  more = len(errors) - most
  return named + (f"; and {more} more" if more > 0 else "")


def _line(cells: Sequence[str], columns: Sequence[int]) -> str:
  return "  ".join(f"{c:{w}}" for c, w in zip(cells, columns, strict=True)).rstrip()


def _plain(text: str) -> str:
  """In one line, without what would move a terminal's cursor: tasks' texts are foreign."""
  return "".join(c if c.isprintable() else " " for c in text)
