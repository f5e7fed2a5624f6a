"""Rules that compare an answer with what is expected. Strict on content, lenient on writing."""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steptool_jax.types import Task

_MINUS = {0x2212: "-", 0x2012: "-"}  # the minus sign and the figure dash
# Plain or with thousands separators, an optional currency sign in front.
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?"
_NUMBER = re.compile(rf"[$€£]?\s*([-+]?{_DIGITS})", re.I)
_SIGN = re.compile(r"^([-+])([$€£])")
_COMMA = re.compile(r"(?<=\d),(?=\d)(?!\d{3}(?!\d))")  # of a list, and not of thousands
_BRACKETS = re.compile(r"\[[-+]?\d+(?:\.\d+)?(?:,[-+]?\d+(?:\.\d+)?)+\]")  # as results are shown
_LONG = re.compile(r"[-+]?\d{16,40}")  # whole numbers beyond a float's digits
_ROUNDING = 1e-6
# Scripts that put no space between words: Thai to Khmer, hiragana and Han; katakana ends where
# another script begins.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u309f\u3400-\u9fff"
_KATAKANA = r"\u30a0-\u30ff"
_LETTER = rf"(?:[^\W{_UNSPACED}{_KATAKANA}]|\d)"  # what may not be beside a whole word
# A number within a text, with its sign: no part of a word, of a date or of a range.
_WITHIN = re.compile(rf"(?<!{_LETTER})(?<![.,/-])[-+]?{_DIGITS}(?!{_LETTER}|[.,/-]\d)", re.I)


def known(checker: Mapping[str, Any]) -> bool:
  """Whether the outcome of a task with this checker is known: type "none" says that it is not."""
  return checker.get("type") != "none"


def unknown(tasks: Iterable[Task]) -> list[str]:
  """Ids of the tasks whose outcome nobody knows."""
  return [task.id for task in tasks if not known(task.checker)]


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
  match = _NUMBER.fullmatch(_SIGN.sub(r"\2\1", normal(text)))
  return None if match is None else _value(match.group(1))


def _value(text: str) -> float | None:
  """An int where a float would lose digits; None for what no float can hold."""
  text = text.replace(",", "")
  if _LONG.fullmatch(text):
    return int(text)
  value = float(text)
  return value if math.isfinite(value) else None


def same_value(answer: str | None, expected: Any, tolerance: float | None = None) -> bool:
  """The whole answer is the expected value: no substring luck, no list of guesses.

  tolerance: how far a number may be away; None: a whole number by a millionth, a fraction by a
  millionth of itself, since both may be rounded.
  """
  if answer is None:
    return False
  if isinstance(expected, (int, float)) and not isinstance(expected, bool):
    got = number(answer)
    return got is not None and close(got, expected, tolerance)
  return normal(answer) == normal(str(expected)) != ""


def whole_word(word: str) -> str:
  """A pattern of `word` with no letter of its script beside it.

  In a script without spaces nothing tells where a word ends: two characters and more may stand
  inside of a longer word, and one alone has to stand alone.
  """
  before, after = (_beside(character, len(word) == 1) for character in (word[:1], word[-1:]))
  return f"(?<!{before}){re.escape(word)}(?!{after})"


def _beside(edge: str, alone: bool) -> str:
  """What may not stand beside a word's edge."""
  if re.match(rf"[{_KATAKANA}]", edge):
    return f"[{_KATAKANA}]"
  if re.match(rf"(?!\d)[{_UNSPACED}]", edge):
    return r"\w" if alone else r"[^\s\S]"
  return _LETTER


def contains_all(answer: str, values: Sequence[str | float], query: str = "") -> bool:
  """Whether the answer has every value, in whole words, and is no list of all candidates.

  Numbers compare by value ("1,234" is 1234, "12.50" is 12.5, "-5" is not 5). A guess is refused: an
  answer with more than twice as many other numbers as wanted values (those of the query do not
  count), or with more than twice as many short items of a list.
  """
  text = normal(answer)
  numbers = _numbers(text)
  wanted = [v if isinstance(v, (int, float)) else number(v) for v in values]
  for value, as_number in zip(values, wanted, strict=True):
    if as_number is not None and any(close(n, as_number) for n in numbers):
      continue
    word = normal(str(value))
    if as_number is not None or not re.search(whole_word(word), text):
      return False
  known = [n for n in wanted if n is not None] + _numbers(query)
  others = {n for n in numbers if not any(close(n, k) for k in known)}
  items = [item for item in re.split(r"[,;|/\n]\s|\band\b|\bor\b", text) if item.strip()]
  short = [item for item in items if len(item.split()) <= 3]
  return len(others) <= 2 * len(values) and len(short) <= max(2 * len(values), 3)


def written_numbers(text: str) -> list[str]:
  """The numbers within a text, without thousands separators: no part of a word, date or range.

  "1,234" is one, "10,12" and "[100,200]" are two.
  """
  text = _BRACKETS.sub(lambda list_: list_.group().replace(",", ", "), normal(text))
  text = _COMMA.sub(", ", text)
  return [m.group().replace(",", "") for m in _WITHIN.finditer(text)]


def _numbers(text: str) -> list[float]:
  return [n for n in map(_value, written_numbers(text)) if n is not None]


def close(a: float, b: float, tolerance: float | None = None) -> bool:
  """Whether `a` may stand for the expected `b`; tolerance as for `same_value`."""
  if tolerance is not None:
    return abs(a - b) <= tolerance * (1 + 1e-9)
  whole = isinstance(b, int) or b.is_integer()
  return abs(a - b) <= _ROUNDING if whole else math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)


def same_table(
  got: tuple[list[str], list[tuple]],
  expected: tuple[list[str], list[tuple]],
  ordered: bool,
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
    _same_cell(a, b)
    for got_row, wanted_row in zip(rows, wanted, strict=True)
    for a, b in zip(got_row, wanted_row, strict=True)
  )


def _same_cell(a: Any, b: Any) -> bool:
  if isinstance(a, (int, float)) and isinstance(b, (int, float)):
    return close(a, b)
  return type(a) is type(b) and a == b


def _row_key(row: tuple) -> list[tuple[str, Any]]:
  # Text first, so that numbers that differ by rounding only cannot reorder rows that text tells
  # apart; numbers are rounded for the same reason.
  texts = [("text", cell) for cell in row if isinstance(cell, str)]
  numbers = [("number", round(cell, 3)) for cell in row if isinstance(cell, (int, float))]
  return texts + numbers
