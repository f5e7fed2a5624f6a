"""What a session's functions hold, as one digest: so that a change of state is seen untold.

Compared is the data that the functions reach: their closures, the objects that they are methods of,
and the mutable globals that they name. Files, servers, generators of random numbers and foreign
objects without attributes cannot be compared, nor more than 20,000 objects, 200,000 numbers
and texts, or 64 MiB; a tool that changes such a thing says so with `Result(value, changed=True)`.
"""

import collections
import hashlib
import inspect
import random
import sqlite3
import types
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import numpy as np

_MOST = 20_000  # objects that are compared; a larger state is not
_MOST_PLAIN = 200_000  # numbers and texts
_MOST_BYTES = 1 << 26
_LONG = 1024  # texts and data beyond are held as their digest
_PLAIN = (str, bytes, int, float, complex, type(None))
_CLOSED = (random.Random, types.ModuleType, type)  # no state of the tools


def state_digest(functions: Iterable[Callable[..., Any]]) -> bytes | None:
  """Digest of the data that the functions reach; None where it is too large to compare."""
  try:
    plain = repr(_Walk().of(list(functions)))
  except (_TooLarge, RecursionError, ValueError):  # ValueError: an int of thousands of digits
    return None
  return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).digest()


class _TooLarge(Exception):
  pass


class _Walk:
  """Objects -> nested tuples of plain values; an object that comes again is its first number."""

  def __init__(self):
    self._met: dict[int, int] = {}
    self._kept: list[Any] = []  # no id may be given to another object meanwhile
    self._plain = self._bytes = 0

  def of(self, item: Any) -> Any:
    if isinstance(item, _PLAIN):
      self._plain += 1
      if self._plain > _MOST_PLAIN:
        raise _TooLarge
      if isinstance(item, (str, bytes)) and len(item) > _LONG:
        return (type(item).__name__, self._digest(item))
      return item
    if id(item) in self._met:
      return ("again", self._met[id(item)])
    if len(self._met) >= _MOST:
      raise _TooLarge
    self._met[id(item)] = len(self._met)
    self._kept.append(item)
    return (type(item).__qualname__, self._inside(item))

  def _inside(self, item: Any) -> Any:
    if isinstance(item, Mapping):
      return [(self.of(key), self.of(value)) for key, value in list(item.items())]
    if isinstance(item, (list, tuple, collections.deque)):
      return [self.of(entry) for entry in list(item)]
    if isinstance(item, Set):
      return sorted(repr(self.of(entry)) for entry in list(item))
    if isinstance(item, bytearray):
      return self._digest(item)
    if isinstance(item, np.ndarray) and item.dtype != object:
      return (item.shape, item.dtype.str, self._digest(item))
    if isinstance(item, sqlite3.Connection):
      return item.total_changes
    if isinstance(item, types.MethodType):
      return [self.of(item.__self__), self.of(item.__func__)]
    if isinstance(item, types.FunctionType):
      try:
        found = inspect.getclosurevars(item)
      except ValueError:  # a variable that is set on another path only
        raise _TooLarge from None
      shared = {name: v for name, v in found.globals.items() if _own(v, item.__module__)}
      return [self.of(dict(found.nonlocals)), self.of(shared)]
    if isinstance(item, _CLOSED):
      return None
    slots = [name for cls in type(item).__mro__ for name in getattr(cls, "__slots__", ())]
    held = {name: getattr(item, name) for name in slots if hasattr(item, name)}
    return self.of(held | getattr(item, "__dict__", {}))

  def _digest(self, data: Any) -> str:
    if isinstance(data, str):
      data = data.encode("utf-8", "surrogatepass")
    array = isinstance(data, np.ndarray)
    self._bytes += data.nbytes if array else len(data)
    if self._bytes > _MOST_BYTES:
      raise _TooLarge
    return hashlib.sha256(data.tobytes() if array else data).hexdigest()


def _own(value: Any, module: str) -> bool:
  """Whether a global may be the state of a module's tools: a container, or of a class or function
  of the module itself."""
  if isinstance(value, (dict, list, set, bytearray, collections.deque, np.ndarray)):
    return True
  if isinstance(value, types.FunctionType):
    return value.__module__ == module
  return type(value).__module__ == module
