"""The start checkpoint for users' own tools: it copies names that it has never seen."""

import runpy

import tiny

from steptool_jax.run import evaluate
from steptool_jax.run.workdir.outputs import read_jsonl
from steptool_jax.validation import validate


def test_it_copies_names_that_it_has_never_seen_into_tools_that_it_has_never_seen(tmp_path):
  """What users' own tools need of it; which tool to call it learns from demonstrations."""
  config = runpy.run_path(str(tiny.ROOT / "configs" / "own_tools_base.py"))["get_config"]()
  config.model.path, config.model.tokenizer = "asset:own_tools", ""
  e, r, v = config.environment, config.rollout, config.evaluation
  e.num_heldout = v.tasks = r.slots = 24
  e.max_calls, e.tools_per_task = 1, 4
  r.max_steps, v.temperature = 1, 0.0
  evaluate.run(validate(config), tmp_path)
  copied = 0
  for record in read_jsonl(tmp_path / "trajectories.jsonl"):
    arguments = record["steps"][0]["action"].get("arguments", {})
    copied += any(len(str(v)) > 3 and str(v) in record["query"] for v in arguments.values())
  assert copied > 12
