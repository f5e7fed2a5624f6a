import random
import re
import threading
import time

import pytest

from steptool_jax.environments import shop
from steptool_jax.environments.base import Environment, Session
from steptool_jax.environments.nested_api import NestedApi
from steptool_jax.simulators.functions import ToolRunner
from steptool_jax.types import Code, Finish, ToolCall

ENV = NestedApi(num_train=600, num_heldout=300, seed=1)
SPLITS = ("train", "heldout")


def run(task, calls, env=ENV):
  session = env.open(task, 0)
  return session, [session.call(call) for call in calls]


def gold(task):
  return task.demonstration[:-1]


@pytest.mark.parametrize("split", SPLITS)
def test_demonstration_solves_every_task(split):
  tasks = ENV.tasks(split)
  assert len(tasks) == {"train": 600, "heldout": 300}[split]
  for task in tasks:
    session, observations = run(task, gold(task))
    assert [o.code for o in observations] == [Code.OK] * len(observations), task
    assert session.grade(task.demonstration[-1].answer) == 1.0, task
    assert all(len(o.text) < 60 for o in observations)
    session.close()


@pytest.mark.parametrize("split", SPLITS)
def test_every_call_is_needed_and_feeds_the_next(split):
  """Arguments come from the query or an earlier result, and dropping a call breaks the chain."""
  for task in ENV.tasks(split):
    calls = gold(task)
    assert 2 <= len(calls) <= 5
    assert len(calls) == task.metadata["depth"]
    session, observations = run(task, calls)
    session.close()
    known = task.query
    for call, observation in zip(calls, observations, strict=True):
      for value in call.arguments.values():
        assert re.search(rf"\b{re.escape(str(value))}\b", known), (task, call)
      known += " " + observation.text
    # The last call needs something that only a call before it tells.
    assert any(
      not re.search(rf"\b{re.escape(str(v))}\b", task.query) for v in calls[-1].arguments.values()
    )
    if task.checker["type"] == "value":
      assert not re.search(rf"\b{re.escape(str(task.checker['answer']))}\b", task.query)


def test_both_kinds_of_tasks_and_all_depths():
  for split in SPLITS:
    tasks = ENV.tasks(split)
    assert {t.metadata["depth"] for t in tasks} == {2, 3, 4, 5}
    share = sum(t.checker["type"] == "state" for t in tasks) / len(tasks)
    assert 0.15 < share < 0.5


def entities(tables):
  """All names and ids of a world."""
  names = {
    row[column]
    for table, column in [
      ("customers", "name"),
      ("suppliers", "name"),
      ("products", "name"),
      ("warehouses", "city"),
      ("warehouses", "manager"),
      ("customers", "city"),
      ("shipments", "carrier"),
    ]
    for row in tables[table].values()
  }
  return names | {i for rows in tables.values() for i in rows}


def test_splits_are_disjoint_in_templates_and_entities():
  train, heldout = (ENV.tasks(split) for split in SPLITS)
  templates = [{t.metadata["template"] for t in tasks} for tasks in (train, heldout)]
  assert not templates[0] & templates[1]
  frames = [{t.split(" | ")[1] for t in found} for found in templates]
  assert not frames[0] & frames[1]
  compositions = [{t.metadata["composition"] for t in tasks} for tasks in (train, heldout)]
  assert len(compositions[1] - compositions[0]) == 4
  worlds = [
    [ENV.world(split, w).tables for w in {t.metadata["world"] for t in tasks}]
    for split, tasks in zip(SPLITS, (train, heldout), strict=True)
  ]
  found = [set().union(*map(entities, tables)) for tables in worlds]
  assert min(map(len, found)) > 200
  assert not found[0] & found[1]
  assert not {t.id for t in train} & {t.id for t in heldout}


def test_heldout_wordings_use_words_of_train():
  def words(tasks):
    return {w for t in tasks for f in [t.metadata["template"].split(" | ")[1]] for w in f.split()}

  def clean(found):
    return {w.strip(".,:?") for w in found}

  train, heldout = (clean(words(ENV.tasks(s))) for s in SPLITS)
  assert not heldout - train
  assert max(len(t.query.split()) for s in SPLITS for t in ENV.tasks(s)) < 25
  assert all(len(call.arguments) <= 2 for s in SPLITS for t in ENV.tasks(s) for call in gold(t))


