"""What a workdir holds: whose run it is, and the policy of its newest checkpoint."""

import pathlib
from typing import Any

from steptool_jax import validation
from steptool_jax.config import Config
from steptool_jax.files import read_json, write_text
from steptool_jax.policy import lora
from steptool_jax.run.hosts import hosts
from steptool_jax.run.parts import rollouts
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.training import setup
from steptool_jax.run.workdir import checkpoint
from steptool_jax.types import TrainState

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
  names = other_fields(config, workdir / "config.json", may_change, only)
  if names:
    raise ValueError(
      f"{workdir} holds a run with another config; different: {', '.join(names)}; use another "
      "--workdir, or the values of its config.json"
    )


def other_fields(
  config: Config, path: pathlib.Path, may_change: tuple[str, ...], only: tuple[str, ...] = ("",)
) -> list[str]:
  """Names of the fields that have another value in this file; none where there is no file."""
  if not path.exists():
    return []
  names = validation.differences(config, read_json(path))
  return [name for name in names if name.startswith(only) and not name.startswith(may_change)]


def claim(config: Config, workdir: pathlib.Path) -> None:
  """Writes config.json where there is none."""
  path = workdir / "config.json"
  if hosts.primary() and not path.exists():
    write_text(path, validation.to_json(config))


def newest_variables(parts: Parts) -> tuple[dict, dict[str, Any]] | None:
  """(variables, meta) of the newest checkpoint, or of the best (checkpoint.use); None for none.

  Raises:
    ValueError: it belongs to another model or config.
  """
  refuse_other_config(parts.config, parts.workdir, only=POLICY)
  if parts.config.checkpoint.use == "best":
    refuse_other_config(parts.config, parts.workdir, only=("evaluation.selection",))
    rollouts.selection(parts)  # no task that is reported has chosen the checkpoint

  def abstract_of(meta: dict[str, Any]) -> TrainState:
    name = "sft" if meta["phase"] == "sft" else parts.config.algorithm
    learner = setup.build_learner(parts.config, parts.policy.model, name)
    return setup.abstract_state(parts.policy, parts.mesh, learner)

  found = checkpoint.newest(parts.workdir, abstract_of, _order(parts))
  if found is None:
    return None
  return lora.join_variables(found.state.trainable, found.state.frozen), found.meta


def _order(parts: Parts) -> list[int]:
  """Checkpoints to read, the one that is wanted first."""
  numbers = hosts.lead(lambda: checkpoint.numbers(parts.workdir))
  if parts.config.checkpoint.use == "newest" or not numbers:
    return numbers
  scores = checkpoint.read_scores(parts.workdir) if parts.config.evaluation.selection else {}
  numbers = [n for n in numbers if n in scores]
  if not numbers:
    raise ValueError(
      f"config.checkpoint.use: 'best', but no checkpoint of {parts.workdir} has a score; train "
      "with evaluation.selection above 0 and evaluation.every a multiple of checkpoint.every, or "
      "use 'newest'"
    )
  return sorted(numbers, key=lambda n: (scores[n], n), reverse=True)
