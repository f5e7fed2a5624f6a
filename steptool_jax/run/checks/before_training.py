"""What a training looks at before it does any work, so that hours are not spent on a bad input."""

import pathlib
from typing import Any

from absl import logging

from steptool_jax.checking import check as checking
from steptool_jax.checking import findings
from steptool_jax.run.checks import environments
from steptool_jax.run.hosts import hosts
from steptool_jax.run.parts.opening import Parts


def refuse_bad_input(parts: Parts) -> None:
  """ValueError for what training would stumble over, with the command that says everything.

  Demonstrations that sft.steps asks for and that are not there, in every environment. On 'custom'
  also every error of the check of config.check.before_training tasks of each split; not again where
  the folder has a checkpoint, because a resumed run goes on as it began.
  """
  config = parts.config
  if config.sft.steps and not any(task.demonstration for task in parts.environment.tasks("train")):
    raise ValueError(
      f"config.sft.steps: {config.sft.steps}, but no training task has a demonstration; set it to "
      "0, or add them"
    )
  if config.environment.name != "custom" or not config.check.before_training:
    return
  # One process looks into the folder: what others see of it may be older.
  found = hosts.lead(lambda: None if _begun(parts.workdir) else _checked(parts))
  if found and found["errors"]:
    raise ValueError(
      f"{found['errors']} errors in tools and tasks: {found['first']}. For the whole table run the "
      "same command with --mode=check; to train all the same, add --config.check.before_training=0"
    )


def _begun(workdir: pathlib.Path) -> bool:
  return (workdir / "checkpoints").is_dir() and any((workdir / "checkpoints").iterdir())


def _checked(parts: Parts) -> dict[str, Any]:
  """{"errors": number, "first": sentence}; warnings are logged."""
  config = parts.config
  extent = checking.Extent(
    config.check.before_training, config.check.seconds, config.rollout.tool_workers
  )
  asked = environments.what_is_asked(config, parts.policy.chat_format, parts.services)
  report = checking.check(parts.environment, asked, parts.runner, extent, should_stop=parts.stop)
  warnings = findings.count(report.findings, findings.WARNING)
  if warnings:
    logging.warning(
      "the check of %d tasks has %d warnings; --mode=check shows them",
      report.figures["checked_tasks"],
      warnings,
    )
  return {"errors": report.errors, "first": findings.first_words(report.findings)}
