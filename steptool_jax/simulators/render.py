"""Any Python value -> bounded, printable JSON-like data and text."""

import json
import math
import numbers
from collections.abc import Iterator, Mapping, Set
from typing import Any

import numpy as np

_MAX_DEPTH = 16
_CUT = "..."


_MOST_LEAVES = 65_536


def shorten(text: str, limit: int) -> str:
  """The text, or its first `limit` characters and "...": so every observation is cut."""
  return text if len(text) <= limit else text[:limit] + _CUT


def clean_text(text: str, limit: int) -> str:
  """At most `limit` printable characters, cut with "..."; newline and tab survive."""
  if len(text) > limit:
    text = shorten(text, limit - len(_CUT))
  if text.isprintable():
    return text
  # Lone surrogates and control characters would break a tokenizer or a terminal.
  return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def as_json(value: Any, limit: int) -> Any:
  """JSON-like copy of `value` with at most `limit` leaves and strings of `limit` characters.

  NaN and infinities become strings, bytes a note of their size, foreign objects their str, cycles
  and very deep data a note. A fresh copy: what a tool mutates later does not change it.
  """
  budget = [limit]
  open_containers: set[int] = set()

  def convert(item: Any, depth: int) -> Any:
    budget[0] -= 1
    if item is None or isinstance(item, bool):
      return item
    if isinstance(item, str):
      return clean_text(str.__str__(item), limit)
    if isinstance(item, (bytes, bytearray, memoryview)):
      return f"<binary, {memoryview(item).nbytes} bytes>"
    if isinstance(item, np.ndarray):
      item = item.tolist() if item.size <= limit else [*item.ravel()[:limit].tolist(), _CUT]
      return convert(item, depth)
    if isinstance(item, np.generic):
      return convert(item.item(), depth)
    if isinstance(item, numbers.Integral):
      # Python refuses to print integers of more than 4,300 digits.
      item = int(item)
      return item if item.bit_length() <= 1024 else f"<integer of {item.bit_length()} bits>"
    if isinstance(item, numbers.Real):
      number = float(item)
      return number if math.isfinite(number) else str(number)
    if isinstance(item, (Mapping, list, tuple, Set)):
      if id(item) in open_containers:
        return "<cycle>"
      if depth >= _MAX_DEPTH:
        return "<too deep>"
      open_containers.add(id(item))
      try:
        return convert_container(item, depth + 1)
      finally:
        open_containers.discard(id(item))
    return clean_text(_text_of(item), limit)

  def convert_container(item: Any, depth: int) -> Any:
    if isinstance(item, Mapping):
      out = {}
      for key, entry in item.items():
        if budget[0] <= 0:
          out[_CUT] = _CUT
          break
        out[clean_text(key if isinstance(key, str) else _text_of(key), limit)] = convert(
          entry, depth
        )
      return out
    if isinstance(item, Set):
      item = sorted(item, key=_text_of)  # a set's own order varies from process to process
    out = []
    for entry in item:
      if budget[0] <= 0:
        out.append(_CUT)
        break
      out.append(convert(entry, depth))
    return out

  return convert(value, 0)


def leaves(value: Any) -> Iterator[Any]:
  """The values inside of JSON-like data that say something: no booleans, no None."""
  if isinstance(value, Mapping):
    for entry in value.values():
      yield from leaves(entry)
  elif isinstance(value, (list, tuple)):
    for entry in value:
      yield from leaves(entry)
  elif value is not None and not isinstance(value, bool):
    yield value


def render(value: Any, limit: int) -> str:
  """Observation text of an `as_json` value: a string as it is, the rest as compact JSON."""
  if isinstance(value, str):
    return clean_text(value, limit)
  text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
  return clean_text(text, limit)


def plain(text: str) -> Any:
  """What a tool's text says that is JSON, without NaN and endless depth; else the text."""
  try:
    return as_json(json.loads(text, parse_constant=str), _MOST_LEAVES)
  except (ValueError, RecursionError):
    return text


def _text_of(item: Any) -> str:
  try:
    return str(item)
  except Exception:  # a foreign object whose __str__ raises
    return f"<{type(item).__name__}>"
