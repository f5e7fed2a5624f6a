import dataclasses
import random

import numpy as np
import pytest
from rewards.replays import replay, step, trajectory

from steptool_jax.environments.custom import Custom
from steptool_jax.environments.data_pipeline import DataPipeline
from steptool_jax.environments.mistakes import imperfect
from steptool_jax.environments.nested_api import NestedApi
from steptool_jax.rewards.rules import annotate, needed
from steptool_jax.simulators.functions import Toolbox, tool
from steptool_jax.types import (
  Code,
  Finish,
  Malformed,
  Observation,
  Status,
  Task,
  ToolCall,
  ToolSpec,
)

SHOP = NestedApi(300, 100, seed=2)
PIPELINE = DataPipeline(300, 100, seed=2)


def pick(env, composition):
  return next(t for t in env.tasks("train") if t.metadata["composition"] == composition)


def annotated(env, task, actions, **rest):
  """[(SC, Con)] of the steps, and IsSolved."""
  result = annotate(task, replay(env, task, actions, **rest))
  return [(s.success_calling, s.contribution) for s in result.steps], result.solved


def spliced(task, at, *extra):
  return [*task.demonstration[:at], *extra, *task.demonstration[at:]]


LAST = (0, 0)
FULL = (1, 1)


@pytest.mark.parametrize("env", [SHOP, PIPELINE], ids=lambda e: e.name)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_demonstrations_earn_everything(env, split):
  for task in env.tasks(split):
    marks, solved = annotated(env, task, task.demonstration)
    assert marks == [FULL] * (len(task.demonstration) - 1) + [LAST], task
    assert solved == 1


CHAIN = pick(SHOP, "customer>order>product.price")  # find, last_order, get_order, get_product


def test_repeat_earns_nothing_and_costs_the_original_nothing():
  calls = CHAIN.demonstration
  marks, solved = annotated(SHOP, CHAIN, spliced(CHAIN, 1, calls[0]))
  assert (marks, solved) == ([FULL, (0, 0), FULL, FULL, FULL, LAST], 1)
  # The same in other letters and another order of things is still a repeat.
  shouted = ToolCall("find_customer", {"name": calls[0].arguments["name"].upper()})
  marks, _ = annotated(SHOP, CHAIN, spliced(CHAIN, 3, shouted))
  assert marks == [FULL, FULL, FULL, (0, 0), FULL, LAST]


def test_useless_call_earns_its_success_only():
  for extra in [
    ToolCall("get_weather", {"city": "x"}),
    ToolCall("find_employee", CHAIN.demonstration[0].arguments),
    ToolCall("list_products", {}),
  ]:
    marks, _ = annotated(SHOP, CHAIN, spliced(CHAIN, 1, extra))
    assert marks == [FULL, (1, 0), FULL, FULL, FULL, LAST], extra


def test_a_list_of_ids_does_not_rob_the_call_that_singles_one_out():
  task = next(
    t
    for t in SHOP.tasks("train")
    if t.metadata["composition"] == "customer>order>product.price"
    and t.demonstration[3].arguments["id"]
    in list(SHOP.world("train", t.metadata["world"]).tables["products"])[:6]
  )
  listed = ToolCall("list_products", {})
  marks, _ = annotated(SHOP, task, [listed, *task.demonstration])
  assert marks == [(1, 0), FULL, FULL, FULL, FULL, LAST]


def test_a_search_without_a_hit_was_executed_and_helps_nothing():
  search = ToolCall("search_help", {"text": "x"})
  marks, _ = annotated(SHOP, CHAIN, spliced(CHAIN, 1, search, search))
  assert marks[1:3] == [(1, 0), (0, 0)]


def test_failed_calls_earn_nothing():
  extra = [
    ToolCall("get_order", {"id": "o0"}),
    ToolCall("get_order", {}),
    ToolCall("nothing", {}),
    Malformed("no action"),
  ]
  marks, solved = annotated(SHOP, CHAIN, spliced(CHAIN, 2, *extra))
  assert marks == [FULL, FULL, *[(0, 0)] * 4, FULL, FULL, LAST]
  assert solved == 1


