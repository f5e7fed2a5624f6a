"""Draws one task with a world and tools of its own; a function of (seed, split, number) only.

A world has two to four kinds of things. Things have a name or a name and a key, fields, and one
field that holds another thing. Tools find keys, read fields or whole records, set fields and add to
them; what they are called, what their arguments are called and what a result looks like differs
from world to world, and so does the wording of the query.
"""

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

from steptool_jax.environments.base import Split
from steptool_jax.environments.generated import Stale
from steptool_jax.environments.invented import words
from steptool_jax.types import ToolCall, ToolSpec

_THINGS = 5  # of each kind


@dataclasses.dataclass(frozen=True)
class Field:
  name: str
  kind: str  # of words.MAKERS, or "link"
  questions: tuple[str, ...] = ()

  @property
  def words(self) -> str:
    return self.name.replace("_", " ")


@dataclasses.dataclass(frozen=True)
class Kind:
  """things: key -> {field: value}; keys: name -> key (the name itself where nothing finds keys)."""

  name: str
  fields: tuple[Field, ...]
  things: Mapping[Any, Mapping[str, Any]]
  keys: Mapping[str, Any]
  finds: bool


@dataclasses.dataclass(frozen=True)
class InventedTool:
  """What it does: find a key, get fields, set a field, add to it, give a thing to another."""

  spec: ToolSpec
  does: str  # "find", "get", "set", "add" or "give"
  kind: str
  fields: tuple[str, ...]
  bare: bool  # answers with the value alone, not with an object

  def result(self, values: Mapping[str, Any]) -> Any:
    return next(iter(values.values())) if self.bare else dict(values)


@dataclasses.dataclass(frozen=True)
class World:
  kinds: Mapping[str, Kind]
  tools: tuple[InventedTool, ...]


@dataclasses.dataclass(frozen=True)
class Drawn:
  """answer: what is asked (None: nothing); changes: (kind, key, field, new value)."""

  world: World
  query: str
  calls: tuple[ToolCall, ...]
  answer: Any
  changes: tuple[tuple[str, Any, str, Any], ...]


def draw(seed: int, split: Split, number: int, depths: range, tools: int | None) -> Drawn:
  """The task of this number. tools: how many it offers at most (None = as many as there are)."""
  rng = random.Random(f"{seed}/{split}/{number}/invented")
  while True:
    try:
      return _Artist(rng, split).draw(depths, tools)
    except Stale:
      continue


