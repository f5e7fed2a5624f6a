"""--mode=evaluate: held-out figures of the newest checkpoint, or of the model itself.

With evaluation.stored: the published figures of stored runs, once more; needs no model.
"""

import pathlib
from typing import Any

from absl import logging

from steptool_jax.config import Config
from steptool_jax.run.evaluating import heldout
from steptool_jax.run.parts import opening
from steptool_jax.run.training import restore
from steptool_jax.run.workdir import outputs
from steptool_jax.toolbench.stored import stored_summary


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Evaluates the policy of WORKDIR's newest checkpoint; without one, the model of the config."""
  stored = config.evaluation.stored
  if stored:
    if not pathlib.Path(stored).is_dir():
      raise FileNotFoundError(f"config.evaluation.stored: there is no folder {stored}")
    figures = {"stored": stored} | stored_summary(stored)
    return outputs.write_summary(workdir, "evaluate", figures)
  with opening.open_parts(config, workdir, opening.Stop()) as b:
    variables, source = restore.policy_variables(b)
    logging.info("evaluating the %s", source)
    figures = {"source": source} | heldout.evaluate(b, variables)
  return outputs.write_summary(workdir, "evaluate", figures)