def test_wrong_answer_takes_the_credit_of_the_last_call_only():
  actions = [*CHAIN.demonstration[:-1], Finish("7")]
  marks, solved = annotated(SHOP, CHAIN, actions)
  assert (marks, solved) == ([FULL, FULL, FULL, (1, 0), LAST], 0)


def test_premature_answer():
  actions = [*CHAIN.demonstration[:2], Finish("7")]
  assert annotated(SHOP, CHAIN, actions)[0] == [FULL, (1, 0), LAST]


def test_truncated_trajectory_has_no_last_step():
  marks, solved = annotated(SHOP, CHAIN, CHAIN.demonstration[:3], status=Status.STEP_BUDGET)
  assert (marks, solved) == ([FULL, FULL, (1, 0)], 0)


def test_another_way_to_the_goal_counts_by_provenance():
  task = pick(SHOP, "order>product.stock")  # get_order, get_stock
  order, stock = task.demonstration[:2]
  # A customer is asked for first, needlessly; then the same order by way of get_order.
  name = next(iter(SHOP.world("train", task.metadata["world"]).tables["customers"].values()))
  extra = [ToolCall("find_customer", {"name": name["name"]})]
  marks, _ = annotated(SHOP, task, [*extra, order, stock, task.demonstration[-1]])
  assert marks == [(1, 0), FULL, FULL, LAST]
  # Without a demonstration the answer alone tells what was used.
  bare = dataclasses.replace(task, demonstration=())
  marks, _ = annotated(SHOP, bare, [*extra, order, stock, task.demonstration[-1]])
  assert marks == [(1, 0), FULL, FULL, LAST]
  wrong, _ = annotated(SHOP, bare, [*extra, order, stock, Finish("x")])
  assert wrong == [(1, 0)] * 3 + [LAST]


WRITE = pick(SHOP, "product!set_price:number")


def test_changes_count_once_and_only_the_required_one():
  find, write, done = WRITE.demonstration
  wrong = ToolCall("set_price", {**write.arguments, "price": write.arguments["price"] + 1})
  marks, solved = annotated(SHOP, WRITE, [find, wrong, write, done])
  assert (marks, solved) == ([FULL, (1, 0), FULL, LAST], 1)
  marks, solved = annotated(SHOP, WRITE, [find, write, write, done])
  assert (marks, solved) == ([FULL, FULL, (0, 0), LAST], 1)
  # Writing what is there already changes nothing, even when it is no repeat.
  again = [find, write, ToolCall("get_product", {"id": write.arguments["id"]}), write, done]
  assert annotated(SHOP, WRITE, again)[0] == [FULL, FULL, (1, 0), (0, 0), LAST]
  old = SHOP.world("train", WRITE.metadata["world"]).tables["products"][write.arguments["id"]]
  noop = ToolCall("set_price", {**write.arguments, "price": old["price"]})
  assert annotated(SHOP, WRITE, [find, noop, write, done])[0] == [FULL, (1, 0), FULL, LAST]


def test_reading_again_after_a_change_is_no_repeat():
  find, write, done = WRITE.demonstration
  look = ToolCall("get_product", {"id": write.arguments["id"]})
  marks, _ = annotated(SHOP, WRITE, [find, look, write, look, look, done])
  assert [m[0] for m in marks] == [1, 1, 1, 1, 0, 0]


def test_free_text_of_a_finish_after_a_change_earns_nothing_for_what_it_names():
  find, write, _ = WRITE.demonstration
  weather = ToolCall("get_weather", {"city": "x"})
  marks, solved = annotated(SHOP, WRITE, [weather, find, write, Finish("sun, done")])
  assert (marks[0], solved) == ((1, 0), 1)


JOINED = pick(PIPELINE, "sales+stores>filter>aggregate")


def test_handles_are_the_provenance():
  load, right, _, where, what, write, done = JOINED.demonstration
  moved = {
    "join": ToolCall("join", {"left": "t2", "right": "t3"}),
    "where": ToolCall("filter_rows", {**where.arguments, "table": "t4"}),
    "what": ToolCall("aggregate", {**what.arguments, "table": "t5"}),
    "write": ToolCall("write_table", {**write.arguments, "table": "t6"}),
  }
  useless = ToolCall("load_csv", {"file": "items"})
  actions = [useless, load, right, *moved.values(), done]
  marks, solved = annotated(PIPELINE, JOINED, actions)
  assert (marks, solved) == ([(1, 0), *[FULL] * 6, LAST], 1)


