"""nested_api: questions and changes over a shop's tables, 2 to 5 calls that feed one another.

A task is a path through the relations (customer -> last order -> product -> supplier), ended by
reading a field or by a change. Train and held-out tasks share the relations; wordings, a few
compositions, and all names and ids are disjoint.
"""

import collections
import dataclasses
import functools
import random
import sqlite3
from collections.abc import Iterator
from typing import Any

from steptool_jax.config import Config
from steptool_jax.environments import shop
from steptool_jax.environments.base import Split, generator_fields
from steptool_jax.environments.generated import Draw, Generated, Stale
from steptool_jax.types import Finish, Task, ToolCall

# kind -> (tool that finds it, its argument, words in front of the name)
STARTS = {
  "customer": ("find_customer", "name", "customer"),
  "product": ("find_product", "name", "product"),
  "supplier": ("find_supplier", "name", "supplier"),
  "order": ("", "id", "order"),
}
# kind -> (tool, field of its result, next kind, phrase)
HOPS = {
  "customer": (("last_order", "order", "order", "the last order of {}"),),
  "order": (
    ("get_order", "product", "product", "the product in {}"),
    ("track_order", "shipment", "shipment", "the shipment of {}"),
  ),
  "product": (
    ("get_product", "supplier", "supplier", "the supplier of {}"),
    ("get_stock", "warehouse", "warehouse", "the warehouse of {}"),
  ),
  "supplier": (("top_product", "product", "product", "the top product of {}"),),
  "shipment": (("get_shipment", "warehouse", "warehouse", "the warehouse of {}"),),
  "warehouse": (),
}
# kind -> (tool, field, word)
READS = {
  "customer": (("get_customer", "city", "city"),),
  "order": (("get_order", "count", "count"),),
  "product": (
    ("get_product", "price", "price"),
    ("get_product", "name", "name"),
    ("get_stock", "count", "stock"),
  ),
  "supplier": (("get_supplier", "city", "city"), ("get_supplier", "name", "name")),
  "shipment": (("get_shipment", "carrier", "carrier"), ("get_shipment", "day", "day")),
  "warehouse": (("get_warehouse", "city", "city"), ("get_warehouse", "manager", "manager")),
}
# (kind of the target, tool, argument, table, column, phrase, where the new value comes from)
_WRITES = (
  ("order", "cancel_order", "", "orders", "status", "cancel {0}", "cancelled"),
  ("customer", "set_city", "city", "customers", "city", "set the city of {0} to {1}", "city"),
  ("product", "set_price", "price", "products", "price", "set the price of {0} to {1}", "number"),
  ("product", "set_stock", "count", "stock", "count", "set the stock of {0} to {1}", "number"),
  ("product", "set_price", "price", "products", "price", "set the price of {0} to {1}", "price"),
  ("customer", "set_city", "city", "customers", "city", "set the city of {0} to {1}", "supplier"),
  (
    "shipment",
    "move_shipment",
    "warehouse",
    "shipments",
    "warehouse",
    "move {0} to the warehouse in {1}",
    "warehouse",
  ),
)
# Held-out frames put words together anew that train frames have as well.
_READ_FRAMES: dict[Split, tuple[str, ...]] = {
  "train": (
    "what is the {f} of {x}?",
    "tell me the {f} of {x}.",
    "i need the {f} of {x}.",
    "for {x}, which {f} is it?",
    "{x}: what {f}?",
  ),
  "heldout": (
    "i need {x}: tell me the {f}.",
    "for {x} what is the {f}?",
    "what {f} is it for {x}?",
    "i need you to tell me the {f} of {x}.",
  ),
}
_WRITE_FRAMES: dict[Split, tuple[str, ...]] = {
  "train": ("please {v}.", "can you {v}?", "{v} now.", "i need you to {v}."),
  "heldout": ("can you please {v} now?", "you need to {v}.", "now {v}, please."),
}
_HELDOUT_COMPOSITIONS = frozenset(
  {
    "order>shipment>warehouse.manager",
    "supplier>product>warehouse.city",
    "customer>order>product>warehouse.manager",
    "supplier>product!set_stock:number",
  }
)
_TEMPLATES_KEPT = 256


