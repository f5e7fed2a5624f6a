"""bfcl: the multi-turn part of the Berkeley Function Calling Leaderboard (v4), on its own package.

    pip install --no-deps bfcl-eval; pip install mpmath

Its Python classes are the tools (a file system, a trading bot, …), its data the tasks, its checker
the verdict: after each user turn the state of the classes and what the calls returned are compared
with those of the gold calls. Ours is what stands between: a call is a method call with the parsed
arguments (the package evaluates text, which we never do), the user's next message comes from the
data, and a task's categories (base, miss_func, miss_param, long_context), which share their world,
lie in one split.
"""

import ast
import copy
import importlib
import inspect
import json
import pathlib
import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from steptool_jax.config import Config
from steptool_jax.environments.base import TURNS, Split, check_split
from steptool_jax.simulators.render import plain, render
from steptool_jax.types import Action, Code, Finish, Observation, Task, ToolCall, ToolSpec

CATEGORIES = ("base", "miss_func", "miss_param", "long_context")
# Names that the package's executor refuses to call.
_REFUSED = frozenset(
  {"kill", "exit", "quit", "remove", "unlink", "popen", "Popen", "run"}  # as there
)
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "list": "array"}
_MORE = "I have updated some more functions you can choose from. What about now?"
_DONE = Finish("done")


class Bfcl:
  """The environment. categories: of CATEGORIES. heldout_share: share of the worlds held out."""

  name = "bfcl"

  def __init__(
    self,
    categories: Sequence[str] = CATEGORIES,
    heldout_share: float = 0.3,
    max_observation_chars: int = 1024,
  ):
    self._package = _Package()
    self._max_chars = max_observation_chars
    self._tasks: dict[str, list[Task]] = {"train": [], "heldout": []}
    for category in categories:
      for entry, gold in self._package.entries(category):
        number = entry["id"].rsplit("_", 1)[1]
        share = zlib.crc32(number.encode()) % 10_000 / 10_000
        split = "heldout" if share < heldout_share else "train"
        self._tasks[split].append(self._package.task(entry, gold, category))

  def tasks(self, split: Split) -> Sequence[Task]:
    return self._tasks[check_split(split)]

  def open(self, task: Task, sample: int) -> "BfclSession":
    """Classes in the task's start; `sample` changes nothing here."""
    return BfclSession(task, self._package, self._max_chars)


