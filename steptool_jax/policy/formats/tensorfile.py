"""Safetensors files, read by memory map and written as a stream.

Only slices that are asked for are read, and a file is written block by block: nothing here holds a
model, nor a large tensor (safetensors' own writer wants all of them at once). bfloat16 comes out as
ml_dtypes.bfloat16. Format: 8 bytes header length (little endian), JSON {name: {dtype, shape,
data_offsets}}, data.
"""

import contextlib
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from steptool_jax.files import read_json

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOCK_BYTES = 128 * 2**20  # written at once; the largest tensor in a layer of an 8B has 112 MiB

# A tensor to be written: anything whose rows can be cut out, tensor[start:stop], in order.
Rows = Any


class TensorFile:
  """One safetensors file, checked by the reference implementation. `shapes`: name -> shape."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    if not path.is_file():
      raise FileNotFoundError(f"{path}: no such file; the directory is incomplete, fetch it again")
    self.shapes: dict[str, tuple[int, ...]] = {}
    self._places: dict[str, tuple[int, np.dtype]] = {}  # name -> (offset in the data, dtype)
    end = 0
    try:
      with safetensors.safe_open(path, "np") as file:
        # It lets only files pass whose tensors follow each other without a gap, to the file's end.
        for name in file.offset_keys():
          part = file.get_slice(name)
          dtype = DTYPES.get(part.get_dtype())
          if dtype is None:
            raise ValueError(
              f"{path}: {name} has dtype {part.get_dtype()}; valid: {', '.join(DTYPES)}"
            )
          self.shapes[name] = tuple(part.get_shape())
          self._places[name] = (end, dtype)
          end += num_bytes(self.shapes[name], dtype)
    except safetensors.SafetensorError as error:
      raise ValueError(
        f"{path}: truncated or no safetensors file ({error}); fetch it again"
      ) from None
    self._start = path.stat().st_size - end

  def read(self, name: str) -> np.ndarray:
    """A memory map of the tensor: indexing reads what it touches."""
    begin, dtype = self._places[name]
    shape = self.shapes[name]
    if not math.prod(shape):
      return np.zeros(shape, dtype)
    return np.memmap(self.path, dtype, "r", self._start + begin, shape)


class TensorFiles:
  """The tensors of a directory: `stem`.safetensors, or the shards of its index."""

  def __init__(self, directory: pathlib.Path, stem: str = "model"):
    self.directory = directory
    index = directory / f"{stem}.safetensors.index.json"
    single = directory / f"{stem}.safetensors"
    self._home: dict[str, TensorFile] = {}
    if index.is_file():
      names = read_json(index).get("weight_map")
      if not isinstance(names, dict):
        raise ValueError(f"{index}: has no weight_map; fetch the file again")
      shards = {}
      for name, shard in names.items():
        if not isinstance(shard, str) or pathlib.PurePath(shard).name != shard:
          raise ValueError(f"{index}: shard {shard!r} lies outside of the directory")
        if shard not in shards:
          shards[shard] = TensorFile(directory / shard)
        if name not in shards[shard].shapes:
          raise ValueError(f"{index}: {name} is not in {shard}; fetch both again")
        self._home[name] = shards[shard]
    elif single.is_file():
      file = TensorFile(single)
      self._home = dict.fromkeys(file.shapes, file)
    else:
      raise FileNotFoundError(
        f"{directory}: neither {single.name} nor {index.name}; only safetensors weights are read"
        " (pytorch_model.bin: save it again with safe_serialization)"
      )
    self.shapes = {name: file.shapes[name] for name, file in self._home.items()}

  def read(self, name: str) -> np.ndarray:
    return self._home[name].read(name)


def write_file(
  path: pathlib.Path,
  entries: Mapping[str, tuple[tuple[int, ...], Any]],
  fetch: Callable[[str], Rows],
) -> None:
  """Writes {name: (shape, dtype)}, asking `fetch` for one tensor at a time; fsynced.

  OSError names the file when it cannot be written (a full disk).
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for name, (shape, dtype) in entries.items():
    size = num_bytes(shape, dtype)
    header[name] = {
      "dtype": CODES[np.dtype(dtype)],
      "shape": list(shape),
      "data_offsets": [offset, offset + size],
    }
    offset += size
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  try:
    with path.open("wb") as file:
      file.write(len(text).to_bytes(8, "little") + text)
      for name, (shape, dtype) in entries.items():
        _write_tensor(file, name, tuple(shape), dtype, fetch(name))
      file.flush()
      os.fsync(file.fileno())
  except OSError as error:
    raise OSError(
      error.errno,
      f"{path}: could not be written ({error.strerror}); nothing of it is kept: make room, or "
      "choose another directory, and write it again",
    ) from error


def _write_tensor(file: Any, name: str, shape: tuple[int, ...], dtype: Any, tensor: Rows) -> None:
  for rows in row_blocks(shape, dtype):
    block = copy_in_order(tensor[rows], dtype)
    expected = (rows.stop - rows.start, *shape[1:])
    if block.shape != expected:
      raise ValueError(f"{name}: rows {rows} have shape {block.shape}, expected {expected}")
    file.write(block.view(np.uint8).data if block.size else b"")


def copy_in_order(x: np.ndarray, dtype: Any) -> np.ndarray:
  """A C-ordered copy of `dtype`.

  A transposed matrix in strips that fit the cache: NumPy's own way takes three to five times as
  long, which is minutes for an 8B model.
  """
  if x.ndim != 2 or x.strides[1] == x.itemsize:
    return np.array(x, dtype, order="C")
  out = np.empty(x.shape, dtype)
  for start in range(0, x.shape[1], 32):
    out[:, start : start + 32] = x[:, start : start + 32]
  return out


def row_blocks(shape: tuple[int, ...], dtype: Any) -> Iterator[slice]:
  """Consecutive rows of at most BLOCK_BYTES (a larger row is a block of its own)."""
  most = max(1, BLOCK_BYTES // max(1, num_bytes(shape[1:], dtype)))
  for start in range(0, shape[0], most):
    yield slice(start, min(start + most, shape[0]))


def num_bytes(shape: tuple[int, ...], dtype: Any) -> int:
  return np.dtype(dtype).itemsize * math.prod(shape)


def split_shards(
  entries: Mapping[str, tuple[tuple[int, ...], Any]], max_bytes: int
) -> Iterable[dict[str, tuple[tuple[int, ...], Any]]]:
  """Consecutive groups of at most `max_bytes` (a larger tensor is a group of its own)."""
  group: dict[str, tuple[tuple[int, ...], Any]] = {}
  used = 0
  for name, (shape, dtype) in entries.items():
    size = num_bytes(shape, dtype)
    if group and used + size > max_bytes:
      yield group
      group, used = {}, 0
    group[name] = (shape, dtype)
    used += size
  yield group


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def output_directory(directory: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """A temporary directory next to `directory` that takes its name on success, else vanishes."""
  directory = pathlib.Path(directory).absolute()
  if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
    raise FileExistsError(f"{directory}: exists and is not empty; choose another directory")
  directory.parent.mkdir(parents=True, exist_ok=True)
  temporary = pathlib.Path(tempfile.mkdtemp(".tmp", f".{directory.name}.", directory.parent))
  try:
    yield temporary
    temporary.chmod(0o755)  # mkdtemp makes it private
    os.rename(temporary, directory)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise
