"""Step rewards from SC, Con and IsSolved (StepTool, section 3.2), by one of the rows of SHAPINGS.

    m_k = (alpha * SC_k + Con_k) / (alpha + 1)     the score of an intermediate step, in [0, 1]
    r_k = weight * row(m_1 … m_k)                  r_S = IsSolved

alpha = 1 gives the numbers of the released annotations. Let M_k be the mean of m_1 … m_k, and P_k
the progress after step k: min(1, (n_1 Con_1 + … + n_k Con_k) / calls that the goal needs), n_k the
calls of step k, one in most formats.

    sum           r_k = m_k                            the paper's
    prefix_mean   r_k = M_k - M_{k-1}
    progress      r_k = P_k - P_{k-1}
    potential     r_k = gamma P_k - P_{k-1}, P = 0 at the end of the episode (Ng et al. 1999)
    failed_cost   r_k = - (1 - SC_k) / 10
    episode_mean  r_k = m_k / (number of intermediate steps)

A row sees the past of its step and nothing else, so what a step earned no longer changes when the
policy goes on. `episode_mean` alone breaks this rule: a later call shrinks what earlier ones
earned, which no advantage ever charges to it, so that calls without use pay. They pay by `sum`
too, and by `prefix_mean` after failed calls, whose low mean any executed call lifts.
results/incentives.md has what a policy learns from each row.
"""

import dataclasses
import math
from collections.abc import Callable, Container, Mapping

from steptool_jax.config import Rewards
from steptool_jax.types import Status, Trajectory, calls_of

_COST = 0.1  # of a call that failed or repeats another, where a solved task earns 1


@dataclasses.dataclass(frozen=True)
class Past:
  """What is known of a trajectory after its step k; nothing of it comes later.

  SC, Con and m of the steps 1 to k, and how many contributions the goal needs.
  """

  success_calling: tuple[float, ...]
  contribution: tuple[float, ...]
  alpha: float
  needed: int
  calls: tuple[int, ...] = ()  # of each step, where a turn may have several; empty: one each

  @property
  def scores(self) -> tuple[float, ...]:
    marks = zip(self.success_calling, self.contribution, strict=True)
    return tuple((self.alpha * sc + con) / (self.alpha + 1) for sc, con in marks)

  @property
  def progress(self) -> float:
    """P in [0, 1]; where nobody knows what the goal needs, one full contribution is all."""
    calls = self.calls or (1,) * len(self.contribution)
    done = math.fsum(con * n for con, n in zip(self.contribution, calls, strict=True))
    return min(1.0, done / max(self.needed, 1))

  @property
  def before(self) -> "Past":
    """The same without the last step."""
    return self.until(len(self.contribution) - 1)

  def until(self, k: int) -> "Past":
    """The same after its first k steps."""
    return dataclasses.replace(
      self,
      success_calling=self.success_calling[:k],
      contribution=self.contribution[:k],
      calls=self.calls[:k],
    )


@dataclasses.dataclass(frozen=True)
class Shaping:
  """One row.

  reward: what the last step of a past earns.
  potential: Phi of the state after a past. With it every step k earns gamma Phi_k - Phi_{k-1}
    besides, and Phi is 0 at the end of the episode: the best policy is that of `reward` alone.
  by_goal: reads how much the goal needs, which stored trajectories do not tell.
  by_count: the rewards are divided by the number of intermediate steps, which only the end knows.
  safe: calls without use earn nothing (tests/rewards/test_incentives.py).
  """

  reward: Callable[[Past], float] = lambda past: 0.0
  potential: Callable[[Past], float] = lambda past: 0.0
  by_goal: bool = False
  by_count: bool = False
  safe: bool = True

  @property
  def causal(self) -> bool:
    """Whether the reward of a step is a function of the past alone."""
    return not self.by_count


def _mean(past: Past) -> float:
  return math.fsum(past.scores) / max(len(past.scores), 1)


SHAPINGS: dict[str, Shaping] = {
  "sum": Shaping(lambda past: past.scores[-1], safe=False),
  "prefix_mean": Shaping(lambda past: _mean(past) - _mean(past.before), safe=False),
  "progress": Shaping(lambda past: past.progress - past.before.progress, by_goal=True),
  "potential": Shaping(potential=lambda past: past.progress, by_goal=True),
  "failed_cost": Shaping(lambda past: -_COST * (1.0 - past.success_calling[-1])),
  "episode_mean": Shaping(lambda past: past.scores[-1], by_count=True, safe=False),
}


