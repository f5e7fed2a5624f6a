import pytest

from steptool_jax.environments import tables
from steptool_jax.environments.base import Environment, Session
from steptool_jax.environments.data_pipeline import DataPipeline
from steptool_jax.environments.tables import Table
from steptool_jax.types import Code, ToolCall

ENV = DataPipeline(num_train=400, num_heldout=300, seed=1)
SPLITS = ("train", "heldout")


def gold(task):
  return task.demonstration[:-1]


def run(task, calls):
  session = ENV.open(task, 0)
  return session, [session.call(call) for call in calls]


@pytest.mark.parametrize("split", SPLITS)
def test_demonstration_solves_every_task_and_its_handles_are_right(split):
  for task in ENV.tasks(split):
    session, observations = run(task, gold(task))
    assert all(o.code == Code.OK for o in observations), task
    assert [o.value.get("table", "") for o in observations] == list(task.metadata["handles"])
    assert session.grade("done") == 1.0, task
    assert session.grade(None) == 0.0
    assert 3 <= len(observations) <= 6
    assert all(len(o.text) < 60 for o in observations)


def oracle(task):
  """The expected rows once more, in another way: plain loops over the parsed query."""
  world = ENV.world(task.metadata["split"], task.metadata["world"])

  def rows_of(file):
    header, *lines = world.files[file].strip().split("\n")
    cells = [line.split(",") for line in lines]
    return [dict(zip(header.split(","), row, strict=True)) for row in cells]

  files, *plan = task.metadata["composition"].split(">")
  files = files.split("+")
  rows = rows_of(files[0])
  if len(files) == 2:
    right = rows_of(files[1])
    shared = set(rows[0]) & set(right[0])
    rows = [{**a, **b} for a in rows for b in right if all(a[c] == b[c] for c in shared)]
  by_name = {call.name: call.arguments for call in gold(task)}
  for operation in plan:
    if operation == "filter":
      name, op, value = by_name["filter_rows"]["where"].split(" ")
      keep = {
        "<": lambda c, v: float(c) < float(v),
        ">": lambda c, v: float(c) > float(v),
        "=": lambda c, v: c == v,
        "!=": lambda c, v: c != v,
      }[op]
      rows = [r for r in rows if keep(r[name], value)]
    elif operation == "aggregate":
      kind, name, _, by = by_name["aggregate"]["what"].split(" ")
      out = []
      for group in dict.fromkeys(r[by] for r in rows):
        cells = [float(r[name]) for r in rows if r[by] == group]
        value = {
          "sum": sum(cells),
          "mean": sum(cells) / len(cells),
          "max": sorted(cells)[-1],
          "count": len(cells),
        }[kind]
        out.append({by: group, kind: value})
      rows = out
    else:
      name, direction = by_name["sort"]["by"].split(" ")
      rows.sort(key=lambda r: float(r[name]), reverse=direction == "desc")
  return rows


def test_expected_tables_agree_with_an_oracle():
  for split in SPLITS:
    for task in ENV.tasks(split):
      checker = task.checker
      wanted = [
        tuple(
          pytest.approx(float(row[c])) if not isinstance(cell, str) else row[c]
          for c, cell in zip(checker["columns"], checker["rows"][0], strict=True)
        )
        for row in oracle(task)
      ]
      got = [tuple(row) for row in checker["rows"]]
      assert got == wanted, task


def test_splits_are_disjoint_in_templates_and_entities():
  tasks = {split: ENV.tasks(split) for split in SPLITS}
  frames = {s: {t.metadata["template"].split(" | ")[1] for t in tasks[s]} for s in SPLITS}
  assert not frames["train"] & frames["heldout"]
  compositions = {s: {t.metadata["composition"] for t in tasks[s]} for s in SPLITS}
  kept_out = {"sales+stores>aggregate>sort", "staff>filter>aggregate", "sales+items>filter>sort"}
  assert kept_out <= compositions["heldout"] - compositions["train"]

  def entities(split):
    out = set()
    for task in tasks[split]:
      world = ENV.world(split, task.metadata["world"])
      out |= set(world.names)
      for text in world.files.values():
        out |= {
          cell
          for line in text.strip().split("\n")[1:]
          for cell in line.split(",")
          if not cell.isdigit()
        }
    return out - {"lamp", "desk", "chair", "rug", "clock"}  # kinds of goods, shared

  assert not entities("train") & entities("heldout")
  words = {s: {w.strip(".,:?") for f in frames[s] for w in f.split()} for s in SPLITS}
  assert not words["heldout"] - words["train"]
  assert max(len(t.query.split()) for s in SPLITS for t in tasks[s]) < 25


def test_every_step_is_needed():
  """Leaving out any operation between loading and writing gives a wrong table."""
  for task in ENV.tasks("train")[:200]:
    calls = gold(task)
    for k, call in enumerate(calls[:-1]):
      if call.name in ("load_csv", "join"):
        continue
      # Handles after the hole move up by one.
      shorter = [c for i, c in enumerate(calls) if i != k]
      moved = [
        ToolCall(
          c.name,
          {n: _up(v, k) if n in ("table", "left", "right") else v for n, v in c.arguments.items()},
        )
        for c in shorter
      ]
      session, _ = run(task, moved)
      assert session.grade("done") == 0, (task, call)


def _up(handle, hole):
  number = int(handle[1:])
  return f"t{number - 1}" if number > hole else handle


def test_row_order_counts_only_where_sorting_was_asked():
  for ordered in (True, False):
    task = next(
      t for t in ENV.tasks("train") if t.checker["ordered"] is ordered and t.metadata["depth"] == 4
    )
    session = ENV.open(task, 0)
    rows = tuple(tuple(row) for row in reversed(task.checker["rows"]))
    handle = session.keep(Table(tuple(task.checker["columns"]), rows))["table"]
    session.call(ToolCall("write_table", {"table": handle, "name": task.checker["name"]}))
    assert session.grade("done") == (0.0 if ordered else 1.0)


