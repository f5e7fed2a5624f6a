"""Recorded answers: the official tool_response_cache folder, and new answers beside it.

The base folder is only read: <Category>/<tool>_for_<Category>/<api>.json, each an object
{str(arguments): {error, response}}. New answers go to a folder of their own (written.py).
"""

import ast
import collections
import contextlib
import dataclasses
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.toolbench.simulators.virtual import (
  NOT_PARSED,
  PASSING_ERRORS,
  SIMULATOR_FAILED,
  Simulator,
  VirtualRequest,
  VirtualResponse,
  failure_in,
  locate,
  parse_arguments,
  response_of,
)
from steptool_jax.toolbench.simulators.written import Place, WrittenAnswers

_MAX_RESOLVED, _MAX_KEY = 1 << 16, 1024  # entries, and characters of each one's arguments


@dataclasses.dataclass(frozen=True)
class CacheStats:
  """Counts so far. API files are read when first asked for."""

  files: int  # API files read
  entries: int  # usable answers in them
  conflicts: int  # entries that mean the same arguments as another, with another answer
  damaged_files: int  # not JSON to the end: the entries before the damage are used
  invalid_entries: int  # skipped: not {error, response}
  failed_entries: int  # skipped: what the official server kept when its own model had failed
  unparsed_keys: int  # found under their exact text only
  exact_hits: int
  canonical_hits: int
  written_hits: int  # answered from the writable cache
  misses: int
  appended: int


def canonical_key(arguments: Mapping[str, Any]) -> str:
  """One text for all ways to write the same arguments.

  Order of names does not matter; 1, 1.0, "1" and "1.0" are one, and so are 2.5 and "2.5". A text
  counts as a number only where it is what Python prints for it: "007" and "1.10" stay texts.
  """
  return repr(_plain(dict(arguments)))


_DECIMAL = re.compile(r"-?[0-9]{1,20}\.[0-9]{1,20}")


def _plain(value: Any) -> Any:
  # Strings and dictionaries first: nearly all there is, 50,000 times a second.
  if isinstance(value, str):
    if "." in value and _DECIMAL.fullmatch(value) and repr(float(value)) == value:
      return _number(float(value))
    return value
  if isinstance(value, dict):
    return {str(name): _plain(value[name]) for name in sorted(value, key=str)}
  if value is None or isinstance(value, bool):
    return value
  if isinstance(value, float):
    return _number(value)
  if isinstance(value, (list, tuple)):
    return [_plain(entry) for entry in value]
  return str(value)


def _number(value: float) -> str:
  whole = value.is_integer() and abs(value) < 2**53
  return str(int(value)) if whole else repr(value)


@dataclasses.dataclass(frozen=True)
class _Entries:
  """The answers of one API, by exact and by canonical key."""

  exact: dict[str, VirtualResponse]
  canonical: dict[str, VirtualResponse]


_NONE = _Entries({}, {})


class Cache:
  """A Simulator over recorded answers. The exact key is looked up first, then the canonical one.

  folder: the official tool_response_cache, or None for no base. writable: folder of the new
  answers, made when missing, or None for a cache that is only read. Where entries of one canonical
  key disagree, the first one that says something (no error, a response) wins, else the first one;
  each keeps its own exact key. The files of the folder are listed once, at the start. Raises
  OSError or ValueError for a missing folder or another layout.
  """

  def __init__(self, folder: Path | str | None, writable: Path | str | None = None):
    if folder is None and writable is None:
      raise ValueError("a cache needs a folder to read, a writable folder, or both")
    self._files = _list_files(Path(folder)) if folder is not None else {}
    self._written = WrittenAnswers(Path(writable)) if writable is not None else None
    self._loaded: dict[Place, _Entries] = {}
    # Answers never change, so what an exact key came to is kept: the long way is slow.
    self._resolved: dict[tuple[Place, str], tuple[VirtualResponse, str]] = {}
    self._counts: collections.Counter[str] = collections.Counter()
    self._load_lock, self._count_lock = threading.Lock(), threading.Lock()

  def answer(self, request: VirtualRequest) -> VirtualResponse | None:
    """The recorded answer, or None; the official parse error for input that is no object."""
    place = locate(request.category, request.tool_name, request.api_name)
    entries = self._entries(place)
    try:
      arguments = parse_arguments(request.tool_input)
      exact = str(arguments)
      found, how = entries.exact.get(exact), "exact_hits"
      if found is None and (place, exact) in self._resolved:
        found, how = self._resolved[place, exact]
      elif found is None and (entries.canonical or self._written is not None):
        canonical = canonical_key(arguments)
        found, how = entries.canonical.get(canonical), "canonical_hits"
    except (ValueError, RecursionError):
      return NOT_PARSED
    if found is None and self._written is not None:
      found, how = self._written.get(place, canonical), "written_hits"
    room = len(exact) <= _MAX_KEY and len(self._resolved) < _MAX_RESOLVED
    if found is not None and how != "exact_hits" and room:
      self._resolved[place, exact] = found, how
    with self._count_lock:
      self._counts[how if found is not None else "misses"] += 1
    return found

  def append(self, request: VirtualRequest, response: VirtualResponse) -> VirtualResponse:
    """Keeps a new answer for good and returns the one that counts from now on: an answer that is
    there already, perhaps from another process, is never changed.

    Raises InfrastructureError when it cannot be written, or is a simulator's own failure.
    """
    if self._written is None:
      raise ValueError("this cache is only read: give it a writable folder")
    wrong = failure_in(response)
    if wrong:
      raise InfrastructureError(f"the answer for {request.api_name} {wrong}")
    arguments = parse_arguments(request.tool_input)
    place = locate(request.category, request.tool_name, request.api_name)
    entries, canonical = self._entries(place), canonical_key(arguments)
    known = entries.exact.get(str(arguments)) or entries.canonical.get(canonical)
    if known is not None:
      return known
    kept, new = self._written.put(place, str(arguments), canonical, response)
    with self._count_lock:
      self._counts["appended"] += new
    return kept

  def examples(self, request: VirtualRequest, count: int = 5) -> list[tuple[str, dict[str, Any]]]:
    """The first `count` recorded (arguments text, {error, response}) of the request's API."""
    place = locate(request.category, request.tool_name, request.api_name)
    found = [(key, r.as_dict()) for key, r in list(self._entries(place).exact.items())[:count]]
    if self._written is not None and len(found) < count:
      found += [(k, r.as_dict()) for k, r in self._written.first(place, count - len(found))]
    return found

  def stats(self) -> CacheStats:
    with self._count_lock:
      return CacheStats(**{f.name: self._counts[f.name] for f in dataclasses.fields(CacheStats)})

  def close(self) -> None:
    if self._written is not None:
      self._written.close()

  def _entries(self, place: Place) -> _Entries:
    entries = self._loaded.get(place)
    if entries is not None:
      return entries
    path = self._files.get(place)
    if path is None:
      return _NONE
    with self._load_lock:
      if place not in self._loaded:
        try:
          data = path.read_bytes()
        except OSError as error:
          raise InfrastructureError(f"cache file {path} cannot be read: {error}") from error
        entries, counts = _read_entries(data)
        with self._count_lock:
          self._counts.update(counts)
        self._loaded[place] = entries
    return self._loaded[place]


