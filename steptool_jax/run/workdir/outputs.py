"""What a run writes to be read: metrics.jsonl, tensorboard/ and summary.json."""

import contextlib
import json
import pathlib
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

from absl import logging
from tensorboardX import event_file_writer, summary
from tensorboardX.proto.event_pb2 import Event, SessionLog

from steptool_jax.evaluation.records import json_object
from steptool_jax.files import read_json, read_lines, write_text
from steptool_jax.run.hosts import hosts
from steptool_jax.run.workdir.sinks import Sinks


class MetricsWriter:
  """Appends to WORKDIR/metrics.jsonl and WORKDIR/tensorboard, in process 0 alone.

  A resumed run keeps the first `keep` records, those that its checkpoint knows, and drops the
  others, because they are written again. `resumed_at`: the checkpoint's step, for TensorBoard.
  sinks: get the same figures, and are closed with it.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    keep: int = 0,
    resumed_at: int = 0,
    sinks: Sinks | None = None,
  ):
    self.records = keep
    self._file = self._board = None
    self._sinks = sinks
    if not hosts.primary():
      return
    path = workdir / "metrics.jsonl"
    kept = read_jsonl(path, keep)
    write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
    if len(kept) < keep:
      logging.warning("%s: %d of %d records are lost", path, keep - len(kept), keep)
    self.records = len(kept)
    self._file = path.open("a")
    self._board = _Board(workdir / "tensorboard", resumed_at + 1 if kept else None)

  def write(self, step: int, prefix: str, metrics: Mapping[str, float]) -> None:
    self.records += 1
    if self._file is None:
      return
    figures = {f"{prefix}/{k}": float(v) for k, v in metrics.items()}
    self._file.write(json.dumps({"step": step} | figures) + "\n")
    self._file.flush()
    self._board.write(step, figures)
    if self._sinks is not None:
      self._sinks.log(step, figures)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._board.close()
    if self._sinks is not None:
      self._sinks.close()


class _Board:
  """TensorBoard's event file, written at once: the queue and thread of tensorboardX's own writer
  wait for ever after one error. Where it cannot be written, metrics.jsonl still has everything."""

  def __init__(self, folder: pathlib.Path, purge_step: int | None):
    self._writer = None
    try:
      folder.mkdir(exist_ok=True)
      self._writer = event_file_writer.EventsWriter(str(folder / "events"))
    except OSError as error:
      self._give_up(error)
    if purge_step is not None:  # what a run that was cut off wrote from here on is hidden
      self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

  def write(self, step: int, figures: Mapping[str, float]) -> None:
    now = time.time()
    self._write(
      *(
        Event(step=step, wall_time=now, summary=summary.scalar(name, value))
        for name, value in figures.items()
      )
    )

  def _write(self, *events: Event) -> None:
    if self._writer is None:
      return
    try:
      for event in events:
        self._writer.write_event(event)
      self._writer.flush()
    except OSError as error:
      self._give_up(error)

  def close(self) -> None:
    if self._writer is not None:
      with contextlib.suppress(OSError):
        self._writer.close()

  def _give_up(self, error: OSError) -> None:
    logging.warning("tensorboard/ is written no more (%s); metrics.jsonl has everything", error)
    self._writer = None


def read_jsonl(path: pathlib.Path, most: int | None = None) -> list[dict[str, Any]]:
  """The records of the first `most` lines; none where there is no file.

  Damaged lines are left out with a warning; a last one that a killed run left half-written is no
  damage.
  """
  if not path.exists():
    return []
  found, damaged, lines = read_lines(path, json_object, most)
  damaged = [n for n in damaged if n < lines or most is not None]
  if damaged:
    logging.warning("%s: %d damaged lines are left out: %s", path, len(damaged), damaged[:20])
  return found


def write_summary(workdir: pathlib.Path, mode: str, figures: Mapping[str, Any]) -> dict[str, Any]:
  """Writes and returns {"mode": mode} and the figures, from process 0 alone.

  WORKDIR/summary_<mode>.json, and summary.json where it is this mode's or nobody's: an evaluation
  of a training's workdir leaves the training's in place. A check makes way for what it checked for.
  """
  document = {"mode": mode} | dict(figures)
  if hosts.primary():
    text = json.dumps(document, indent=2) + "\n"
    write_text(workdir / f"summary_{mode}.json", text)
    try:
      owner = read_json(workdir / "summary.json", finite=False).get("mode", mode)
    except (OSError, ValueError):
      owner = mode
    if owner in (mode, "check"):
      write_text(workdir / "summary.json", text)
  return document


def peak_rss_gib() -> float:
  """Largest resident set of this process so far, GiB."""
  unit = 1 if sys.platform == "darwin" else 2**10
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