class _Package:
  """What is read from bfcl_eval, once. ValueError where it is not installed."""

  def __init__(self):
    where = "bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker"
    try:
      self.checker = importlib.import_module(where)
      config = importlib.import_module("bfcl_eval.constants.executable_backend_config")
      importlib.import_module("mpmath")
    except ImportError as error:
      raise ValueError(
        f"environment 'bfcl' needs the package bfcl-eval ({error}): pip install --no-deps "
        "bfcl-eval, and pip install mpmath (its own pins are older than jax's)"
      ) from error
    self._config = config
    self._data = pathlib.Path(importlib.import_module("bfcl_eval").__file__).parent / "data"
    self._docs: dict[str, list[dict[str, Any]]] = {}
    self._entries: dict[str, dict[str, Any]] = {}
    self._gold: dict[str, list[list[str]]] = {}

  def entries(self, category: str) -> list[tuple[dict[str, Any], list[list[str]]]]:
    name = f"BFCL_v4_multi_turn_{category}.json"
    gold = {e["id"]: e["ground_truth"] for e in _lines(self._data / "possible_answer" / name)}
    found = [(entry, gold[entry["id"]]) for entry in _lines(self._data / name)]
    self._entries |= {entry["id"]: entry for entry, _ in found}
    self._gold |= gold
    return found

  def of(self, task: Task) -> tuple[dict[str, Any], list[list[str]]]:
    key = task.metadata["bfcl"]
    return self._entries[key], self._gold[key]

  def functions(self, class_name: str) -> list[dict[str, Any]]:
    if class_name not in self._docs:
      file = self._config.MULTI_TURN_FUNC_DOC_FILE_MAPPING[class_name]
      self._docs[class_name] = _lines(self._data / "multi_turn_func_doc" / file)
    return self._docs[class_name]

  def instances(self, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Class name -> an instance in the entry's start."""
    found = {}
    for name in entry["involved_classes"]:
      module = importlib.import_module(self._config.CLASS_FILE_PATH_MAPPING[name])
      found[name] = getattr(module, name)()
      if name not in self._config.STATELESS_CLASSES:
        start = copy.deepcopy(entry["initial_config"].get(name, {}))
        found[name]._load_scenario(start, long_context="long_context" in entry["id"])
    return found

  def task(self, entry: Mapping[str, Any], gold: list[list[str]], category: str) -> Task:
    docs = self._docs_of(entry)
    held = {n for names in entry.get("missed_function", {}).values() for n in names}
    tools = tuple(_spec(doc) for name, doc in docs.items() if name not in held)
    parameters = {name: list(doc["parameters"]["properties"]) for name, doc in docs.items()}
    actions: list[Action] = []
    for turn in gold:
      actions += [call_of(text, parameters) for text in turn]
      actions.append(_DONE)
    return Task(
      id=f"bfcl/{entry['id']}",
      environment="bfcl",
      query=_said(entry, 0, docs),
      tools=tools,
      checker={"type": "bfcl"},
      demonstration=tuple(actions),
      metadata={TURNS: True, "bfcl": entry["id"], "category": category},
    )

  def message(self, entry: Mapping[str, Any], turn: int) -> str | None:
    """What the user says in a turn; None where there is no such turn."""
    if turn >= len(entry["question"]):
      return None
    return _said(entry, turn, self._docs_of(entry))

  def _docs_of(self, entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> description of every function of its classes."""
    return {d["name"]: d for c in entry["involved_classes"] for d in self.functions(c)}


def _said(entry: Mapping[str, Any], turn: int, docs: Mapping[str, Mapping[str, Any]]) -> str:
  held = entry.get("missed_function", {}).get(str(turn))
  if held:  # as prompting models are told of it there
    functions = [{k: v for k, v in docs[n].items() if k != "response"} for n in held]
    return f"{json.dumps(functions)}\n{_MORE}"
  return "\n".join(message["content"] for message in entry["question"][turn])


class BfclSession:
  """One attempt: the policy's instances, and those of the gold calls beside them."""

  def __init__(self, task: Task, package: _Package, max_chars: int):
    self._package, self._max_chars = package, max_chars
    self._entry, self._gold = package.of(task)
    self._mine, self._theirs = package.instances(self._entry), package.instances(self._entry)
    self._lock = threading.Lock()
    self._turn = 0
    self._said_now = 0  # calls of this turn
    self._said: list[str] = []  # what all calls so far returned
    self._valid = True

  def call(self, call: ToolCall) -> Observation:
    with self._lock:
      before = _state(self._mine)
      text, code, value = execute(self._mine, call.name, call.arguments)
      self._said.append(text)
      self._said_now += 1
      changed = code is Code.OK and _state(self._mine) != before
    return Observation(render(text, self._max_chars), code, value, changed)

  def reply(self, answer: str) -> Observation | None:
    """The user's next message, with the verdict on the turn that ends."""
    del answer
    with self._lock:
      if self._turn + 1 >= len(self._gold):
        return None  # grade() judges the last turn
      solved = self._judge()
      self._turn += 1
      text = self._package.message(self._entry, self._turn)
    return Observation(text, Code.OK, solved=solved)

  def grade(self, answer: str | None) -> float:
    """1 where every turn was right, as the package's runner has it; None = no answer: 0."""
    with self._lock:
      if answer is None or self._turn + 1 != len(self._gold):
        return 0.0
      return float(self._judge() == 1.0 and self._valid)

  def _judge(self) -> float:
    """The package's checks after a turn, with the gold calls of this turn made beside it."""
    gold = self._gold[self._turn]
    expected = []
    for text in gold:
      name, arguments, keywords = _parsed(text)
      expected.append(execute(self._theirs, name, keywords, arguments)[0])
    said, self._said_now = self._said_now, 0
    right = not gold or (
      said > 0
      and self._package.checker.state_checker(self._mine, self._theirs)["valid"]
      and self._package.checker.response_checker(self._said, expected, self._turn)["valid"]
    )
    self._valid = self._valid and right
    return float(right)

  def close(self) -> None:
    """Nothing is kept beyond the session's own memory."""


def execute(
  instances: Mapping[str, Any], name: str, keywords: Mapping[str, Any], positional: Sequence = ()
) -> tuple[str, Code, Any]:
  """(text, code, value) of a method call; the text is what the package's executor returns."""
  method = None
  for instance in instances.values():
    if not name.startswith("_") and inspect.ismethod(getattr(instance, name, None)):
      method = getattr(instance, name)
  if name in _REFUSED:
    return f"Error during execution: Function call {name} is not allowed.", Code.TOOL_ERROR, None
  if method is None:
    return f"Error during execution: name '{name}' is not defined", Code.UNKNOWN_TOOL, None
  try:
    # A copy: classes keep what they are given, and change it later.
    result = method(*copy.deepcopy(list(positional)), **copy.deepcopy(dict(keywords)))
  except TypeError as error:
    return f"Error during execution: {error}", Code.BAD_ARGUMENTS, None
  except Exception as error:
    return f"Error during execution: {error}", Code.TOOL_ERROR, None
  text = result if isinstance(result, str) else str(result)
  if isinstance(result, dict):
    try:
      text = json.dumps(result)
    except (TypeError, ValueError):
      text = str(result)
  failed = isinstance(result, dict) and "error" in result
  return text, Code.TOOL_ERROR if failed else Code.OK, None if failed else plain(text)


def call_of(text: str, parameters: Mapping[str, Sequence[str]]) -> ToolCall:
  """A gold call, e.g. "sort('a.txt')", with its arguments by name."""
  name, positional, keywords = _parsed(text)
  named = dict(zip(parameters.get(name, ()), positional, strict=False)) | keywords
  return ToolCall(name, json.loads(json.dumps(named)))


def _parsed(text: str) -> tuple[str, list[Any], dict[str, Any]]:
  """Name, positional and keyword arguments of a call that is written down; literals only."""
  call = ast.parse(text, mode="eval").body
  if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
    raise ValueError(f"{text!r}: no plain call")
  return (
    call.func.id,
    [ast.literal_eval(a) for a in call.args],
    {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg},
  )


def _spec(doc: Mapping[str, Any]) -> ToolSpec:
  return ToolSpec(doc["name"], doc["description"], _schema(doc["parameters"]))


def _schema(doc: Any) -> Any:
  """JSON schema of the package's own type names."""
  if isinstance(doc, list):
    return [_schema(entry) for entry in doc]
  if not isinstance(doc, dict):
    return doc
  found = {k: _schema(v) for k, v in doc.items() if k not in ("type", "default")}
  if isinstance(doc.get("type"), str):
    if doc["type"] != "any":
      found["type"] = _TYPES.get(doc["type"], doc["type"])
  elif "type" in doc:  # a parameter of this name
    found["type"] = _schema(doc["type"])
  return found


def _state(instances: Mapping[str, Any]) -> str:
  shown = [{k: v for k, v in vars(i).items() if k[0] != "_"} for i in instances.values()]
  return repr(shown)


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def from_config(config: Config, services: Any) -> Bfcl:
  """The row of base.ENVIRONMENTS."""
  del services
  e = config.environment
  return Bfcl(e.bfcl, e.heldout_share, config.rollout.max_observation_chars)
