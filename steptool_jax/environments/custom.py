"""custom: a user's own Python functions as tools and a JSONL file of tasks with checkers.

One task a line:
  {"id": "t1", "query": "...", "checker": {"type": "number", "value": 12},
   "tools": ["add"], "split": "train",
   "demonstration": [{"tool": "add", "arguments": {"a": 5, "b": 7}}, {"answer": "12"}]}
tools (default: all), split (default: by `heldout_share`), demonstration, kind (a word for tasks
alike, for which held-out figures are told) and state are optional.
An entry of a demonstration may hold several calls of one turn: {"calls": [{"tool": …}, …]}, for
model.parallel_calls. `turns` or `user`: a user who goes on after an answer (environments/users.py).
`"state": {…}`, any JSON value, is the task's own start: `make_tools(state)` receives a copy of it
for every conversation, and None for a task without one.
Checkers: exact {value}, number {value, tolerance}, regex {pattern}, contains_all {values}, none
(nobody can tell: only a reward model may pay, rewards.source=model), or the name of a function
`check(answer, tools, **rest of the checker) -> bool | 0 | .5 | 1`, where `tools` maps names to the
session's functions, so that it can look at the state.

A function that takes longer than rollout.tool_timeout gives the observation TIMEOUT, but no thread
can be ended from outside: it runs on, and what it changes later is changed. Let functions that wait
for something have a time-out of their own.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import sys
import types
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import regex

from steptool_jax.config import Config
from steptool_jax.environments import demonstrations, users
from steptool_jax.environments.base import KIND, SPLITS, TURNS, Problem, Split, check_split
from steptool_jax.environments.checkers import contains_all, normal, same_value
from steptool_jax.files import parse_json
from steptool_jax.simulators import starts
from steptool_jax.simulators.changes import state_digest
from steptool_jax.simulators.endpoint import Endpoint
from steptool_jax.simulators.functions import Tool, Toolbox, tool
from steptool_jax.simulators.mcp import McpServers, McpSession
from steptool_jax.simulators.schemas import MATCH_S, matches
from steptool_jax.types import Observation, Task, ToolCall

Functions = Sequence[Callable[..., Any] | Tool]
_FIELDS = frozenset(
  {"id", "query", "checker", "tools", "split", "demonstration", KIND, starts.STATE, *users.FIELDS}
)
# Checkers of other environments, whose fields rewards/rules.py reads.
_TAKEN = frozenset({"value", "state", "table"})
# type -> its fields: (name, JSON type, required)
_CHECKERS: Mapping[str, tuple[tuple[str, tuple[type, ...], bool], ...]] = {
  "exact": (("value", (str, int, float), True),),
  "number": (("value", (int, float), True), ("tolerance", (int, float), False)),
  "regex": (("pattern", (str,), True),),
  "contains_all": (("values", (list,), True),),
  "none": (),
}


class Custom:
  """The environment.

  functions: a list of functions that share nothing, or of Tools (an MCP server's); or a function
  that makes the list anew for every session (shared state lives there), whose parameter, if it has
  one, receives the task's state; or a module ("pkg.mod" or "file.py") that has either TOOLS (a
  list) or make_tools (a function); its other functions are checkers. tasks_path: the JSONL file.
  heldout_share: share of the tasks without a split field that are held out. All errors in tools and
  tasks are found here, as ValueError, in tasks with "file:line: reason". problems: a list that
  takes them in the place of the first error; tools and tasks with one are left out. servers: lends
  an MCP server's tools to each session; `functions` is then "" or a module with checkers only.
  user: the endpoint of users of type "model".
  """

  name = "custom"

  def __init__(
    self,
    functions: Functions | Callable[[], Functions] | str | Path,
    tasks_path: str | Path,
    heldout_share: float = 0.2,
    max_observation_chars: int = 1024,
    problems: list[Problem] | None = None,
    servers: McpServers | None = None,
    user: Endpoint | None = None,
  ):
    if not 0 <= heldout_share <= 1:
      raise ValueError(f"heldout_share is {heldout_share}: must be in [0, 1]")
    known: dict[str, Callable[..., Any]] = {}
    self._own: frozenset[str] = frozenset()  # functions that the module itself defines
    if functions and isinstance(functions, (str, Path)):
      module = load_module(str(functions))
      known = {n: f for n, f in vars(module).items() if inspect.isfunction(f) and n[0] != "_"}
      self._own = frozenset(n for n, f in known.items() if f.__module__ == module.__name__)
      functions = _tools_of(module, str(functions), servers is not None)
    if servers is not None:
      functions = servers.tools
    self._servers, self._user = servers, user
    self._checkers = known
    self._max_chars = max_observation_chars
    self._problems = problems
    # What a list shares is shared by all conversations: its functions hold nothing of one.
    self._side_by_side = servers is None and not callable(functions)
    if callable(functions):
      self._make, self._with_state = functions, starts.takes_state(functions)
    else:
      shared = list(functions)
      self._make, self._with_state = (lambda: shared), False
    lines = task_lines(Path(tasks_path))
    box = Toolbox(self._derive(_first_state(lines), problems), max_observation_chars)
    if not box.specs:
      raise ValueError("custom environment: there is no tool")
    self._specs = {spec.name: spec for spec in box.specs}
    self._tasks = self._read(Path(tasks_path), lines, heldout_share)

  def _derive(self, state: Any, problems: list[Problem] | None = None) -> list[Tool]:
    """The tools of one session. Errors of single ones go to `problems`, where it is given."""
    tools: list[Tool] = []
    for function in starts.made(self._make, self._with_state, state):
      try:
        tools.append(function if isinstance(function, Tool) else tool(function))
      except ValueError as error:
        if self._problems is None:
          raise
        if problems is not None:
          problems.append(Problem("", str(error)))
    return tools

  def tasks(self, split: Split) -> Sequence[Task]:
    return self._tasks[check_split(split)]

  def open(self, task: Task, sample: int) -> "CustomSession":
    """A session with functions of its own where a factory was given."""
    offered = {spec.name for spec in task.tools}
    server = self._servers.open() if self._servers is not None else None
    tools = self._derive(task.metadata.get(starts.STATE)) if server is None else server.tools
    functions = {t.spec.name: t.function for t in tools}
    # What a server holds cannot be compared.
    digest = functools.partial(state_digest, functions.values() if server is None else ())
    tools = [t for t in tools if t.spec.name in offered]
    if server is None:
      _refuse_others(task, tools)
    box = Toolbox(tools, self._max_chars, digest)
    return CustomSession(
      task, box, functions, self._checkers, server, self._side_by_side, self._user
    )

  def _read(
    self, path: Path, lines: Sequence[str], heldout_share: float
  ) -> dict[str, tuple[Task, ...]]:
    tasks: dict[str, list[Task]] = {split: [] for split in SPLITS}
    where: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
      if not line.strip():
        continue
      try:
        task, split = self._parse(line, heldout_share)
        if task.id in where:
          raise ValueError(f"id {task.id!r} is already used in line {where[task.id]}")
      except (ValueError, RecursionError) as error:
        reason = f"{path}:{number}: {error}"
        if self._problems is None:
          raise ValueError(reason) from None
        self._problems.append(Problem(_id_of(line), reason))
        continue
      where[task.id] = number
      tasks[split].append(task)
    if not where and not self._problems:
      raise ValueError(f"{path}: holds no task")
    return {split: tuple(found) for split, found in tasks.items()}

  def _parse(self, line: str, heldout_share: float) -> tuple[Task, str]:
    record = parse_json(line)
    try:
      json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
      half = f"\\u{ord(error.object[error.start]):04x}"
      raise ValueError(f"{half} is half of a character: write the whole, or leave it out") from None
    if not isinstance(record, dict):
      raise ValueError("a task must be a JSON object")
    unknown = sorted(set(record) - _FIELDS)
    if unknown:
      raise ValueError(f"unknown field {unknown[0]!r}: fields are {', '.join(sorted(_FIELDS))}")
    for field in ("id", "query", *record.keys() & {KIND}):
      if not isinstance(record.get(field), str) or not record[field].strip():
        raise ValueError(f"field {field!r} must be a non-empty string")
    split = record.get("split")
    if split is None:
      # By the id, so that adding a task moves no other one to the other split.
      share = zlib.crc32(record["id"].encode()) % 10_000 / 10_000
      split = "heldout" if share < heldout_share else "train"
    elif split not in SPLITS:
      raise ValueError(f"split {split!r} does not exist: use one of {', '.join(SPLITS)}")
    names = record.get("tools", list(self._specs))
    if not isinstance(names, list) or not names:
      raise ValueError("field 'tools' must be a non-empty list of tool names")
    for name in names:
      if not isinstance(name, str) or name not in self._specs:
        raise ValueError(f"unknown tool {name!r}: there are {', '.join(self._specs)}")
    specs = tuple(self._specs[name] for name in dict.fromkeys(names))
    checker = self._check_checker(record.get("checker"))
    own = {n: f for n, f in self._checkers.items() if n not in self._specs}
    says = users.metadata_of(record, own, self._check_checker, self._user is not None)
    actions = demonstrations.read(record.get("demonstration", []), specs, bool(says))
    metadata = starts.metadata_of(record, self._with_state) | says
    if KIND in record:
      metadata[KIND] = record[KIND]
    return Task(record["id"], self.name, record["query"], specs, checker, actions, metadata), split

  def _check_checker(self, checker: Any) -> dict[str, Any]:
    if not isinstance(checker, dict) or not isinstance(checker.get("type"), str):
      raise ValueError("field 'checker' must be an object with a 'type'")
    kind = checker["type"]
    rest = {k: v for k, v in checker.items() if k != "type"}
    if kind in self._checkers and kind in _TAKEN:
      raise ValueError(
        f"checker {kind!r}: this name belongs to an embedded environment; rename your function"
      )
    if kind in _CHECKERS and kind in self._own - self._specs.keys():
      raise ValueError(
        f"checker {kind!r} is built in, and your module has a function of that name too; rename it"
      )
    if kind not in _CHECKERS:
      if kind not in self._checkers:
        known = ", ".join([*_CHECKERS, *self._checkers])
        raise ValueError(f"unknown checker type {kind!r}: there are {known}")
      try:
        inspect.signature(self._checkers[kind]).bind("answer", {}, **rest)
      except TypeError as error:
        raise ValueError(f"checker {kind}(answer, tools, ...): {error}") from None
      return checker
    fields = _CHECKERS[kind]
    for field, types_, required in fields:
      value = rest.pop(field, None)
      if value is None and not required:
        continue
      if not isinstance(value, types_) or isinstance(value, bool):
        wanted = " or ".join(t.__name__ for t in types_)
        raise ValueError(f"checker {kind!r} needs {field!r} of type {wanted}")
    if rest:
      raise ValueError(f"checker {kind!r} has no field {next(iter(rest))!r}")
    if kind == "regex":
      try:
        regex.compile(checker["pattern"])
      except regex.error as error:
        raise ValueError(f"checker pattern {checker['pattern']!r}: {error}") from None
    if kind == "contains_all" and not (
      checker["values"] and all(isinstance(v, (str, int, float)) for v in checker["values"])
    ):
      raise ValueError("checker 'contains_all' needs 'values', a non-empty list of text or numbers")
    for value in (*checker.get("values", ()), checker.get("value", 0)):
      if not normal(str(value)):
        raise ValueError(f"checker {kind!r}: {value!r} says nothing: all answers have it or none")
    return checker


@dataclasses.dataclass(frozen=True, eq=False)
class CustomSession:
  """Calls are not serialised here: a hung function must not block the calls after it."""

  task: Task
  box: Toolbox
  functions: Mapping[str, Callable[..., Any]]
  checkers: Mapping[str, Callable[..., Any]]
  server: McpSession | None = None
  side_by_side: bool = False
  user: Endpoint | None = None

  @functools.cached_property
  def _user(self) -> users.User:
    says = self.task.metadata[TURNS]
    return users.User(
      self.task.query, says, self.checkers, self.functions, self._verdict, self.user
    )

  def call(self, call: ToolCall) -> Observation:
    return self.box.call(call)

  def reply(self, answer: str) -> Observation | None:
    """RuntimeError as of `grade`, InfrastructureError where the user's endpoint is down."""
    return self._user.reply(answer)

  def grade(self, answer: str | None) -> float:
    """RuntimeError naming task and checker when a checker function raises or returns nonsense."""
    return 0.0 if answer is None else self._verdict(self.task.checker, answer)

  def _verdict(self, checker: Mapping[str, Any], answer: str) -> float:
    kind = checker["type"]
    if kind in _CHECKERS:
      try:
        return float(_matches(checker, answer, self.task.query))
      except TimeoutError:
        raise RuntimeError(
          f"task {self.task.id}: checker regex {checker['pattern']!r:.80} takes longer than "
          f"{MATCH_S:g} s on an answer; write a pattern that does not try every split"
        ) from None
    # Copies: what a checker takes out of its list would be missing from every later verdict.
    rest = copy.deepcopy({k: v for k, v in checker.items() if k != "type"})
    try:
      verdict = self.checkers[kind](answer, dict(self.functions), **rest)
    except Exception as error:
      raise RuntimeError(
        f"task {self.task.id}: checker {kind} raised {type(error).__name__}: {error}"
      ) from error
    if verdict not in (0, 0.5, 1):
      raise RuntimeError(
        f"task {self.task.id}: checker {kind} returned {verdict!r}, not 0, .5 or 1"
      )
    return float(verdict)

  def close(self) -> None:
    """Ends the MCP server of this session, where it has one."""
    if self.server is not None:
      self.server.close()


