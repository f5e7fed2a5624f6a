"""The old log-probs of stored trajectories, kept in WORKDIR/behaviour.npz.

Old log-probs, the denominator of PPO's ratio, are those of the policy that sampled the data: as
recorded in rollouts, and where nobody recorded them (official rows, trajectories of other models)
those of the policy before its first update. Either way they stay the same through all passes, so
that the ratio corrects for how far the policy has moved from the data's, and its clip keeps it near
them. The release takes the policy's own log-probs anew at every batch: the ratio is then 1 at the
start of each, the data count as if today's policy had sampled them, and nothing bounds the drift
over a run; data.behaviour = "current" does that, for comparison. The KL penalty always compares
today's policy with the one before training.
"""

import collections
import dataclasses
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO

import numpy as np

from steptool_jax.files import replacing
from steptool_jax.learning import batching
from steptool_jax.run.data.offline import Data
from steptool_jax.run.hosts import hosts
from steptool_jax.types import TokenBatch

_FILE = "behaviour.npz"


def fill(
  data: Data,
  row_tokens: int,
  rows: int,
  logprobs: Callable[[TokenBatch], np.ndarray],
  workdir: pathlib.Path,
) -> Data:
  """Fills log-probs that nobody recorded with those of the policy before its first update.

  Keeps all of them in WORKDIR/behaviour.npz, since that policy is gone when a run is resumed.

  Args:
    data: as `load` gave it.
    row_tokens: of a packed row.
    rows: that a call takes at least, so that none is spent on a few.
    logprobs: packed batch [R, T] -> today's log-probs, float32 [R, T].
    workdir: of the run.
  """

  def values() -> Iterator[np.ndarray]:
    missing = np.flatnonzero(~data.recorded)
    computed = _computed(data, missing, row_tokens, max(rows, data.size), logprobs)
    for i, recorded in enumerate(data.recorded):
      if recorded:
        yield np.concatenate([step.logprobs for step in data[i].steps])
      else:
        yield next(computed)

  path = workdir / _FILE
  if hosts.primary():
    with replacing(path, "wb") as file:
      _write_logprobs(file, data.digest, int(data.ends[-1]), values())
  else:
    collections.deque(values(), maxlen=0)  # the same calls on the device
  hosts.gather(True)  # the file is there
  return dataclasses.replace(data, logprobs=_map_logprobs(path))


def _computed(
  data: Data,
  missing: np.ndarray,
  row_tokens: int,
  count: int,
  logprobs: Callable[[TokenBatch], np.ndarray],
) -> Iterator[np.ndarray]:
  """Log-probs of the trajectories `missing`, `count` in memory at a time."""
  for start in range(0, len(missing), count):
    packed = batching.pack([data[i] for i in missing[start : start + count]], row_tokens)
    yield from batching.unpack(packed, logprobs(packed.batch))


def restore(data: Data, workdir: pathlib.Path) -> Data:
  """The same from the file of an interrupted run.

  ValueError when the data are no longer those that the run began with, or the file is damaged;
  OSError without a file.
  """
  path = workdir / _FILE
  try:
    with zipfile.ZipFile(path) as archive:
      if archive.testzip() is not None:  # what is mapped below is not checked again
        raise ValueError("its check sums are wrong")
    with np.load(path) as file:
      digest = str(file["digest"])
    logprobs = _map_logprobs(path)
  except OSError:
    raise
  except Exception as error:  # damage shows in many ways
    raise ValueError(
      f"{path} is damaged ({error}); put back a copy, or start anew with another --workdir"
    ) from error
  if digest != data.digest:
    raise ValueError(
      f"config.data.path: the trajectories are not those that the run in {workdir} began with; "
      "put the old files back, or use another --workdir"
    )
  if len(logprobs) != data.ends[-1]:
    raise ValueError(f"{path}: holds {len(logprobs)} log-probs of {data.ends[-1]}; put back a copy")
  return dataclasses.replace(data, logprobs=logprobs)


def _write_logprobs(file: IO, digest: str, total: int, parts: Iterable[np.ndarray]) -> None:
  """What np.savez(file, digest=digest, logprobs=<all parts>) writes, without all in memory."""
  header = {"descr": "<f4", "fortran_order": False, "shape": (total,)}
  with zipfile.ZipFile(file, "w") as archive:
    with archive.open("digest.npy", "w", force_zip64=True) as member:
      np.lib.format.write_array(member, np.asarray(digest))
    with archive.open("logprobs.npy", "w", force_zip64=True) as member:
      np.lib.format.write_array_header_1_0(member, header)
      for part in parts:
        member.write(part.astype("<f4").tobytes())


def _map_logprobs(path: pathlib.Path) -> np.ndarray:
  """The log-probs in the file, float32[tokens], read from disk where they are used."""
  with zipfile.ZipFile(path) as archive, path.open("rb") as file:
    start = archive.getinfo("logprobs.npy").header_offset
    file.seek(start + 26)  # of a member's header of 30 bytes: the lengths of its name and extras
    lengths = np.frombuffer(file.read(4), "<u2")
    file.seek(start + 30 + int(lengths.sum()))
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return np.memmap(path, dtype, "r", file.tell(), shape)