class Recorded:
  """A cache, and another simulator for what it does not know, whose answers it keeps.

  Passing troubles of an API (time-outs, rate limits, missing keys) are handed on, not kept.
  """

  def __init__(self, cache: Cache, simulator: Simulator):
    self._cache, self._simulator = cache, simulator

  def answer(self, request: VirtualRequest) -> VirtualResponse | None:
    known = self._cache.answer(request)
    if known is not None:
      return known
    found = self._simulator.answer(request)
    if found is None or found.error in PASSING_ERRORS or found == NOT_PARSED:
      return found
    return self._cache.append(request, found)


def _list_files(folder: Path) -> dict[Place, Path]:
  if not folder.is_dir():
    raise FileNotFoundError(
      f"cache folder {folder} does not exist: give the official tool_response_cache folder, "
      "unpacked, or no folder"
    )
  files = {}
  for category in _folders(folder):
    suffix = f"_for_{category.name}"
    for tool in _folders(category.path):
      if tool.name.endswith(suffix):
        with os.scandir(tool.path) as found:
          for file in found:
            name, extension = os.path.splitext(file.name)
            if extension == ".json":
              files[category.name, tool.name.removesuffix(suffix), name] = Path(file.path)
  if not files:
    raise ValueError(
      f"cache folder {folder} holds no <Category>/<tool>_for_<Category>/<api>.json: give the "
      "tool_response_cache folder itself"
    )
  return files


def _folders(path: str | Path) -> list[os.DirEntry]:
  with os.scandir(path) as entries:
    return [entry for entry in entries if entry.is_dir()]


def _read_entries(data: bytes) -> tuple[_Entries, collections.Counter[str]]:
  counts: collections.Counter[str] = collections.Counter(files=1)
  try:
    pairs = json.loads(data)
    if not isinstance(pairs, dict):
      raise ValueError("not an object")
  except (ValueError, RecursionError):
    counts["damaged_files"] += 1
    pairs = dict(_salvage(data.decode(errors="replace")))
  exact: dict[str, VirtualResponse] = {}
  canonical: dict[str, VirtualResponse] = {}
  for key, entry in pairs.items():
    try:
      response = response_of(entry)
    except ValueError:
      counts["invalid_entries"] += 1
      continue
    if response.error == SIMULATOR_FAILED:
      counts["failed_entries"] += 1
      continue
    exact[key] = response
    try:
      same = canonical_key(_arguments_of(key))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      counts["unparsed_keys"] += 1
      continue
    rival = canonical.setdefault(same, response)
    if rival != response:
      counts["conflicts"] += 1
      if _says_something(response) and not _says_something(rival):
        canonical[same] = response
  counts["entries"] += len(exact)
  return _Entries(exact, canonical), counts


def _arguments_of(key: str) -> Mapping[str, Any]:
  """The arguments that a key prints; some exports have JSON instead of Python there."""
  try:
    arguments = ast.literal_eval(key)
  except (ValueError, SyntaxError):
    arguments = json.loads(key)
  if not isinstance(arguments, dict):
    raise ValueError("not an arguments object")
  return arguments


def _says_something(response: VirtualResponse) -> bool:
  return not response.error and bool(response.response)


def _salvage(text: str) -> Iterator[tuple[str, Any]]:
  """The complete `"key": value` pairs at the start of a cut-off JSON object."""
  decoder, blank = json.JSONDecoder(), re.compile(r"[\s,]*")
  start = re.match(r"\s*\{", text)
  position = start.end() if start else len(text)
  with contextlib.suppress(ValueError, RecursionError):
    while position < len(text):
      key, position = decoder.raw_decode(text, blank.match(text, position).end())
      colon = re.compile(r"\s*:\s*").match(text, position)
      if colon is None or not isinstance(key, str):
        return
      value, position = decoder.raw_decode(text, colon.end())
      yield key, value
