"""The shop: seven related tables, the world generator and the tools over one SQLite connection."""

import dataclasses
import random
import sqlite3
from collections.abc import Mapping
from typing import Any

from steptool_jax.environments import names
from steptool_jax.environments.base import Split
from steptool_jax.environments.checkers import same_value
from steptool_jax.environments.generated import SerialSession
from steptool_jax.simulators.functions import NotFound, Result, Tool, tool
from steptool_jax.types import Task

Row = dict[str, Any]
Tables = dict[str, dict[str, Row]]  # table -> id -> column -> value

SCHEMA: Mapping[str, tuple[str, ...]] = {
  "customers": ("name", "city"),
  "employees": ("name", "city"),
  "suppliers": ("name", "city", "product"),
  "products": ("name", "price", "supplier"),
  "warehouses": ("city", "manager"),
  "stock": ("warehouse", "count"),  # its id is the product's
  "orders": ("customer", "product", "count", "status", "shipment"),
  "shipments": ("carrier", "day", "warehouse"),
}
_KINDS = ("lamp", "desk", "chair", "rug", "clock")
_COUNTS = {"customers": 12, "suppliers": 6, "products": 14, "warehouses": 6, "orders": 16}


def generate(rng: random.Random, split: Split) -> Tables:
  """A random world: 12 customers, 16 orders, 14 products, 6 suppliers, 6 warehouses."""

  def ids(prefix: str, table: str) -> list[str]:
    return rng.sample(names.ids(prefix, split), _COUNTS[table])

  people = names.full_names(rng, split, _COUNTS["customers"] + _COUNTS["warehouses"])
  product_words = rng.sample(names.words(split), _COUNTS["products"])
  mills = names.full_names(rng, split, _COUNTS["suppliers"], "mill")
  # No city or carrier is a part of a name: an answer can never be copied out of the query.
  taken = {word for name in (*people, *product_words, *mills) for word in name.split()}
  free = rng.sample([word for word in names.words(split) if word not in taken], 22)
  cities, carriers = free[:12], free[12:]
  customers = {
    i: {"name": name, "city": rng.choice(cities)}
    for i, name in zip(ids("c", "customers"), people, strict=False)
  }
  # The same people on the wrong list: find_employee is a distractor that answers.
  employees = {
    i: {"name": row["name"], "city": rng.choice(cities)}
    for i, row in zip(ids("e", "customers"), customers.values(), strict=True)
  }
  supplier_ids = ids("s", "suppliers")
  product_names = [f"{word} {rng.choice(_KINDS)}" for word in product_words]
  products = {
    i: {"name": name, "price": rng.randint(10, 999), "supplier": rng.choice(supplier_ids)}
    for i, name in zip(ids("p", "products"), product_names, strict=True)
  }
  product_ids = list(products)
  suppliers = {
    i: {"name": name, "city": rng.choice(cities), "product": rng.choice(product_ids)}
    for i, name in zip(supplier_ids, mills, strict=True)
  }
  # One warehouse a city, so that a city names a warehouse.
  warehouses = {
    i: {"city": city, "manager": manager}
    for i, city, manager in zip(
      ids("w", "warehouses"),
      rng.sample(cities, _COUNTS["warehouses"]),
      people[len(customers) :],
      strict=True,
    )
  }
  warehouse_ids = list(warehouses)
  stock = {
    i: {"warehouse": rng.choice(warehouse_ids), "count": rng.randint(10, 999)} for i in products
  }
  shipments = {
    i: {
      "carrier": rng.choice(carriers),
      "day": rng.randint(10, 365),
      "warehouse": rng.choice(warehouse_ids),
    }
    for i in ids("h", "orders")
  }
  customer_ids = list(customers)
  orders = {
    order: {
      "customer": rng.choice(customer_ids),
      "product": rng.choice(product_ids),
      "count": rng.randint(10, 999),
      "status": "sent" if rng.random() < 0.3 else "open",
      "shipment": shipment,
    }
    for order, shipment in zip(ids("o", "orders"), shipments, strict=True)
  }
  return {
    "customers": customers,
    "employees": employees,
    "suppliers": suppliers,
    "products": products,
    "warehouses": warehouses,
    "stock": stock,
    "orders": orders,
    "shipments": shipments,
  }


