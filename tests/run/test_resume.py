import json
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from steptool_jax.run import train
from steptool_jax.run.training import phase
from steptool_jax.run.workdir.checkpoint import Checkpoints
from steptool_jax.run.workdir.metrics_writer import read_jsonl
from steptool_jax.types import TrainState

# A checkpoint every second iteration, so that a kill throws work away.
FLAGS = (
  "--config.sft.steps=4",
  "--config.train.iterations=4",
  "--config.checkpoint.every=2",
  "--config.loss.kl_adaptive=True",
)
# Parts of what depends on the clock. The sampler's log-probs do in their last bits: tools decide by
# their speed which conversations share an append, and its width. Nothing is trained on them.
CLOCK = ("tokens_per_second", "share", "rl_seconds", "sampler_gap")


def saved(workdir):
  """(arrays by path, meta) of the newest checkpoint."""
  with ocp.CheckpointManager(workdir / "checkpoints") as manager:
    args = ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
    found = manager.restore(manager.latest_step(), args=args)
  leaves = jax.tree_util.tree_leaves_with_path(found["state"])
  return {jax.tree_util.keystr(p): np.asarray(x) for p, x in leaves}, found["meta"]


def records(workdir):
  return [
    {k: v for k, v in r.items() if not any(word in k for word in CLOCK)}
    for r in read_jsonl(workdir / "metrics.jsonl")
  ]


def assert_same_run(workdir, other):
  mine, meta = saved(workdir)
  theirs, other_meta = saved(other)
  assert mine.keys() == theirs.keys()
  assert {p.split("'")[1] for p in mine} >= {"trainable", "opt_state", "step", "kl_coef"}
  moments = [x for path, x in mine.items() if "opt_state" in path and "mu" in path]
  assert any(np.any(x) for x in moments), "RL learnt nothing: the comparison would be empty"
  for path, array in mine.items():
    np.testing.assert_array_equal(array, theirs[path], err_msg=path)
  for name in ("phase", "done", "conversations", "tokens", "train_curve", "heldout_curve"):
    assert meta[name] == other_meta[name], name
  assert records(workdir) == records(other)


def start(workdir, *flags):
  return subprocess.Popen(
    tiny.command(workdir, *flags),
    env=tiny.environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for(process, workdir, word, step):
  """Until metrics.jsonl has a record of `step` with `word`."""
  limit = time.monotonic() + 200
  while time.monotonic() < limit:
    assert process.poll() is None, process.communicate()[1][-3000:]
    found = read_jsonl(workdir / "metrics.jsonl")
    if any(r["step"] >= step and any(k.startswith(word) for k in r) for r in found):
      return
    time.sleep(0.01)
  raise AssertionError(f"no {word} at step {step}")


def summary(workdir):
  return json.loads((workdir / "summary.json").read_text())


@pytest.fixture(scope="module")
def reference(tmp_path_factory, compiled):
  """(workdir, flags) of a run that nobody stopped."""
  workdir = tmp_path_factory.mktemp("reference")
  flags = (*FLAGS, f"--config.compilation_cache={compiled}")
  done = tiny.main(workdir, *flags)
  assert done.returncode == 0, done.stderr[-3000:]
  return workdir, flags


def test_terminated_and_killed_runs_go_on_bit_equal(reference, tmp_path):
  whole, flags = reference

  # SIGTERM in SFT.
  process = start(tmp_path, *flags)
  wait_for(process, tmp_path, "heldout", 0)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors[-3000:]
  assert summary(tmp_path)["interrupted"] is True
  _, meta = saved(tmp_path)
  assert meta["phase"] == "sft"
  assert meta["done"] < 4

  # kill -9 in RL, one iteration behind the checkpoint.
  process = start(tmp_path, *flags)
  wait_for(process, tmp_path, "train", 7)
  process.kill()
  process.communicate()
  _, meta = saved(tmp_path)
  assert meta["phase"] == "rl"
  assert meta["done"] < 3
  assert any(r["step"] == 7 for r in records(tmp_path)), "a record that will be written again"

  # SIGTERM in RL: the signal comes while the programs are loaded, the rollout sees it.
  process = start(tmp_path, *flags)
  wait_for_resume(process)
  process.send_signal(signal.SIGTERM)
  process.stderr.read()
  assert process.wait(timeout=120) == 0
  assert summary(tmp_path)["interrupted"] is True
  _, meta = saved(tmp_path)
  assert meta["phase"] == "rl"
  assert meta["done"] < 4

  process = start(tmp_path, *flags)
  _, errors = process.communicate(timeout=200)
  assert process.returncode == 0, errors[-3000:]
  assert_same_run(tmp_path, whole)
  mine, theirs = summary(tmp_path), summary(whole)
  for name in ("pass_rate_base", "pass_rate_sft", "pass_rate_rl", "interrupted", "conversations"):
    assert mine[name] == theirs[name], name


def wait_for_resume(process):
  for line in process.stderr:
    if "resuming: rl" in line:
      return
  raise AssertionError("did not resume")


def test_a_finished_run_started_again_changes_nothing(reference):
  workdir, flags = reference
  arrays, meta = saved(workdir)
  before, results = records(workdir), summary(workdir)
  files = sorted(p.name for p in (workdir / "checkpoints").iterdir())
  done = tiny.main(workdir, *flags)
  assert done.returncode == 0, done.stderr[-3000:]
  after, meta_after = saved(workdir)
  assert meta_after == meta
  for path, array in arrays.items():
    np.testing.assert_array_equal(array, after[path])
  assert records(workdir) == before
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == files
  clocks = ("seconds", "peak_rss_gib")
  again = summary(workdir)
  assert {k: v for k, v in again.items() if k not in clocks} == {
    k: v for k, v in results.items() if k not in clocks
  }


def test_another_config_is_refused_by_name(reference):
  workdir, flags = reference
  done = tiny.main(workdir, *flags, "--config.rollout.samples=3")
  assert done.returncode == 1
  assert "holds a run with another config; different: rollout.samples;" in done.stderr
  assert "Traceback" not in done.stderr


class Crash(BaseException):
  pass


def crash_and_go_on(config, folder, done):
  """A run that nobody stopped and one that crashed in RL iteration `done` end the same.

  (meta that the crash left behind, arrays in the end).
  """
  train.run(config, folder / "whole")
  whole = train._Trainer._iteration

  def crash(self):
    if self.progress.done == done:
      raise Crash
    return whole(self)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train._Trainer, "_iteration", crash)
    with pytest.raises(Crash):
      train.run(config, folder / "cut")
  _, meta = saved(folder / "cut")
  train.run(config, folder / "cut")
  assert_same_run(folder / "cut", folder / "whole")
  return meta, saved(folder / "cut")[0]


