"""Annotated trajectories as a TFDS dataset in array_record files, read without TensorFlow.

    build({"train": records}, data_dir)  # or a JSON lines file in the place of records
    source = open_source(data_dir, "train")  # random access: len(source), source[i]

`open_source` gives AnnotatedTrajectory records; other programs read the same files with
`tfds.builder_from_directory(directory).as_data_source(split)` and need none of this code.
Everything that TFDS does is imported when it is used, so the package works without it.
"""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from steptool_jax.data.trajectories import AnnotatedTrajectory, read_trajectories

NAME = "annotated_trajectories"
VERSION = "1.0.0"


Records = str | pathlib.Path | Sequence[AnnotatedTrajectory]  # of a split; or their JSON lines


def build(splits: Mapping[str, Records], data_dir: str | pathlib.Path) -> pathlib.Path:
  """Writes {split: records} to data_dir/annotated_trajectories/1.0.0; returns that folder.

  ValueError for a broken line, an empty split or no split at all, and for a folder that is there
  already: data are never mixed. A build that fails leaves no dataset.
  """
  builders = _import()
  if not splits:
    raise ValueError("splits: name at least one split")
  refuse_existing(data_dir)
  for split, records in splits.items():
    if next(iter(records_of(records)), None) is None:
      origin = records if isinstance(records, (str, pathlib.Path)) else "the list of records"
      raise ValueError(f"{origin} (split {split!r}) holds no trajectory")
  builder = builders.Builder(splits=splits, data_dir=data_dir, file_format="array_record")
  builder.download_and_prepare()
  return pathlib.Path(builder.data_dir)


def refuse_existing(data_dir: str | pathlib.Path) -> None:
  """ValueError where a dataset is there already, or none can be written."""
  _import()
  folder = pathlib.Path(data_dir) / NAME / VERSION
  if folder.exists():
    raise ValueError(f"{folder} exists: remove it, or build into another data_dir")


def records_of(records: Records) -> Iterable[AnnotatedTrajectory]:
  """The records themselves, or those of a JSON lines file, one by one."""
  return read_trajectories(records) if isinstance(records, (str, pathlib.Path)) else records


class Source(Sequence[AnnotatedTrajectory]):
  """Random access to the records of one split."""

  def __init__(self, source: Any, decode: Any, folder: pathlib.Path):
    self._source, self._decode, self._folder = source, decode, folder

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    if not -len(self) <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    place = index % len(self)
    with _damage(f"{self._folder}, record {place}"):
      return self._decode(self._source[place])

  def __iter__(self) -> Iterator[AnnotatedTrajectory]:
    return (self[i] for i in range(len(self)))


def open_source(data_dir: str | pathlib.Path, split: str) -> Source:
  """The records of one split, in the order of its file.

  FileNotFoundError when nothing was built there, ValueError for an unknown split.
  """
  builders = _import()
  folder = pathlib.Path(data_dir) / NAME / VERSION
  if not (folder / "dataset_info.json").is_file():
    raise FileNotFoundError(f"no dataset in {folder}: build it first from JSON lines")
  with _damage(folder):
    builder = builders.tfds.builder_from_directory(folder)
  if split not in builder.info.splits:
    raise ValueError(f"split {split!r}: {folder} has {', '.join(sorted(builder.info.splits))}")
  with _damage(folder):
    return Source(builder.as_data_source(split), builders.decode, folder)


@contextlib.contextmanager
def _damage(where: Any) -> Iterator[None]:
  """ValueError in the place of whatever a damaged file makes TFDS and its readers raise."""
  try:
    yield
  except Exception as error:  # they document none
    raise ValueError(
      f"{where}: cannot be read ({type(error).__name__}: {str(error)[:200]}); build the dataset "
      "again from JSON lines"
    ) from error


def _import():
  try:
    import array_record  # noqa: F401 (TFDS looks for it when it writes, and not everywhere has it)

    from steptool_jax.data.annotated_trajectories import (
      annotated_trajectories_dataset_builder as builders,
    )
  except ImportError as error:
    raise ValueError(
      f"annotated trajectories as a TFDS dataset need tensorflow-datasets ({error}): pip install "
      "tensorflow-datasets array_record importlib_resources, or use the JSON lines"
    ) from error
  return builders
