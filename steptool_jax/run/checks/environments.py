"""The check of the environment that a config names, with everything around it that it needs."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from steptool_jax.checking import check as checking
from steptool_jax.checking.findings import ERROR, WARNING, Finding
from steptool_jax.config import Config, Rewards
from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.environments.base import Problem
from steptool_jax.learning.algorithms import get_algorithm
from steptool_jax.rewards.shaping import SHAPINGS
from steptool_jax.run.parts import build, services, tokenizers
from steptool_jax.run.parts.watchdog import Watchdog
from steptool_jax.simulators.errors import InfrastructureError


def report_on(
  config: Config,
  workdir: pathlib.Path,
  extent: checking.Extent,
  on_done: Callable[[], Any] = lambda: None,
) -> checking.Report:
  """Opens services, environment and tokenizer, and checks; what cannot be opened is a finding."""
  problems: list[Problem] = []
  with (
    Watchdog(workdir / "frozen_check.txt") as watchdog,
    build.build_runner(config, watchdog.during) as runner,
  ):
    try:
      with services.open_services(config) as found:
        environment = build.build_environment(config, found, problems)
        with tokenizers.opened_format(config, environment, workdir, runner) as (format_, why):
          asked = what_is_asked(config, format_, found)
          report = checking.check(environment, asked, runner, extent, on_done)
    except (ValueError, OSError, ImportError, RuntimeError, InfrastructureError) as error:
      report = checking.Report((_unopened(error),), {})
      why = ""
  first = [_of_problem(p) for p in problems]
  if why:
    first.append(_without_format(why))
  found = report.findings
  if any(f.kind == "line" for f in first):  # a split is empty since its lines are wrong
    found = tuple(f for f in found if f.kind != "split")
  return dataclasses.replace(report, findings=(*first, *found))


def what_is_asked(
  config: Config, chat_format: ChatFormat | None, found: services.Services
) -> checking.Asked:
  """What training with this config asks of its environment."""
  rewards = get_algorithm(config.algorithm).rewards
  needed = []
  if config.sft.steps or (rewards != "none" and not config.data.path):
    needed.append("train")
  if config.evaluation.tasks:
    needed.append("heldout")
  return checking.Asked(
    limits=config.rollout,
    chat_format=chat_format,
    system=config.model.system or None,
    sft=config.sft.steps > 0,
    progress=rewards == "step" and _by_progress(config.rewards),
    checkers=found.judging is None,
    splits=tuple(needed),
  )


def _by_progress(rewards: Rewards) -> bool:
  return rewards.source == "progress" and SHAPINGS[rewards.shaping].by_goal


def _of_problem(problem: Problem) -> Finding:
  if problem.reason.startswith("tool "):
    return Finding(ERROR, "tool", "", problem.reason, "mend the function; the tool was left out")
  return Finding(ERROR, "line", problem.task, problem.reason, "mend the line; it was left out")


def _unopened(error: Exception) -> Finding:
  what = str(error) or type(error).__name__
  return Finding(ERROR, "environment", "", what, "mend it; nothing else could be checked")


def _without_format(why: str) -> Finding:
  return Finding(
    *(WARNING, "tokenizer", ""),
    f"tokens are not counted: {why}",
    "give the model, or a tokenizer with --config.model.tokenizer=DIR",
  )
