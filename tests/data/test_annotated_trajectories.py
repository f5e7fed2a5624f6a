import json
import subprocess
import sys

import numpy as np
import pytest
from exact_records import EMPTY, RECORD, exactly, unknown

from steptool_jax.data import annotated_trajectories as dataset
from steptool_jax.data.trajectories import write_trajectories

RECORDS = [RECORD, unknown(RECORD), EMPTY, RECORD]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  write_trajectories(folder / "a.jsonl", RECORDS)
  write_trajectories(folder / "b.jsonl", RECORDS[:1])
  dataset.build({"train": folder / "a.jsonl", "test": folder / "b.jsonl"}, folder / "data")
  return folder / "data"


def test_nothing_is_lost_and_the_order_is_kept(built):
  source = dataset.open_source(built, "train")
  assert len(source) == 4
  assert exactly(list(source)) == exactly(RECORDS)
  assert exactly(source[-1]) == exactly(RECORD)
  assert exactly(source[1:3]) == exactly(RECORDS[1:3])
  assert len(dataset.open_source(built, "test")) == 1
  with pytest.raises(IndexError, match="record 4 of 4"):
    source[4]


def test_other_programs_read_it_without_this_package_and_without_tensorflow(built):
  folder = str(built / "annotated_trajectories" / "1.0.0")
  code = f"""
import sys, json
sys.modules["steptool_jax"] = None
import tensorflow_datasets as tfds
source = tfds.builder_from_directory({folder!r}).as_data_source("train")
print(json.dumps([source[0]["tokens"].tolist(), source[0]["rewards"].tolist()]))
assert "tensorflow" not in sys.modules
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  tokens, rewards = json.loads(done.stdout.splitlines()[-1])
  steps = RECORD.trajectory.steps
  assert tokens == np.concatenate([s.tokens for s in steps]).tolist()
  assert rewards == np.array([s.reward for s in steps], np.float32).tolist()
  assert list(built.rglob("*.array_record*"))


def test_bad_builds_are_refused(built, tmp_path):
  empty = tmp_path / "none.jsonl"
  empty.write_text("")
  with pytest.raises(ValueError, match=r"none\.jsonl .*holds no trajectory"):
    dataset.build({"train": empty}, tmp_path / "data")
  with pytest.raises(ValueError, match="exists: remove it"):
    dataset.build({"train": empty}, built)
  with pytest.raises(ValueError, match="at least one split"):
    dataset.build({}, tmp_path / "data")
  with pytest.raises(FileNotFoundError, match="build it first"):
    dataset.open_source(tmp_path, "train")
  with pytest.raises(ValueError, match="split 'x': .* has test, train"):
    dataset.open_source(built, "x")


def test_a_broken_line_leaves_no_dataset(tmp_path):
  path = tmp_path / "t.jsonl"
  write_trajectories(path, [RECORD])
  path.write_text(path.read_text() + "{}\n")
  with pytest.raises(ValueError, match=r"t\.jsonl, line 2"):
    dataset.build({"train": path}, tmp_path / "data")
  with pytest.raises(FileNotFoundError, match="build it first"):
    dataset.open_source(tmp_path / "data", "train")
  write_trajectories(path, [RECORD])
  dataset.build({"train": path}, tmp_path / "data")


def test_the_package_works_without_tfds(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  name = "steptool_jax.data.annotated_trajectories.annotated_trajectories_dataset_builder"
  monkeypatch.delitem(sys.modules, name, raising=False)
  monkeypatch.delattr(dataset, name.rpartition(".")[2], raising=False)
  with pytest.raises(ValueError, match="pip install tensorflow-datasets array_record"):
    dataset.open_source("x", "train")