def test_lora_with_folded_sft_adapters_resumes_bit_equal(tmp_path, compiled):
  config = tiny.make("lora", compilation_cache=compiled, evaluation__every=0)
  meta, arrays = crash_and_go_on(config, tmp_path, 1)
  assert (meta["phase"], meta["done"]) == ("rl", 1)
  assert any("lora" in path and np.any(array) for path, array in arrays.items())


@pytest.mark.parametrize("cut", ["before training", "after SFT", "iteration 2", "after RL"])
def test_an_evaluation_that_is_cut_off_is_made_up_for(cut, tmp_path, compiled, monkeypatch):
  """All results and held-out records are there in the end, each once."""

  def figures(parts, variables, num_tasks, label, temperature):
    if label == cut:
      raise train.Interrupted
    return {"pass_rate": len(label) / 100}, []

  config = tiny.make(compilation_cache=compiled)
  monkeypatch.setattr(train.rollouts, "evaluate_policy", figures)
  # Rollouts and updates are beside the point here.
  fake = {"reward": 0.0, "pass_rate": 0.0, "kl": 0.0, "tokens_per_second": 0.0}

  def iteration(self):
    self.progress.learnt += 1
    return dict(fake)

  monkeypatch.setattr(train._Trainer, "_iteration", iteration)
  monkeypatch.setattr(phase.Phase, "update", lambda self, batch, rows: {"loss": 0.0})
  first = train.run(config, tmp_path)
  assert first["interrupted"] is True
  cut = ""
  second = train.run(config, tmp_path)
  assert second["interrupted"] is False
  assert second["pass_rate_base"] == len("before training") / 100
  assert second["pass_rate_sft"] == len("after SFT") / 100
  assert second["pass_rate_rl"] == len("after RL") / 100
  found = [(r["step"], next(k for k in r if k != "step")) for r in records(tmp_path)]
  held = "heldout/pass_rate"
  assert [f for f in found if f[1] == held] == [(0, held), (2, held), (4, held), (5, held)]
  assert len(found) == len(set(found)) == 4 + 2 + 3


def test_the_state_is_copied_before_it_is_donated(tmp_path):
  """Checkpoints are written in the background while the next update overwrites the buffers."""
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    trainable={"w": jnp.zeros(4_000_000)},
    frozen={},
    reference={},
    opt_state=(),
    kl_coef=jnp.float32(0.1),
  )
  checkpoints = Checkpoints(tmp_path, keep=1)
  array = state.trainable["w"]
  checkpoints.save(1, state, {})
  for _ in range(10):
    array = step(array)
  checkpoints.close()
  arrays, _ = saved(tmp_path)
  np.testing.assert_array_equal(arrays["['trainable']['w']"], np.zeros(4_000_000))
