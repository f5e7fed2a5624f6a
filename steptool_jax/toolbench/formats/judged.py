"""Judged trajectories: pass-rate files (verdicts) and reward annotations (verdicts, SC and Con).

Every reader checks what it reads, names the file and the entry of what is wrong, and reads `.xz` as
well. Python literals in these files are read with ast.literal_eval: they are data, and nothing is
ever evaluated.

The released training rows lie on the grid of r = .5 SC + .5 Con / 5 for three judge runs, all of
them. They are of other runs than the released annotation file, though: of its five trajectories
four are rows 1, 2, 4 and 5 of the qwen2 file, and 5 of their 11 rewards are those of the file (row
1 first step and answer, row 2 second step and answer, row 4 answer).
"""

import dataclasses
import enum
import json
import re
from collections.abc import Iterable
from typing import Any

from steptool_jax.data.reading import Path, check, field, literal, objects, texts, typed
from steptool_jax.dialogue.parser import FINISH, GIVE_ANSWER, GIVE_UP
from steptool_jax.files import replacing
from steptool_jax.rewards import scores
from steptool_jax.rewards.responses import Transcript
from steptool_jax.rewards.scores import CONTRIBUTION_MAX, StepScores


class Verdict(enum.StrEnum):
  """What a judge says of one answer."""

  SOLVED = "AnswerStatus.Solved"
  UNSURE = "AnswerStatus.Unsure"
  UNSOLVED = "AnswerStatus.Unsolved"

  @property
  def score(self) -> float:
    """IsSolved: 1, .5 or 0."""
    return {Verdict.SOLVED: 1.0, Verdict.UNSURE: 0.5, Verdict.UNSOLVED: 0.0}[self]


@dataclasses.dataclass(frozen=True)
class StoredStep:
  """A call as result files spell it; name "" where the official parser found none."""

  name: str
  arguments: str
  response: str


@dataclasses.dataclass(frozen=True)
class Result:
  """One task of a pass-rate file. `steps` include the last one; `final` is that step again."""

  query_id: str
  query: str
  tool_names: tuple[str, ...]
  steps: tuple[StoredStep, ...]
  final: StoredStep
  verdicts: tuple[Verdict, ...]  # by judge run

  @property
  def transcript(self) -> Transcript:
    """The texts of the trajectory, Finish apart."""
    finished = self.final.name == FINISH
    calls = self.steps
    if finished and calls and calls[-1].name == FINISH:
      calls = calls[:-1]
    return Transcript(
      self.query,
      tuple((f"{step.name} {step.arguments}", step.response) for step in calls),
      answer_of(self.final.arguments) if finished else "",
      finished,
    )


@dataclasses.dataclass(frozen=True)
class Annotation(Result):
  """One task of an annotation file. `steps` are the intermediate ones, `final` is Finish.

  success_calling[run][step] is 0 or 1, contribution[run][step] an integer of 0 to 5.
  """

  success_calling: tuple[tuple[int, ...], ...]
  contribution: tuple[tuple[int, ...], ...]

  @property
  def scores(self) -> StepScores:
    """SC, Con and IsSolved, each the mean over judge runs."""
    runs = zip(self.success_calling, self.contribution, self.verdicts, strict=True)
    return scores.mean(
      [
        StepScores(
          tuple(map(float, sc)), tuple(con / CONTRIBUTION_MAX for con in cons), verdict.score
        )
        for sc, cons, verdict in runs
      ]
    )


def read_results(path: Path) -> dict[str, Result]:
  """A pass-rate file, query id -> Result."""
  fields = ("query", "tool_names", "answer_steps", "final_step", "is_solved")
  return {
    query_id: Result(query_id, *_judged(entry, where))
    for where, query_id, entry in objects(path, fields)
  }


def write_results(path: Path, results: Iterable[Result]) -> None:
  """A pass-rate file that the official tools and `read_results` read, whole or not at all."""
  document = {
    result.query_id: {
      "query": result.query,
      "tool_names": list(result.tool_names),
      "answer_steps": "\n".join(
        f"Step {n}: {dataclasses.asdict(step)}" for n, step in enumerate(result.steps, start=1)
      ),
      "final_step": f"Final step: {dataclasses.asdict(result.final)}" if result.steps else "",
      "is_solved": {str(run): str(verdict) for run, verdict in enumerate(result.verdicts)},
      "length": len(result.steps),
    }
    for result in results
  }
  with replacing(path) as file:
    json.dump(document, file, ensure_ascii=False, indent=4)


