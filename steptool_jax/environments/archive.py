"""archive: calls that pay off late. 2 to 6 calls; a step's use shows three and more calls later.

A visitor's badge is given out only while nothing else has been asked for, and opens the cabinet at
the very end; a copy is queued by one call, made by another and collected by a third. An agent that
forgets the first call is told so by the last. Train and held-out tasks share the tools; wordings,
some compositions, and all names and ids are disjoint.
"""

import dataclasses
import random
from collections.abc import Iterator, Mapping
from typing import Any

from steptool_jax.config import Config
from steptool_jax.environments import names
from steptool_jax.environments.base import Split, generator_fields
from steptool_jax.environments.checkers import same_value
from steptool_jax.environments.generated import Draw, Generated, SerialSession, Stale
from steptool_jax.simulators.functions import NotFound, Result, Tool, tool
from steptool_jax.types import Finish, Task, ToolCall

_FILES, _VISITORS = 14, 8
_KINDS = ("atlas", "ledger", "map", "diary", "plan")
# What is asked of the file that the path ends at -> (calls after the file's id, needs a badge).
_ENDS: Mapping[str, tuple[int, bool]] = {
  "author": (1, False),
  "cabinet": (1, False),
  "code": (2, True),
  "lock": (2, True),
  "seal": (3, True),
}
_READ_FRAMES: dict[Split, tuple[str, ...]] = {
  "train": (
    "what is the {f} of {x}?",
    "tell me the {f} of {x}.",
    "i need the {f} of {x}.",
    "{x}: what {f}?",
  ),
  "heldout": ("for {x} what is the {f}?", "i need {x}: tell me the {f}."),
}
_LOCK_FRAMES: dict[Split, tuple[str, ...]] = {
  "train": ("please lock the cabinet of {x}.", "lock the cabinet of {x} now."),
  "heldout": ("i need the cabinet of {x}: please lock it.",),
}
_WORDS = {"code": "cabinet code", "seal": "seal of a copy"}
_HELDOUT_COMPOSITIONS = frozenset({"file>next.code", "file>next.author"})


@dataclasses.dataclass(frozen=True)
class _Composition:
  """Hops from a file to the next one, and what is asked at the end."""

  hops: int
  end: str

  @property
  def name(self) -> str:
    return ">".join(["file", *["next"] * self.hops]) + f".{self.end}"

  @property
  def depth(self) -> int:
    calls, badge = _ENDS[self.end]
    return badge + 1 + self.hops + calls


def _compositions() -> Iterator[_Composition]:
  for end, (_, badge) in _ENDS.items():
    # Without a badge at most 3 calls: whatever is longer has a late effect.
    for hops in range(3 if badge else 2):
      found = _Composition(hops, end)
      if found.depth <= 6:
        yield found


@dataclasses.dataclass(frozen=True)
class _File:
  title: str
  author: str
  cabinet: str
  next: str  # id of another file
  seal: int  # on each copy of it


@dataclasses.dataclass(frozen=True)
class _World:
  files: Mapping[str, _File]  # by id
  codes: Mapping[str, int]  # cabinet -> what opens its drawers
  badges: Mapping[str, str]  # visitor -> badge


class ArchiveTools:
  """The tools of one session. The desk is open until any other tool has been used."""

  def __init__(self, world: _World):
    self._world = world
    self._desk_open = True
    self._badges: set[str] = set()
    self._queue: list[str] = []
    self._copies: set[str] = set()
    self.locked: set[str] = set()

  def _file(self, key: str) -> _File:
    if key not in self._world.files:
      raise NotFound(f"no file {key}")
    self._desk_open = False
    return self._world.files[key]

  def _code(self, cabinet: str, badge: str) -> int:
    if cabinet not in self._world.codes:
      raise NotFound(f"no cabinet {cabinet}")
    self._check(badge)
    return self._world.codes[cabinet]

  def _check(self, badge: str) -> None:
    self._desk_open = False
    if badge not in self._badges:
      raise ValueError(f"badge {badge} was not given out")

  def sign_in(self, name: str) -> dict[str, Any]:
    """Badge of a visitor. Only before any other tool."""
    if name.lower() not in self._world.badges:
      raise NotFound(f"no visitor {name}")
    if not self._desk_open:
      raise ValueError("the desk is closed")
    badge = self._world.badges[name.lower()]
    self._badges.add(badge)
    return {"badge": badge}

  def find_file(self, title: str) -> dict[str, Any]:
    """Id of a file."""
    self._desk_open = False
    for key, file in self._world.files.items():
      if file.title == title.lower():
        return {"id": key}
    raise NotFound(f"no file {title}")

  def get_file(self, id: str) -> dict[str, Any]:
    """Author, cabinet and next file of a file."""
    file = self._file(id)
    return {"author": file.author, "cabinet": file.cabinet, "next": file.next}

  def open_cabinet(self, id: str, badge: str) -> dict[str, Any]:
    """Code of a cabinet."""
    return {"code": self._code(id, badge)}

  def lock_cabinet(self, id: str, badge: str) -> Result:
    """Lock a cabinet."""
    self._code(id, badge)
    # Without a change there is no value at all: such a call earns nothing (rewards/rules.py).
    if id in self.locked:
      return Result({"changed": []})
    self.locked.add(id)
    return Result({"locked": id}, changed=True)

  def order_copy(self, id: str) -> Result:
    """Order a copy of a file. The press makes it."""
    self._file(id)
    if id in self._queue or id in self._copies:
      return Result({"changed": []})
    self._queue.append(id)
    return Result({"ordered": id}, changed=True)

  def run_press(self) -> Result:
    """Make the copies that are ordered."""
    self._desk_open = False
    if not self._queue:
      return Result({"changed": []})
    made, self._queue = self._queue, []
    self._copies.update(made)
    return Result({"made": len(made)}, changed=True)

  def collect_copy(self, id: str, badge: str) -> dict[str, Any]:
    """Seal of a copy that is made."""
    file = self._file(id)
    self._check(badge)
    if id not in self._copies:
      raise NotFound(f"no copy of {id}")
    return {"seal": file.seal}

  def list_files(self) -> dict[str, Any]:
    """Ids of some files."""
    self._desk_open = False
    return {"files": [*self._world.files][:6]}

  def search_help(self, text: str) -> dict[str, Any]:
    """Search the help pages."""
    self._desk_open = False
    return {"pages": []}