class _Artist:
  def __init__(self, rng: random.Random, split: Split):
    self.rng, self.split = rng, split
    self.camel = rng.random() < 0.2
    self.with_kind = rng.random() < 0.6  # tools of one field name the kind, too
    self.key_style = rng.choice(("id", "id", "kind", "kind_id", "kind_id", "key", "name", "code"))
    self.name_style = rng.choice(("name", "name", "kind", "kind_name", "title", "query", "text"))
    self.found = rng.choice(("id", "id", "kind_id", "kind", "key"))
    self.finder_verb = rng.choice(("find", "find", "search", "lookup", "get", "id_of", "which"))
    self.numbers = rng.random() < 0.25  # keys are numbers

  def draw(self, depths: range, most: int | None) -> Drawn:
    rng = self.rng
    depth = rng.choice(depths)
    kinds = self._kinds(rng.randint(2, 4))
    tools = self._tools(kinds)
    path = _Path(self, kinds, tools)
    drawn = path.draw(depth)
    used = {call.name for call in drawn["calls"]}
    if len({tool.spec.name for tool in tools}) < len(tools) or (most and most < len(used)):
      raise Stale
    others = [tool for tool in tools if tool.spec.name not in used]
    room = (most or len(tools)) - len(used)
    kept = used | {t.spec.name for t in rng.sample(others, min(room, len(others)))}
    offered = [tool for tool in tools if tool.spec.name in kept]
    rng.shuffle(offered)
    return Drawn(World({kind.name: kind for kind in kinds}, tuple(offered)), **drawn)

  def _kinds(self, count: int) -> list[Kind]:
    rng = self.rng
    taken: set[str] = set()
    named = [self._fresh(taken, words.KINDS, 0.3) for _ in range(count)]
    heads = []
    for n, name in enumerate(named):
      fields = [self._field(taken) for _ in range(rng.randint(1, 3))]
      # Mostly called what it leads to: else the next tool can only be guessed.
      plain = rng.random() < 0.75
      link = named[(n + 1) % count] if plain else self._fresh(taken, words.LINKS, 0.2)
      heads.append((name, (*fields, Field(link, "link")), rng.random() < 0.45))
    keys = [self._keys(finds) for _, _, finds in heads]
    made = []
    for n, (name, fields, finds) in enumerate(heads):
      linked = list(keys[(n + 1) % count].values())
      things = {key: self._thing(fields, linked) for key in keys[n].values()}
      made.append(Kind(name, fields, things, keys[n], finds))
    return made

  def _fresh(self, taken: set[str], english: tuple[str, ...], share: float) -> str:
    while True:
      invented = self.rng.random() < share
      word = words.made_up(self.rng, self.split) if invented else self.rng.choice(english)
      if word not in taken:
        taken.add(word)
        return word

  def _field(self, taken: set[str]) -> Field:
    rng = self.rng
    if rng.random() < 0.6:
      name = self._fresh(taken, tuple(words.FIELDS), 0.0)
      kind, questions = words.FIELDS[name]
      return Field(name, kind, questions)
    name = self._fresh(taken, words.KINDS, 0.6)
    if rng.random() < 0.3:
      name = f"{name}_{rng.choice(('name', 'count', 'code', 'date', 'level', 'total'))}"
    return Field(name, rng.choice(tuple(words.MAKERS)))

  def _keys(self, finds: bool) -> dict[str, Any]:
    rng = self.rng
    make = rng.choice((words.person, words.title, words.title, words.code))
    names = {make(rng, self.split) for _ in range(_THINGS)}
    if not finds:
      return {name: name for name in sorted(names)}
    numbers = rng.sample(range(1, 2000), len(names))
    return {
      name: number if self.numbers else words.code(rng, self.split)
      for name, number in zip(sorted(names), numbers, strict=True)
    }

  def _thing(self, fields: tuple[Field, ...], linked: list[Any]) -> dict[str, Any]:
    return {
      field.name: self.rng.choice(linked)
      if field.kind == "link"
      else words.MAKERS[field.kind](self.rng, self.split)
      for field in fields
    }

  # --- tools

  def _tools(self, kinds: list[Kind]) -> list[InventedTool]:
    tools: list[InventedTool] = []
    for kind in kinds:
      key_schema = {"type": "integer" if self.numbers and kind.finds else "string"}
      key = (self.key_style if kind.finds else self.name_style).replace("kind", kind.name)
      if kind.finds:
        argument = self.name_style.replace("kind", kind.name)
        found = (self.found.replace("kind", kind.name),)
        name = self._name(self.finder_verb, kind.name)
        tools.append(self._tool("find", name, kind, found, {argument: {"type": "string"}}))
      if self.rng.random() < 0.45:
        name = self._name(self.rng.choice([*words.GETS, ""]), kind.name)
        fields = tuple(field.name for field in kind.fields)
        tools.append(self._tool("get", name, kind, fields, {key: key_schema}))
      else:
        for field in kind.fields:
          name = self._field_name(self.rng.choice([*words.GETS, "", ""]), kind.name, field.name)
          tools.append(self._tool("get", name, kind, (field.name,), {key: key_schema}))
      for field in kind.fields:
        if field.kind != "link" and self.rng.random() < 0.3:
          tools.append(self._writer(kind, field, key, key_schema))
      if self.rng.random() < 0.35:
        tools.append(self._giver(kind, key, key_schema))
    return tools

  def _writer(self, kind: Kind, field: Field, key: str, key_schema: Any) -> InventedTool:
    adds = field.kind == "number" and self.rng.random() < 0.5
    value_schema = {"number": "integer", "decimal": "number"}.get(field.kind, "string")
    value = self.rng.choice((field.name, field.name, "amount" if adds else "value"))
    if value == key:
      raise Stale
    verb = self.rng.choice(words.ADDS if adds else words.SETS)
    name = self._field_name(verb, kind.name, field.name)
    arguments = {key: key_schema, value: {"type": value_schema}}
    return self._tool("add" if adds else "set", name, kind, (field.name,), arguments)

  def _giver(self, kind: Kind, key: str, key_schema: Any) -> InventedTool:
    """Sets the link, under a verb of its own."""
    link = kind.fields[-1]
    numbers = all(isinstance(thing[link.name], int) for thing in kind.things.values())
    value = self.rng.choice((link.name, f"{link.name}_id", "to", "target"))
    if value == key:
      raise Stale
    verb = self.rng.choice(words.GIVES)
    name = self._name(verb, *self.rng.choice(((), (kind.name,), (kind.name, "to", link.name))))
    arguments = {key: key_schema, value: {"type": "integer" if numbers else "string"}}
    return self._tool("give", name, kind, (link.name,), arguments)

  def _field_name(self, verb: str, kind: str, field: str) -> str:
    if not self.with_kind:
      return self._name(verb, field)
    return self._name(verb, *self.rng.choice(((kind, field), (field, "of", kind))))

  def _name(self, *parts: str) -> str:
    name = "_".join(part for part in parts if part)
    if not self.camel:
      return name
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)

  def _tool(self, does, name, kind, fields, arguments) -> InventedTool:
    bare = len(fields) == 1 and self.rng.random() < 0.3
    parameters = {
      "type": "object",
      "properties": arguments,
      "required": list(arguments),
      "additionalProperties": False,
    }
    what = {"find": "Key", "get": "Reads", "set": "Sets", "add": "Adds to", "give": "Gives"}[does]
    spec = ToolSpec(name, f"{what}: {', '.join(fields)} of {kind.name}.", parameters)
    return InventedTool(spec, does, kind.name, fields, bare)


