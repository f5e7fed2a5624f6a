"""New answers of a cache: an SQLite database that any number of threads and processes share.

On a local disk: SQLite's log needs its locks. An answer that was written once is never changed.
"""

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.toolbench.simulators.virtual import VirtualResponse, failure_in, response_of

_DATABASE = "answers.sqlite3"
_BUSY_S = 30.0  # how long a writer waits for the writers of other processes
Place = tuple[str, str, str]  # category, tool, api


class WrittenAnswers:
  """The writable cache: one row per API and canonical key; the first writer wins for ever."""

  def __init__(self, folder: Path):
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise OSError(f"writable cache folder {folder} cannot be made: {error}") from error
    self._path = folder / _DATABASE
    self._lock = threading.Lock()
    self._connection, self._process = self._open(), os.getpid()

  def get(self, place: Place, canonical: str) -> VirtualResponse | None:
    with self._database() as database:
      return self._select(database, place, canonical)

  def put(
    self, place: Place, key: str, canonical: str, response: VirtualResponse
  ) -> tuple[VirtualResponse, bool]:
    """(the answer that counts, whether it is this one)."""
    text = json.dumps(response.as_dict())
    with self._database() as database:
      self._select(database, place, canonical)  # frees the place of what is no answer
      done = database.execute(
        "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (*place, canonical, key, text),
      )
      new = done.rowcount == 1
      kept = response if new else self._select(database, place, canonical)
    return kept, new

  def first(self, place: Place, count: int) -> list[tuple[str, VirtualResponse]]:
    with self._database() as database:
      rows = database.execute(
        "SELECT key, answer FROM answers WHERE category = ? AND tool = ? AND api = ? "
        "ORDER BY rowid LIMIT ?",
        (*place, count),
      ).fetchall()
    found = [(key, response_of(json.loads(answer))) for key, answer in rows]
    return [(key, response) for key, response in found if not failure_in(response)]

  def close(self) -> None:
    with self._lock:
      if self._connection is not None and self._process == os.getpid():
        self._connection.close()
      self._connection = None

  @staticmethod
  def _select(database: sqlite3.Connection, place: Place, canonical: str):
    row = database.execute(
      "SELECT answer FROM answers WHERE category = ? AND tool = ? AND api = ? AND canonical = ?",
      (*place, canonical),
    ).fetchone()
    found = response_of(json.loads(row[0])) if row else None
    if found is None or not failure_in(found):
      return found
    # Kept by an earlier version, which took a simulator's failure for an answer.
    database.execute(
      "DELETE FROM answers WHERE category = ? AND tool = ? AND api = ? AND canonical = ?",
      (*place, canonical),
    )
    return None

  @contextlib.contextmanager
  def _database(self) -> Iterator[sqlite3.Connection]:
    with self._lock:
      if self._connection is None or self._process != os.getpid():
        # A connection must not cross a fork; the parent's is left to the parent.
        self._connection, self._process = self._open(), os.getpid()
      try:
        yield self._connection
      except sqlite3.Error as error:
        raise InfrastructureError(f"writable cache {self._path}: {error}") from error

  def _open(self) -> sqlite3.Connection:
    deadline = time.monotonic() + _BUSY_S
    while True:
      connection = None
      try:
        # Autocommit: every statement is a transaction of its own.
        connection = sqlite3.connect(
          self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(
          "CREATE TABLE IF NOT EXISTS answers (category TEXT, tool TEXT, api TEXT, "
          "canonical TEXT, key TEXT, answer TEXT, UNIQUE (category, tool, api, canonical))"
        )
        return connection
      except sqlite3.Error as error:
        if connection is not None:
          connection.close()
        # Switching a new file to WAL does not wait for a process that does so too.
        if "locked" in str(error) and time.monotonic() < deadline:
          time.sleep(0.02)
          continue
        raise OSError(
          f"writable cache {self._path} cannot be opened: {error}; give a writable folder on a "
          "local disk, or move the file away if it is damaged"
        ) from error