def test_agents_without_skill_fail():
  for task in ENV.tasks("heldout"):
    session = ENV.open(task, 0)
    assert session.grade("done") == 0
    name = task.checker["name"]
    for file in ("sales", "staff", "items", "stores"):
      loaded = session.call(ToolCall("load_csv", {"file": file}))
      session.call(ToolCall("write_table", {"table": loaded.value["table"], "name": name}))
      assert session.grade("done") == 0
    other, _ = run(task, [*gold(task)[:-1]])
    last = gold(task)[-1].arguments["table"]
    other.call(ToolCall("write_table", {"table": last, "name": f"{name}x"}))
    assert other.grade("done") == 0  # the right table under a wrong name


def test_writing_the_same_again_is_no_change():
  task = ENV.tasks("train")[0]
  session, observations = run(task, gold(task))
  assert observations[-1].changed
  again = session.call(gold(task)[-1])
  assert (again.code, again.changed, again.value) == (Code.OK, False, {"changed": []})


@pytest.mark.parametrize(
  ("call", "code", "text"),
  [
    (ToolCall("load_csv", {"file": "x"}), Code.NOT_FOUND, "no file x"),
    (ToolCall("sort", {"table": "t9", "by": "pay asc"}), Code.NOT_FOUND, "no table t9"),
    (ToolCall("sort", {"table": "t1", "by": "pay up"}), Code.TOOL_ERROR, "asc"),
    (ToolCall("sort", {"table": "t1", "by": "nope asc"}), Code.NOT_FOUND, "no column nope"),
    (ToolCall("filter_rows", {"table": "t1", "where": "pay ~ 3"}), Code.TOOL_ERROR, "where"),
    (ToolCall("filter_rows", {"table": "t1", "where": "pay > x"}), Code.TOOL_ERROR, "numbers"),
    (ToolCall("filter_rows", {"table": "t1", "where": "pay > nan"}), Code.TOOL_ERROR, "numbers"),
    (ToolCall("aggregate", {"table": "t1", "what": "sum city by person"}), Code.TOOL_ERROR, "text"),
    (ToolCall("aggregate", {"table": "t1", "what": "sum pay"}), Code.TOOL_ERROR, "what"),
    (
      ToolCall("filter_rows", {"table": "t1", "where": "__import__('os') > 1"}),
      Code.TOOL_ERROR,
      "where",
    ),
  ],
)
def test_bad_calls_are_observations(call, code, text):
  session = ENV.open(ENV.tasks("train")[0], 0)
  session.call(ToolCall("load_csv", {"file": "staff"}))
  observation = session.call(call)
  assert observation.code == code
  assert text in observation.text


def test_table_functions_on_literals():
  left = tables.read_csv('city,n\nx,1\ny,2\n"x",3\n')
  assert left == Table(("city", "n"), (("x", 1), ("y", 2), ("x", 3)))
  right = tables.read_csv("city,area\nx,n\nx,s\nz,w\n")
  assert tables.join_tables(left, right).rows == (
    *(("x", 1, "n"), ("x", 1, "s")),
    *(("x", 3, "n"), ("x", 3, "s")),
  )
  assert tables.aggregate_table(left, "mean n by city").rows == (("x", 2.0), ("y", 2.0))
  assert tables.sort_table(left, "n desc").rows == (("x", 3), ("y", 2), ("x", 1))
  assert tables.filter_table(left, "city != x").rows == (("y", 2),)
  assert tables.filter_table(left, "n >= 2").rows == (("y", 2), ("x", 3))
  # A column of mixed cells is text, so comparing never fails; Python's own 1_0 is no number.
  assert tables.read_csv("a\n1\n1_0\n").rows == (("1",), ("1_0",))


@pytest.mark.parametrize(("text", "match"), [("", "header"), ("a,b\n1\n", "line 2: 1 cells")])
def test_broken_csv(text, match):
  with pytest.raises(ValueError, match=match):
    tables.read_csv(text)


def test_joins_cannot_explode():
  table = Table(("k",), tuple(("x",) for _ in range(50)))
  squared = tables.join_tables(table, table)
  assert len(squared.rows) == 2500
  with pytest.raises(ValueError, match="more than 10000 rows"):
    tables.join_tables(squared, table)


def test_tasks_depend_on_the_arguments_only_and_arguments_are_checked():
  again = DataPipeline(num_train=400, num_heldout=300, seed=1)
  assert again.tasks("heldout") == ENV.tasks("heldout")
  assert again.tasks("train") == ENV.tasks("train")
  for bad in ({"depths": (1, 2)}, {"depths": (5, 4)}, {"tools_per_task": 5}, {"num_heldout": -1}):
    with pytest.raises(ValueError, match=next(iter(bad))):
      DataPipeline(**bad)
  assert {len(gold(t)) for t in DataPipeline(40, 0, depths=(6, 9)).tasks("train")} == {6}


def test_tools_per_task_offers_the_needed_ones_and_refuses_the_rest():
  env = DataPipeline(60, 0, seed=1, tools_per_task=6)
  for task in env.tasks("train"):
    names = {spec.name for spec in task.tools}
    assert len(names) == 6
    assert {call.name for call in gold(task)} <= names
  missing = next(name for name in tables.SPECS if name not in names)
  assert env.open(task, 0).call(ToolCall(missing, {})).code == Code.UNKNOWN_TOOL


def test_protocols():
  assert isinstance(ENV, Environment)
  assert isinstance(ENV.open(ENV.tasks("train")[0], 0), Session)
