"""Which demonstrations can be learnt from: they fit, their tools answer, their checker says yes."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from absl import logging

from steptool_jax.checking import replays
from steptool_jax.rollout.chain import Interrupted
from steptool_jax.rollout.replaying import hung
from steptool_jax.run.data.order import Order
from steptool_jax.run.hosts import hosts
from steptool_jax.run.parts.opening import Parts
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.types import Status, Task

_DOWN, _WRONG = "tools", "checker"  # the other reasons are names of limits
_NAMED = 5  # ids in a sentence


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """Why a demonstration cannot be learnt from; needed: of a limit, tokens or steps."""

  task: str
  reason: str
  needed: int = 0


def usable(parts: Parts, tasks: Sequence[Task]) -> list[Task]:
  """The tasks whose demonstration can be learnt from; says what is left out, how long, and why.

  Looks at those that SFT will draw, and at all as soon as one of them is left out. Where nothing
  is wrong the list is the same as before, and so are all batches.

  Raises:
    ValueError: none is left.
    RuntimeError: more tools hang than may be left behind.
    Interrupted: the run was asked to stop meanwhile.
  """
  sft, count = parts.config.sft, len(tasks)
  order = Order(count, parts.config.seed)
  drawn = sorted({order[k] for k in range(min(sft.steps * sft.batch, count))})
  left = _left_out(parts, [tasks[i] for i in drawn])
  if not left:
    return list(tasks)
  others = sorted(set(range(count)) - set(drawn))
  left += _left_out(parts, [tasks[i] for i in others])
  said = describe(left, count, parts)
  names = {entry.task for entry in left}
  kept = [task for task in tasks if task.id not in names]
  if not kept:
    raise ValueError(f"{said}. Nothing is left to learn from")
  if hosts.primary():
    logging.warning("%s", said)
  return kept


def describe(left: Sequence[LeftOut], count: int, parts: Parts) -> str:
  """One sentence: how many of `count` are left out, by reason, with lengths and limits."""
  clauses = []
  for name in ("max_tokens", "max_steps", "max_step_tokens"):
    needed = [entry.needed for entry in left if entry.reason == name]
    if needed:
      span = f"{min(needed)}" if min(needed) == max(needed) else f"{min(needed)} to {max(needed)}"
      limit = getattr(parts.limits, name)
      clauses.append(f"{len(needed)} need {span}, rollout.{name} is {limit}")
  for reason, text in ((_WRONG, "their own checker rejects"), (_DOWN, "whose tools fail or hang")):
    ids = [entry.task for entry in left if entry.reason == reason]
    if ids:
      named = ", ".join(ids[:_NAMED]) + (", …" if len(ids) > _NAMED else "")
      clauses.append(f"{len(ids)} {text} ({named})")
  return f"sft: {len(left)} of {count} demonstrations are left out: {'; '.join(clauses)}"


def _left_out(parts: Parts, tasks: Sequence[Task]) -> list[LeftOut]:
  """Process 0 replays; all hear the same."""

  def look() -> list[list[Any]] | None:
    with (
      hosts.bar(total=len(tasks), desc="demonstrations", leave=False, unit="task") as bar,
      ThreadPoolExecutor(parts.config.rollout.tool_workers) as pool,
    ):
      found = []
      for entry in pool.map(lambda task: _look(parts, task), tasks):
        bar.update()
        found.append(entry)
    if parts.stop():
      return None
    return [dataclasses.astuple(entry) for entry in found if entry is not None]

  try:
    found = hosts.lead(look)
  except InfrastructureError as error:
    raise RuntimeError(f"sft: {error}") from error
  if found is None:
    raise Interrupted
  return [LeftOut(*entry) for entry in found]


def _look(parts: Parts, task: Task) -> LeftOut | None:
  if parts.stop():
    return None
  limits = parts.limits
  replay = replays.replay(
    *(parts.environment, task, parts.policy.chat_format, limits, parts.runner),
    parts.config.model.system or None,
  )
  trajectory = replay.trajectory
  # A limit first: it is the reason that has a number, and a remedy in the config.
  for name, (needed, _) in replay.size.broken(limits).items():
    return LeftOut(task.id, name, needed)
  if replay.problem or trajectory.status is Status.INFRASTRUCTURE_ERROR or hung(trajectory):
    return LeftOut(task.id, _DOWN)
  return None if trajectory.solved else LeftOut(task.id, _WRONG)
