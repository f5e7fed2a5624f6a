"""Pays trajectories: a source marks every step, a scheme says what the last step earns.

    trajectory --source--> SC, Con of every step --scheme, shaping--> r of every step

A new source or scheme is one row of SOURCES or SCHEMES.
"""

from collections.abc import Callable, Mapping, Sequence

from steptool_jax.config import Rewards
from steptool_jax.rewards import orchestra, responses, rules, shaping
from steptool_jax.types import Task, Trajectory

# (task, trajectory) -> the same trajectory with SC and Con on every step.
Source = Callable[[Task, Trajectory], Trajectory]
SOURCES: dict[str, Source] = {
  # By comparison with the demonstration and the final answer, where answers are checked by rule.
  "rules": rules.annotate,
  # By the text rule "evidence", where answers are free text.
  "evidence": lambda task, trajectory: responses.score(task.query, trajectory),
}

# (tasks, trajectories, options) -> what each last step earns, by part; None for IsSolved.
Final = Mapping[str, float] | None
Scheme = Callable[[Sequence[Task], Sequence[Trajectory], Rewards], Sequence[Final]]


def _is_solved(
  tasks: Sequence[Task], trajectories: Sequence[Trajectory], options: Rewards
) -> list[Final]:
  del trajectories, options
  return [None] * len(tasks)


def _eq_2(
  tasks: Sequence[Task], trajectories: Sequence[Trajectory], options: Rewards
) -> Sequence[Final]:
  o = options.orchestra
  usual = orchestra.Preference(o.outcome, o.cost, o.latency)
  preferences = [usual.of(task.metadata.get("preference", {})) for task in tasks]
  return orchestra.final_rewards(trajectories, preferences)


# Eq. 2 alone goes with algorithms of outcome rewards, orchestra_steps with those of step rewards.
SCHEMES: dict[str, Scheme] = {"steptool": _is_solved, "orchestra": _eq_2, "orchestra_steps": _eq_2}


def pay(
  tasks: Sequence[Task],
  trajectories: Sequence[Trajectory],
  options: Rewards,
  *,
  source: str = "rules",
  scheme: str = "steptool",
  outcome_only: bool = False,
) -> list[Trajectory]:
  """The same trajectories with SC, Con and r on every step.

  Args:
    tasks: of the trajectories, one each.
    trajectories: those of a task together, where the scheme compares them.
    options: config.rewards; `scheme` is given apart, since evaluations always use "steptool".
    source: a name in SOURCES.
    scheme: a name in SCHEMES.
    outcome_only: the steps before the last one earn nothing.
  """
  mark = SOURCES[source]
  finals = SCHEMES[scheme](tasks, trajectories, options)
  return [
    shaping.shape(mark(task, t), options.alpha, options.normalization, outcome_only, final)
    for task, t, final in zip(tasks, trajectories, finals, strict=True)
  ]