def _refuse_others(task: Task, tools: Sequence[Tool]) -> None:
  """ValueError where the session's tools are not those that the prompt shows."""
  made = {tool.spec.name: tool.spec for tool in tools}
  for spec in task.tools:
    if made.get(spec.name) != spec:
      how = "is another tool" if spec.name in made else "is missing"
      raise ValueError(
        f"task {task.id}: {spec.name} {how} with this task's state than with the first task's: "
        "make_tools must give every state the same names, parameters and texts; choose among the "
        "tools with a task's field 'tools'"
      )


def _matches(checker: Mapping[str, Any], answer: str, query: str) -> bool:
  kind = checker["type"]
  if kind == "none":
    return bool(answer.strip())  # says that there is an answer, and no more
  if kind == "number":
    return same_value(answer, checker["value"], checker.get("tolerance"))
  if kind == "regex":
    return matches(checker["pattern"], answer.strip(), whole=True)
  if kind == "contains_all":
    return contains_all(answer, checker["values"], query)
  return same_value(answer, checker["value"])


def task_lines(path: Path) -> list[str]:
  try:
    # Not splitlines: U+2028 and others may stand inside a JSON string.
    return path.read_text(encoding="utf-8-sig").split("\n")
  except FileNotFoundError:
    raise FileNotFoundError(f"task file {path} does not exist") from None
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: is not UTF-8 text: {error}") from None