_NAMES = tuple(name for name in vars(ArchiveTools) if name[0] != "_")
_NOTHING = _World({}, {}, {})
SPECS = {name: tool(getattr(ArchiveTools(_NOTHING), name)).spec for name in _NAMES}


class Archive(Generated[_World, _Composition]):
  """The environment: 2 to 6 gold calls a task, 10 tools; from 4 calls on all effects are late."""

  name = "archive"
  gold_calls = (2, 6)
  specs = SPECS
  compositions = tuple(_compositions())
  heldout_compositions = _HELDOUT_COMPOSITIONS

  def open(self, task: Task, sample: int) -> "ArchiveSession":
    """A visit that has not begun; `sample` changes nothing here."""
    world = self.world(task.metadata["split"], task.metadata["world"])
    return ArchiveSession(task, ArchiveTools(world), self._max_chars)

  def make_world(self, rng: random.Random, split: Split) -> _World:
    keys = rng.sample(names.ids("f", split), _FILES)
    cabinets = rng.sample(names.ids("k", split), _FILES)
    people = names.full_names(rng, split, _FILES + _VISITORS)
    titles = [f"{word} {rng.choice(_KINDS)}" for word in rng.sample(names.words(split), _FILES)]
    numbers = rng.sample(range(200, 1000), 2 * _FILES)  # no id ends in such a number
    nexts = [rng.choice([k for k in keys if k != key]) for key in keys]
    files = {
      key: _File(*row)
      for key, *row in zip(keys, titles, people, cabinets, nexts, numbers, strict=False)
    }
    codes = dict(zip(cabinets, numbers[_FILES:], strict=True))
    badges = zip(people[_FILES:], rng.sample(names.ids("b", split), _VISITORS), strict=True)
    return _World(files, codes, dict(badges))

  def draw(
    self, rng: random.Random, split: Split, world: _World, composition: _Composition
  ) -> Draw:
    _, needs_badge = _ENDS[composition.end]
    key = rng.choice([*world.files])
    path, calls, badge, words = [key], [], "", world.files[key].title
    if needs_badge:
      visitor = rng.choice([*world.badges])
      badge = world.badges[visitor]
      calls.append(ToolCall("sign_in", {"name": visitor}))
    calls.append(ToolCall("find_file", {"title": words}))
    for _ in range(composition.hops):
      calls.append(ToolCall("get_file", {"id": path[-1]}))
      path.append(world.files[path[-1]].next)
      words = f"the next file of {words}"
    if len(set(path)) < len(path):
      raise Stale  # a circle: a call would be made again
    file, key = world.files[path[-1]], path[-1]
    if composition.end == "seal":
      calls += [
        ToolCall("order_copy", {"id": key}),
        ToolCall("run_press", {}),
        ToolCall("collect_copy", {"id": key, "badge": badge}),
      ]
    else:
      calls.append(ToolCall("get_file", {"id": key}))
    if composition.end in ("code", "lock"):
      name = "open_cabinet" if composition.end == "code" else "lock_cabinet"
      calls.append(ToolCall(name, {"id": file.cabinet, "badge": badge}))
    if needs_badge:
      words += f" for visitor {visitor}"
    if composition.end == "lock":
      frame = rng.choice(_LOCK_FRAMES[split])
      checker = {"type": "state", "locked": [file.cabinet]}
      return Draw(frame.format(x=words), frame, calls, Finish("done"), checker)
    answers = {
      "author": file.author,
      "cabinet": file.cabinet,
      "code": world.codes[file.cabinet],
      "seal": file.seal,
    }
    frame = rng.choice(_READ_FRAMES[split])
    query = frame.format(f=_WORDS.get(composition.end, composition.end), x=words)
    answer = answers[composition.end]
    checker = {"type": "value", "answer": answer, "locked": []}
    return Draw(query, frame, calls, Finish(str(answer)), checker)


class ArchiveSession(SerialSession):
  """One visit. Answers are checked by value, and what is locked must be what was asked for."""

  def __init__(self, task: Task, owner: ArchiveTools, max_chars: int):
    tools = [Tool(spec, getattr(owner, name)) for name, spec in SPECS.items()]
    super().__init__(task, tools, max_chars)
    self._owner = owner

  def grade(self, answer: str | None) -> float:
    """1 or 0; copies that nobody needs do no harm, a cabinet locked beside the task does."""
    checker = self._task.checker
    with self._lock:
      locked = sorted(self._owner.locked)
    if answer is None or locked != checker["locked"]:
      return 0.0
    return float(checker["type"] == "state" or same_value(answer, checker["answer"]))

  def close(self) -> None:
    """Nothing is kept beyond the session's own memory."""


def from_config(config: Config, services: Any) -> Archive:
  """The row of base.ENVIRONMENTS."""
  del services
  return Archive(**generator_fields(config))
