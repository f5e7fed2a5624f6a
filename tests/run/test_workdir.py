"""What a workdir keeps: one run at a time, the figures of every mode, what it was begun with."""

import fcntl
import json
import logging
import os
import socket
import subprocess
import threading
import time

import pytest
import tiny

from steptool_jax.evaluation import records
from steptool_jax.run import train
from steptool_jax.run.hosts import hang
from steptool_jax.run.parts import build, tokenizers
from steptool_jax.run.training import behaviour, restore
from steptool_jax.run.workdir import lock, outputs

# --- one run at a time ---


@pytest.mark.parametrize("process", [[], "7", True, -1, 10**30, None])
def test_a_lock_that_names_no_process_is_anybodys(process, tmp_path):
  """A damaged process number was a TypeError; what holds the lock is still in the way."""
  with lock.held(tmp_path, "train"):
    text = json.dumps({"host": "h", "machine": lock._machine(), "process": process})
    (tmp_path / "lock").write_text(text)
    with pytest.raises(RuntimeError, match="in use by"), lock.held(tmp_path, "train"):
      pass


def test_a_second_run_in_a_workdir_is_refused_and_told_whose_it_is(tmp_path):
  """Two runs used to train into one workdir."""
  with lock.held(tmp_path, "train"):
    who = rf"--mode=train, process {os.getpid()} on {socket.gethostname()} since 20"
    with (
      pytest.raises(RuntimeError, match=rf"in use by {who}.*; wait for its end"),
      lock.held(tmp_path, "evaluate"),
    ):
      pass
  with lock.held(tmp_path, "evaluate"):
    pass


def left_behind(workdir, machine, process=7):
  """What a process that was killed leaves."""
  owner = {"host": "far", "machine": machine, "process": process, "mode": "train", "since": "then"}
  (workdir / "lock").write_text(json.dumps(owner | {"beat": 3}))
  return owner


def test_a_lock_of_a_process_that_is_gone_does_not_hold(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "BEAT_S", 0.01)
  for machine in (lock._machine(), "of another host"):
    left_behind(tmp_path, machine)
    with lock.held(tmp_path, "train"):
      assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()


def test_a_child_that_outlived_its_run_does_not_hold_the_workdir(tmp_path, monkeypatch):
  """A tool's process inherits the lock; its run is gone."""
  monkeypatch.setattr(lock, "BEAT_S", 0.01)
  gone = subprocess.Popen(["true"])
  gone.wait()
  left_behind(tmp_path, lock._machine(), gone.pid)
  with (tmp_path / "lock").open() as child:
    fcntl.flock(child, fcntl.LOCK_EX)
    with lock.held(tmp_path, "train"):
      pass


def test_a_process_of_another_host_holds_it_as_long_as_its_beat_goes_on(tmp_path, monkeypatch):
  """Network file systems may not share locks between hosts."""
  monkeypatch.setattr(lock, "BEAT_S", 0.05)
  owner = left_behind(tmp_path, "of another host")
  later = json.dumps(owner | {"beat": 4})
  timer = threading.Timer(0.05, lambda: (tmp_path / "lock").write_text(later))
  timer.start()
  with (
    pytest.raises(RuntimeError, match="in use by --mode=train, process 7 on far since then"),
    lock.held(tmp_path, "train"),
  ):
    pass
  timer.join()


def test_what_killed_processes_left_half_written_goes_away(tmp_path):
  """Temporary files and folders used to stay for ever; those of a run beside this one must."""
  x, new = "abcd_123", ".export.new.abcd_123"
  folders = ("cells/a", "moments", f"{new}.tmp", new)
  for name in folders:
    (tmp_path / name).mkdir(parents=True)
  files = (f".config.json.{x}.tmp", f"moments/.a.jsonl.{x}.tmp", f"{folders[2]}/model")
  files += (".shared-0123456789abcdef",)
  kept = (f"cells/a/.x.{x}.tmp", f".report.html.{x}.tmp", "moments/a.jsonl", ".theirs.tmp")
  for name in (*files, *kept):
    (tmp_path / name).touch()
  with lock.held(tmp_path, "train"):
    pass
  left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
  assert left == {*kept, "lock"}
  assert not list(tmp_path.glob(".export*"))


# --- figures ---


