"""--mode=bench at small sizes: that it runs, and what it tells."""

import json

import fakes
import tiny

from steptool_jax.run import bench


def test_every_figure_is_there(tmp_path, monkeypatch):
  """It ended in a traceback once the update's critic was one that is fitted to a table."""
  for name, value in {
    "ARCHITECTURE": fakes.tiny_config(max_position_embeddings=512),
    "TRAJECTORIES": 2,
    "TOKENS": 64,
    "SLOTS": 2,
    "TURNS": 3,
    "PROMPT": 16,
    "OBSERVATIONS": (3, 6),
    "ANSWER": 4,
    "PACKED": 20,
  }.items():
    monkeypatch.setattr(bench, name, value)
  summary = bench.run(tiny.make("calls", bench__repeats=1), tmp_path)
  assert json.loads((tmp_path / "summary_bench.json").read_text()) == summary
  for name in ("update_over_matmul", "engine_over_reprefill", "update_tokens_per_second"):
    assert summary[name] > 0
  assert summary["update_parameters"] > 10_000
  assert 0 <= summary["padding_share"] < 1