def last_orders(tables: Tables) -> dict[str, str]:
  """customer id -> id of the order that was entered last; customers without one are missing."""
  return {row["customer"]: order for order, row in tables["orders"].items()}


def load(tables: Tables) -> sqlite3.Connection:
  """A fresh in-memory database with these rows; usable from any thread, one at a time."""
  db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
  db.execute("BEGIN")  # one transaction instead of one a statement
  for table, columns in SCHEMA.items():
    # entered keeps insertion order: "the last order" needs one.
    db.execute(
      f"CREATE TABLE {table} (entered INTEGER PRIMARY KEY, id TEXT UNIQUE, {', '.join(columns)})"
    )
    marks = ", ".join("?" * (len(columns) + 1))
    db.executemany(
      f"INSERT INTO {table} (id, {', '.join(columns)}) VALUES ({marks})",
      [(i, *(row[c] for c in columns)) for i, row in tables[table].items()],
    )
  db.execute("COMMIT")
  return db


def dump(db: sqlite3.Connection) -> Tables:
  """All rows, in the form that `load` takes."""
  return {
    table: {
      row[0]: dict(zip(columns, row[1:], strict=True))
      for row in db.execute(f"SELECT id, {', '.join(columns)} FROM {table} ORDER BY entered")
    }
    for table, columns in SCHEMA.items()
  }


@dataclasses.dataclass(frozen=True)
class ShopTools:
  """The tools as methods over one connection."""

  db: sqlite3.Connection

  def _row(self, kind: str, table: str, key: str, value: str, columns: str) -> Row:
    cursor = self.db.execute(f"SELECT {columns} FROM {table} WHERE {key} = ?", (value,))
    row = cursor.fetchone()
    if row is None:
      raise NotFound(f"no {kind} {value}")
    return {d[0]: v for d, v in zip(cursor.description, row, strict=True)}

  def _set(self, kind: str, table: str, row: str, column: str, value: Any) -> Result:
    self._row(kind, table, "id", row, "id")
    cursor = self.db.execute(
      f"UPDATE {table} SET {column} = ? WHERE id = ? AND {column} IS NOT ?", (value, row, value)
    )
    # Without a change there is no value at all: such a call earns nothing (rewards/rules.py).
    if not cursor.rowcount:
      return Result({"changed": []})
    return Result({"id": row, column: value}, changed=True)

  def find_customer(self, name: str) -> Row:
    """Id of a customer."""
    return self._row("customer", "customers", "name", name.lower(), "id")

  def find_employee(self, name: str) -> Row:
    """Id of a person on the staff list."""
    return self._row("employee", "employees", "name", name.lower(), "id")

  def find_supplier(self, name: str) -> Row:
    """Id of a supplier."""
    return self._row("supplier", "suppliers", "name", name.lower(), "id")

  def find_product(self, name: str) -> Row:
    """Id of a product."""
    return self._row("product", "products", "name", name.lower(), "id")

  def find_warehouse(self, city: str) -> Row:
    """Id of the warehouse in a city."""
    return self._row("warehouse", "warehouses", "city", city.lower(), "id")

  def get_customer(self, id: str) -> Row:
    """City of a customer."""
    return self._row("customer", "customers", "id", id, "city")

  def get_supplier(self, id: str) -> Row:
    """Name and city of a supplier."""
    return self._row("supplier", "suppliers", "id", id, "name, city")

  def get_product(self, id: str) -> Row:
    """Name, price and supplier of a product."""
    return self._row("product", "products", "id", id, "name, price, supplier")

  def get_warehouse(self, id: str) -> Row:
    """City and manager of a warehouse."""
    return self._row("warehouse", "warehouses", "id", id, "city, manager")

  def get_stock(self, id: str) -> Row:
    """Warehouse and count in stock of a product."""
    return self._row("product", "stock", "id", id, "warehouse, count")

  def get_order(self, id: str) -> Row:
    """Product, count and status of an order."""
    return self._row("order", "orders", "id", id, "product, count, status")

  def last_order(self, id: str) -> Row:
    """The last order of a customer."""
    self._row("customer", "customers", "id", id, "id")
    row = self.db.execute(
      "SELECT id FROM orders WHERE customer = ? ORDER BY entered DESC LIMIT 1", (id,)
    ).fetchone()
    if row is None:
      raise NotFound(f"{id} has no order")
    return {"order": row[0]}

  def top_product(self, id: str) -> Row:
    """The top product of a supplier."""
    return self._row("supplier", "suppliers", "id", id, "product")

  def track_order(self, id: str) -> Row:
    """The shipment of an order."""
    return self._row("order", "orders", "id", id, "shipment")

  def get_shipment(self, id: str) -> Row:
    """Carrier, day and warehouse of a shipment."""
    return self._row("shipment", "shipments", "id", id, "carrier, day, warehouse")

  def cancel_order(self, id: str) -> Result:
    """Cancel an order."""
    return self._set("order", "orders", id, "status", "cancelled")

  def set_city(self, id: str, city: str) -> Result:
    """Change the city of a customer."""
    return self._set("customer", "customers", id, "city", city.lower())

  def set_price(self, id: str, price: int) -> Result:
    """Change the price of a product."""
    return self._set("product", "products", id, "price", price)

  def set_stock(self, id: str, count: int) -> Result:
    """Change the count in stock of a product."""
    return self._set("product", "stock", id, "count", count)

  def move_shipment(self, id: str, warehouse: str) -> Result:
    """Move a shipment to a warehouse."""
    self._row("warehouse", "warehouses", "id", warehouse, "id")
    return self._set("shipment", "shipments", id, "warehouse", warehouse)

  def get_weather(self, city: str) -> Row:
    """Weather of a city."""
    return {"weather": ("rain", "sun", "snow")[len(city) % 3]}

  def search_help(self, text: str) -> Row:
    """Search the help pages."""
    return {"pages": []}

  def list_products(self) -> Row:
    """Ids of some products."""
    rows = self.db.execute("SELECT id FROM products ORDER BY entered LIMIT 6")
    return {"products": [row[0] for row in rows]}