def test_loading_twice_is_a_repeat_but_using_either_is_right():
  load, right, *_, done = JOINED.demonstration
  where, what, write = JOINED.demonstration[3:6]
  actions = [
    load,
    load,
    right,
    ToolCall("join", {"left": "t1", "right": "t3"}),
    ToolCall("filter_rows", {**where.arguments, "table": "t4"}),
    ToolCall("aggregate", {**what.arguments, "table": "t5"}),
    ToolCall("write_table", {**write.arguments, "table": "t6"}),
    done,
  ]
  marks, solved = annotated(PIPELINE, JOINED, actions)
  assert (marks, solved) == ([FULL, (0, 0), *[FULL] * 5, LAST], 1)


def test_an_operation_on_the_wrong_table_contributes_nothing():
  load, done = JOINED.demonstration[0], JOINED.demonstration[-1]
  actions = [load, ToolCall("sort", {"table": "t1", "by": "amount asc"}), done]
  assert annotated(PIPELINE, JOINED, actions)[0] == [(1, 0), (1, 0), LAST]


def hand_made(observations, answer="12", solved=1.0, checker=None, gold=()):
  task = Task("t", "x", "what is it for ann?", (), checker or {"type": "exact"}, gold)
  steps = [step(ToolCall("f", {"k": i}), o) for i, o in enumerate(observations)]
  result = annotate(task, trajectory(task, [*steps, step(Finish(answer))], solved))
  return [(s.success_calling, s.contribution) for s in result.steps[:-1]]


def ok(value, **rest):
  return Observation("", Code.OK, value, **rest)


def test_every_code_but_ok_and_every_injected_fault_earns_nothing():
  for code in Code:
    expected = FULL if code == Code.OK else (0, 0)
    assert hand_made([Observation("", code, 12)]) == [expected], code
  assert hand_made([ok(12, injected=True)]) == [(0, 0)]


def test_a_retry_after_a_fault_is_no_repeat():
  task = Task("t", "x", "q", (), {"type": "exact"})
  call = ToolCall("f", {})
  fault = Observation("try again", Code.UNAVAILABLE, injected=True)
  steps = [step(call, fault), step(call, ok(12)), step(Finish("12"))]
  result = annotate(task, trajectory(task, steps, 1.0))
  assert [(s.success_calling, s.contribution) for s in result.steps] == [(0, 0), FULL, LAST]


@pytest.mark.parametrize(
  ("values", "answer", "marks"),
  [
    ([{"a": [1, {"b": 12}]}], "12", [FULL]),  # nested
    ([12.0], "12", [FULL]),  # number formats
    ([1234], "1,234", [FULL]),
    ([1234.5], "$1,234.50", [FULL]),
    (["KARO"], "karo", [FULL]),
    (["karo"], "it is karo.", [FULL]),  # a lenient checker took the sentence
    ([512], "12", [(1, 0)]),  # no substring luck
    ([1], "1.5", [(1, 0)]),
    (["ann"], "ann", [(1, 0)]),  # known from the query
    ([12, 12], "12", [FULL, (1, 0)]),  # the first to produce it
    ([True], "true", [(1, 0)]),  # executed, but no leaf carries information
    ([[]], "12", [(1, 0)]),
    ([{"rows": []}], "12", [(1, 0)]),
    ([""], "12", [(1, 0)]),
    (["The sum is 12."], "12", [FULL]),  # a value within a sentence
    (["It is karo's id a-17."], "a-17", [FULL]),
    ([0], "0", [FULL]),  # zero is a value
    ([4006381333932], "4006381333931", [(1, 0)]),  # another article
    ([4006381333931.0], "4006381333931", [FULL]),
    (["007"], "7", [(1, 0)]),  # a name, not a number
    (["007"], "007", [FULL]),
    ([1200], "it is $1,200 now", [FULL]),  # a number within a text, by value
    ([12.5], "12.50 each", [FULL]),
    ([0.1 + 0.2], "0.3", [FULL]),
    (["9" * 5000], "12", [(1, 0)]),
    ([["It costs 1350 dollars"]], "1350", [FULL]),  # texts inside of a result
    ([{"price": "$1,350.00"}], "1350", [FULL]),
  ],
)
def test_values_by_hand(values, answer, marks):
  assert hand_made([ok(v) for v in values], answer) == marks


