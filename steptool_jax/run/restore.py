"""What a workdir holds: whose run it is, and the policy of its newest checkpoint."""

import json
import pathlib
from typing import Any

from steptool_jax import validation
from steptool_jax.config import Config
from steptool_jax.policy import lora
from steptool_jax.run import learners, metrics_writer
from steptool_jax.run.checkpoint import Checkpoints
from steptool_jax.run.workbench import Workbench

# What decides how a checkpoint is read: the other fields may differ in modes that only read.
POLICY = ("algorithm", "model.", "lora.", "sft.", "loss.kl", "train.optimizer.")


def refuse_other_config(
  config: Config, workdir: pathlib.Path, may_change: tuple[str, ...] = (), only: tuple = ("",)
) -> None:
  """Does nothing in a workdir without a run.

  `may_change`, `only`: beginnings of the names of fields that are let through, or looked at.

  Raises:
    ValueError: the workdir's run has another config; names the fields.
  """
  path = workdir / "config.json"
  if not path.exists():
    return
  names = validation.differences(config, json.loads(path.read_text()))
  names = [name for name in names if name.startswith(only) and not name.startswith(may_change)]
  if names:
    raise ValueError(
      f"{workdir} holds a run with another config; different: {', '.join(names)}; use another "
      "--workdir, or the values of its config.json"
    )


def claim(config: Config, workdir: pathlib.Path) -> None:
  """Writes config.json where there is none."""
  path = workdir / "config.json"
  if not path.exists():
    metrics_writer.write_atomically(path, validation.to_json(config))


def newest_variables(bench: Workbench) -> tuple[dict, dict[str, Any]] | None:
  """(variables, meta) of the newest checkpoint; None where the workdir has none.

  Raises:
    ValueError: it belongs to another model or config.
  """
  refuse_other_config(bench.config, bench.workdir, only=POLICY)
  checkpoints = Checkpoints(bench.workdir, bench.config.checkpoint.keep)
  try:
    meta = checkpoints.latest_meta()
    if meta is None:
      return None
    name = "sft" if meta["phase"] == "sft" else bench.config.algorithm
    learner = learners.build_learner(bench.config, bench.policy.model, name)
    abstract = learners.abstract_state(bench.config, bench.policy, bench.mesh, learner)
    state = checkpoints.restore(abstract)
    return lora.join_variables(state.trainable, state.frozen), meta
  finally:
    checkpoints.close()
