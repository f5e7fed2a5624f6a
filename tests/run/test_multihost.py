"""Two processes of two devices train as one, over gloo: the same tokens, one checkpoint, one end.

The runs of one test follow each other in one workdir, since starting processes is what costs.
STEPTOOL_PROCESSES=4 takes four processes of one device.
"""

import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from pod import Pod
from resuming import records

from steptool_jax.data.trajectories import AnnotatedTrajectory, read_trajectories, to_document
from steptool_jax.learning import batching
from steptool_jax.run import train
from steptool_jax.run.hosts import agreement, ending, hosts, joining
from steptool_jax.run.parts import rollouts
from steptool_jax.run.workdir import checkpoint

ITERATIONS = 2
FLAGS = (
  "--config.mesh.data=2",
  "--config.mesh.fsdp=2",
  f"--config.train.iterations={ITERATIONS}",
)
PROCESSES = int(os.environ.get("STEPTOOL_PROCESSES", "2"))
PATIENCE_S, END_S = 200, 100  # on a machine with other work


@pytest.fixture(scope="module")
def pod():
  with Pod(PROCESSES) as running:
    yield running


@pytest.fixture(scope="module")
def flags(compiled):
  return (*FLAGS, f"--config.compilation_cache={compiled}")


def one_process(compiled):
  return tiny.make("calls", compilation_cache=compiled, train__iterations=ITERATIONS)


@pytest.fixture(scope="module")
def whole(pod, flags, tmp_path_factory):
  """Workdir of processes that nobody stopped."""
  workdir = tmp_path_factory.mktemp("whole")
  run = pod.start(workdir, *flags)
  assert run.wait() == [0] * PROCESSES, run.log(0)[-3000:]
  return workdir


@pytest.fixture(scope="module")
def alone(compiled, tmp_path_factory):
  """Workdir of the same run in this process, and its trajectories."""
  workdir = tmp_path_factory.mktemp("alone")
  reward, rolled = rollouts.reward, []

  def recording(*args, **options):
    trajectories = reward(*args, **options)
    rolled.extend(trajectories)
    return trajectories

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(rollouts, "reward", recording)
    train.run(one_process(compiled), workdir)
  return workdir, rolled


def arrays(workdir):
  """(number, {path: array}) of the newest checkpoint, wherever it was written."""
  number = checkpoint.numbers(workdir)[0]
  handler = ocp.PyTreeCheckpointHandler()
  path = ocp.utils.epath.Path(workdir / "checkpoints" / str(number) / "state")
  shapes = handler.metadata(path)
  to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
  found = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=to_numpy))
  return number, {
    jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(found)
  }


def meta(workdir):
  number = checkpoint.numbers(workdir)[0]
  folder = ocp.utils.epath.Path(workdir / "checkpoints" / str(number) / "meta")
  return ocp.JsonCheckpointHandler().restore(folder)


def assert_bit_equal(workdir, other):
  number, mine = arrays(workdir)
  assert number == arrays(other)[0]
  for path, array in arrays(other)[1].items():
    np.testing.assert_array_equal(mine[path], array, err_msg=path)
  for name in ("phase", "done", "conversations", "tokens", "train_curve"):
    assert meta(workdir)[name] == meta(other)[name], name
  assert records(workdir) == records(other)


def ids(trajectories):
  """What was sampled and shown, and how it was judged."""
  documents = [to_document(AnnotatedTrajectory(trajectory)) for trajectory in trajectories]
  for document in documents:
    for step in document["steps"]:
      del step["logprobs"]
      if step["observation"] is not None:
        del step["observation"]["seconds"]
  return documents


def rolled(workdir, process):
  return [record.trajectory for record in read_trajectories(workdir / f"rolled_{process}.jsonl")]


def assert_close(mine, theirs):
  assert mine.keys() == theirs.keys()
  for path, array in theirs.items():
    np.testing.assert_allclose(mine[path], array, atol=1e-5, err_msg=path)


def until(run, ready, what):
  limit = time.monotonic() + PATIENCE_S
  while not ready():
    assert time.monotonic() < limit, f"{what}: {run.log(0)[-3000:]}"
    time.sleep(0.01)


def resumed(run):
  """Whether the last start in this log goes on from a checkpoint."""
  return "resuming: rl" in run.log(0).rpartition("Starting JAX distributed service")[2]


def assert_all_end_with_a_sentence(run, victim):
  """Soon after this one was killed."""
  os.kill(run.pids[victim], signal.SIGKILL)
  killed = time.monotonic()
  codes = run.wait()
  assert time.monotonic() - killed < END_S, "the others wait for the dead one"
  assert codes.pop(victim) == -signal.SIGKILL
  assert set(codes) <= {1, -signal.SIGABRT}, codes
  for process in range(len(run.pids)):
    until(run, lambda process=process: sentences(run, process), "a sentence")
    (said,) = sentences(run, process)
    assert said.startswith(f"steptool_jax: process {process}: ")
    assert "start all processes again with the same command: training goes on from" in said


