"""What StepTool and StableToolBench publish of results: readers, and a writer of verdicts.

Every reader checks what it reads and names the file and the row of what is wrong. Python literals
in these files are read with ast.literal_eval: they are data, and nothing is ever evaluated.
A reader that takes a path reads `.xz` as well.
"""

import dataclasses
import enum
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steptool_jax.data.reading import (
  Path,
  check,
  field,
  literal,
  objects,
  read_json,
  texts,
  typed,
)
from steptool_jax.dialogue.parser import GIVE_ANSWER, GIVE_UP
from steptool_jax.files import replacing


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


@dataclasses.dataclass(frozen=True)
class Annotation:
  """One judged trajectory. success_calling[run][step] in {0, 1}, contribution[run][step] in 0..5;
  `steps` are the intermediate ones, `final` is Finish.
  """

  query_id: str
  query: str
  tool_names: tuple[str, ...]
  steps: tuple[StoredStep, ...]
  final: StoredStep
  success_calling: tuple[tuple[int, ...], ...]
  contribution: tuple[tuple[int, ...], ...]
  verdicts: tuple[Verdict, ...]


@dataclasses.dataclass(frozen=True)
class AnswerFile:
  """What one `<qid>_<method>.json` says; `document` is the whole of it."""

  query_id: str
  method: str
  query: str
  valid: bool
  final_answer: str
  finish_type: str  # "" in CoT files, which do not say
  query_count: int  # LLM calls
  total_tokens: int
  functions: tuple[Mapping[str, Any], ...]
  document: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Converted:
  """One entry of a converted file; `chain` is the nested answer_details, from the root down."""

  query_id: str
  query: str
  tools: tuple[Mapping[str, Any], ...]
  method: str
  total_steps: int
  final_answer: str
  chain: tuple[tuple[str, str | StoredStep], ...]  # (role, text or, where role is tool, the call)


# --- judged results --------------------------------------------------------------------------


def read_results(path: Path) -> dict[str, Result]:
  """A pass-rate file, query id -> Result."""
  fields = ("query", "tool_names", "answer_steps", "final_step", "is_solved")
  out = {}
  for where, query_id, entry in objects(path, fields):
    out[query_id] = Result(
      query_id,
      typed(entry["query"], str, f"{where}, field 'query'"),
      tuple(texts(entry["tool_names"], f"{where}, field 'tool_names'")),
      _steps(entry["answer_steps"], f"{where}, field 'answer_steps'"),
      _final(entry["final_step"], f"{where}, field 'final_step'"),
      _verdicts(entry["is_solved"], f"{where}, field 'is_solved'"),
    )
  return out


def result_of(answer: "Converted", verdicts: Sequence[Verdict]) -> Result:
  """A judged answer, as the official evaluator takes it down: calls alone count, texts do not."""
  steps = tuple(message for _, message in answer.chain if isinstance(message, StoredStep))
  return Result(
    answer.query_id,
    answer.query,
    tuple(str(tool.get("function", tool).get("name", "")) for tool in answer.tools),
    steps,
    steps[-1] if steps else StoredStep("", "", ""),
    tuple(verdicts),
  )


def answer_of(arguments: str) -> str:
  """The final answer in Finish's arguments as files hold them, "" for a give-up.

  Some 8 % of the published answers are cut in the middle of their JSON and were judged all the
  same, so here (unlike in a rollout) the text behind "final_answer" counts.
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
    steps = _steps(entry["answer_steps"], f"{where}, field 'answer_steps'")
    verdicts = _verdicts(entry["is_solved"], f"{where}, field 'is_solved'")
    runs = _runs(entry["process_reward"], f"{where}, field 'process_reward'")
    if len(runs) != len(verdicts):
      raise ValueError(f"{where}: {len(runs)} runs of process_reward, {len(verdicts)} of is_solved")
    scores: dict[str, list[tuple[int, ...]]] = {"succeed_tool_calling": [], "contributions": []}
    for number, run in enumerate(runs):
      for (name, rows), top in zip(scores.items(), (1, 5), strict=True):
        place = f"{where}, process_reward {number}, {name}"
        values = typed(field(run, name, place), list, place)
        if len(values) != len(steps):
          raise ValueError(f"{place}: {len(values)} scores for {len(steps)} steps")
        for value in values:
          good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= top
          check(good, place, f"integers of 0 to {top}", value)
        rows.append(tuple(values))
    out[query_id] = Annotation(
      query_id,
      typed(entry["query"], str, f"{where}, field 'query'"),
      tuple(texts(entry["tool_names"], f"{where}, field 'tool_names'")),
      steps,
      _final(entry["final_step"], f"{where}, field 'final_step'"),
      tuple(scores["succeed_tool_calling"]),
      tuple(scores["contributions"]),
      verdicts,
    )
  return out


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
  return _call(literal(text, dict, where), where)


def _call(call: Any, where: str) -> StoredStep:
  names = ("name", "arguments", "response")
  return StoredStep(*(typed(field(call, n, where), str, f"{where}, field {n!r}") for n in names))


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


# --- answers ---------------------------------------------------------------------------------


def read_answer(path: Path) -> AnswerFile:
  """One answer file; query id and method are in its name, `<qid>_<method>.json`."""
  path = pathlib.Path(path)
  query_id, separator, method = path.name.removesuffix(".xz").removesuffix(".json").partition("_")
  if not (separator and query_id and method):
    raise ValueError(f"{path}: an answer file is named <query id>_<method>.json")
  document = typed(read_json(path), dict, str(path))
  place = f"{path}, answer_generation"
  answer = typed(field(document, "answer_generation", str(path)), dict, place)

  def get(name: str, kind: type, default: Any = None) -> Any:
    where = f"{place}, field {name!r}"
    value = answer.get(name, default) if default is not None else field(answer, name, where)
    return typed(value, kind, where)

  return AnswerFile(
    query_id,
    method,
    get("query", str),
    get("valid_data", bool),
    get("final_answer", str),
    get("finish_type", str, ""),
    get("query_count", int),
    get("total_tokens", int),
    tuple(get("function", list)),
    document,
  )


def read_converted(path: Path) -> dict[str, Converted]:
  """A converted file, query id -> Converted; the nested answer must be a chain."""
  out = {}
  for where, query_id, entry in objects(path, ("query", "available_tools", "answer")):
    answer = typed(entry["answer"], dict, f"{where}, field 'answer'")
    chain: list[tuple[str, str | StoredStep]] = []
    level = field(answer, "answer_details", where)
    while level:
      place = f"{where}, answer_details, depth {len(chain)}"
      if not isinstance(level, list) or len(level) != 1:
        raise ValueError(f"{place}: must be a list of one message: a chain, not a tree")
      role, message = field(level[0], "role", place), field(level[0], "message", place)
      if role == "tool":
        chain.append((role, _call(message, place)))
      else:
        chain.append((str(role), typed(message, str, place)))
      level = field(level[0], "next", place)
    out[query_id] = Converted(
      query_id,
      typed(entry["query"], str, f"{where}, field 'query'"),
      tuple(typed(entry["available_tools"], list, f"{where}, field 'available_tools'")),
      typed(field(answer, "method", where), str, f"{where}, field 'method'"),
      typed(field(answer, "total_steps", where), int, f"{where}, field 'total_steps'"),
      typed(field(answer, "final_answer", where), str, f"{where}, field 'final_answer'"),
      tuple(chain),
    )
  return out
