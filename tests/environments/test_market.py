import collections
import dataclasses
import random
import time

import pytest
from rewards.replays import replay

from steptool_jax.environments.base import Environment, Session
from steptool_jax.environments.data_pipeline import DataPipeline
from steptool_jax.environments.faults import Faults, FaultyEnvironment
from steptool_jax.environments.markets import market, pipeline_specialists
from steptool_jax.environments.markets import shop_specialists as specialists
from steptool_jax.environments.markets.market import Market, MarketEnvironment, MarketSession
from steptool_jax.environments.nested_api import NestedApi
from steptool_jax.environments.tables import PipelineTools, Table
from steptool_jax.rewards import rules
from steptool_jax.simulators.errors import NotFound
from steptool_jax.types import Code, Finish, Observation, ToolCall

PLAIN = NestedApi(300, 100, seed=1)
ALL = ("small", "medium", "large")
ENV = MarketEnvironment(PLAIN, Market(seed=3, specialists=ALL, preferences=True))
SPLITS = ("train", "heldout")


def asked(task):
  return [spec.name for spec in task.tools if spec.name.startswith("ask_")]


def reading(split="train", env=ENV):
  return [t for t in env.tasks(split) if specialists.question_of(t)]


def run(task, calls, env=ENV):
  session = env.open(task, 0)
  found = [session.call(call) for call in calls]
  session.close()
  return found


@pytest.mark.parametrize("plain", [PLAIN, DataPipeline(50, 20, seed=2)], ids=lambda e: e.name)
def test_without_specialists_and_wishes_tasks_only_gain_prices(plain):
  env = MarketEnvironment(plain, Market())
  assert isinstance(env, Environment)
  for split in SPLITS:
    for before, after in zip(plain.tasks(split), env.tasks(split), strict=True):
      prices = after.metadata["prices"]
      assert set(prices) == {spec.name for spec in after.tools}
      assert dict(after.metadata) == {**before.metadata, "prices": prices}
      assert [s.parameters for s in after.tools] == [s.parameters for s in before.tools]
      same = {"tools": (), "metadata": {}}
      assert dataclasses.replace(before, **same) == dataclasses.replace(after, **same)


def test_every_task_is_solved_without_a_specialist_and_pays_by_its_price_list():
  for split in SPLITS:
    for task in ENV.tasks(split)[:60]:
      session = ENV.open(task, 0)
      assert isinstance(session, Session)
      *calls, last = task.demonstration
      for call in calls:
        observation = session.call(call)
        assert observation.code is Code.OK
        assert [observation.cost, observation.latency] == task.metadata["prices"][call.name]
        assert observation.cost >= 0.001
      assert session.grade(last.answer) == 1.0
      session.close()


def test_prices_vary_by_task_within_the_spread():
  env = MarketEnvironment(PLAIN, Market(specialists=ALL, spread=3.0))
  prices = [t.metadata["prices"] for t in env.tasks("train")]
  large = [p["ask_large"] for p in prices if "ask_large" in p]
  assert min(c for c, _ in large) < 0.012 < 0.07 < max(c for c, _ in large)  # around 0.03 USD
  assert all(0.01 <= cost <= 0.09 and 1.0 <= seconds <= 9.0 for cost, seconds in large)
  assert len({tuple(map(tuple, p.values())) for p in prices}) == len(prices)
  usual = MarketEnvironment(PLAIN, Market(spread=1.0)).tasks("train")
  assert {tuple(p) for t in usual for p in t.metadata["prices"].values()} == {(0.003, 1.0)}


def test_draws_depend_on_seed_split_and_task_alone():
  market = Market(seed=3, specialists=ALL, preferences=True)
  again = MarketEnvironment(NestedApi(300, 100, seed=1), market)
  assert again.tasks("heldout") == ENV.tasks("heldout")  # before train
  assert again.tasks("train") == ENV.tasks("train")
  other = MarketEnvironment(PLAIN, Market(seed=4, specialists=ALL, preferences=True))
  same = [a.metadata["prices"] == b.metadata["prices"] for a, b in paired(other, ENV)]
  assert not any(same)


