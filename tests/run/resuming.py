"""Runs that are compared bit by bit: what a workdir holds, and one that crashes and goes on."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from steptool_jax.run import train
from steptool_jax.run.training import iteration
from steptool_jax.run.workdir.outputs import read_jsonl

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


class Crash(BaseException):
  pass


def crash(config, workdir, done):
  """A run that crashes in RL iteration `done`; the meta that it leaves behind."""
  whole = iteration.run_iteration

  def crashing(parts, phase, recorder, data):
    if phase.progress.done == done:
      raise Crash
    return whole(parts, phase, recorder, data)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(iteration, "run_iteration", crashing)
    with pytest.raises(Crash):
      train.run(config, workdir)
  return saved(workdir)[1]


def crash_and_go_on(config, folder, done):
  """A run that nobody stopped and one that crashed in RL iteration `done` end the same.

  (meta that the crash left behind, arrays in the end).
  """
  train.run(config, folder / "whole")
  meta = crash(config, folder / "cut", done)
  train.run(config, folder / "cut")
  assert_same_run(folder / "cut", folder / "whole")
  return meta, saved(folder / "cut")[0]