def sentences(run, process):
  return [line for line in run.log(process).splitlines() if line.startswith("steptool_jax: ")]


def test_two_processes_are_one(whole, alone):
  workdir, trajectories = alone
  observations = [s.observation for t in trajectories for s in t.steps if s.observation]
  assert "ok" in {o.code for o in observations}, "no tool was called: nothing was exchanged"
  for process in range(PROCESSES):
    assert ids(rolled(whole, process)) == ids(trajectories)
  mine, theirs = arrays(whole)[1], arrays(workdir)[1]
  assert_close(mine, theirs)
  assert any(np.any(x) for path, x in theirs.items() if "'mu'" in path), "nothing was learnt"
  assert json.loads((whole / "summary.json").read_text())["interrupted"] is False


def test_killed_and_preempted_processes_go_on_bit_equal_and_on_another_mesh(
  pod, flags, whole, compiled, tmp_path
):
  workdir = tmp_path / "run"
  run = pod.start(workdir, *flags)
  until(run, lambda: 2 in checkpoint.numbers(workdir), "second checkpoint")
  assert_all_end_with_a_sentence(run, PROCESSES - 1)

  run = pod.start(workdir, *flags)
  until(run, lambda: resumed(run), "resumption")
  rolls = len(rolled(workdir, 0))
  os.kill(run.pids[-1], signal.SIGTERM)
  assert run.wait() == [0] * PROCESSES, run.log(0)[-3000:]
  assert json.loads((workdir / "summary.json").read_text())["interrupted"] is True
  assert len(rolled(workdir, 0)) == rolls, "they went on"
  other_mesh = tmp_path / "one"
  shutil.copytree(workdir, other_mesh)

  assert pod.start(workdir, *flags).wait() == [0] * PROCESSES
  assert_bit_equal(workdir, whole)

  # Their checkpoint goes on in one process with one device.
  assert checkpoint.numbers(other_mesh)[0] < checkpoint.numbers(whole)[0]
  train.run(one_process(compiled), other_mesh)
  assert_close(arrays(other_mesh)[1], arrays(whole)[1])


@pytest.mark.parametrize("victim", [3, 0])
def test_all_of_four_end_with_a_sentence_when_one_is_killed(pod, tmp_path, victim):
  """The store dies with process 0, and jax aborts the others."""
  run = pod.exchange(tmp_path, 4)
  until(run, lambda: all("exchanged" in run.log(n) for n in range(4)), "an exchange")
  assert_all_end_with_a_sentence(run, victim)


def test_all_of_four_end_with_the_error_of_one(pod, tmp_path):
  run = pod.exchange(tmp_path, 4, failing=2)
  assert run.wait() == [1] * 4
  for process in range(4):
    told = "" if process == 2 else "process 2 stopped: "
    (said,) = sentences(run, process)
    assert said.startswith(f"steptool_jax: process {process}: {told}nothing but trouble")


def test_one_that_ends_without_a_word_has_left_one(capfd):
  for last, expected in (("farewell", "\nfarewell\n"), ("", "")):
    will = ending.Will()
    will.write("unheard")
    will.write(last)
    will.process.send_signal(signal.SIGTERM)  # of a scheduler, to all
    will.process.stdin.close()
    will.process.wait(60)
    assert capfd.readouterr().err == expected


def test_processes_with_different_configs_are_refused(pod, tmp_path):
  run = pod.start(tmp_path / "run", each=((), ("--config.rollout.samples=3",)))
  assert run.wait() == [1, 1]
  for process in range(2):
    assert "process 1 has another config than process 0; different: rollout.samples;" in run.log(
      process
    )
  assert not (tmp_path / "run" / "config.json").exists()


def test_a_corrupt_newest_checkpoint_costs_one_iteration(alone, compiled, tmp_path, caplog):
  whole, _ = alone
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  newest = checkpoint.numbers(workdir)[0]
  files = [p for p in (workdir / f"checkpoints/{newest}/state").rglob("*") if p.is_file()]
  torn = max(files, key=lambda path: path.stat().st_size)
  torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
  train.run(one_process(compiled), workdir)
  assert f"checkpoints/{newest} is corrupt and not used" in caplog.text
  assert_bit_equal(workdir, whole)


