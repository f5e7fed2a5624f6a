"""What is kept, what is refused, and what becomes of damage and of a full disk."""

import contextlib
import json
import logging
import resource
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from steptool_jax.run.hosts import hosts
from steptool_jax.run.workdir import checkpoint
from steptool_jax.run.workdir.checkpoint import Checkpoints
from steptool_jax.types import TrainState


def state(value, **changes):
  fields = {
    "step": jnp.int32(value),
    "trainable": {"w": jnp.full((64, 32), value, jnp.float32), "b": jnp.arange(8.0) + value},
    "frozen": {},
    "reference": {},
    "opt_state": ({"mu": jnp.full(16, value / 3, jnp.bfloat16)},),
    "kl_coef": jnp.float32(0.1),
  }
  return TrainState(**(fields | changes))


def write(workdir, *values, keep=9, keep_best=0, scores=None):
  """Checkpoints 1, 2, ... of these values."""
  checkpoints = Checkpoints(workdir, keep, keep_best)
  for number, value in enumerate(values, start=1):
    checkpoints.save(number, state(value), {"done": number})
    if scores and scores[number - 1] is not None:
      checkpoints.score(number, scores[number - 1])
  checkpoints.close()


def abstract_of(meta):
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    jax.eval_shape(lambda: state(0)),
  )


def assert_newest(workdir, value, number):
  found, meta, _ = checkpoint.newest(workdir, abstract_of)
  assert meta == {"done": number}
  jax.tree.map(np.testing.assert_array_equal, found, state(value))


@pytest.mark.parametrize("damage", ["arrays a number", "a pair of three", "another layout"])
@pytest.mark.parametrize("marked", [True, False])
def test_damage_to_the_check_is_damage_to_the_checkpoint(damage, marked, tmp_path):
  """It ended in a traceback, or said that the checkpoint belongs to another model."""
  write(tmp_path, 1, 2)
  path = tmp_path / "checkpoints/2/check/metadata"
  check = json.loads(path.read_text())
  if damage == "arrays a number":
    check["arrays"] = 5
  elif damage == "a pair of three":
    check["arrays"]["kl_coef"].append(1)
  else:
    check["arrays"]["kl_coef"][0 if marked else 1] = "int8[7]"
  if not marked:  # as older ones are
    del check["itself"]
  path.write_text(json.dumps(check))
  assert_newest(tmp_path, 1, 1)