def _records(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Of the lines that can be read; what is wrong with the others is said where they are parsed."""
  for line in lines:
    with contextlib.suppress(ValueError, RecursionError):
      record = parse_json(line)
      if isinstance(record, dict):
        yield record


def _first_state(lines: Sequence[str]) -> Any:
  """The tools' schemas do not depend on the state; but to make them may need one."""
  states = (record.get(starts.STATE) for record in _records(lines))
  return next((state for state in states if state is not None), None)


def _id_of(line: str) -> str:
  record = next(_records([line]), {})
  return record["id"] if isinstance(record.get("id"), str) else ""


def load_module(where: str) -> types.ModuleType:
  """A file, which may import its neighbours, or a module, also of the current folder."""
  _reach(Path(where).parent if where.endswith(".py") else Path())
  if not where.endswith(".py"):
    try:
      return importlib.import_module(where)
    except ModuleNotFoundError as error:
      raise ValueError(f"tools module {where!r} cannot be imported: {error}") from error
  path = Path(where)
  if not path.is_file():
    raise FileNotFoundError(f"tools file {where} does not exist")
  name = f"steptool_custom_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module  # dataclasses and type hints look their module up there
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    del sys.modules[name]
    raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
  return module


def _reach(folder: Path) -> None:
  """Last in Python's path, so that nothing of ours is hidden by a file of that name."""
  if (place := str(folder.resolve())) not in sys.path:
    sys.path.append(place)


def _tools_of(
  module: types.ModuleType, where: str, has_server: bool
) -> Functions | Callable[[], Functions]:
  found = [name for name in ("TOOLS", "make_tools") if hasattr(module, name)]
  if has_server:
    if found:
      raise ValueError(f"{where} has {found[0]}, and there is an MCP server: keep one of the two")
    return ()
  if len(found) != 1:
    what = "both TOOLS and make_tools: keep one" if found else "neither TOOLS nor make_tools"
    raise ValueError(f"{where} has {what}")
  return vars(module)[found[0]]


def from_config(config: Config, services: Any, problems: list[Problem] | None = None) -> Custom:
  """The row of base.ENVIRONMENTS; tools of an MCP server where the config names one."""
  c = config.environment
  environment = Custom(
    functions=c.functions,
    tasks_path=c.tasks,
    heldout_share=c.heldout_share,
    max_observation_chars=config.rollout.max_observation_chars,
    problems=problems,
    servers=services.mcp if services is not None else None,
    user=services.user if services is not None else None,
  )
  return environment