@dataclasses.dataclass(frozen=True)
class _Composition:
  """start kind, hops, and either a read or a write at the end."""

  start: str
  hops: tuple[tuple[str, str, str, str], ...]
  read: tuple[str, str, str] | None = None
  write: tuple[str, ...] | None = None

  @property
  def kinds(self) -> tuple[str, ...]:
    return (self.start, *(hop[2] for hop in self.hops))

  @property
  def name(self) -> str:
    path = ">".join(self.kinds)
    if self.read is not None:
      return f"{path}.{self.read[2]}"
    return f"{path}!{self.write[1]}:{self.write[6]}"

  @property
  def depth(self) -> int:
    extra = 0
    if self.write is not None:
      extra = {"price": 2, "supplier": 2, "warehouse": 1}.get(self.write[6], 0)
    return (STARTS[self.start][0] != "") + len(self.hops) + 1 + extra


def _paths(kind: str, seen: tuple[str, ...]) -> Iterator[tuple[tuple[str, str, str, str], ...]]:
  yield ()
  for hop in HOPS[kind]:
    if hop[2] not in seen:
      for rest in _paths(hop[2], (*seen, hop[2])):
        yield (hop, *rest)


def _compositions() -> Iterator[_Composition]:
  for start in STARTS:
    for hops in _paths(start, (start,)):
      end = hops[-1][2] if hops else start
      for read in READS[end]:
        if hops or read[1] != "name":  # the name of what is named is no question
          yield _Composition(start, hops, read=read)
      for write in _WRITES:
        if write[0] == end:
          yield _Composition(start, hops, write=write)


@dataclasses.dataclass(frozen=True, eq=False)
class _World:
  tables: shop.Tables
  last: dict[str, str]
  cities: tuple[str, ...]

  def look(self, tool: str, key: str) -> dict[str, Any]:
    """What a reading tool will answer; the generator's copy of the tools (tests compare them)."""
    t = self.tables
    if tool.startswith("find_"):
      table, column = (
        ("warehouses", "city") if tool == "find_warehouse" else (f"{tool[5:]}s", "name")
      )
      return {"id": next(i for i, row in t[table].items() if row[column] == key)}
    if tool == "last_order":
      return {"order": self.last[key]}
    table, columns = {
      "get_customer": ("customers", ("city",)),
      "get_supplier": ("suppliers", ("name", "city")),
      "get_product": ("products", ("name", "price", "supplier")),
      "get_warehouse": ("warehouses", ("city", "manager")),
      "get_stock": ("stock", ("warehouse", "count")),
      "get_order": ("orders", ("product", "count", "status")),
      "top_product": ("suppliers", ("product",)),
      "track_order": ("orders", ("shipment",)),
      "get_shipment": ("shipments", ("carrier", "day", "warehouse")),
    }[tool]
    return {c: t[table][key][c] for c in columns}


class _Draft:
  """Gold calls being collected; refuses values that were known before the call that gives them."""

  def __init__(self, world: _World):
    self.world, self.calls = world, []
    self.seen: set[str] = set()

  def read(self, tool: str, argument: str, key: str, field: str) -> Any:
    self.calls.append(ToolCall(tool, {argument: key}))
    self.seen.add(str(key))
    row = self.world.look(tool, key)
    if str(row[field]) in self.seen:
      raise Stale
    self.seen.update(map(str, row.values()))
    return row[field]