def test_tasks_depend_on_the_arguments_only():
  again = NestedApi(num_train=600, num_heldout=300, seed=1)
  assert again.tasks("heldout") == ENV.tasks("heldout")  # before train, in another order
  assert again.tasks("train") == ENV.tasks("train")
  assert NestedApi(10, 0, seed=2).tasks("train") != NestedApi(10, 0, seed=1).tasks("train")
  queries = [(t.metadata["world"], t.query) for t in ENV.tasks("train")]
  assert len(set(queries)) == len(queries)


def test_generation_is_fast():
  started = time.process_time()
  assert len(NestedApi(5000, 0).tasks("train")) == 5000
  assert time.process_time() - started < 2


def test_at_least_twelve_tools_and_distractors():
  task = ENV.tasks("train")[0]
  names = {spec.name for spec in task.tools}
  used = {call.name for t in ENV.tasks("train") for call in gold(t)}
  assert len(used) >= 12
  assert len(names - used) >= 3  # plausible, never needed
  assert all(spec.description for spec in task.tools)


def pass_rate(agent, tasks):
  solved = 0.0
  for task in tasks:
    session = ENV.open(task, 0)
    solved += session.grade(agent(task, session))
    session.close()
  return solved / len(tasks)


def test_agents_without_skill_fail():
  tasks = ENV.tasks("heldout")
  answers = [str(t.checker["answer"]) for t in tasks if t.checker["type"] == "value"]
  rng = random.Random(0)
  common = max(set(answers), key=answers.count)
  soup = " ".join(answers)
  assert pass_rate(lambda t, s: rng.choice(answers), tasks) < 0.02
  assert pass_rate(lambda t, s: common, tasks) < 0.02
  assert pass_rate(lambda t, s: soup, tasks) == 0
  assert pass_rate(lambda t, s: "done", tasks) == 0
  assert pass_rate(lambda t, s: None, tasks) == 0

  def noisy(task, session):
    """The right answer inside other words."""
    for call in gold(task):
      session.call(call)
    return f"answer: {task.checker.get('answer', '')}"

  questions = [t for t in tasks if t.checker["type"] == "value"]
  assert pass_rate(noisy, questions) == 0

  def first_word(task, session):
    """Copies from the query."""
    return rng.choice(task.query.strip(".?").split())

  assert pass_rate(first_word, tasks) == 0


def test_a_question_with_a_side_effect_fails():
  task = next(t for t in ENV.tasks("train") if t.checker["type"] == "value")
  tables = ENV.world("train", task.metadata["world"]).tables
  order = next(iter(tables["orders"]))
  session, _ = run(task, [*gold(task), ToolCall("cancel_order", {"id": order})])
  assert session.grade(str(task.checker["answer"])) == 0


def test_a_change_must_be_right_whole_and_alone():
  tasks = [t for t in ENV.tasks("train") if t.metadata["composition"] == "product!set_price:number"]
  task = tasks[0]
  find, write = gold(task)
  price = write.arguments["price"]
  session, _ = run(task, [find, ToolCall("set_price", {**write.arguments, "price": price + 1})])
  assert session.grade("done") == 0  # wrong value
  assert session.call(write).changed
  assert session.grade("done") == 1  # repaired
  assert session.grade(None) == 0  # did not finish
  again = session.call(write)
  assert (again.code, again.changed, again.text) == (Code.OK, False, '{"changed":[]}')
  tables = ENV.world("train", task.metadata["world"]).tables
  other = next(p for p in tables["products"] if p != write.arguments["id"])
  session.call(ToolCall("set_stock", {"id": other, "count": 5}))
  assert session.grade("done") == 0  # one more change


def test_sessions_are_private_and_the_world_stays_as_it_was():
  task = next(t for t in ENV.tasks("train") if t.checker["type"] == "state")
  first, _ = run(task, gold(task))
  second = ENV.open(task, 1)
  assert first.grade("done") == 1
  assert second.grade("done") == 0
  first.close()
  first.close()
  assert ENV.open(task, 2).grade("done") == 0