class Others:
  """A second process that says what it is told to."""

  index, count = 0, 2

  def __init__(self, changes):
    self.changes = changes

  def gather(self, document):
    other = json.loads(json.dumps(document))
    if isinstance(other, dict):
      other |= self.changes
    return [document, other]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"code": "jax 0.0, source beef"}, r"process 1 runs other code than process 0 \(jax 0\.0, "),
    ({"workdir": ""}, r"--workdir: .* of process 0 is not seen by process 1; all hosts need one"),
  ],
)
def test_other_code_and_another_disk_are_refused(changes, message, tmp_path, monkeypatch):
  monkeypatch.setattr(hosts, "peers", lambda: Others(changes))
  monkeypatch.setattr(hosts, "lead", lambda work: work())
  monkeypatch.setattr(agreement.jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match=message):
    agreement.refuse_differences(tiny.make(), tmp_path)
  assert not list(tmp_path.iterdir())


def test_different_batches_are_refused(monkeypatch):
  class Different(Others):
    def gather(self, document):
      return [document, document + 1]

  monkeypatch.setattr(hosts, "peers", lambda: Different({}))
  with pytest.raises(RuntimeError, match="the processes have different batches"):
    agreement.refuse_different_batches(batching.empty_batch(2, 8))


@pytest.mark.parametrize(
  ("coordinator", "count", "index"),
  [("", 4, 0), ("host:1", -1, 0), ("host:1", 4, 4), ("auto", 2, 0)],
)
def test_an_incomplete_description_of_the_processes_is_refused(coordinator, count, index):
  with pytest.raises(ValueError, match="several processes need all three"):
    joining.joined(coordinator, count, index).__enter__()


@pytest.mark.parametrize(
  ("coordinator", "bound"),
  [
    ("localhost:12", "localhost:12"),
    ("127.0.0.1:12", "127.0.0.1:12"),
    ("[::1]:12", "[::1]:12"),
    ("host:12", None),
  ],
)
def test_a_coordinator_of_this_machine_listens_here_alone(coordinator, bound, monkeypatch):
  """It listened on every address even for localhost; and no two programs fly at once on CPUs."""
  found, options = {}, {}
  monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
  monkeypatch.setattr(jax.distributed, "initialize", lambda **fields: found.update(fields))
  monkeypatch.setattr(joining.jax.config, "update", options.__setitem__)
  joining._connect(coordinator, 2, 0)
  assert found.get("coordinator_bind_address") == bound
  assert options["jax_cpu_enable_async_dispatch"] is False


def test_one_process_joins_nothing(monkeypatch):
  monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "nobody:1")
  with joining.joined("", -1, -1):
    assert hosts.primary()
    assert hosts.gather(5) == [5]
  monkeypatch.setenv("JAX_NUM_PROCESSES", "many")
  with pytest.raises(ValueError, match="JAX_NUM_PROCESSES: 'many' is no number"):
    joining.joined("", -1, -1).__enter__()


def test_long_messages_take_a_second_exchange(monkeypatch):
  """What all_gather does for two processes, by hand."""
  sent = {}

  def all_gather(buffer):
    sent.setdefault(len(buffer), []).append(buffer)
    return np.stack([buffer, other[len(buffer)]])

  joined = hosts.Joined(1, 2)
  text = json.dumps([0, "x" * 10_000]).encode()
  other = {}
  for size in (4096, 16384):
    other[size] = np.zeros(size, np.uint8)
    other[size][:8] = np.frombuffer(len(text).to_bytes(8, "little"), np.uint8)
    other[size][8 : 8 + len(text)] = np.frombuffer(text, np.uint8)[: size - 8]
  monkeypatch.setattr(hosts.multihost_utils, "process_allgather", all_gather)
  assert joined.gather({"a": 1}) == ["x" * 10_000, {"a": 1}]
  assert list(sent) == [4096, 16384]


@pytest.mark.parametrize(
  ("variables", "several"),
  [
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "tpu,cpu"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, False),
    ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_PROCESS_ADDRESSES": "local"}, False),
  ],
)
def test_a_notebook_with_a_tpu_waits_for_nobody(variables, several, monkeypatch):
  for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "JAX_PLATFORMS"):
    monkeypatch.delenv(name, raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(joining.importlib.util, "find_spec", lambda name: True)
  monkeypatch.setattr(joining.pathlib.Path, "glob", lambda path, pattern: ["accel0"])
  assert joining._on_a_tpu() == several


def test_a_tpu_without_metadata_runs_alone(monkeypatch, caplog):
  def connect(*described):
    raise ConnectionError("metadata.google.internal")

  monkeypatch.setattr(joining, "_on_a_tpu", lambda: True)
  monkeypatch.setattr(joining, "_connect", connect)
  with joining.joined("", -1, -1):
    assert hosts.peers().count == 1
  assert "no TPU metadata here (metadata.google.internal): this host runs alone" in caplog.text
  with pytest.raises(ConnectionError):
    joining.joined("host:1", 2, 0).__enter__()