class _Path:
  """From a thing that the query names, over links, to what is asked or changed."""

  def __init__(self, artist: _Artist, kinds: list[Kind], tools: list[InventedTool]):
    self.rng, self.split, self.kinds, self.tools = artist.rng, artist.split, kinds, tools
    self.calls: list[ToolCall] = []
    self.known: list[str] = []  # what the query and the results so far have said

  def draw(self, depth: int) -> dict[str, Any]:
    rng = self.rng
    place = rng.randrange(len(self.kinds))
    kind = self.kinds[place]
    name = rng.choice(list(kind.keys))
    self.known.append(name)
    phrase = self._called(kind, name)
    if kind.finds:
      self._call(self._tool("find", kind), name)
    key = kind.keys[name]
    gives = rng.random() < 0.2
    # To give a thing away, the other one may have to be found, too.
    left = 1 + (gives and rng.random() < 0.5)
    while len(self.calls) < depth - left:
      link = kind.fields[-1]
      key = self._read(kind, link, key)
      phrase = rng.choice((f"the {link.words} of {phrase}", f"{phrase}'s {link.words}"))
      place = (place + 1) % len(self.kinds)
      kind = self.kinds[place]
    if gives:
      return self._give(kind, self.kinds[(place + 1) % len(self.kinds)], key, phrase, depth)
    if len(self.calls) != depth - 1:
      raise Stale
    tools = [t for t in self.tools if t.kind == kind.name and t.does in ("set", "add")]
    if tools and rng.random() < 0.5:
      return self._write(rng.choice(tools), kind, key, phrase)
    field = rng.choice(kind.fields)
    value = self._read(kind, field, key)
    return self._done(self._question(field, phrase), value)

  def _called(self, kind: Kind, name: str) -> str:
    return self.rng.choice(
      (
        *(name, name, f"'{name}'", f'"{name}"', f"the {kind.name} {name}", f"{kind.name} {name}"),
        *(f"the {kind.name} called {name}", f"the {kind.name} '{name}'"),
      )
    )

  def _question(self, field: Field, phrase: str) -> str:
    frames = words.READ_FRAMES[self.split]
    if field.questions and self.rng.random() < 0.5:
      frames = field.questions
    return self.rng.choice(frames).format(f=field.words, x=phrase)

  def _read(self, kind: Kind, field: Field, key: Any) -> Any:
    """The value, which must not have been known before."""
    value = kind.things[key][field.name]
    if str(value) in self.known:
      raise Stale
    self._call(self._tool("get", kind, field.name), key)
    self.known += map(str, kind.things[key].values())
    return value

  def _tool(self, does: str, kind: Kind, field: str = "") -> InventedTool:
    """Stale where this world has none."""
    for tool in self.tools:
      if (tool.kind, tool.does) == (kind.name, does) and (not field or field in tool.fields):
        return tool
    raise Stale

  def _call(self, tool: InventedTool, *values: Any) -> None:
    names = tool.spec.parameters["required"]
    self.calls.append(ToolCall(tool.spec.name, dict(zip(names, values, strict=True))))

  def _write(self, tool: InventedTool, kind: Kind, key: Any, phrase: str) -> dict[str, Any]:
    rng = self.rng
    field = next(f for f in kind.fields if f.name == tool.fields[0])
    old = kind.things[key][field.name]
    adds = tool.does == "add"
    given = rng.randint(1, 200) if adds else words.MAKERS[field.kind](rng, self.split)
    new = old + given if adds else given
    if new == old:
      raise Stale
    self._call(tool, key, given)
    frames = (words.ADD_FRAMES if adds else words.SET_FRAMES)[self.split]
    query = rng.choice(frames).format(f=field.words, x=phrase, v=given)
    asked = adds and rng.random() < 0.5
    if asked:
      query = f"{query} {rng.choice(words.THEN_TELL)}"
    return self._done(query, new if asked else None, ((kind.name, key, field.name, new),))

  def _give(self, kind: Kind, other: Kind, key: Any, phrase: str, depth: int) -> dict[str, Any]:
    rng = self.rng
    name = rng.choice(list(other.keys))
    value = other.keys[name]
    tool = self._tool("give", kind)
    if value in (key, kind.things[key][tool.fields[0]]) or name in self.known:
      raise Stale
    if other.finds:
      self._call(self._tool("find", other), name)
    self._call(tool, key, value)
    if len(self.calls) != depth:
      raise Stale
    verb = next(v for v in words.GIVES if tool.spec.name.startswith(v))
    query = rng.choice(words.GIVE_FRAMES[self.split]).format(
      g=verb, x=phrase, v=self._called(other, name)
    )
    return self._done(query, None, ((kind.name, key, tool.fields[0], value),))

  def _done(self, query: str, answer: Any, changes: tuple = ()) -> dict[str, Any]:
    query = self.rng.choice(words.GREETINGS) + query
    if self.rng.random() < 0.5:
      query = query[0].upper() + query[1:]
    return {"query": query, "calls": tuple(self.calls), "answer": answer, "changes": changes}
