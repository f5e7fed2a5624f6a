"""A run that was stopped, killed or cut off ends as one that was left alone."""

import json
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from resuming import assert_same_run, crash_and_go_on, records, saved

from steptool_jax.rollout import context
from steptool_jax.run import train
from steptool_jax.run.training import iteration, phase
from steptool_jax.run.workdir.checkpoint import Checkpoints
from steptool_jax.run.workdir.outputs import read_jsonl
from steptool_jax.types import TrainState

# A checkpoint every second iteration, so that a kill throws work away.
FLAGS = (
  "--config.sft.steps=4",
  "--config.train.iterations=4",
  "--config.checkpoint.every=2",
  "--config.loss.kl_adaptive=True",
)


def start(workdir, *flags):
  return subprocess.Popen(
    tiny.command(workdir, *flags),
    env=tiny.environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for(process, workdir, word, step):
  """Waits until metrics.jsonl has a record of `step` with `word`."""
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

  # kill -9 in RL, one iteration after the checkpoint.
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


@pytest.mark.campaign
def test_lora_with_folded_sft_adapters_resumes_bit_equal(tmp_path, compiled):
  config = tiny.make("lora", compilation_cache=compiled, evaluation__every=0)
  meta, arrays = crash_and_go_on(config, tmp_path, 1)
  assert (meta["phase"], meta["done"]) == ("rl", 1)
  assert any("lora" in path and np.any(array) for path, array in arrays.items())


@pytest.mark.campaign
def test_conversations_of_several_segments_resume_bit_equal(tmp_path, compiled, monkeypatch):
  """Results that are folded give later calls a prompt of their own, and trajectories several rows,
  whose number and order a resumed run must find again."""
  monkeypatch.setattr(context, "FOLDED", "")  # shorter than this shop's results
  config = tiny.make(
    "calls",
    **{"compilation_cache": compiled, "rollout__fold": 1, "rollout__max_steps": 4},
    **{"record__train": 8, "record__every": 1},
  )
  crash_and_go_on(config, tmp_path, done=2)
  for folder in ("whole", "cut"):
    last = max((tmp_path / folder / "moments").glob("train_*.jsonl"))
    own = ["prompt_tokens" in step for line in read_jsonl(last) for step in line["steps"]]
    assert any(own), "no history was changed: the test would be empty"


def test_a_finished_run_goes_on_with_more_iterations(tmp_path, compiled):
  """As one that had them from the start: the rate is constant."""
  config = tiny.make(compilation_cache=compiled)
  train.run(config, tmp_path / "whole")
  for iterations in (2, 3):
    train.run(tiny.replace(config, train__iterations=iterations), tmp_path / "cut")
  assert_same_run(tmp_path / "cut", tmp_path / "whole")
  assert json.loads((tmp_path / "cut/config.json").read_text())["train"]["iterations"] == 3


@pytest.mark.parametrize("cut", ["before training", "after SFT", "iteration 2", "after RL"])
def test_an_evaluation_that_is_cut_off_is_made_up_for(cut, tmp_path, compiled, monkeypatch):
  """All results and held-out records are there in the end, each once."""

  def figures(parts, variables, tasks, label, temperature):
    if label == cut:
      raise train.Interrupted
    return {"pass_rate": len(label) / 100}, []

  config = tiny.make(compilation_cache=compiled)
  monkeypatch.setattr(train.rollouts, "evaluate_policy", figures)
  # Rollouts and updates are beside the point here.
  fake = {"reward": 0.0, "pass_rate": 0.0, "kl": 0.0, "tokens_per_second": 0.0}

  def run_iteration(parts, learner, recorder, data):
    learner.progress.learnt += 1
    return dict(fake)

  monkeypatch.setattr(iteration, "run_iteration", run_iteration)
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
