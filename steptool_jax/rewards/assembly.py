"""Pays trajectories: a source marks every step, a scheme says what the last step earns.

    trajectory --source--> SC, Con of every step --scheme, shaping--> r of every step

A new source or scheme is one row of SOURCES or SCHEMES; how marks become rewards is a row of
shaping.SHAPINGS.
"""

import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence

from steptool_jax.config import Rewards
from steptool_jax.rewards import information, orchestra, responses, rules, shaping
from steptool_jax.types import Task, Trajectory

# (task, trajectory) -> the same trajectory with SC and Con on every step.
Mark = Callable[[Task, Trajectory], Trajectory]


@dataclasses.dataclass(frozen=True)
class Source:
  """One row.

  mark: where answers are checked by rule.
  texts: where answers are free text (ToolBench).
  causal: the marks of a step depend on the steps up to it alone.
  device: a model marks a whole iteration before it is paid (run/training/sources.py).
  by_turn: whether Con of the task's steps is that of a whole turn, and not a mean over its calls.
  """

  mark: Mark
  texts: Mark
  causal: bool = True
  device: bool = False
  by_turn: Callable[[Task], bool] = lambda task: False


def _as_it_is(task: Task, trajectory: Trajectory) -> Trajectory:
  return trajectory


SOURCES: dict[str, Source] = {
  # What is done of the demonstration and obtained of what the goal needs; in texts, what is new.
  "progress": Source(
    lambda task, trajectory: rules.annotate(task, trajectory, causal=True),
    lambda task, trajectory: responses.score(task.query, trajectory, "news"),
  ),
  # What was used later, in a right answer or on the way to it.
  "hindsight": Source(
    rules.annotate,
    lambda task, trajectory: responses.score(task.query, trajectory, "evidence"),
    causal=False,
  ),
  # SC, Con and IsSolved by a frozen reward model, of what it has seen up to the step.
  "model": Source(_as_it_is, _as_it_is, device=True),
  # As progress, but Con is how much the step told the policy about the gold answer (IGPO).
  "info_gain": Source(_as_it_is, _as_it_is, device=True, by_turn=information.has_gold),
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


def refuse_hindsight(options: Rewards) -> None:
  """ValueError where a step of a rollout is paid by what comes later, unless that is asked for."""
  for field, chosen, table in (
    ("shaping", options.shaping, shaping.SHAPINGS),
    ("source", options.source, SOURCES),
  ):
    if not table[chosen].causal and not options.unsafe:
      raise ValueError(
        f"config.rewards.{field}: {chosen!r} reads the future: later calls change what earlier "
        "ones earned, so calls without use can pay; use 'progress', or set "
        "config.rewards.unsafe=True to train on it all the same (to annotate stored trajectories "
        "it is fine)"
      )


def described(options: Rewards) -> dict[str, str | float | bool]:
  """How rollouts' steps are paid, for a summary.

  causal: what a step earned no longer changes. safe: and calls without use earn nothing, which
  nobody can promise of a model's marks.
  """
  row, source = shaping.SHAPINGS[options.shaping], SOURCES[options.source]
  causal = row.causal and source.causal
  return {
    "source": options.source,
    "shaping": options.shaping,
    "weight": options.weight,
    "causal": causal,
    "safe": causal and row.safe and not source.device,
  }


def pay(
  tasks: Sequence[Task],
  trajectories: Sequence[Trajectory],
  options: Rewards,
  *,
  scheme: str = "steptool",
  outcome_only: bool = False,
  texts: bool = False,
  gamma: float = 1.0,
  bootstrap: Container[str] = (),
) -> list[Trajectory]:
  """The same trajectories with SC, Con and r on every step.

  Args:
    tasks: of the trajectories, one each.
    trajectories: those of a task together, where the scheme compares them.
    options: config.rewards; `scheme` is given apart, since evaluations always use "steptool".
    scheme: a name in SCHEMES.
    outcome_only: the steps before the last one earn nothing.
    texts: answers are free text, which no rule checks.
    gamma, bootstrap: config.advantage's, see shaping.shape.
  """
  source = SOURCES[options.source]
  mark = source.texts if texts else source.mark
  finals = SCHEMES[scheme](tasks, trajectories, options)
  return [
    shaping.shape(
      mark(task, t),
      options,
      outcome_only=outcome_only,
      final=final,
      needed=rules.needed(task),
      gamma=gamma,
      bootstrap=bootstrap,
      by_turn=source.by_turn(task),
    )
    for task, t, final in zip(tasks, trajectories, finals, strict=True)
  ]