_NAMES = tuple(name for name in vars(ShopTools) if not name.startswith("_") and name != "db")
SPECS = {name: tool(getattr(ShopTools(None), name)).spec for name in _NAMES}


def tools(db: sqlite3.Connection) -> list[Tool]:
  """All tools over this connection; the specs are shared, so opening a session stays cheap."""
  owner = ShopTools(db)
  return [Tool(spec, getattr(owner, name)) for name, spec in SPECS.items()]


class ShopSession(SerialSession):
  """A private database. Answers are checked by value or by the whole database state."""

  def __init__(self, task: Task, tables: Tables, db: sqlite3.Connection, max_chars: int):
    super().__init__(task, tools(db), max_chars)
    self._tables, self._db = tables, db

  def look(self, tool: str, key: str) -> Row:
    """What a reading tool of one argument answers now, offered or not; raises NotFound."""
    with self._lock:
      return getattr(ShopTools(self._db), tool)(key)

  def keys(self, table: str) -> list[str]:
    """All ids of a table, in the order of their entry."""
    with self._lock:
      return [row[0] for row in self._db.execute(f"SELECT id FROM {table} ORDER BY entered")]

  def grade(self, answer: str | None) -> float:
    """1 or 0. A question must leave the database as it was; a change must do that and no more."""
    if answer is None:
      return 0.0
    checker = self._task.checker
    expected = self._tables
    if checker["type"] == "value":
      if not same_value(answer, checker["answer"]):
        return 0.0
    else:
      expected = {table: dict(rows) for table, rows in self._tables.items()}
      for table, row, column, value in checker["changes"]:
        expected[table][row] = {**expected[table][row], column: value}
    with self._lock:
      return float(dump(self._db) == expected)

  def close(self) -> None:
    with self._lock:
      self._db.close()
