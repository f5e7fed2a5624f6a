"""The policy of a workdir's newest checkpoint, for modes that only read it."""

from typing import Any

from steptool_jax.policy import lora
from steptool_jax.run import build
from steptool_jax.run.checkpoint import Checkpoints
from steptool_jax.run.workbench import Workbench


def newest_variables(bench: Workbench) -> tuple[dict, dict[str, Any]]:
  """(variables, meta) of the newest checkpoint.

  Raises:
    FileNotFoundError: the workdir has none.
  """
  checkpoints = Checkpoints(bench.workdir, bench.config.checkpoint.keep)
  try:
    meta = checkpoints.latest_meta()
    if meta is None:
      raise FileNotFoundError(f"{bench.workdir}: no checkpoint; train first, or check --workdir")
    name = "sft" if meta["phase"] == "sft" else bench.config.algorithm
    learner = build.build_learner(bench.config, bench.policy.model, name)
    abstract = build.abstract_state(bench.config, bench.policy, bench.mesh, learner)
    state = checkpoints.restore(abstract)
    return lora.join_variables(state.trainable, state.frozen), meta
  finally:
    checkpoints.close()