def paired(a, b):
  return zip(a.tasks("train"), b.tasks("train"), strict=True)


class SameIds:
  """An environment whose splits use the same task ids, as a file of a user may."""

  name = "custom"

  def tasks(self, split):
    return [dataclasses.replace(t, id=f"t{k}") for k, t in enumerate(PLAIN.tasks("train")[:20])]


def test_the_splits_share_no_draw():
  env = MarketEnvironment(SameIds(), Market())
  train, heldout = ([t.metadata["prices"] for t in env.tasks(split)] for split in SPLITS)
  assert all(a != b for a, b in zip(train, heldout, strict=True))


def test_each_task_has_its_own_choice_of_specialists():
  choices = [tuple(asked(t)) for t in ENV.tasks("train")]
  assert len(set(choices)) == 7
  for tier in ALL:
    assert 0.5 < sum(f"ask_{tier}" in c for c in choices) / len(choices) < 0.85
  for task in ENV.tasks("train")[:20]:
    missing = {f"ask_{tier}" for tier in ALL} - set(asked(task))
    for name in missing:
      (observation,) = run(task, [ToolCall(name, {"question": "city of customer x"})])
      assert (observation.code, observation.cost) == (Code.UNKNOWN_TOOL, 0.0)


def test_the_query_tells_prices_and_wishes():
  words = {
    "keep it cheap.": {"cost": 1.0, "latency": 0.0},
    "be quick.": {"cost": 0.0, "latency": 1.0},
  }
  seen = set()
  for before, task in paired(PLAIN, ENV):
    assert task.query.startswith(before.query)
    told = task.query.removeprefix(before.query)
    for name in asked(task):
      cost, seconds = task.metadata["prices"][name]
      assert f"{name} {100 * cost:.1f} cents {seconds:.1f} s" in told
    for spec in task.tools:
      cost, seconds = task.metadata["prices"][spec.name]
      assert f"({100 * cost:.1f} cents {seconds:.1f} s)" in spec.description
    wish = task.metadata.get("preference")
    if wish is None:
      assert told.endswith(" s.")
      seen.add("none")
    elif "tools" in wish:
      ((tool, weight),) = wish["tools"].items()
      assert tool in asked(task)
      verb = {1.0: "prefer", -1.0: "avoid"}[weight]
      assert told.endswith(f"s. {verb} {tool}.")
      seen.add(verb)
    else:
      (said,) = (text for text, w in words.items() if w == wish)
      assert told.endswith(f"s. {said}")
      seen.add(said)
  assert seen == {"none", "prefer", "avoid", *words}


def test_an_expensive_specialist_is_right_more_often():
  right = {}
  for tier in ALL:
    tasks = [t for t in reading() if f"ask_{tier}" in asked(t)]
    solved = 0.0
    for task in tasks:
      session = ENV.open(task, 0)
      question = specialists.question_of(task)
      observation = session.call(ToolCall(f"ask_{tier}", {"question": question}))
      value = observation.value["answer"] if observation.code is Code.OK else None
      solved += session.grade(None if value is None else str(value))
      session.close()
    right[tier] = solved / len(tasks)
  assert 0.3 < right["small"] < 0.6 < right["medium"] < 0.85 < right["large"] < 1.0


