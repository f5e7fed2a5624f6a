"""A run that samples from an int8 cache (rollout.kv_cache): what it says, and what it learns."""

import types

import fakes
import jax
import pytest
import tiny

from steptool_jax.policy import sharding
from steptool_jax.run import train
from steptool_jax.run.parts import build
from steptool_jax.run.workdir.outputs import read_jsonl


def test_the_gap_is_shown_and_small_and_corrected(compiled, tmp_path):
  """A cache that mixed its scales up would sample nonsense, whose log-probs are not the trainer's;
  one that nothing reads would have no gap but float32's rounding."""
  config = tiny.make(
    "calls", compilation_cache=compiled, rollout__kv_cache="int8", train__iterations=1
  )
  train.run(config, tmp_path)
  (record,) = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if "train/kl" in r]
  assert 1e-5 < record["train/sampler_gap_mean"] < 0.02
  assert record["train/sampler_gap_mean"] < record["train/sampler_gap"] < 0.5
  assert record["train/importance"] == pytest.approx(1.0, abs=0.02)
  assert record["train/importance_cut"] < 0.01


def test_the_engine_is_the_configured_one():
  """What is trained on, log-probs of another policy among it, must not depend on when tools
  answer: then a run that was killed would not go on as it was."""
  policy = types.SimpleNamespace(model=fakes.tiny_config(max_position_embeddings=512))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  for kv_cache, buckets in (("auto", (1, 2, 4)), ("int8", ())):
    engine = build.build_engine(tiny.make(rollout__kv_cache=kv_cache), policy, mesh)
    assert (engine.kv_cache, engine.buckets) == (kv_cache, buckets)
    assert (engine.init().cache.k_scale is None) == (kv_cache == "auto")