def shape(
  trajectory: Trajectory,
  options: Rewards = Rewards(),  # noqa: B008, frozen
  *,
  outcome_only: bool = False,
  final: Mapping[str, float] | None = None,
  needed: int = 0,
  gamma: float = 1.0,
  bootstrap: Container[str] = (),
  by_turn: bool = False,
) -> Trajectory:
  """The same trajectory with `reward` (float) on every step, and reward_parts of their sum.

  A terminated trajectory's last step earns IsSolved, or the parts in `final` if there are some
  (rewards/orchestra.py). A truncated one has no last step in this sense: all its steps are
  intermediate. An INFRASTRUCTURE_ERROR earns 0 everywhere (and is kept out of training).

  A turn of several earns rewards.turns times the verdict of its own checker at its answer.

  reward_parts: success_calling (what the calls would earn if none contributed), contribution (the
  rest of what they earn), and solved or the names in `final`.

  Args:
    trajectory: with SC and Con on its steps.
    options: alpha, shaping, weight and `every`.
    outcome_only: intermediate steps earn 0.
    final: what the last step earns in the place of IsSolved.
    needed: contributions that the goal needs, 0 where nobody knows.
    gamma: discount per step of the advantage, which potentials take.
    bootstrap: statuses whose trajectories go on beyond their last step (config.advantage.bootstrap)
      and so keep their potential.
    by_turn: Con of a turn with several calls is what all of them came to; else their mean.

  Raises:
    ValueError: alpha < 0, no such row, or SC, Con, IsSolved outside [0, 1].
  """
  _check(trajectory, options)
  row = SHAPINGS[options.shaping]
  broken = trajectory.status == Status.INFRASTRUCTURE_ERROR
  count = len(trajectory.steps) - (not trajectory.truncated)  # intermediate steps
  whole = Past(
    tuple(s.success_calling for s in trajectory.steps[: max(count, 0)]),
    tuple(s.contribution for s in trajectory.steps[: max(count, 0)]),
    options.alpha,
    needed,
    tuple(
      1 if by_turn else max(1, len(calls_of(s.action))) for s in trajectory.steps[: max(count, 0)]
    ),
  )
  goes_on = trajectory.status in bootstrap
  weight = 0.0 if outcome_only or broken else options.weight
  rewards = _rewards(row, whole, len(trajectory.steps), gamma, goes_on)
  bare = dataclasses.replace(whole, contribution=(0.0,) * len(whole.contribution))
  calls = weight * math.fsum(_rewards(row, bare, len(trajectory.steps), gamma, goes_on))
  parts = {
    "success_calling": calls,
    "contribution": weight * math.fsum(rewards) - calls,
  }
  rewards = [weight * r for r in rewards]
  # Of a turn that the user replies to: its own verdict, where there is one.
  turns = [None if s.observation is None else s.observation.solved for s in trajectory.steps]
  if any(solved is not None for solved in turns):
    pay = 0.0 if outcome_only or broken else options.turns
    earned = [pay * (solved or 0.0) for solved in turns]
    rewards = [r + e for r, e in zip(rewards, earned, strict=True)]
    parts["turns"] = math.fsum(earned)
  last = {"solved": float(trajectory.solved)} if final is None else dict(final)
  if not rewards or trajectory.truncated or broken:
    last = dict.fromkeys(last, 0.0)
  if rewards:
    rewards[-1] += sum(last.values())
  rewards = _together(rewards, options.every)
  steps = tuple(
    dataclasses.replace(step, reward=float(reward))
    for step, reward in zip(trajectory.steps, rewards, strict=True)
  )
  return dataclasses.replace(trajectory, steps=steps, reward_parts=parts | last)


def _rewards(row: Shaping, whole: Past, steps: int, gamma: float, goes_on: bool) -> list[float]:
  """Of all steps, what the last one is paid for the outcome left out."""
  if not steps:
    return []
  pasts = [whole.until(k) for k in range(len(whole.contribution) + 1)]
  scale = 1.0 / max(len(pasts) - 1, 1) if row.by_count else 1.0
  rewards = [scale * row.reward(past) for past in pasts[1:]]
  rewards += [0.0] * (steps - len(rewards))
  potentials = [row.potential(past) for past in pasts[:steps]]
  after = [*potentials[1:], row.potential(pasts[-1]) if goes_on else 0.0]
  return [r + gamma * then - now for r, now, then in zip(rewards, potentials, after, strict=True)]


def _together(rewards: list[float], every: int) -> list[float]:
  """Each run of `every` rewards (0: all) as their sum on the last of them, 0 on the others."""
  size = every or len(rewards)
  out = [0.0] * len(rewards)
  for k in range(0, len(rewards), max(size, 1)):
    out[min(k + size, len(rewards)) - 1] = math.fsum(rewards[k : k + size])
  return out


def _check(trajectory: Trajectory, options: Rewards) -> None:
  if not (math.isfinite(options.alpha) and options.alpha >= 0):
    raise ValueError(f"alpha is {options.alpha}: must be a finite number >= 0")
  if options.shaping not in SHAPINGS:
    raise ValueError(f"shaping is {options.shaping!r}: must be one of {', '.join(SHAPINGS)}")
  if not 0 <= trajectory.solved <= 1:
    raise ValueError(f"{trajectory.task_id}: solved is {trajectory.solved}, outside [0, 1]")
  for k, step in enumerate(trajectory.steps):
    for field, value in (("SC", step.success_calling), ("Con", step.contribution)):
      if not 0 <= value <= 1:
        raise ValueError(f"{trajectory.task_id}, step {k}: {field} is {value}, outside [0, 1]")