def test_the_demonstrated_call_has_the_credit_of_the_answer():
  gold = (ToolCall("f", {"k": 1}), Finish("12"))
  assert hand_made([ok({"some": [3, 12]}), ok(12)], gold=gold) == [(1, 0), FULL]
  assert hand_made([ok({"some": [3, 12]}), ok(12)]) == [FULL, (1, 0)]


def test_unsolved_or_half_solved_answers_prove_no_use():
  assert hand_made([ok(12)], solved=0.0) == [(1, 0)]
  assert hand_made([ok(12)], solved=0.5) == [(1, 0)]


def test_custom_changes_without_a_demonstration(tmp_path):
  path = tmp_path / "tools.py"
  path.write_text(
    "from steptool_jax.simulators.functions import Result\n"
    "def make_tools():\n"
    "  state = {}\n"
    "  def put(key: str, value: int) -> Result:\n"
    "    changed = state.get(key) != value\n"
    "    state[key] = value\n"
    "    return Result({'put': value} if changed else {}, changed)\n"
    "  def get(key: str) -> int:\n"
    "    return state[key]\n"
    "  return [put, get]\n"
    "def holds(answer, tools, key, value):\n"
    "  return tools['get'](key) == value\n"
  )
  tasks = tmp_path / "tasks.jsonl"
  tasks.write_text(
    '{"id": "t", "query": "put", "split": "train",'
    ' "checker": {"type": "holds", "key": "a", "value": 3}}\n'
  )
  env = Custom(str(path), tasks)
  (task,) = env.tasks("train")
  put = ToolCall("put", {"key": "a", "value": 3})
  marks, solved = annotated(env, task, [put, put, Finish("done")])
  assert (marks, solved) == ([FULL, (0, 0), LAST], 1)


def test_another_tasks_trajectory_is_refused_and_nothing_is_mutated():
  task = SHOP.tasks("train")[0]
  original = replay(SHOP, task, task.demonstration)
  result = annotate(task, original)
  assert original.steps[0].success_calling == 0
  assert result.steps[0].tokens is original.steps[0].tokens
  assert isinstance(result.steps[0].success_calling, float)
  with pytest.raises(ValueError, match="annotated with task"):
    annotate(SHOP.tasks("train")[1], original)
  empty = dataclasses.replace(original, steps=())
  assert annotate(task, empty).steps == ()
  assert np.array_equal(result.prompt_tokens, original.prompt_tokens)


@pytest.mark.parametrize("value", [True, [], "", "Stored.", {"status": "stored"}, 0, None])
def test_a_demonstrated_call_that_solves_earns_everything_whatever_it_returns(value):
  """A tool that returned true or [] had SC 0, one that returned a sentence Con 0."""
  gold = ToolCall("act", {"n": 3})
  task = Task("t", "custom", "Do it.", (), {"type": "exact", "value": "done"}, (gold, Finish("x")))
  steps = (step(gold, Observation("", Code.OK, value)), step(Finish("done")))
  for solved, marks in ((1.0, FULL), (0.0, (1, 0))):
    first = annotate(task, trajectory(task, steps, solved)).steps[0]
    assert (first.success_calling, first.contribution) == marks


def test_a_call_that_the_demonstration_makes_twice_is_no_repeat():
  """Reading a queue twice with the same arguments: the third time it is one."""
  gold = ToolCall("next", {})
  task = Task("t", "custom", "q", (), {"type": "exact", "value": "x"}, (gold, gold, Finish("x")))
  calls = [step(gold, Observation("", Code.OK, None))] * 3
  marked = annotate(task, trajectory(task, (*calls, step(Finish("x"))), 1.0)).steps
  assert [s.success_calling for s in marked] == [1, 1, 0, 0]


