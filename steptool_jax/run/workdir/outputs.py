"""What a run writes to be read: metrics.jsonl, tensorboard/ and summary.json."""

import json
import pathlib
import resource
from collections.abc import Mapping
from typing import Any

import tensorboardX

from steptool_jax.files import write_text
from steptool_jax.run.hosts import hosts


class MetricsWriter:
  """Appends to WORKDIR/metrics.jsonl and WORKDIR/tensorboard, in process 0 alone.

  A resumed run keeps the first `keep` records, those that its checkpoint knows, and drops the
  others, because they are written again. `resumed_at`: the checkpoint's step, for TensorBoard.
  """

  def __init__(self, workdir: pathlib.Path, keep: int = 0, resumed_at: int = 0):
    self.records = keep
    if not hosts.primary():
      self._file = self._board = None
      return
    path = workdir / "metrics.jsonl"
    kept = read_jsonl(path)[:keep]
    write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
    self.records = len(kept)
    self._file = path.open("a")
    self._board = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"), purge_step=resumed_at + 1 if kept else None
    )

  def write(self, step: int, prefix: str, metrics: Mapping[str, float]) -> None:
    self.records += 1
    if self._file is None:
      return
    record = {"step": step} | {f"{prefix}/{k}": float(v) for k, v in metrics.items()}
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()
    for name, value in record.items():
      if name != "step":
        self._board.add_scalar(name, value, step)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._board.close()


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
  """All whole records; a last line that a killed run left half-written is not one."""
  records = []
  if path.exists():
    for line in path.read_text().splitlines():
      try:
        records.append(json.loads(line))
      except json.JSONDecodeError:
        break
  return records


def write_summary(workdir: pathlib.Path, summary: Mapping[str, Any]) -> None:
  """WORKDIR/summary.json, from process 0 alone."""
  if hosts.primary():
    write_text(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")


def peak_rss_gib() -> float:
  """Largest resident set of this process so far, GiB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
