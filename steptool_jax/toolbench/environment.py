"""toolbench: the queries of ToolBench / StableToolBench, read in the layout they are published in.

    <folder>/solvable_queries/test_instruction/<subset>.json   the queries with their APIs
    <folder>/solvable_queries/test_query_ids/<subset>.json     the ids that count (optional)
    <tools folder>/<Category>/<tool>.json                      the tool environment (optional)

Answers come from a simulator (toolbench/simulators/virtual.py). An observation is the official text
{"error": …, "response": …}, cut at 1,024 characters.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from steptool_jax.config import Config
from steptool_jax.environments.base import Split, check_split
from steptool_jax.files import read_json
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.render import as_json, shorten
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

_NO_FUNCTION = "No such function name: "


class ToolBench:
  """The environment. All queries are read and checked here; errors name the file and the query.

  subsets, train_subsets: names such as "G1_instruction", for heldout and for train. ids: only
  these query ids of `subsets`. tools_folder: descriptions and schemas come from there instead of
  the query files; an API that it does not know is left out and listed in `missing`.
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
    prompts: Prompts | None = None,
    max_observation_chars: int = 1024,
    toolbench_key: str = "",
  ):
    if max_observation_chars < 1:
      raise ValueError(f"max_observation_chars is {max_observation_chars}: must be at least 1")
    for field, names in (("subsets", subsets), ("train_subsets", train_subsets)):
      if len(set(names)) < len(names):
        raise ValueError(f"config.environment.toolbench.{field}: {list(names)} names one twice")
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
    _refuse_shared(train, heldout)
    self._tasks = {"train": tuple(train), "heldout": tuple(heldout)}
    if self.missing:
      logging.warning(
        "%d APIs are not in the tool environment and were left out, the first is %s",
        len(self.missing),
        self.missing[0],
      )
    self._simulator, self._key, self._max_chars = simulator, toolbench_key, max_observation_chars

  def tasks(self, split: Split) -> Sequence[Task]:
    return self._tasks[check_split(split)]

  def open(self, task: Task, sample: int) -> "ToolBenchSession":
    """`sample` changes nothing here: the tools keep no state."""
    return ToolBenchSession(task, self._simulator, self._key, self._max_chars)

  def _read(self, subset: str, split: Split, wanted: Collection[str] | None) -> Iterator[Task]:
    path = self._folder / "test_instruction" / f"{subset}.json"
    if not path.is_file():
      found = ", ".join(sorted(p.stem for p in path.parent.glob("*.json"))) or "none"
      raise ValueError(f"subset {subset!r}: {path} does not exist; there are {found}")
    queries = read_json(path, list)
    ids_path = self._folder / "test_query_ids" / f"{subset}.json"
    counted = set(read_json(ids_path, dict)) if ids_path.is_file() else None
    seen: set[str] = set()
    for position, entry in enumerate(queries):
      where = f"{path}, query {position}"
      if not isinstance(entry, dict) or not isinstance(entry.get("query"), str):
        raise ValueError(f"{where}: must be an object with the text 'query'")
      pairs = entry.get("relevant APIs") or []
      if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise ValueError(f"{where}: 'relevant APIs' must be a list of [tool, API]")
      if not isinstance(entry.get("api_list") or [], list):
        raise ValueError(f"{where}: 'api_list' must be a list")
      key = str(entry.get("query_id", position))
      if (counted is not None and key not in counted) or (wanted is not None and key not in wanted):
        continue
      if "/" in key or "\0" in key:
        raise ValueError(f"{where}: the query id {key!r:.80} is no name of a file")
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
    named = {name: (a.standard_tool, standardize(a.name)) for name, a in functions.items()}
    # One that is not offered, as the tool environment lacks it, was needed all the same.
    absent = sorted(relevant - set(named.values()))
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
        "relevant": (
          *(name for name, pair in named.items() if pair in relevant),
          *(f"{change_name(name)}_for_{tool}" for tool, name in absent),
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
  """One attempt, without any state of its own."""

  def __init__(self, task: Task, simulator: Simulator, toolbench_key: str, max_chars: int):
    self._task, self._simulator = task, simulator
    self._key, self._max_chars = toolbench_key, max_chars

  def call(self, call: ToolCall) -> Observation:
    api = self._task.metadata["apis"].get(call.name)
    if api is None:
      return self._failure(Code.UNKNOWN_TOOL, _NO_FUNCTION + call.name)
    # Which arguments there are is not checked: officially all are passed on, and the API complains.
    if not isinstance(call.arguments, Mapping):
      return self._failure(Code.BAD_ARGUMENTS, "arguments must be an object")
    request = VirtualRequest(
      category=api["category"],
      tool_name=api["tool"],
      api_name=api["api"],
      tool_input=dict(call.arguments),
      toolbench_key=self._key,
      documentation=api["documentation"],
    )
    try:
      response = self._simulator.answer(request) or NOT_WORKING
    except InfrastructureError as error:
      return self._failure(Code.INFRASTRUCTURE, f"simulator: {error}")
    _, code = codes_of(response.error)
    value = as_json(response.response, 4 * self._max_chars) if code is Code.OK else None
    return Observation(shorten(response.text, self._max_chars), code, value)

  def fork(self) -> "ToolBenchSession":
    return self

  def grade(self, answer: str | None) -> float:
    """Whether there is an answer, and no more: verdicts come after the rollout (judging.py)."""
    return float(bool(answer and answer.strip()))

  def close(self) -> None:
    pass

  def _failure(self, code: Code, error: str) -> Observation:
    return Observation(shorten(json.dumps({"error": error, "response": ""}), self._max_chars), code)


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
      if category == ".." or path.parent.parent != self._path:
        continue  # no name of a folder: it would lead out of this one
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
    data = read_json(path, dict)
    apis: dict[str, dict] = {}
    entries = data.get("api_list") or []
    for entry in entries if isinstance(entries, list) else [None]:
      if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ValueError(f"{path}: every entry of api_list must be an object with a 'name'")
      apis.setdefault(change_name(standardize(entry["name"])), entry)
    return str(data.get("tool_name", path.stem)), str(data.get("tool_description") or ""), apis


def _is_pair(value: Any) -> bool:
  return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def _refuse_shared(train: Sequence[Task], heldout: Sequence[Task]) -> None:
  """ValueError where a held-out query is trained on, by whatever subset and id it is called."""
  trained = {" ".join(task.query.split()).casefold(): task.id for task in train}
  found = {t.id: trained.get(" ".join(t.query.split()).casefold()) for t in heldout}
  shared = [f"{ours} (in training: {theirs})" for ours, theirs in found.items() if theirs]
  if shared:
    raise ValueError(
      f"config.environment.toolbench.train_subsets: {len(shared)} held-out queries are trained on, "
      f"{', '.join(shared[:3])} among them; name subsets that share no query with subsets"
    )


def _query_folder(folder: Path) -> Path:
  for candidate in (folder / "solvable_queries", folder):
    if (candidate / "test_instruction").is_dir():
      return candidate
  raise FileNotFoundError(
    f"{folder} holds no solvable_queries/test_instruction: give the folder of a StableToolBench "
    "download"
  )


def _api(raw: Any, where: str) -> Api:
  fields = ("category_name", "tool_name", "api_name")
  if not isinstance(raw, dict) or not all(isinstance(raw.get(f), str) for f in fields):
    raise ValueError(f"{where}: must be an object with the texts {', '.join(fields)}")
  parameters = {}
  for kind in ("required_parameters", "optional_parameters"):
    found = raw.get(kind) or []
    parameters[kind] = tuple(found) if isinstance(found, list) else (None,)
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


def from_config(config: Config, services: Any) -> ToolBench:
  """The row of environments.base.ENVIRONMENTS.

  Sessions grade by their default: services.judging gives the verdicts, all at once.
  """
  c = config.environment.toolbench
  prompts = None
  if c.prompt:
    try:
      prompts = Prompts(system=Path(c.prompt).read_text(encoding="utf-8"))
    except ValueError as error:
      raise ValueError(f"config.environment.toolbench.prompt: {c.prompt}: {error}") from None
  return ToolBench(
    c.folder,
    services.answering.simulator,
    c.subsets,
    train_subsets=c.train_subsets,
    ids=c.ids or None,
    tools_folder=c.tools or None,
    prompts=prompts,
    max_observation_chars=config.rollout.max_observation_chars,
    toolbench_key=services.toolbench_key,
  )