def read_annotations(path: Path) -> dict[str, Annotation]:
  """Step annotations of a judge, query id -> Annotation.

  ValueError also for scores whose number is not that of the steps, and for scores out of range
  (the released code checks neither).
  """
  fields = ("query", "tool_names", "answer_steps", "process_reward", "final_step", "is_solved")
  out = {}
  for where, query_id, entry in objects(path, fields):
    judged = _judged(entry, where)
    steps, verdicts = judged[2], judged[4]
    runs = _runs(entry["process_reward"], f"{where}, field 'process_reward'")
    if len(runs) != len(verdicts):
      raise ValueError(f"{where}: {len(runs)} runs of process_reward, {len(verdicts)} of is_solved")
    marks: dict[str, list[tuple[int, ...]]] = {"succeed_tool_calling": [], "contributions": []}
    for number, run in enumerate(runs):
      for (name, rows), top in zip(marks.items(), (1, CONTRIBUTION_MAX), strict=True):
        place = f"{where}, process_reward {number}, {name}"
        values = typed(field(run, name, place), list, place)
        if len(values) != len(steps):
          raise ValueError(f"{place}: {len(values)} scores for {len(steps)} steps")
        for value in values:
          good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= top
          check(good, place, f"integers of 0 to {top}", value)
        rows.append(tuple(values))
    out[query_id] = Annotation(query_id, *judged, *map(tuple, marks.values()))
  return out


def answer_of(arguments: str) -> str:
  """The final answer in Finish's arguments as files hold them, "" for a give-up.

  Some 8 % of the published answers are cut in the middle of their JSON and were judged all the
  same, so here (unlike in a rollout) the text after "final_answer" counts.
  """
  try:
    value = json.loads(arguments, strict=False)
  except (ValueError, RecursionError):
    match = _ANSWER.search(arguments)
    gave_up = GIVE_UP in arguments.partition('"final_answer"')[0]
    return match[1].replace("\\n", "\n").replace('\\"', '"') if match and not gave_up else ""
  if not isinstance(value, dict) or value.get("return_type") != GIVE_ANSWER:
    return ""
  return str(value.get("final_answer") or "")


_ANSWER = re.compile(r'"final_answer"\s*:\s*"(.*?)"?\s*\}?\s*\Z', re.DOTALL)


def stored_step(call: Any, where: str) -> StoredStep:
  """The call in an object with name, arguments and response; ValueError for another one."""
  names = ("name", "arguments", "response")
  return StoredStep(*(typed(field(call, n, where), str, f"{where}, field {n!r}") for n in names))


def _judged(entry: dict[str, Any], where: str) -> tuple[Any, ...]:
  """The fields of Result after query_id."""
  return (
    typed(entry["query"], str, f"{where}, field 'query'"),
    tuple(texts(entry["tool_names"], f"{where}, field 'tool_names'")),
    _steps(entry["answer_steps"], f"{where}, field 'answer_steps'"),
    _final(entry["final_step"], f"{where}, field 'final_step'"),
    _verdicts(entry["is_solved"], f"{where}, field 'is_solved'"),
  )


def _steps(value: Any, where: str) -> tuple[StoredStep, ...]:
  """One text of lines "Step 1: {…}", "Step 2: {…}" and so on, or a list of such lines."""
  lines = value.split("\n") if isinstance(value, str) else value
  if lines == [""]:
    return ()
  steps = []
  for number, line in enumerate(texts(lines, where), start=1):
    match = re.fullmatch(rf"Step {number}: (.*)", line, re.DOTALL)
    if match is None:
      raise ValueError(
        f"{where}: line {number} must start with 'Step {number}: ', found {line!r:.60}"
      )
    steps.append(_step(match[1], f"{where}, step {number}"))
  return tuple(steps)


def _final(value: Any, where: str) -> StoredStep:
  text = typed(value, str, where)
  if not text:  # nothing was called
    return StoredStep("", "", "")
  if not text.startswith("Final step: "):
    raise ValueError(f"{where}: must start with 'Final step: ', found {text!r:.60}")
  return _step(text.removeprefix("Final step: "), where)


def _step(text: str, where: str) -> StoredStep:
  return stored_step(literal(text, dict, where), where)


def _verdicts(value: Any, where: str) -> tuple[Verdict, ...]:
  runs = _runs(value, where)
  for verdict in runs:
    check(verdict in list(Verdict), where, f"one of {', '.join(Verdict)}", verdict)
  return tuple(Verdict(verdict) for verdict in runs)


def _runs(value: Any, where: str) -> list[Any]:
  """Values of {"0": …, "1": …} by number: files hold them in the order in which they came in."""
  runs = typed(value, dict, where)
  if not runs or set(runs) != {str(k) for k in range(len(runs))}:
    raise ValueError(f"{where}: the judge runs must be numbered from 0, found {sorted(runs)}")
  return [runs[str(k)] for k in range(len(runs))]