def test_accuracy_by_skill_of_single_relations():
  """Wrong values are another entity's, of the same kind."""
  env = MarketEnvironment(PLAIN, Market(specialists=("small",)))
  found = {"people": [], "goods": [], "orders": []}
  for task in env.tasks("train")[:150]:
    tables = PLAIN.world("train", task.metadata["world"]).tables
    session = env.open(task, 0)
    key, row = next(iter(tables["orders"].items()))
    value = session.call(ToolCall("ask_small", {"question": f"count of order {key}"})).value
    found["orders"].append(value["answer"] == row["count"])
    assert value["answer"] in {r["count"] for r in tables["orders"].values()}
    key, row = next(iter(tables["products"].items()))
    value = session.call(ToolCall("ask_small", {"question": f"product {row['name']}"})).value
    found["goods"].append(value["answer"] == key)
    assert value["answer"] in tables["products"]
    key, row = next(iter(tables["customers"].items()))
    value = session.call(ToolCall("ask_small", {"question": f"customer {row['name']}"})).value
    found["people"].append(value["answer"] == key)
    assert value["answer"] in tables["customers"]
    session.close()
  for skill, share in specialists.SHOP.accuracy["small"].items():
    assert sum(found[skill]) / 150 == pytest.approx(share, abs=0.1), skill


def test_the_same_fact_is_told_the_same_however_often_and_in_whatever_words():
  env = MarketEnvironment(PLAIN, Market(specialists=("small",)))
  for task in reading(env=env)[:30]:
    question = specialists.question_of(task)
    asks = [
      ToolCall("ask_small", {"question": q})
      for q in (question, question, f"What is the {question}?", question.replace("the ", ""))
    ]
    answers = run(task, asks, env) + run(task, asks, env)
    assert len({a.text for a in answers}) == 1


def test_a_specialist_sees_the_present_state():
  env = MarketEnvironment(PLAIN, Market(specialists=("large",)))
  changed = 0
  for task in env.tasks("train"):
    call = task.demonstration[-2]
    if call.name != "set_stock":
      continue
    name = PLAIN.world("train", task.metadata["world"]).tables["products"][call.arguments["id"]]
    ask = ToolCall("ask_large", {"question": f"stock of product {name['name']}"})
    before, _, after = run(task, [ask, call, ask], env)
    changed += after.value == {"answer": call.arguments["count"]} != before.value
  assert changed > 5


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("customer karo mine", ("customer", "karo mine", (), "customer")),
    ("What is the city of customer Karo Mine?", ("customer", "karo mine", ("get_customer",), "")),
    ("the supplier of product lo desk", ("product", "lo desk", ("get_product",), "supplier")),
    (
      "manager of the warehouse of the shipment of order o12",
      ("order", "o12", ("track_order", "get_shipment", "get_warehouse"), ""),
    ),
    (
      "stock of the product in the last order of customer a b",
      ("customer", "a b", ("last_order", "get_order", "get_stock"), ""),
    ),
    (
      "city of warehouse of top product of supplier x mill",
      ("supplier", "x mill", ("top_product", "get_stock", "get_warehouse"), ""),
    ),
  ],
)
def test_questions_by_hand(text, expected):
  got = specialists.parse(text)
  assert (got.start, got.name, tuple(tool for _, tool, _ in got.relations), got.end) == expected


@pytest.mark.parametrize("text", ["", "?", "hello", "city of", "price of customer a b", "order "])
def test_what_is_no_question_is_not_understood(text):
  with pytest.raises(NotFound, match="ask like"):
    specialists.parse(text)


def test_refused_calls_are_free_and_failed_ones_are_not():
  task = next(t for t in ENV.tasks("train") if asked(t))
  name = asked(task)[0]
  bad, odd, missing, unknown = run(
    task,
    [
      ToolCall(name, {"text": "x"}),
      ToolCall(name, {"question": "hello"}),
      ToolCall("get_customer", {"id": "c0"}),
      ToolCall("nothing", {}),
    ],
  )
  assert (bad.code, bad.cost, bad.latency) == (Code.BAD_ARGUMENTS, 0.0, 0.0)
  assert (unknown.code, unknown.cost) == (Code.UNKNOWN_TOOL, 0.0)
  assert odd.code is missing.code is Code.NOT_FOUND
  assert [odd.cost, odd.latency] == task.metadata["prices"][name]
  assert [missing.cost, missing.latency] == task.metadata["prices"]["get_customer"]