def largest(folder):
  """The file with the arrays' bytes."""
  files = [path for path in folder.rglob("*") if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def test_the_newest_and_the_best_are_kept(tmp_path):
  write(tmp_path, 1, 2, 3, 4, 5, keep=2, keep_best=1, scores=[0.1, 0.5, 0.2, 0.3, 0.4])
  assert checkpoint.numbers(tmp_path) == [5, 4, 2]
  assert checkpoint.read_scores(tmp_path)[2] == 0.5
  # A new start knows the scores; where two are equal, the later one is better.
  checkpoints = Checkpoints(tmp_path, keep=1, keep_best=1)
  checkpoints.save(6, state(6), {})
  checkpoints.score(6, 0.5)
  checkpoints.save(7, state(7), {})
  checkpoints.score(8, 1.0)  # there is none
  checkpoints.close()
  assert checkpoint.numbers(tmp_path) == [7, 6]
  assert 8 not in checkpoint.read_scores(tmp_path)


@pytest.mark.parametrize("keep_best", [2, 3, 4])
def test_all_that_have_a_score_are_kept_while_they_are_fewer(keep_best, tmp_path):
  write(tmp_path, 1, 2, 3, 4, keep=1, keep_best=keep_best, scores=[0.5, 0.6, None, None])
  assert checkpoint.numbers(tmp_path) == [4, 2, 1]


def test_a_checkpoint_of_another_model_is_refused_and_not_taken_for_damage(tmp_path):
  write(tmp_path, 1, 2)

  def other(meta):
    abstract = abstract_of(meta)
    return abstract._replace(trainable=abstract.trainable | {"b": abstract.step})

  with pytest.raises(ValueError, match=r"checkpoints/2 does not fit .* \(1 arrays differ; "):
    checkpoint.newest(tmp_path, other)
  assert checkpoint.newest(tmp_path / "empty", abstract_of) is None


def cut(folder):
  path = largest(folder / "state")
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(folder):
  path = largest(folder / "state")
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def swap(folder):
  """Whole files of another checkpoint: nothing is torn, but the arrays are not those saved."""
  state = folder / "state"
  state.rename(folder / "old")
  (folder.parent / "1" / "state").rename(state)


def remove(folder):
  for path in (folder / "meta").iterdir():
    path.unlink()


def tamper(folder):
  """Still JSON, but of another moment of the run: this used to be believed."""
  (path,) = (p for p in (folder / "meta").iterdir() if b"done" in p.read_bytes())
  path.write_bytes(path.read_bytes().replace(b"3", b"2"))


@pytest.mark.parametrize("damage", [cut, flip, swap, remove, tamper])
def test_the_one_before_takes_the_place_of_a_corrupt_one(tmp_path, damage, caplog):
  write(tmp_path, 1, 2, 3)
  damage(tmp_path / "checkpoints" / "3")
  with caplog.at_level(logging.ERROR):
    checkpoints = Checkpoints(tmp_path, keep=9)
    found, meta, _ = checkpoints.newest(abstract_of)
  assert meta == {"done": 2}
  jax.tree.map(np.testing.assert_array_equal, found, state(2))
  assert "checkpoints/3 is corrupt and not used" in caplog.text
  assert [path.name for path in (tmp_path / "corrupt").iterdir()] == ["3_0"]
  # The number is free again.
  checkpoints.save(3, state(33), {"done": 3})
  checkpoints.close()
  assert_newest(tmp_path, 33, 3)


@pytest.mark.parametrize(
  "error", [MemoryError(), PermissionError(13, "denied"), RuntimeError("RESOURCE_EXHAUSTED: HBM")]
)
def test_what_is_the_machines_fault_is_no_damage(tmp_path, monkeypatch, error):
  write(tmp_path, 1, 2)

  def fail(self, directory):
    raise error

  with monkeypatch.context() as patched:
    patched.setattr(ocp.JsonCheckpointHandler, "restore", fail)
    with pytest.raises(type(error)):
      Checkpoints(tmp_path, 9).newest(abstract_of)
  assert checkpoint.numbers(tmp_path) == [2, 1]
  assert not (tmp_path / "corrupt").exists()


def test_a_run_without_a_whole_checkpoint_does_not_start_anew_unasked(tmp_path):
  """The first refusal used to move them away, so that the same command then started from zero."""
  write(tmp_path, 1, 2)
  for number in ("1", "2"):
    cut(tmp_path / "checkpoints" / number)
  for _ in range(2):
    with (
      Checkpoints(tmp_path, keep=9) as checkpoints,
      pytest.raises(RuntimeError, match=r"all checkpoints of .* are corrupt \(2, 1\); put back"),
    ):
      checkpoints.newest(abstract_of)
  (tmp_path / "corrupt").mkdir()
  for number in ("1", "2"):
    (tmp_path / "checkpoints" / number).rename(tmp_path / "corrupt" / f"{number}_0")
  with pytest.raises(RuntimeError, match=r"are corrupt \(corrupt/1_0, corrupt/2_0\); put back"):
    checkpoint.newest(tmp_path, abstract_of)


@pytest.mark.parametrize("text", ["", "[]", '{"one": 1}', '{"1": []}', "\udcff"])
def test_damaged_scores_are_named_with_what_to_do(tmp_path, text):
  (tmp_path / checkpoint.SCORES).write_text(text, errors="surrogateescape")
  with pytest.raises(ValueError, match=r"scores\.json is damaged .*, or delete it: then no check"):
    checkpoint.read_scores(tmp_path)


def test_a_full_disk_keeps_the_old_one_and_says_so(tmp_path):
  """No file may grow beyond a few KiB, as if the disk were full."""
  write(tmp_path, 1)
  checkpoints = Checkpoints(tmp_path, keep=1)
  noise = jax.random.normal(jax.random.key(0), (512, 256))
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
  try:
    checkpoints.save(2, state(2, trainable={"w": noise}), {"done": 2})
    with pytest.raises(OSError, match=r"could not be written .* 1 is the newest whole one; make r"):
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert_newest(tmp_path, 1, 1)
  # With room again the next start clears what was left half-written, and goes on.
  (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
  again = Checkpoints(tmp_path, keep=1)
  again.save(2, state(2), {"done": 2})
  again.close()
  assert_newest(tmp_path, 2, 2)
  assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == ["2"]


def test_nobody_waits_for_the_part_of_a_process_that_is_gone(tmp_path, monkeypatch):
  checkpoints, closed = Checkpoints(tmp_path, 1), []
  monkeypatch.setattr(checkpoints, "close", lambda: closed.append(True))
  monkeypatch.setattr(hosts, "peers", lambda: hosts.Joined(0, 2))
  for error, expected in (
    (RuntimeError("Gloo AllGather failed: Connection closed by peer"), 0),
    (TimeoutError("Timed out while waiting for async_commit_complete barrier."), 0),
    (RuntimeError("NaN"), 1),
  ):
    with contextlib.suppress(RuntimeError, TimeoutError), checkpoints:
      raise error
    assert len(closed) == expected


def test_fingerprints_do_not_depend_on_the_layout_and_see_order():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
  bits = np.asarray(x).view(np.uint32).astype(np.uint64).ravel()
  expected = int((bits * (2 * np.arange(48, dtype=np.uint64) + 1)).sum() % 2**32)
  assert checkpoint.fingerprints({"x": x}) == [expected]
  assert checkpoint.fingerprints({"x": x[::-1]}) != [expected]
  assert checkpoint.fingerprints({"x": x.at[3, 3].set(np.nextafter(x[3, 3], 9))}) != [expected]


def test_scores_are_a_small_json_file(tmp_path):
  write(tmp_path, 1, scores=[0.25])
  assert json.loads((tmp_path / checkpoint.SCORES).read_text()) == {"1": 0.25}


def test_a_share_may_show_for_a_while_what_was_set_aside(tmp_path, monkeypatch):
  """A host with a listing of moments ago took the number for saved, and waited in vain."""
  write(tmp_path, 1, 2)
  checkpoints = Checkpoints(tmp_path, keep=9)
  waited = []

  def lead(work):
    waited.append(work)  # seen from here, nothing has happened yet

  def sleep(seconds):
    waited.pop()()

  monkeypatch.setattr(checkpoint.hosts, "lead", lead)
  clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
  monkeypatch.setattr(checkpoint, "time", clock)
  checkpoints._set_aside(2)
  assert (checkpoints.holds(2), checkpoints.holds(1), waited) == (False, True, [])
  checkpoints.close()