def test_an_evaluation_leaves_the_figures_of_the_training_in_place(tmp_path):
  """--mode=evaluate and export used to replace summary.json, and the report lost the run's."""
  trained = outputs.write_summary(tmp_path, "train", {"pass_rate_rl": 0.5, "interrupted": False})
  evaluated = outputs.write_summary(tmp_path, "evaluate", {"pass_rate": 0.7})
  assert evaluated == {"mode": "evaluate", "pass_rate": 0.7}
  found = {p.name: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
  assert found == {
    "summary.json": trained,
    "summary_train.json": trained,
    "summary_evaluate.json": evaluated,
  }


def test_a_training_after_an_evaluation_is_what_the_report_shows(tmp_path):
  outputs.write_summary(tmp_path, "evaluate", {"pass_rate": 0.7})
  assert records.summary_path(tmp_path).name == "summary.json"
  trained = outputs.write_summary(tmp_path, "train", {"pass_rate_rl": 0.5})
  assert records.read_run(tmp_path).summary == trained


def test_a_damaged_line_of_metrics_costs_itself_alone(tmp_path, caplog):
  """One bad line used to cost all records behind it, silently."""
  lines = [json.dumps({"step": k}).encode() + b"\n" for k in range(12)]
  lines[4], lines[6], lines[8] = b'{"step": 4', b'{"\xff": 1}\n', b"[3]\n"
  lines[4] += b"\n"
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b"".join(lines))
  good = [k for k in range(12) if k not in (4, 6, 8)]
  run = records.read_run(tmp_path)
  assert [r["step"] for r in run.metrics] == good
  assert "metrics.jsonl: 3 damaged lines are left out, the first is line 5" in run.problems
  with caplog.at_level(logging.WARNING):
    writer = outputs.MetricsWriter(tmp_path, keep=11)
    writer.write(99, "train", {"x": 1.0})
    writer.close()
  assert "3 damaged lines are left out: [5, 7, 9]" in caplog.text
  assert "metrics.jsonl: 3 of 11 records are lost" in caplog.text
  assert [r["step"] for r in outputs.read_jsonl(path)] == [*good[:-1], 99]
  caplog.clear()
  with path.open("a") as file:
    file.write('{"half')
  assert len(outputs.read_jsonl(path)) == 9
  assert not caplog.text, "what a killed run left half-written is no damage"


@pytest.mark.parametrize("trouble", ["an error", "the clock"])
def test_trouble_with_tensorboard_does_not_hold_the_training(trouble, tmp_path, monkeypatch):
  """Its thread died of one error, or slept until the clock came back, and its queue filled."""
  writer = outputs.MetricsWriter(tmp_path)
  if trouble == "an error":

    def fail(*_):
      raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs.event_file_writer.EventsWriter, "write_event", fail)
  else:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 1e8)
  for k in range(30):
    writer.write(k, "train", {"reward": k, "kl": 0.0})
  writer.close()
  assert len(outputs.read_jsonl(tmp_path / "metrics.jsonl")) == 30


# --- what a run was begun with ---


@pytest.fixture
def begun(tmp_path):
  """(workdir, a function that makes configs of one run on files of the user's)."""
  for name in ("tasks.jsonl", "tools.py"):
    (tmp_path / name).write_text(f"# {name}")

  def make(tasks="tasks.jsonl", **changes):
    where = {"tasks": tmp_path / tasks, "functions": tmp_path / "tools.py"}
    fields = {f"environment__{name}": str(path) for name, path in where.items()}
    return tiny.make(environment__name="custom", **fields, **changes)

  workdir = tmp_path / "run"
  workdir.mkdir()
  restore.claim(make(), workdir)
  return workdir, make


def check(config, workdir):
  restore.refuse_other_config(config, workdir, train.MAY_CHANGE)
  restore.refuse_fewer_iterations(config, workdir)


@pytest.mark.parametrize(("name", "field"), [("tasks.jsonl", "tasks"), ("tools.py", "functions")])
def test_files_with_other_content_are_refused(begun, name, field):
  """A tasks file that was written anew used to be trained on without a word."""
  workdir, make = begun
  (workdir.parent / name).write_text("other")
  with pytest.raises(ValueError, match=rf"the content of config\.environment\.{field} is not what"):
    check(make(), workdir)


