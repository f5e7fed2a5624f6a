"""toolbench: the queries of ToolBench / StableToolBench, read in the layout they are published in.

    <folder>/solvable_queries/test_instruction/<subset>.json   the queries with their APIs
    <folder>/solvable_queries/test_query_ids/<subset>.json     the ids that count (optional)
    <tools folder>/<Category>/<tool>.json                      the tool environment (optional)

Answers come from a simulator (toolbench/simulators/virtual.py). An observation is the official text
{"error": …, "response": …}, cut at 1,024 characters.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from steptool_jax.environments.base import Split, check_split
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.render import as_json
from steptool_jax.toolbench.formats.codes import codes_of
from steptool_jax.toolbench.names import Api, Prompts, function_names, system_text, tool_spec
from steptool_jax.toolbench.simulators.virtual import (
  NOT_WORKING,
  Simulator,
  VirtualRequest,
  change_name,
  standardize,
  standardize_category,
)
from steptool_jax.types import Code, Observation, Task, ToolCall

# (query, final answer, the calls and observations as text) -> IsSolved in {0, .5, 1}
Judge = Callable[[str, str, str], float]

_NO_FUNCTION = "No such function name: "


def any_answer(query: str, answer: str, trajectory: str) -> float:
  """The default judge: every answer that is not blank is 1. An upper bound, for smoke tests only;
  figures need the LLM judge or a rule judge whose agreement is known (evaluation/).
  """
  del query, trajectory
  return float(bool(answer.strip()))


class ToolBench:
  """The environment. All queries are read and checked here; errors name the file and the query.

  subsets, train_subsets: names such as "G1_instruction", for heldout and for train. ids: only
  these query ids of `subsets`. tools_folder: descriptions and schemas come from there instead of
  the query files; an API that it does not know is left out and listed in `missing`. judge: see
  Judge; it blocks. strict_arguments: refuse missing required and unknown arguments; off by
  default, since the official environment passes all on and lets the API complain (9 % of the
  published calls in the cache would be refused).
  """

  name = "toolbench"

  def __init__(
    self,
    folder: str | Path,
    simulator: Simulator,
    subsets: Sequence[str],
    *,
    train_subsets: Sequence[str] = (),
    ids: Collection[int | str] | None = None,
    tools_folder: str | Path | None = None,
    judge: Judge = any_answer,
    prompts: Prompts | None = None,
    strict_arguments: bool = False,
    max_observation_chars: int = 1024,
    strip: str = "filter",
    toolbench_key: str = "",
  ):
    if max_observation_chars < 1:
      raise ValueError(f"max_observation_chars is {max_observation_chars}: must be at least 1")
    self._folder = _query_folder(Path(folder))
    self._tools = _ToolFolder(Path(tools_folder)) if tools_folder is not None else None
    self._prompts = prompts or Prompts()
    self.missing: tuple[str, ...] = ()  # "<query id>: <category>/<tool>/<api>"
    wanted = None if ids is None else {str(i) for i in ids}
    heldout = [t for s in subsets for t in self._read(s, "heldout", wanted)]
    if wanted is not None:
      unknown = sorted(wanted - {t.metadata["query_id"] for t in heldout})
      if unknown:
        raise ValueError(
          f"ids: query {', '.join(unknown[:5])} is in none of the subsets {', '.join(subsets)} "
          f"of {self._folder}"
        )
    train = [t for s in train_subsets for t in self._read(s, "train", None)]
    self._tasks = {"train": tuple(train), "heldout": tuple(heldout)}
    if self.missing:
      logging.warning(
        "%d APIs are not in the tool environment and were left out, the first is %s",
        len(self.missing),
        self.missing[0],
      )
    self._session = {
      "simulator": simulator,
      "judge": judge,
      "strict": strict_arguments,
      "max_chars": max_observation_chars,
      "sent": {"strip": strip, "toolbench_key": toolbench_key},
    }

  def tasks(self, split: Split) -> Sequence[Task]:
    return self._tasks[check_split(split)]

  def open(self, task: Task, sample: int) -> "ToolBenchSession":
    """`sample` changes nothing here: the tools keep no state."""
    return ToolBenchSession(task, **self._session)

  def _read(self, subset: str, split: Split, wanted: Collection[str] | None) -> Iterator[Task]:
    path = self._folder / "test_instruction" / f"{subset}.json"
    if not path.is_file():
      found = ", ".join(sorted(p.stem for p in path.parent.glob("*.json"))) or "none"
      raise ValueError(f"subset {subset!r}: {path} does not exist; there are {found}")
    queries = _load(path, list)
    ids_path = self._folder / "test_query_ids" / f"{subset}.json"
    counted = set(_load(ids_path, dict)) if ids_path.is_file() else None
    seen: set[str] = set()
    for position, entry in enumerate(queries):
      where = f"{path}, query {position}"
      if not isinstance(entry, dict) or not isinstance(entry.get("query"), str):
        raise ValueError(f"{where}: must be an object with the text 'query'")
      key = str(entry.get("query_id", position))
      if (counted is not None and key not in counted) or (wanted is not None and key not in wanted):
        continue
      if key in seen:
        raise ValueError(f"{where}: the query id {key} appears twice")
      seen.add(key)
      yield self._task(subset, split, key, entry, where)
    absent = sorted((counted or set()) - seen) if wanted is None else []
    if absent:
      raise ValueError(f"{ids_path}: query {', '.join(absent[:5])} is not in {path}")

  def _task(self, subset: str, split: Split, key: str, entry: dict, where: str) -> Task:
    apis: dict[tuple[str, str, str], Api] = {}
    descriptions = []
    for n, raw in enumerate(entry.get("api_list") or ()):
      api, description = _api(raw, f"{where}, api_list[{n}]"), ""
      if self._tools is not None:
        known = self._tools.find(api)
        if known is None:
          self.missing += (f"{key}: {api.category}/{api.tool}/{api.name}",)
          continue
        api, description = known
      if apis.setdefault((api.category, api.tool, api.name), api) is api:
        descriptions.append((api.standard_tool, description))
    if not apis:
      raise ValueError(f"{where} (id {key}): none of its APIs is known, it cannot be solved")
    names = function_names(list(apis.values()))
    functions = dict(zip(names, apis.values(), strict=True))
    specs = tuple(tool_spec(api, name, self._prompts) for name, api in functions.items())
    pairs = entry.get("relevant APIs") or ()
    relevant = {(standardize(tool), standardize(api)) for tool, api in pairs}
    return Task(
      id=f"toolbench/{subset}/{key}",
      environment=self.name,
      query=entry["query"],
      tools=specs,
      checker={"type": "judge"},
      metadata={
        "split": split,
        "subset": subset,
        "query_id": key,
        "system": system_text(self._prompts, descriptions, specs),
        "relevant": tuple(
          name
          for name, api in functions.items()
          if (api.standard_tool, standardize(api.name)) in relevant
        ),
        "apis": {
          name: {
            "category": api.category,
            "tool": api.standard_tool,
            "api": api.standard_name,
            "documentation": api.document,
          }
          for name, api in functions.items()
        },
      },
    )


class ToolBenchSession:
  """One attempt. Its only state is the record of what was called, which a fork copies."""

  def __init__(
    self,
    task: Task,
    simulator: Simulator,
    judge: Judge,
    strict: bool,
    max_chars: int,
    sent: Mapping[str, str],
    record: tuple[str, ...] = (),
  ):
    self._task, self._simulator, self._judge = task, simulator, judge
    self._strict, self._max_chars, self._sent = strict, max_chars, sent
    self._specs = {spec.name: spec for spec in task.tools}
    self._record = record

  def call(self, call: ToolCall) -> Observation:
    observation = self._call(call)
    if observation.code is not Code.INFRASTRUCTURE:
      arguments = json.dumps(call.arguments, ensure_ascii=False, default=str)
      self._record += (f"{call.name}({arguments}) -> {observation.text}",)
    return observation

  def fork(self) -> "ToolBenchSession":
    return ToolBenchSession(
      *(self._task, self._simulator, self._judge, self._strict, self._max_chars, self._sent),
      record=self._record,
    )

  def grade(self, answer: str | None) -> float:
    """0 without an answer, else what the judge says; ValueError for anything but 0, .5 and 1."""
    if answer is None or not answer.strip():
      return 0.0
    score = self._judge(self._task.query, answer, "\n".join(self._record))
    if score not in (0, 0.5, 1):
      raise ValueError(f"judge: said {score!r} for {self._task.id}, must be 0, 0.5 or 1")
    return float(score)

  def close(self) -> None:
    pass

  def _call(self, call: ToolCall) -> Observation:
    if call.name not in self._specs:
      return self._failure(Code.UNKNOWN_TOOL, _NO_FUNCTION + call.name)
    refusal = self._refusal(call)
    if refusal:
      return self._failure(Code.BAD_ARGUMENTS, refusal)
    api = self._task.metadata["apis"][call.name]
    request = VirtualRequest(
      category=api["category"],
      tool_name=api["tool"],
      api_name=api["api"],
      tool_input=dict(call.arguments),
      documentation=api["documentation"],
      **self._sent,
    )
    try:
      response = self._simulator.answer(request) or NOT_WORKING
    except InfrastructureError as error:
      return self._failure(Code.INFRASTRUCTURE, f"simulator: {error}")
    _, code = codes_of(response.error)
    value = as_json(response.response, 4 * self._max_chars) if code is Code.OK else None
    return Observation(self._cut(response.text), code, value)

  def _refusal(self, call: ToolCall) -> str:
    if not isinstance(call.arguments, Mapping):
      return "arguments must be an object"
    if not self._strict:
      return ""
    parameters = self._specs[call.name].parameters
    missing = [name for name in parameters["required"] if name not in call.arguments]
    unknown = [name for name in call.arguments if name not in parameters["properties"]]
    if missing:
      return f"the required argument {missing[0]} is missing"
    if unknown:
      known = ", ".join(parameters["properties"]) or "none"
      return f"there is no argument {unknown[0][:40]}; there are: {known}"
    return ""

  def _failure(self, code: Code, error: str) -> Observation:
    return Observation(self._cut(json.dumps({"error": error, "response": ""})), code)

  def _cut(self, text: str) -> str:
    return text if len(text) <= self._max_chars else text[: self._max_chars] + "..."


class _ToolFolder:
  """The tool environment, read file by file as queries need it."""

  def __init__(self, path: Path):
    if not path.is_dir():
      raise FileNotFoundError(
        f"tools folder {path} does not exist: unpack the official tool environment there "
        "(<Category>/<tool>.json), or leave it out to use the query files' own descriptions"
      )
    self._path = path
    self._read: dict[Path, tuple[str, str, dict[str, dict]] | None] = {}

  def find(self, api: Api) -> tuple[Api, str] | None:
    """(the API as the environment describes it, the tool's description); None if unknown."""
    for category in dict.fromkeys((api.category, standardize_category(api.category))):
      path = self._path / category / f"{api.standard_tool}.json"
      if path not in self._read:
        self._read[path] = self._load(path) if path.is_file() else None
      found = self._read[path]
      if found is not None and api.standard_name in found[2]:
        tool, description, apis = found
        entry = {"category_name": api.category, "tool_name": tool} | apis[api.standard_name]
        entry = {"api_name": entry["name"], "api_description": entry.get("description")} | entry
        return _api(entry, f"{path}, {api.name}"), description
    return None

  def _load(self, path: Path) -> tuple[str, str, dict[str, dict]]:
    data = _load(path, dict)
    apis: dict[str, dict] = {}
    for entry in data.get("api_list") or ():
      if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ValueError(f"{path}: every entry of api_list must be an object with a 'name'")
      apis.setdefault(change_name(standardize(entry["name"])), entry)
    return str(data.get("tool_name", path.stem)), str(data.get("tool_description") or ""), apis


def _query_folder(folder: Path) -> Path:
  for candidate in (folder / "solvable_queries", folder):
    if (candidate / "test_instruction").is_dir():
      return candidate
  raise FileNotFoundError(
    f"{folder} holds no solvable_queries/test_instruction: give the folder of a StableToolBench "
    "download"
  )


def _load(path: Path, kind: type) -> Any:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not valid JSON ({error}): download it again") from None
  if not isinstance(value, kind):
    raise ValueError(f"{path}: must hold a JSON {kind.__name__}, found {type(value).__name__}")
  return value


def _api(raw: Any, where: str) -> Api:
  fields = ("category_name", "tool_name", "api_name")
  if not isinstance(raw, dict) or not all(isinstance(raw.get(f), str) for f in fields):
    raise ValueError(f"{where}: must be an object with the texts {', '.join(fields)}")
  parameters = {}
  for kind in ("required_parameters", "optional_parameters"):
    parameters[kind] = tuple(raw.get(kind) or ())
    if not all(isinstance(p, dict) and isinstance(p.get("name"), str) for p in parameters[kind]):
      raise ValueError(f"{where}: every entry of {kind} must be an object with a 'name'")
  return Api(
    category=raw["category_name"],
    tool=raw["tool_name"],
    name=raw["api_name"],
    description=str(raw.get("api_description") or ""),
    required=parameters["required_parameters"],
    optional=parameters["optional_parameters"],
    document=raw,
  )