def test_bad_calls_are_observations():
  task = ENV.tasks("train")[0]
  session, observations = run(
    task,
    [
      ToolCall("get_customer", {"id": "c0"}),
      ToolCall("get_order", {"id": "c41"}),
      ToolCall("get_customer", {}),
      ToolCall("get_customer", {"id": 4}),
      ToolCall("drop_table", {"id": "c1"}),
      ToolCall("get_customer", {"id": "x' OR '1'='1"}),
      ToolCall("set_price", {"id": "p0", "price": 4}),
      ToolCall("set_stock", {"id": next(iter(shop.SPECS)), "count": 10**30}),
    ],
  )
  assert [o.code for o in observations] == [
    Code.NOT_FOUND,
    Code.NOT_FOUND,
    Code.BAD_ARGUMENTS,
    Code.BAD_ARGUMENTS,
    Code.UNKNOWN_TOOL,
    Code.NOT_FOUND,
    Code.NOT_FOUND,
    Code.NOT_FOUND,
  ]
  assert observations[0].text == "error: no customer c0"
  overflow = session.call(ToolCall("set_stock", {"id": _any(task, "products"), "count": 10**30}))
  assert overflow.code == Code.TOOL_ERROR


def _any(task, table):
  return next(iter(ENV.world("train", task.metadata["world"]).tables[table]))


def test_tools_per_task_offers_the_needed_ones_and_refuses_the_rest():
  env = NestedApi(60, 0, seed=1, tools_per_task=6)
  offered = set()
  for task in env.tasks("train"):
    names = [spec.name for spec in task.tools]
    assert len(names) == 6
    assert {call.name for call in gold(task)} <= set(names)
    offered.add(tuple(names))
    session, _ = run(task, gold(task), env)
    assert session.grade(task.demonstration[-1].answer) == 1
  assert len(offered) > 20
  missing = next(name for name in shop.SPECS if name not in names)
  assert session.call(ToolCall(missing, {})).code == Code.UNKNOWN_TOOL
  short = NestedApi(20, 0, depths=(2, 2), tools_per_task=2).tasks("train")
  assert {len(task.tools) for task in short} == {2}  # as many as the deepest of these needs


def test_sessions_work_from_other_threads():
  tasks = ENV.tasks("train")[:40]
  with ToolRunner(workers=4) as runner:
    sessions = [ENV.open(task, 0) for task in tasks]
    for k in range(5):
      futures = [
        runner.submit(session, task.demonstration[k])
        for session, task in zip(sessions, tasks, strict=True)
        if not isinstance(task.demonstration[min(k, len(task.demonstration) - 1)], Finish)
        and k < len(task.demonstration)
      ]
      assert all(f.result(10).code == Code.OK for f in futures)
  answers = [t.demonstration[-1].answer for t in tasks]
  assert [s.grade(a) for s, a in zip(sessions, answers, strict=True)] == [1.0] * 40


def test_one_session_from_many_threads():
  task = ENV.tasks("train")[0]
  session = ENV.open(task, 0)
  calls = [ToolCall("set_stock", {"id": _any(task, "products"), "count": n}) for n in range(50)]
  codes = []
  threads = [threading.Thread(target=lambda c=c: codes.append(session.call(c).code)) for c in calls]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert codes == [Code.OK] * 50


@pytest.mark.parametrize(
  ("bad", "match"),
  [
    ({"depths": (6, 9)}, "depths is 6 to 9: tasks have 2 to 5"),
    ({"depths": (4, 3)}, "depths"),
    ({"num_train": -1}, "num_train"),
    ({"tools_per_task": 3}, "tools_per_task: 3, but tasks of up to 5 calls take 5 to 23 tools"),
    ({"tools_per_task": 1, "depths": (2, 2)}, "tasks of up to 2 calls take 2 to 23 tools"),
  ],
)
def test_arguments_are_checked(bad, match):
  with pytest.raises(ValueError, match=match):
    NestedApi(**bad)
  with pytest.raises(ValueError, match="'dev' does not exist"):
    ENV.tasks("dev")


def test_depths_are_respected():
  for depths, found in [((3, 3), {3}), ((1, 2), {2}), ((5, 9), {5})]:
    env = NestedApi(50, 20, depths=depths)
    assert {len(gold(t)) for s in SPLITS for t in env.tasks(s)} == found


def test_protocols():
  assert isinstance(ENV, Environment)
  assert isinstance(ENV.open(ENV.tasks("train")[0], 0), Session)
