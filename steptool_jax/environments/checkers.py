"""Rules that compare an answer with what is expected. Strict on content, lenient on writing."""

import math
import re
import unicodedata
from typing import Any

# Plain or with thousands separators, an optional currency sign in front.
_NUMBER = re.compile(r"[$€£]?\s*([-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?)", re.I)


def normal(text: str) -> str:
  """Case, width, white space, outer quotes and a final full stop do not matter."""
  text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
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
    return got is not None and math.isclose(got, expected, rel_tol=tolerance, abs_tol=tolerance)
  return normal(answer) == normal(str(expected)) != ""


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
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
  return type(a) is type(b) and a == b


def _row_key(row: tuple) -> list[tuple[str, Any]]:
  # Text first, so that numbers that differ by rounding only cannot reorder rows that text tells
  # apart; numbers are rounded for the same reason.
  texts = [("text", cell) for cell in row if isinstance(cell, str)]
  numbers = [("number", round(cell, 3)) for cell in row if isinstance(cell, (int, float))]
  return texts + numbers