class NestedApi(Generated[_World, _Composition]):
  """The environment: 2 to 5 gold calls a task, 23 tools."""

  name = "nested_api"
  gold_calls = (2, 5)
  specs = shop.SPECS
  compositions = tuple(_compositions())
  heldout_compositions = _HELDOUT_COMPOSITIONS

  @functools.cached_property
  def _templates(self) -> collections.OrderedDict[tuple[str, int], sqlite3.Connection]:
    """Loaded databases, those used last at the end."""
    return collections.OrderedDict()

  def open(self, task: Task, sample: int) -> shop.ShopSession:
    """A private copy of the task's database; `sample` changes nothing here."""
    where = (task.metadata["split"], task.metadata["world"])
    db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    with self._lock:
      tables = self.world(*where).tables
      if where not in self._templates:
        self._templates[where] = shop.load(tables)
        if len(self._templates) > _TEMPLATES_KEPT:
          self._templates.popitem(last=False)[1].close()
      self._templates.move_to_end(where)
      self._templates[where].backup(db)
    return shop.ShopSession(task, tables, db, self._max_chars)

  def make_world(self, rng: random.Random, split: Split) -> _World:
    tables = shop.generate(rng, split)
    cities = dict.fromkeys(row["city"] for row in tables["customers"].values())
    return _World(tables, shop.last_orders(tables), tuple(cities))

  def draw(
    self, rng: random.Random, split: Split, world: _World, composition: _Composition
  ) -> Draw:
    draft = _Draft(world)
    value: Any = None  # of the change
    shown = ""  # how the query says it
    if composition.write is not None:
      value, shown = _new_value(rng, draft, composition.write[6])
    phrase, key = _walk(rng, draft, composition)
    if composition.read is not None:
      tool, field, word = composition.read
      answer = draft.read(tool, "id", key, field)
      frame = rng.choice(_READ_FRAMES[split])
      query = frame.format(f=word, x=phrase)
      return Draw(
        query, frame, draft.calls, Finish(str(answer)), {"type": "value", "answer": answer}
      )
    _, tool, argument, table, column, verb, _ = composition.write
    if world.tables[table][key][column] == value or value == key:
      raise Stale
    draft.calls.append(ToolCall(tool, {"id": key} | ({argument: value} if argument else {})))
    frame = rng.choice(_WRITE_FRAMES[split])
    query = frame.format(v=verb.format(phrase, shown))
    checker = {"type": "state", "changes": [[table, key, column, value]]}
    return Draw(query, frame, draft.calls, Finish("done"), checker)


def _new_value(rng: random.Random, draft: _Draft, source: str) -> tuple[Any, str]:
  """(value that a change sets, its words in the query); adds the calls that find it out."""
  tables = draft.world.tables
  if source == "cancelled":
    return "cancelled", ""
  if source == "number":
    value = rng.randint(10, 999)
    draft.seen.add(str(value))
    return value, str(value)
  if source == "city":
    city = rng.choice(draft.world.cities)
    draft.seen.add(city)
    return city, city
  if source == "warehouse":
    warehouse = rng.choice(list(tables["warehouses"]))
    city = tables["warehouses"][warehouse]["city"]
    return draft.read("find_warehouse", "city", city, "id"), city
  kind, field = ("product", "price") if source == "price" else ("supplier", "city")
  name = rng.choice(list(tables[f"{kind}s"].values()))["name"]
  key = draft.read(f"find_{kind}", "name", name, "id")
  return draft.read(f"get_{kind}", "id", key, field), f"the {field} of {kind} {name}"


def _walk(rng: random.Random, draft: _Draft, path: _Composition) -> tuple[str, str]:
  """(phrase, id) of the entity at the end of the hops; adds the calls."""
  tables = draft.world.tables
  finder, argument, word = STARTS[path.start]
  # Only customers with an order can be asked for their last one.
  pool = list(
    draft.world.last if len(path.kinds) > 1 and word == "customer" else tables[f"{word}s"]
  )
  key = rng.choice(pool)
  if finder:
    name = tables[f"{word}s"][key]["name"]
    phrase = f"{word} {name}"
    key = draft.read(finder, argument, name, "id")
  else:
    phrase = f"{word} {key}"
  for tool, field, _, words in path.hops:
    key = draft.read(tool, "id", key, field)
    phrase = words.format(phrase)
  return phrase, key


def from_config(config: Config, services: Any) -> NestedApi:
  """The row of base.ENVIRONMENTS."""
  del services
  return NestedApi(**generator_fields(config))