@pytest.mark.parametrize("code", list(Code))
def test_what_never_ran_is_free(code):
  """A call that broke off in the simulator was paid for, and lowered Eq. 2's reward."""
  task = ENV.tasks("train")[0]
  name = task.tools[0].name

  class Answers:
    def call(self, call):
      return Observation("x", code)

  session = MarketSession(Answers(), task, Market(), None)
  seen = session.call(ToolCall(name, {}))
  free = code in (Code.MALFORMED, Code.UNKNOWN_TOOL, Code.BAD_ARGUMENTS, Code.INFRASTRUCTURE)
  assert [seen.cost, seen.latency] == ([0.0, 0.0] if free else task.metadata["prices"][name])


def test_an_injected_fault_is_free_and_nobody_waits_for_a_latency():
  env = FaultyEnvironment(ENV, Faults(transient=1.0, max_consecutive=1))
  task = ENV.tasks("train")[0]
  started = time.monotonic()
  faulted, answered = run(task, [task.demonstration[0]] * 2, env)
  assert time.monotonic() - started < answered.latency
  assert (faulted.injected, faulted.cost, faulted.latency) == (True, 0.0, 0.0)
  assert answered.cost > 0


def test_demonstrations_may_ask_a_specialist_that_knows():
  env = MarketEnvironment(PLAIN, Market(seed=3, specialists=ALL, preferences=True, asked=0.5))
  asking = 0
  for before, task in zip(ENV.tasks("train"), env.tasks("train"), strict=True):
    if task.demonstration == before.demonstration:
      continue
    asking += 1
    call, last = task.demonstration
    assert isinstance(last, Finish)
    assert call.name in asked(task)
    assert task.metadata.get("preference", {}).get("tools", {}).get(call.name, 0.0) >= 0
    session = env.open(task, 0)
    assert str(session.call(call).value["answer"]) == last.answer
    assert session.grade(last.answer) == 1.0
    session.close()
  assert 0.3 < asking / len(reading()) < 0.5


def test_specialists_know_the_embedded_environments_alone():
  with pytest.raises(ValueError, match="know nested_api and data_pipeline, not 'custom'"):
    MarketEnvironment(SameIds(), Market(specialists=("small",)))


# --- data_pipeline's specialists ---

PIPELINE = DataPipeline(300, 100, seed=2)
TABLES = MarketEnvironment(PIPELINE, Market(seed=3, specialists=ALL, asked=0.5))
CSV = "city,amount\na,1\nb,5\na,2\n"
STORES = "city,area\na,x\nb,y\n"


class Certain:
  """What a specialist knows that is wrong at these skills only."""

  def __init__(self, *wrong):
    self.wrong = wrong

  def of(self, skill, fact):
    return skill not in self.wrong, random.Random(fact)


def table_of(question, *wrong):
  session = PipelineTools({"sales": CSV, "stores": STORES})
  session.keep(Table((), ()))  # handles go on where the agent's own end
  value = pipeline_specialists.ask(session, Certain(*wrong), question)
  assert value["table"] == "t2"
  table = session.tables["t2"]
  assert value["rows"] == len(table.rows)
  return table.rows


@pytest.mark.parametrize(
  ("question", "rows", "wrong", "mistake"),
  [
    ("sales: keep amount > 1", (("b", 5), ("a", 2)), "filter", {(("a", 1),)}),
    ("sales: sort amount desc", (("b", 5), ("a", 2), ("a", 1)), "sort", None),
    ("sales: sum amount by city", (("a", 3), ("b", 5)), "aggregate", None),
    ("sales: join stores", (("a", 1, "x"), ("b", 5, "y"), ("a", 2, "x")), "join", None),
    (
      "sales: join stores, keep area = x, max amount by area.",
      (("x", 2),),
      "aggregate",
      {(("x", 1),)},
    ),
  ],
)
def test_tables_by_hand(question, rows, wrong, mistake):
  assert table_of(question) == rows
  got = table_of(question, wrong)
  assert got != rows
  if mistake is not None:
    assert got in mistake
  if wrong == "sort":
    assert got == rows[::-1]


