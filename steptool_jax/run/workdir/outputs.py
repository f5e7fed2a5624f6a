"""What a run writes to be read: metrics.jsonl, tensorboard/, learning_curve.png, summary.json."""

import json
import pathlib
import resource
from collections.abc import Mapping, Sequence
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


def plot_learning_curve(
  path: pathlib.Path,
  train: Sequence[tuple[float, float]],
  heldout: Sequence[tuple[float, float]],
  levels: Mapping[str, float],
  title: str,
  heldout_label: str,
) -> None:
  """PNG: pass rate (%) over conversations rolled out; `levels` are dashed lines."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120)
  if train:
    x, y = zip(*train, strict=True)
    axes.plot(x, [100 * v for v in y], color="#9db8d9", lw=1.2, label="training tasks, sampled")
  if heldout:
    x, y = zip(*heldout, strict=True)
    axes.plot(x, [100 * v for v in y], "o-", color="#1f4e8c", lw=2, label=heldout_label)
  for (name, level), color in zip(levels.items(), ("#b0b0b0", "#d9822b"), strict=False):
    axes.axhline(100 * level, ls="--", color=color, lw=1.2, label=f"{name}: {100 * level:.1f} %")
  axes.set(xlabel="conversations rolled out", ylabel="pass rate (%)", ylim=(0, 100), title=title)
  axes.grid(alpha=0.25)
  axes.legend(loc="lower right", fontsize=8)
  figure.tight_layout()
  figure.savefig(path)
  pyplot.close(figure)
