"""--mode=evaluate: held-out figures of the newest checkpoint, or of the model itself."""

import pathlib
from typing import Any

from absl import logging

from steptool_jax.config import Config
from steptool_jax.run import build, metrics_writer, restore, workbench


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Evaluates the policy of WORKDIR's newest checkpoint; without one, the model of the config."""
  with workbench.open_workbench(config, workdir, workbench.Stop()) as b:
    newest = restore.newest_variables(b)
    if newest is not None:
      variables, meta = newest
      source = f"checkpoint: {meta['phase']}, iteration {meta['done']}"
    else:
      variables = build.initial_variables(config, b.policy, b.mesh)
      source = f"model: {config.model.path or 'random weights'}"
    logging.info("evaluating the %s", source)
    figures, trajectories = workbench.evaluate_policy(
      b, variables, config.evaluation.tasks, "evaluation"
    )
  summary = {"mode": "evaluate", "source": source, "tasks": len(trajectories)} | figures
  metrics_writer.write_summary(workdir, summary)
  return summary
