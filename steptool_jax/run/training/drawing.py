"""What an iteration of RL learns from: tasks in the run's order, rolled out, judged and paid.

Dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476, eq. 11), with rollout.rounds above 1:
where all samples of a task are paid the same, they compare with nothing. Such groups are left out,
and as many tasks, the next of the order, are drawn in another round, until the iteration has its
number of tasks with contrast or the rounds are used up. A group is what one place of the order
drew: a task that comes twice in an iteration makes two, with other samples. All conversations count
as spent.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from steptool_jax.config import Config, Filters
from steptool_jax.rewards import orchestra
from steptool_jax.rollout.carrying import Carried
from steptool_jax.rollout.setting import Stats
from steptool_jax.run.data import order
from steptool_jax.run.parts import rollouts
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.training import carrying, replay, sources
from steptool_jax.run.training.phase import Phase
from steptool_jax.types import Status, Trajectory

# Returns are sums of fractions: equal ones may differ in their last bits.
_CONTRAST = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
  """trajectories: all, paid. kept: those that may reach the update. redrawn: tasks of later rounds,
  by which the order has moved on. carried: what goes on in the next iteration."""

  trajectories: list[Trajectory]
  kept: list[Trajectory]
  figures: dict[str, float]
  stats: Stats
  redrawn: int
  carried: Carried


def draw(
  parts: Parts, phase: Phase, done: int, variables: dict | None = None, **options: Any
) -> Drawn:
  """The trajectories of iteration `done`; variables: where they are not today's.

  options: as rollouts.roll's. With a lag they may go into a checkpoint before they are learnt from,
  so that they hold what a checkpoint keeps.

  RuntimeError where no conversation can be trained on; Interrupted, NonFiniteLogprobs as rollout.
  """
  config, r, tasks = parts.config, parts.config.rollout, parts.environment.tasks("train")
  variables = phase.variables() if variables is None else variables
  redrawn = phase.progress.redrawn
  count = min(r.tasks, len(tasks))
  position, wanted, rounds, groups = done * count + redrawn, count, 0, 0
  carried = phase.carried
  seen = carrying.drawn_before(tasks, carried, r.samples)
  everything: list[Trajectory] = []
  kept: list[Trajectory] = []
  dropped: collections.Counter[str] = collections.Counter()
  said: list[dict[str, float]] = []
  stats = Stats()
  while rounds < r.rounds and (wanted or not rounds):
    work = order.jobs(config, tasks, position, wanted, seen)
    position, groups, rounds = position + wanted, groups + wanted, rounds + 1
    if r.carry:
      drawn, rolled, more, carried = carrying.roll(parts, phase, variables, work, done)
    else:
      drawn = [task for task, _ in work]
      rolled, more = rollouts.roll(
        *(parts, variables, work, done, r.temperature, "rollout"), some=rounds > 1, **options
      )
    stats = _sum(stats, more)
    graded = rollouts.judge(parts, drawn, rolled)
    marked, figures = sources.mark(parts, phase, drawn, graded)
    said.append(figures)
    paid = rollouts.reward(parts, drawn, marked, config.rewards.scheme, marked=True)
    if r.lag:
      paid = replay.without_values(paid)
    everything += sources.with_outcomes(paid, graded)
    if r.rounds == 1:
      parted = [paid]
    else:
      parted = [paid[k : k + r.samples] for k in range(0, len(paid), r.samples)]
    for group in parted:
      found, taken = orchestra.keep(list(filter(_usable, group)), _filters(config))
      kept += found
      dropped.update(taken)
      wanted -= bool(found)
  if not (carried.unfinished or carried.waiting):  # else there is more to come
    _refuse_nothing(everything)
  figures = _means(said) | dict(dropped)
  if r.carry:
    figures["carried"] = float(len(carried.unfinished))
  if r.rounds > 1:
    figures |= {"rounds": float(rounds), "without_contrast": 1 - (count - wanted) / groups}
  return Drawn(everything, kept, figures, stats, groups - count, carried)


def _means(rounds: list[dict[str, float]]) -> dict[str, float]:
  names = {name for found in rounds for name in found}
  return {n: float(np.mean([found[n] for found in rounds if n in found])) for n in sorted(names)}


def keep(
  config: Config, trajectories: Sequence[Trajectory]
) -> tuple[list[Trajectory], dict[str, float]]:
  """(those of paid trajectories that may reach the update, how many each filter dropped)."""
  _refuse_nothing(trajectories)
  return orchestra.keep(list(filter(_usable, trajectories)), _filters(config))


def _filters(config: Config) -> Filters:
  filters = config.rewards.filters
  if config.rollout.rounds == 1:
    return filters
  return dataclasses.replace(filters, min_deviation=max(filters.min_deviation, _CONTRAST))


def _usable(trajectory: Trajectory) -> bool:
  return bool(trajectory.steps) and trajectory.status is not Status.INFRASTRUCTURE_ERROR


def _refuse_nothing(trajectories: Sequence[Trajectory]) -> None:
  if not any(map(_usable, trajectories)):
    raise RuntimeError(
      "no conversation of this iteration can be trained on: all ended in infrastructure errors "
      "or before the first call; look at the tools and at rollout.max_tokens"
    )


def _sum(a: Stats, b: Stats) -> Stats:
  names = [field.name for field in dataclasses.fields(Stats)]
  return Stats(**{name: getattr(a, name) + getattr(b, name) for name in names})