# --- progress: what is known at a step ---


def progress(env, task, actions, **rest):
  """[(SC, Con)] of the steps, by progress."""
  result = annotate(task, replay(env, task, actions, **rest), causal=True)
  return [(s.success_calling, s.contribution) for s in result.steps]


@pytest.mark.parametrize("env", [SHOP, PIPELINE], ids=lambda e: e.name)
def test_progress_of_a_step_does_not_change_when_later_steps_do(env):
  """Else a step is paid for what the policy does later, and the later step is not."""
  rng = random.Random(1)
  for task in env.tasks("heldout"):
    one, other = (list(imperfect(env, task, rng, 0.5)) for _ in range(2))
    cut = rng.randrange(len(one))
    whole = progress(env, task, one)
    assert progress(env, task, one[:cut], status=Status.STEP_BUDGET) == whole[:cut]
    assert progress(env, task, [*one[:cut], *other])[:cut] == whole[:cut]
    assert progress(env, task, [*one[:cut], Finish("7")])[:cut] == whole[:cut]


@pytest.mark.parametrize("env", [SHOP, PIPELINE], ids=lambda e: e.name)
def test_demonstrations_make_all_the_progress_there_is(env):
  for task in env.tasks("heldout"):
    marks = progress(env, task, task.demonstration)
    assert marks == [FULL] * needed(task) + [LAST], task
    assert needed(task) == len(task.demonstration) - 1


def test_progress_is_known_before_the_answer_and_whatever_it_is():
  calls = CHAIN.demonstration
  useless, failed = ToolCall("get_weather", {"city": "x"}), ToolCall("get_order", {"id": "o0"})
  marks = progress(SHOP, CHAIN, [calls[0], useless, calls[1], calls[1], failed, Finish("7")])
  assert marks == [FULL, (1, 0), FULL, (0, 0), (0, 0), LAST]


def test_a_value_that_the_goal_needs_is_progress_once():
  """By other calls than the demonstrated ones; without a demonstration, the answer's alone."""
  gold = (ToolCall("g", {"name": "ann"}), ToolCall("h", {"id": "c17"}), Finish("karo"))
  for demonstration, marks in (
    (gold, [(1, 0), FULL, (1, 0), FULL]),
    ((), [(1, 0), (1, 0), (1, 0), FULL]),
  ):
    checker = {"type": "exact", "value": "karo"}
    task = Task("t", "x", "what is it for ann?", (), checker, demonstration)
    seen = [ok("ann"), ok({"id": "c17"}), ok("c17 again"), ok("karo")]
    steps = [step(ToolCall("f", {"k": i}), o) for i, o in enumerate(seen)]
    result = annotate(task, trajectory(task, steps, 0.0, Status.TOKEN_BUDGET), causal=True)
    assert [(s.success_calling, s.contribution) for s in result.steps] == marks


@pytest.mark.parametrize(
  ("gold", "called", "same"),
  [
    (4006381333931, 4006381333932, False),
    ("007", "7", False),
    ("0123456789", 123456789, False),
    ("12", 12.0, True),
  ],
)
def test_a_call_is_demonstrated_with_these_arguments_alone(gold, called, same):
  task = Task("t", "x", "?", (), {"type": "none"}, (ToolCall("f", {"id": gold}), Finish("karo")))
  call = step(ToolCall("f", {"id": called}), ok("done"))
  (found,) = annotate(task, trajectory(task, [call], 0.0, Status.STEP_BUDGET), causal=True).steps
  assert found.contribution == same


@pytest.mark.parametrize("query", ["Pay $1,200 to Bob.", "Pay 1200.00 to Bob.", "Pay 1200, please"])
def test_a_number_of_the_query_is_nothing_new(query):
  """An echo of it was paid as if it had been found."""
  gold = (ToolCall("pay", {"amount": 1200}), Finish("done"))
  task = Task("t", "x", query, (), {"type": "state"}, gold)
  echo = step(ToolCall("echo", {"x": 1200}), ok(1200))
  (found,) = annotate(task, trajectory(task, [echo], 0.0, Status.STEP_BUDGET), causal=True).steps
  assert (found.success_calling, found.contribution) == (1, 0)


