"""What a workdir holds: whose run it is, and the policy of its newest checkpoint."""

import json
import pathlib
from typing import Any

from absl import logging

from steptool_jax import validation
from steptool_jax.config import Config
from steptool_jax.files import read_json, write_text
from steptool_jax.policy import lora
from steptool_jax.run.hosts import hosts
from steptool_jax.run.parts import build, rollouts
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.training import setup
from steptool_jax.run.workdir import checkpoint, inputs
from steptool_jax.types import TrainState

_CONFIG, _INPUTS = "config.json", "inputs.json"  # in WORKDIR: fields, {field: digest of its files}
# What decides how a checkpoint is read: the other fields may differ in modes that only read.
POLICY = ("algorithm", "model.", "lora.", "sft.", "loss.kl", "critic.passes", "train.optimizer.")


def refuse_other_config(
  config: Config, workdir: pathlib.Path, may_change: tuple[str, ...] = (), only: tuple = ("",)
) -> None:
  """Does nothing in a workdir without a run.

  A file that was moved is the same one by its content; one with other content is another one.
  `may_change`, `only`: beginnings of the names of fields that are let through, or looked at.

  Raises:
    ValueError: the workdir's run has another config, or began with other files; names the fields.
  """
  path = workdir / _INPUTS
  # One process looks into the folder: all have to take the same way from here.
  begun = hosts.lead(lambda: _read(path) if path.exists() else {})
  today = hosts.lead(lambda: inputs.digests(config, workdir)) if begun else {}
  names = [
    name
    for name in other_fields(config, workdir / _CONFIG, may_change, only)
    if name not in begun or begun[name] != today.get(name)
  ]
  if names:
    raise ValueError(
      f"{workdir} holds a run with another config; different: {', '.join(names)}; use another "
      "--workdir, or the values of its config.json"
    )
  changed = [
    name
    for name, digest in begun.items()
    if name.startswith(only)
    and not name.startswith(may_change)
    and today.get(name, digest) != digest  # one that is missing is named where it is read
  ]
  if changed:
    raise ValueError(
      f"{workdir} holds a run that began with other files: the content of "
      f"{', '.join(f'config.{name}' for name in changed)} is not what it was; put the old files "
      "back, or use another --workdir"
    )


def refuse_fewer_iterations(config: Config, workdir: pathlib.Path) -> None:
  """ValueError where the workdir's run has more train.iterations; more than it has go on."""
  path = workdir / _CONFIG
  begun = _read(path).get("train", {}).get("iterations", 0) if path.exists() else 0
  if config.train.iterations < begun:
    raise ValueError(
      f"config.train.iterations: {config.train.iterations}, but the run in {workdir} has {begun}; "
      "they can be raised, not lowered"
    )
  o = config.train.optimizer
  if begun and config.train.iterations > begun and (o.schedule != "constant" or o.warmup):
    logging.warning(
      "train.iterations is raised from %d to %d: the learning rate's schedule now spans all of "
      "them, so the run differs from one that began so",
      *(begun, config.train.iterations),
    )
  if begun and config.train.iterations > begun and config.rollout.stale:
    logging.warning(
      "train.iterations is raised from %d to %d: iteration %d, once the last one, left nothing to "
      "the next (rollout.lag, rollout.carry), so the run differs from one that began so",
      *(begun, config.train.iterations, begun),
    )


def other_fields(
  config: Config, path: pathlib.Path, may_change: tuple[str, ...], only: tuple[str, ...] = ("",)
) -> list[str]:
  """Names of the fields that have another value in this file; none where there is no file.

  ValueError for a file that is damaged.
  """
  if not path.exists():
    return []
  names = validation.differences(config, _read(path))
  return [name for name in names if name.startswith(only) and not name.startswith(may_change)]


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    return read_json(path)
  except ValueError as error:
    raise ValueError(
      f"{path} is damaged, so nobody can say whether this command goes on with its run ({error}); "
      "put back a copy, or delete it if the command is the old one"
    ) from error


def claim(config: Config, workdir: pathlib.Path) -> None:
  """Writes config.json and the digests of the files where there are none, and more iterations."""
  if not hosts.primary():
    return
  path = workdir / _CONFIG
  if not path.exists() or "train.iterations" in other_fields(config, path, ()):
    write_text(path, validation.to_json(config))
  if not (workdir / _INPUTS).exists():
    write_text(workdir / _INPUTS, json.dumps(inputs.digests(config, workdir), indent=2))


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


def policy_variables(parts: Parts) -> tuple[dict, str]:
  """(variables, where they come from): as newest_variables, else the model of the config."""
  newest = newest_variables(parts)
  if newest is not None:
    variables, meta = newest
    return variables, f"checkpoint: {meta['phase']}, iteration {meta['done']}"
  variables = build.initial_variables(parts.config, parts.policy, parts.mesh)
  return variables, f"model: {parts.config.model.path or 'random weights'}"


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
