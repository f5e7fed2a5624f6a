"""Rules that compare an answer with what is expected. Strict on content, lenient on writing."""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

_MINUS = {0x2212: "-", 0x2012: "-"}  # the minus sign and the figure dash
# Plain or with thousands separators, an optional currency sign in front.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?"
_NUMBER = re.compile(rf"[$€£]?\s*([-+]?{_DIGITS})", re.I)
# A number within a text, with its sign: no part of a word, of a date or of a range.
_WITHIN = re.compile(rf"(?<![\w.,/-])[-+]?{_DIGITS}(?!\w|[.,/-]\d)", re.I)


def known(checker: Mapping[str, Any]) -> bool:
  """Whether the outcome of a task with this checker is known: type "none" says that it is not."""
  return checker.get("type") != "none"


def normal(text: str) -> str:
  """Case, width, white space, outer quotes and a final full stop do not matter."""
  text = unicodedata.normalize("NFKC", text).translate(_MINUS)
  text = " ".join(text.casefold().split())
  if text.endswith(".") and not text.endswith(".."):
    text = text[:-1].rstrip()
  if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'`":
    text = text[1:-1].strip()
  return text


def number(text: str) -> float | None:
  """The number that the whole text is, or None. "1,234.50" and "$5" are; "5 apples" is not."""
  match = _NUMBER.fullmatch(normal(text))
  if match is None:
    return None
  value = float(match.group(1).replace(",", ""))
  return value if math.isfinite(value) else None


def same_value(answer: str | None, expected: Any, tolerance: float = 1e-6) -> bool:
  """The whole answer is the expected value: no substring luck, no list of guesses."""
  if answer is None:
    return False
  if isinstance(expected, (int, float)) and not isinstance(expected, bool):
    got = number(answer)
    return got is not None and _close(got, expected, tolerance)
  return normal(answer) == normal(str(expected)) != ""


def contains_all(answer: str, values: Sequence[str | float], query: str = "") -> bool:
  """Whether the answer has every value, in whole words, and is no list of all candidates.

  Numbers compare by value ("1,234" is 1234, "12.50" is 12.5, "-5" is not 5). A guess is refused: an
  answer with more than twice as many other numbers as wanted values (those of the query do not
  count), or with more than twice as many short items of a list.
  """
  text = normal(answer)
  numbers = _numbers(text)
  wanted = [float(v) if isinstance(v, (int, float)) else number(v) for v in values]
  for value, as_number in zip(values, wanted, strict=True):
    if as_number is not None and any(_close(n, as_number) for n in numbers):
      continue
    word = normal(str(value))
    if as_number is not None or not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text):
      return False
  known = [n for n in wanted if n is not None] + _numbers(query)
  others = {n for n in numbers if not any(_close(n, k) for k in known)}
  items = [item for item in re.split(r"[,;|/\n]\s|\band\b|\bor\b", text) if item.strip()]
  short = [item for item in items if len(item.split()) <= 3]
  return len(others) <= 2 * len(values) and len(short) <= max(2 * len(values), 3)


def written_numbers(text: str) -> list[str]:
  """The numbers within a text, without thousands separators: no part of a word, date or range."""
  return [m.group().replace(",", "") for m in _WITHIN.finditer(normal(text))]


def _numbers(text: str) -> list[float]:
  return [n for n in map(float, written_numbers(text)) if math.isfinite(n)]


def _close(a: float, b: float, tolerance: float = 1e-6) -> bool:
  return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def same_table(
  got: tuple[list[str], list[tuple]],
  expected: tuple[list[str], list[tuple]],
  ordered: bool,
  tolerance: float = 1e-6,
) -> bool:
  """Two (columns, rows) with the same content. Column order never matters, row order if asked."""
  columns, rows = got
  wanted_columns, wanted = expected
  if sorted(columns) != sorted(wanted_columns) or len(rows) != len(wanted):
    return False
  order = [columns.index(c) for c in wanted_columns]
  rows = [tuple(row[i] for i in order) for row in rows]
  if not ordered:
    rows, wanted = sorted(rows, key=_row_key), sorted(wanted, key=_row_key)
  return all(
    _same_cell(a, b, tolerance)
    for got_row, wanted_row in zip(rows, wanted, strict=True)
    for a, b in zip(got_row, wanted_row, strict=True)
  )


def _same_cell(a: Any, b: Any, tolerance: float) -> bool:
  if isinstance(a, (int, float)) and isinstance(b, (int, float)):
    return _close(a, b, tolerance)
  return type(a) is type(b) and a == b


def _row_key(row: tuple) -> list[tuple[str, Any]]:
  # Text first, so that numbers that differ by rounding only cannot reorder rows that text tells
  # apart; numbers are rounded for the same reason.
  texts = [("text", cell) for cell in row if isinstance(cell, str)]
  numbers = [("number", round(cell, 3)) for cell in row if isinstance(cell, (int, float))]
  return texts + numbers