def test_handles_without_a_demonstration():
  """As of a question that is typed to --mode=chat in the world of a task."""
  task = dataclasses.replace(JOINED, demonstration=())
  marks = progress(PIPELINE, task, JOINED.demonstration)
  assert [sc for sc, _ in marks[:-1]] == [1] * (len(marks) - 1)


def test_a_pipelines_handles_are_no_values_of_the_demonstration():
  """t2 of this session is not t2 of the demonstration: a call counts by what it was made of."""
  load, right, *_, done = JOINED.demonstration
  useless = ToolCall("load_csv", {"file": "items"})
  marks = progress(PIPELINE, JOINED, [useless, load, useless, right, done])
  assert marks == [(1, 0), FULL, (0, 0), FULL, LAST]


def marked(task, actions_and_values):
  steps = [step(call, observation) for call, observation in actions_and_values]
  result = annotate(task, trajectory(task, [*steps, step(Finish("x"))], 1.0), causal=True)
  return [(s.success_calling, s.contribution) for s in result.steps[:-1]]


def test_a_value_that_was_cut_off_was_not_obtained():
  """A dump of all records was paid, and the call that singled one out was not."""
  records = [{"id": n, "pay": 5000 + n} for n in range(300)]

  def dump() -> list:
    return records

  def pay() -> dict:
    return {"pay": 5250}

  box = Toolbox([tool(dump), tool(pay)])
  calls = [ToolCall("dump", {}), ToolCall("pay", {})]
  task = Task("t", "x", "what?", (), {"type": "number", "value": 5250})
  assert marked(task, [(c, box.call(c)) for c in calls]) == [(1, 0), FULL]
  task = dataclasses.replace(task, checker={"type": "number", "value": 5003})
  assert marked(task, [(c, box.call(c)) for c in calls]) == [FULL, (1, 0)]


def test_a_name_within_a_text_is_obtained():
  task = Task("t", "x", "Who leads ann?", (), {"type": "exact", "value": "Bob Smith"})
  call = ToolCall("f", {})
  assert marked(task, [(call, ok({"text": "Ann's manager is Bob Smith."}))]) == [FULL]
  assert marked(task, [(call, ok({"text": "Ann's manager is Bob Smithers."}))]) == [(1, 0)]


def test_a_default_may_be_written_out():
  schema = {"type": "object", "properties": {"k": {}, "unit": {"default": "EUR"}}}
  gold = (ToolCall("f", {"k": 1}), Finish("done"))
  task = Task("t", "x", "q", (ToolSpec("f", "", schema),), {"type": "exact"}, gold)
  assert marked(task, [(ToolCall("f", {"k": 1, "unit": "EUR"}), ok("ok"))]) == [FULL]
  assert marked(task, [(ToolCall("f", {"k": 1, "unit": "USD"}), ok("ok"))]) == [(1, 0)]


def test_of_a_text_that_is_cut_its_beginning_was_obtained():
  text = "Ann's manager is Bob Smith. " + "No more is known. " * 100
  box = Toolbox([tool(lambda_named("look", {"content": text, "code": 7777}))])
  seen = box.call(ToolCall("look", {}))
  assert seen.text.endswith("...")
  for value, marks in (("Bob Smith", FULL), ("7777", (1, 0))):
    task = Task("t", "x", "Who?", (), {"type": "exact", "value": value})
    assert marked(task, [(ToolCall("look", {}), seen)]) == [marks]


def lambda_named(name, value):
  def function() -> dict:
    return value

  function.__name__ = name
  return function


def test_text_that_is_no_json_of_its_value_does_no_harm():
  """As in records that somebody else has written."""
  task = Task("t", "x", "Who?", (), {"type": "exact", "value": "12"})
  odd = Observation(r'{"a": "\d"} "' + r"\"" * 20_000 + "...", Code.OK, {"a": 12})
  assert marked(task, [(ToolCall("f", {}), odd)]) == [(1, 0)]