def test_a_file_that_was_moved_and_what_changes_no_bits_go_on(begun):
  workdir, make = begun
  (workdir.parent / "new").mkdir()
  (workdir.parent / "tasks.jsonl").rename(workdir.parent / "new/tasks.jsonl")
  check(make("new/tasks.jsonl"), workdir)
  faster = {"slots": 16, "tool_timeout": 3.0, "tool_workers": 2}
  check(make("new/tasks.jsonl", **{f"rollout__{k}": v for k, v in faster.items()}), workdir)
  (workdir.parent / "new/tasks.jsonl").write_text("other")
  with pytest.raises(ValueError, match=r"different: environment\.tasks;"):
    check(make("new/tasks.jsonl"), workdir)


def test_iterations_can_be_raised_and_not_lowered(begun):
  workdir, make = begun
  more = make(train__iterations=5)
  check(more, workdir)
  restore.claim(more, workdir)
  with pytest.raises(ValueError, match=r"iterations: 3, but the run in .* has 5; they can be rais"):
    check(make(), workdir)


@pytest.mark.parametrize("text", ["", "[]", "{", "\udcff"])
def test_a_damaged_config_is_named_with_what_to_do(begun, text):
  workdir, make = begun
  (workdir / "config.json").write_text(text, errors="surrogateescape")
  with pytest.raises(ValueError, match=r"config\.json is damaged, so nobody can say .* put back a"):
    check(make(), workdir)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 cut", b"\xff"])
def test_damaged_log_probs_of_stored_data_are_named(tmp_path, data):
  (tmp_path / behaviour._FILE).write_bytes(data)
  with pytest.raises(ValueError, match="is damaged .*; put back a copy"):
    behaviour.restore(None, tmp_path)


def test_another_gguf_is_another_model(tmp_path, monkeypatch):
  """The second one used to be taken for the first, whose weights lay there already."""
  gguf = pytest.importorskip("steptool_jax.policy.formats.gguf")

  def convert(source, out):
    out.mkdir(parents=True)
    (out / "config.json").write_text(source.read_text())

  monkeypatch.setattr(gguf, "gguf_to_hub", convert)
  for name in ("a", "b"):
    path = tmp_path / f"{name}.gguf"
    path.write_text(name)
    for _ in range(2):
      found = build._source(str(path), tmp_path)
      assert (found / "config.json").read_text() == name


def test_a_compact_tokenizer_is_of_this_environment_until_a_run_has_learnt_it(
  tmp_path, monkeypatch
):
  made = []

  def make(texts, vocab_size, out):
    out.mkdir(exist_ok=True)
    (out / "tokenizer_config.json").touch()
    made.append(vocab_size)

  class Nothing:
    def tasks(self, split):
      return []

  monkeypatch.setattr(tokenizers.compact, "build_tokenizer", make)
  one, other = tiny.make(), tiny.make(environment__seed=1)
  for config in (one, one, other, other):
    build._tokenizer(config, Nothing(), tmp_path, None)
  assert len(made) == 2, "another environment used to get the first one's tokens"
  restore.claim(other, tmp_path)
  build._tokenizer(one, Nothing(), tmp_path, None)
  assert len(made) == 2, "the policy knows these tokens"
  (tmp_path / "tokenizer/tokenizer_config.json").write_text("{}")
  with pytest.raises(ValueError, match=r"the content of config\.model\.tokenizer is not what"):
    check(other, tmp_path)


# --- hangs ---


def test_a_run_without_progress_ends_with_a_sentence(tmp_path):
  said = []
  with hang.watched(0.1, tmp_path, said.append):
    time.sleep(0.3)
    assert not said, "nothing has begun"
    for _ in range(6):
      hang.stamp()
      time.sleep(0.05)
    hang.rest()
    time.sleep(0.3)
    assert not said, "it went on, or rested"
    hang.stamp()
    time.sleep(0.3)
  (text,) = said
  assert text.startswith("no progress for 0.1 s (config.hang_after): a tool, the devices or")
  assert "test_a_run_without_progress" in (tmp_path / "error.txt").read_text(), "where it stood"
  with hang.watched(0, tmp_path, said.append):
    hang.stamp()
    time.sleep(0.05)
  assert len(said) == 1


def test_a_run_may_go_on_on_a_mesh_of_another_size(begun):
  """Rows must fit a larger mesh, and the config said that they must be those of before."""
  workdir, make = begun
  fields = {"mesh__fsdp": 4, "train__micro_rows": 8, "sft__micro_rows": 8, "rollout__slots": 8}
  check(make(**fields), workdir)
  check(make(rollout__tensor=2), workdir)
