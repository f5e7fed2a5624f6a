"""Answers that nobody should be paid for, and whether a task's checker passes one.

They are graded in a fresh session, before any call: what is right without work is no task.
"""

import dataclasses
import math
import random
from collections.abc import Sequence

from steptool_jax.checking.findings import ERROR, WARNING, Finding
from steptool_jax.environments.base import Environment
from steptool_jax.environments.checkers import close, normal, number
from steptool_jax.simulators.render import clean_text, leaves
from steptool_jax.simulators.runner import ToolRunner, TooManyStuck
from steptool_jax.types import Finish, Task, Trajectory

_OTHERS = 3  # other tasks' answers that are tried
_CANDIDATES = 20  # values in a list of all
_NEAR = 0.1  # a function's own tolerance may be as large, relatively
_EXACT = frozenset({"exact", "number", "contains_all"})  # checkers whose tolerance is known


@dataclasses.dataclass(frozen=True)
class Wrong:
  """One wrong answer."""

  kind: str
  text: str
  level: str  # of the finding where it passes
  remedy: str


def gold_answer(task: Task) -> str | None:
  """The demonstration's answer; None without a demonstration."""
  last = task.demonstration[-1] if task.demonstration else None
  return last.answer if isinstance(last, Finish) else None


def wrong_answers(
  task: Task, others: Sequence[str], trajectory: Trajectory | None = None
) -> list[Wrong]:
  """The sample for one task: empty, the query, other tasks' answers, all candidates in a list.

  others: answers of other tasks; those that say the same as the task's own are left out.
  trajectory: of the demonstration, whose observed values are candidates, too.
  """
  gold = gold_answer(task)
  known = set() if gold is None else {normal(gold)}
  right = known | {normal(str(v)) for v in leaves(task.checker)}
  found = [
    Wrong("empty", "", ERROR, "let the checker look at the answer, or at what the calls changed"),
    Wrong("echo", task.query, ERROR, "let the checker ask for something that the query lacks"),
  ]
  found = [w for w in found if gold is None or normal(w.text) != normal(gold)]
  other = [
    text
    for text in dict.fromkeys(others)
    if text.strip() and normal(text) not in right and not _near(text, gold, task)
  ]
  chosen = random.Random(task.id).sample(other, min(_OTHERS, len(other)))
  # Where rule and right answer are both unknown, it may be the right one in another writing.
  plain = gold is not None or task.checker.get("type") in ("exact", "number")
  level = ERROR if plain else WARNING
  found += [
    Wrong("other", text, level, "let the checker compare with this task's own answer")
    for text in chosen
  ]
  candidates = [*other[:_CANDIDATES], *([gold] if gold else [])]
  for step in trajectory.steps if trajectory is not None else ():
    if step.observation is not None:
      candidates += [str(v) for v in leaves(step.observation.value)]
  distinct = list({normal(c): c for c in candidates if normal(c)}.values())
  # Where all that there is belongs into the answer, the list is no guess.
  if gold and any(not _within(c, gold) for c in distinct):
    listed = _around(gold, [c for c in distinct if normal(c) != normal(gold)])
    found.append(Wrong("list", listed, WARNING, "let the checker refuse an answer of many values"))
  return found


def passing(
  environment: Environment, task: Task, wrong: Sequence[Wrong], runner: ToolRunner
) -> list[Finding]:
  """A finding for every kind of wrong answer that the task's checker passes.

  An opening or a checker that takes longer than the runner's time-out, or raises, is a finding.
  TooManyStuck as the runner.
  """
  what = f"opening a session for task {task.id}"
  try:
    session = runner.within(lambda: environment.open(task, 0), what, lambda late: late.close())
  except TooManyStuck:
    raise
  except Exception as error:
    return [_broken(task, f"no session: {error}", "let make_tools return its tools")]
  found: dict[str, Finding] = {}
  try:
    for answer in wrong:
      if answer.kind in found:
        continue
      verdict = runner.within(
        lambda text=answer.text: session.grade(text), f"grading task {task.id}"
      )
      if verdict > 0:
        found[answer.kind] = Finding(
          *(answer.level, f"wrong answer ({answer.kind})", task.id),
          f"the checker gives {verdict:g} to {_NAMES[answer.kind]}, before any call"
          + (f": {clean_text(answer.text, 60)!r}" if answer.text else ""),
          answer.remedy,
        )
  except TooManyStuck:
    raise
  except Exception as error:
    text = f"the checker fails on a wrong answer: {error}"
    return [*found.values(), _broken(task, text, "let it return 0 for what it cannot read")]
  finally:
    session.close()
  return list(found.values())


_NAMES = {
  "empty": "an empty answer",
  "echo": "the query given back",
  "other": "another task's answer",
  "list": "a list of all candidates",
}


def _broken(task: Task, what: str, remedy: str) -> Finding:
  return Finding(ERROR, "checker", task.id, what, remedy)


def _near(text: str, gold: str | None, task: Task) -> bool:
  """Numbers that a tolerance may rightly take for the same: the checker's, or a function's own."""
  exact = task.checker.get("type") in _EXACT
  if gold is None and exact:
    gold = str(task.checker.get("value", ""))
  one, other = number(text), None if gold is None else number(gold)
  if one is None or other is None:
    return False
  if exact:
    return close(one, other, task.checker.get("tolerance"))
  return math.isclose(one, other, rel_tol=_NEAR)


def _within(value: str, text: str) -> bool:
  return normal(value) in normal(text)


def _around(gold: str, others: Sequence[str]) -> str:
  """A list with the right answer in its middle: neither its first nor its last word."""
  half = (len(others) + 1) // 2
  return ", ".join([*others[:half], gold, *others[half:]])
