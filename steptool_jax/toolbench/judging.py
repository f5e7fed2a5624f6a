"""IsSolved of ToolBench answers, by a rule or by a language model, after the rollout.

Not while it goes on: an llm takes seconds a verdict, so all of a rollout's answers are judged at
once, as many in flight as the endpoint allows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from steptool_jax.simulators.endpoint import Endpoint
from steptool_jax.toolbench import rule_judge
from steptool_jax.toolbench.llm_judges import llm_comparer, llm_judge
from steptool_jax.toolbench.passrate import (
  Outcome,
  PassRate,
  WinRate,
  outcome_of,
  pass_rate,
  win_rate,
)
from steptool_jax.types import Status, Task, Trajectory


class Judging:
  """endpoint: the judge's; None = the rule. runs: judge runs of the llm; a rule has no noise."""

  def __init__(self, endpoint: Endpoint | None, runs: int):
    self._endpoint = endpoint
    self.runs = runs if endpoint is not None else 1
    # A rule tells solved from unsolved and no more: equal verdicts are a tie.
    self._compare, self._in_flight = lambda *_: "tie", 1
    if endpoint is not None:
      self._compare, self._in_flight = llm_comparer(endpoint), endpoint.max_in_flight

  def judge(
    self, tasks: Sequence[Task], trajectories: Sequence[Trajectory]
  ) -> tuple[PassRate, list[Trajectory]]:
    """Verdicts, and the same trajectories with `solved`, the mean over judge runs.

    In the PassRate an id is the position in `trajectories`, as text. A trajectory that the judge
    failed on becomes an infrastructure error: it is neither scored nor trained on.
    """
    if self._endpoint is not None:
      judge = llm_judge(self._endpoint)
    else:
      judge = rule_judge.as_judge({t.query: rule_judge.tool_texts(t.tools) for t in tasks})
    rate = pass_rate(_outcomes(tasks, trajectories), judge, self.runs, self._in_flight)
    scores = {int(n): row.mean() for n, row in zip(rate.task_ids, rate.scores, strict=True)}
    unjudged = set(map(int, rate.unjudged))

    def marked(n: int, trajectory: Trajectory) -> Trajectory:
      if n in scores:
        return dataclasses.replace(trajectory, solved=float(scores[n]))
      status = Status.INFRASTRUCTURE_ERROR if n in unjudged else trajectory.status
      return dataclasses.replace(trajectory, solved=0.0, status=status)

    return rate, [marked(n, trajectory) for n, trajectory in enumerate(trajectories)]

  def win_rate(
    self,
    tasks: Sequence[Task],
    ours: Sequence[Trajectory],
    theirs: Sequence[Trajectory],
    our_rate: PassRate,
  ) -> WinRate:
    """How often `ours` beats `theirs`, task by task; our_rate as `judge` gave it for `ours`."""
    their_rate, _ = self.judge(tasks, theirs)
    sides = _outcomes(tasks, ours), _outcomes(tasks, theirs)
    return win_rate(*sides, our_rate, their_rate, self._compare, max_in_flight=self._in_flight)

  def beside(self, figure: str) -> str:
    """A printed figure with who made it; a rule's with its measured agreement with GPT-4."""
    if self._endpoint is None:
      return rule_judge.beside(figure)
    return f"{figure} (judged by {self._endpoint.model}, {self.runs} runs)"

  def report(self) -> dict[str, Any]:
    """JSON data: the judge, and its measured agreement or what it cost."""
    if self._endpoint is None:
      agreement = dataclasses.asdict(rule_judge.MEASURED)
      return {"kind": "rule", "runs": 1, "agreement_with_gpt4": agreement}
    usage = dataclasses.asdict(self._endpoint.usage())
    return {"kind": "llm", "model": self._endpoint.model, "runs": self.runs, "usage": usage}


def _outcomes(tasks: Sequence[Task], trajectories: Sequence[Trajectory]) -> list[Outcome]:
  return [
    dataclasses.replace(outcome_of(trajectory, task.query), task_id=str(n))
    for n, (task, trajectory) in enumerate(zip(tasks, trajectories, strict=True))
  ]