@pytest.mark.parametrize(
  ("question", "words"),
  [
    ("hello", "do not understand; ask like: sales"),
    ("sales: sing", "do not understand 'sing'; ask like"),
    ("nothing: sort amount desc", "no file nothing"),
    ("sales: sort price desc", "no column price"),
    ("sales: join sales2", "no file sales2"),
  ],
)
def test_what_a_pipeline_specialist_does_not_understand(question, words):
  with pytest.raises(NotFound, match=words):
    table_of(question)


def test_a_question_about_every_pipeline_task_and_dearer_specialists_are_right_more_often():
  env = MarketEnvironment(PIPELINE, Market(specialists=ALL))
  right, asked_of = collections.Counter(), collections.Counter()
  for task in env.tasks("train"):
    question = pipeline_specialists.question_of(task)
    for tier in ALL:
      if f"ask_{tier}" not in asked(task):
        continue
      session = env.open(task, 0)
      ask = ToolCall(f"ask_{tier}", {"question": question})
      observation = session.call(ask)
      assert session.call(ask).value["rows"] == observation.value["rows"]
      *calls, last = pipeline_specialists.rest(task, observation.value)
      assert [session.call(call).code for call in calls] == [Code.OK]
      right[tier] += session.grade(last.answer)
      asked_of[tier] += 1
      assert [observation.cost, observation.latency] == task.metadata["prices"][ask.name]
      session.close()
  share = {tier: right[tier] / asked_of[tier] for tier in ALL}
  assert 0.4 < share["small"] < 0.75 < share["medium"] < 0.9 < share["large"] < 1.0


def test_pipeline_demonstrations_that_ask_are_right_and_contribute_whole():
  asking = [t for t in TABLES.tasks("train") if t.demonstration[0].name.startswith("ask_")]
  assert 0.3 < len(asking) / 300 < 0.5
  for task in asking[:40]:
    annotated = rules.annotate(task, replay(TABLES, task, task.demonstration))
    assert annotated.solved == 1.0
    assert [s.contribution for s in annotated.steps[:-1]] == [1.0] * len(task.demonstration[:-1])


def test_asking_contributes_where_the_demonstration_went_step_by_step():
  env = MarketEnvironment(PIPELINE, Market(specialists=("large",)))
  solved = 0
  for task in env.tasks("train")[:40]:
    ask = ToolCall("ask_large", {"question": pipeline_specialists.question_of(task)})
    write, last = pipeline_specialists.rest(task, {"table": "t1"})
    other = ToolCall("write_table", {"table": "t1", "name": "other"})
    annotated = rules.annotate(task, replay(env, task, (ask, other, write, last)))
    solved += annotated.solved
    whole = annotated.solved == 1.0
    assert [s.contribution for s in annotated.steps[:-1]] == [float(whole), 0.0, float(whole)]
  assert solved > 30


def test_tools_of_ones_own_may_have_a_specialists_name():
  """Without specialists on the market nothing takes their place."""
  spec = dataclasses.replace(PLAIN.tasks("train")[0].tools[0], name="ask_small")

  class Own(SameIds):
    def tasks(self, split):
      return [dataclasses.replace(t, tools=(spec,)) for t in super().tasks(split)]

    def open(self, task, sample):
      return self

    def call(self, call):
      return market.Observation("mine", Code.OK)

  env = MarketEnvironment(Own(), Market())
  task = env.tasks("train")[0]
  assert env.open(task, 0).call(ToolCall("ask_small", {})).text == "mine"
