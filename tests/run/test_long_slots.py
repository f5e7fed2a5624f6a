"""Slots of two sizes (rollout.slot_tokens, rollout.long_slots) in a run."""

import re

import jax
import pytest
import tiny

from steptool_jax.policy import sharding
from steptool_jax.run import compile as compile_mode
from steptool_jax.run import serve, train
from steptool_jax.run.workdir.outputs import read_jsonl

CLASSES = {"rollout__slots": 4, "rollout__slot_tokens": 130, "rollout__long_slots": 2}


@pytest.mark.parametrize(
  "changes", [{}, pytest.param({"rollout__carry": 1}, marks=pytest.mark.campaign)]
)
def test_a_run_learns_what_it_learns_with_slots_of_one_size(changes, compiled, tmp_path):
  """But for the last bits of log-probs; with a carry, conversations come back into any slot."""
  usual = {"compilation_cache": compiled, "train__iterations": 2, **changes}
  found = {}
  for name, sizes in (("alike", {"rollout__slots": 6}), ("classes", CLASSES)):
    train.run(tiny.make("calls", **usual, **sizes), tmp_path / name)
    found[name] = [r for r in read_jsonl(tmp_path / name / "metrics.jsonl") if "train/kl" in r]
  clocks = ("seconds", "_share", "_per_second", "share_of_rollout")
  assert found["alike"]
  for alike, sized in zip(found["alike"], found["classes"], strict=True):
    assert sized["train/outgrown"] > 0
    assert 0 <= sized["train/crowded_share"] < 1
    for figure, value in alike.items():
      if not figure.endswith(clocks) and "sampler_gap" not in figure:
        assert sized[figure] == pytest.approx(value, rel=1e-3, abs=1e-4), figure
    assert "train/outgrown" not in alike


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rollout__long_slots": 0}, "rollout.slot_tokens: 130, and rollout.long_slots: 0; .* both"),
    ({"rollout__slot_tokens": 0}, "rollout.slot_tokens: 0, and rollout.long_slots: 2; .* both"),
    ({"rollout__slot_tokens": 320}, "rollout.slot_tokens: 320 is not less than .* = 320"),
    ({"rollout__strategy": "dfsdt"}, "rollout.strategy = 'dfsdt' all slots are alike"),
    ({"rollout__engine": "http"}, "rollout.engine = 'http' all slots are alike"),
  ],
)
def test_what_does_not_go_with_it_is_refused_before_work(changes, message):
  with pytest.raises(ValueError, match=message):
    tiny.make(**(CLASSES | changes))


def test_a_server_takes_slots_of_one_size(tmp_path):
  config = tiny.make(**CLASSES, serve__what="policy")
  with pytest.raises(ValueError, match=re.escape("rollout.long_slots: 2, but slots of a server")):
    serve._policy(config, tmp_path, "", lambda: False)


def test_compile_has_their_programs():
  """Long slots and the move into them count in memory, and are compiled."""
  config = tiny.make(**CLASSES, model__tokenizer="")
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    found = compile_mode.programs(config, compile_mode.abstract_policy(config), mesh)
    names = [program.name for program in found]
    each = ("append", "decode", "fork", "rewind")
    assert names == ["prepare", "update", *each, *(f"{n}_long" for n in each), "move"]
    assert len(jax.tree.leaves(found[-1].alive)) > len(jax.tree.leaves(found[-1].arguments))
    found[-1].compile()
