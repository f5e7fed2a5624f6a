import json
import sys
from typing import Literal

import pytest

from steptool_jax.environments import custom
from steptool_jax.environments.base import Environment, Session
from steptool_jax.environments.custom import Custom
from steptool_jax.simulators.functions import Result
from steptool_jax.types import Code, Finish, ToolCall

MODULE = '''
"""A user's own environment."""
from steptool_jax.simulators.functions import NotFound, Result


def make_tools():
  accounts = {"ann": 10, "bob": 5}

  def balance(owner: str) -> int:
    """Balance of an account."""
    if owner not in accounts:
      raise NotFound(f"no account {owner}")
    return accounts[owner]

  def pay(owner: str, amount: int) -> Result:
    """Pay into an account."""
    accounts[owner] += amount
    return Result({"balance": accounts[owner]}, changed=amount != 0)

  return [balance, pay]


def has_balance(answer, tools, owner, want):
  return tools["balance"](owner) == want


def broken(answer, tools):
  return tools["nothing"]()


def half(answer, tools):
  return 0.5


def odd(answer, tools):
  return 0.7
'''


def add(a: int, b: int) -> int:
  """Sum of two numbers."""
  return a + b


def upper(text: str) -> str:
  """Upper case."""
  return text.upper()


def write(tmp_path, *records):
  path = tmp_path / "tasks.jsonl"
  lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")
  return path


def one(checker, **fields):
  return {"id": "t", "query": "q", "checker": checker, "split": "train"} | fields


def grade(tmp_path, checker, answer, tools=(add,)):
  env = Custom(list(tools), write(tmp_path, one(checker)))
  return env.open(env.tasks("train")[0], 0).grade(answer)


def test_functions_and_tasks(tmp_path):
  demonstration = [{"tool": "add", "arguments": {"a": 5, "b": 7}}, {"answer": "12"}]
  record = one({"type": "number", "value": 12}, tools=["add"], demonstration=demonstration)
  env = Custom([add, upper], write(tmp_path, record, "", record | {"id": "u", "split": "heldout"}))
  assert isinstance(env, Environment)
  (task,) = env.tasks("train")
  assert (task.id, task.environment, task.query) == ("t", "custom", "q")
  assert [spec.name for spec in task.tools] == ["add"]
  assert task.demonstration == (ToolCall("add", {"a": 5, "b": 7}), Finish("12"))
  assert [t.id for t in env.tasks("heldout")] == ["u"]
  session = env.open(task, 0)
  assert isinstance(session, Session)
  assert session.call(task.demonstration[0]).text == "12"
  assert session.call(ToolCall("upper", {"text": "x"})).code == Code.UNKNOWN_TOOL
  assert session.grade("12") == 1
  session.close()


@pytest.mark.parametrize(
  ("checker", "right", "wrong"),
  [
    ({"type": "exact", "value": "Karo"}, ["karo", " KARO. "], ["karo mine", "", None]),
    ({"type": "exact", "value": 12}, ["12", "12.0"], ["120", "a 12"]),
    ({"type": "number", "value": 3, "tolerance": 0.2}, ["3.2", "2.8", "3"], ["3.5", "three"]),
    ({"type": "number", "value": 37, "tolerance": 1}, ["36", "38.0"], ["1", "39", "1000000"]),
    ({"type": "number", "value": 1000, "tolerance": 0.05}, ["1000.04"], ["950", "1001"]),
    ({"type": "number", "value": 5551234}, ["5551234", "5,551,234"], ["5551230", "5551233.9"]),
    ({"type": "number", "value": 1 / 3}, ["0.3333333"], ["0.3334"]),
    ({"type": "exact", "value": 4006381333931}, ["4006381333931"], ["4006381333932"]),
    ({"type": "exact", "value": 12345678901234567}, ["12345678901234567"], ["12345678901234568"]),
    ({"type": "contains_all", "values": [5551234]}, ["it is 5551234."], ["it is 5551230."]),
    ({"type": "contains_all", "values": [10, 12]}, ["10,12", "[10,12]", "10 and 12"], ["10,13"]),
    ({"type": "contains_all", "values": [100, 200]}, ["[100,200]"], ["100,200"]),
    ({"type": "contains_all", "values": [100200]}, ["100,200"], ["[100,200]"]),
    ({"type": "contains_all", "values": [1200, 3400]}, ["[$1,200, $3,400]", "[1,200, 3,400]"], []),
    ({"type": "contains_all", "values": [1234]}, ["[1,234 results](x)"], []),
    ({"type": "number", "value": 3}, ["3.0"], ["3.01"]),
    ({"type": "regex", "pattern": "[ab]+"}, ["abba", " ab "], ["abc", "xab"]),
    (
      {"type": "contains_all", "values": ["ann", 12]},
      ["Ann has 12."],
      ["ann has 512", "12", "1.12 ann"],
    ),
  ],
)
def test_checkers(tmp_path, checker, right, wrong):
  assert [grade(tmp_path, checker, a) for a in right] == [1.0] * len(right)
  assert [grade(tmp_path, checker, a) for a in wrong] == [0.0] * len(wrong)


@pytest.fixture
def module(tmp_path):
  path = tmp_path / "my_tools.py"
  path.write_text(MODULE)
  return str(path)


def test_module_with_a_factory_has_state_for_each_session(tmp_path, module):
  checker = {"type": "has_balance", "owner": "ann", "want": 15}
  env = Custom(module, write(tmp_path, one(checker)))
  (task,) = env.tasks("train")
  first, second = env.open(task, 0), env.open(task, 1)
  paid = first.call(ToolCall("pay", {"owner": "ann", "amount": 5}))
  assert (paid.text, paid.changed) == ('{"balance":15}', True)
  assert (first.grade("done"), second.grade("done")) == (1.0, 0.0)
  assert first.grade(None) == 0.0
  missing = second.call(ToolCall("balance", {"owner": "eve"}))
  assert (missing.code, missing.text) == (Code.NOT_FOUND, "error: no account eve")


def test_a_tools_file_may_import_its_neighbours(tmp_path, monkeypatch):
  """`python -m` could, and the command steptool could not."""
  monkeypatch.setattr("sys.path", [p for p in sys.path if p])
  (tmp_path / "bank_of_neighbours.py").write_text("BALANCE = 3\n")
  (tmp_path / "neighbourly.py").write_text(
    "import bank_of_neighbours\n\ndef f() -> int:\n  return bank_of_neighbours.BALANCE\n\n"
    "TOOLS = [f]\n"
  )
  assert custom.load_module(str(tmp_path / "neighbourly.py")).TOOLS[0]() == 3
  monkeypatch.chdir(tmp_path)
  assert custom.load_module("neighbourly").TOOLS[0]() == 3


def test_importable_module_and_TOOLS(tmp_path, monkeypatch):
  (tmp_path / "my_pkg_tools.py").write_text(
    "def add(a: int, b: int) -> int:\n  return a + b\n\nTOOLS = [add]\n"
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  env = Custom("my_pkg_tools", write(tmp_path, one({"type": "exact", "value": 1})))
  assert [spec.name for spec in env.tasks("train")[0].tools] == ["add"]


def test_checker_that_fails_names_itself(tmp_path, module):
  for kind, match in [("broken", "checker broken raised KeyError"), ("odd", "odd returned 0.7")]:
    env = Custom(module, write(tmp_path, one({"type": kind})))
    with pytest.raises(RuntimeError, match=match):
      env.open(env.tasks("train")[0], 0).grade("x")


def test_half_solved(tmp_path, module):
  env = Custom(module, write(tmp_path, one({"type": "half"})))
  assert env.open(env.tasks("train")[0], 0).grade("x") == 0.5


GOOD = one({"type": "exact", "value": "x"})
LAST = {"answer": "x"}


@pytest.mark.parametrize(
  ("line", "reason"),
  [
    ('{"id": "a", "query": ', "tasks.jsonl:2: Expecting value"),
    ("[1, 2]", "tasks.jsonl:2: a task must be a JSON object"),
    ('{"id": "a", "query": "\\ud83d"}', "tasks.jsonl:2: \\ud83d is half of a character"),
    ("[" * 100_000, "tasks.jsonl:2: "),
    ({**GOOD, "id": 7}, "2: field 'id' must be a non-empty string"),
    ({"id": "a", "checker": {"type": "exact", "value": 1}}, "2: field 'query'"),
    ({**GOOD, "id": "t"}, "2: id 't' is already used in line 1"),
    ({**GOOD, "id": "a", "quary": 1}, "2: unknown field 'quary'"),
    ({**GOOD, "id": "a", "kind": 1}, "2: field 'kind' must be a non-empty string"),
    ({**GOOD, "id": "a", "split": "dev"}, "2: split 'dev' does not exist"),
    ({**GOOD, "id": "a", "tools": ["sub"]}, "2: unknown tool 'sub': there are add"),
    ({**GOOD, "id": "a", "tools": []}, "2: field 'tools' must be a non-empty list"),
    ({**GOOD, "id": "a", "checker": "exact"}, "2: field 'checker' must be an object"),
    ({**GOOD, "id": "a", "checker": {"type": "exakt"}}, "2: unknown checker type 'exakt'"),
    ({**GOOD, "id": "a", "checker": {"type": "exact"}}, "2: checker 'exact' needs 'value'"),
    (
      {**GOOD, "id": "a", "checker": {"type": "exact", "value": "x", "valeu": 1}},
      "2: checker 'exact' has no field 'valeu'",
    ),
    ({**GOOD, "id": "a", "checker": {"type": "number", "value": "1"}}, "2: checker 'number' needs"),
    ({**GOOD, "id": "a", "checker": {"type": "regex", "pattern": "("}}, "2: checker pattern"),
    ({**GOOD, "id": "a", "checker": {"type": "contains_all", "values": []}}, "2: checker 'cont"),
    (
      '{"id": "a", "query": "q", "checker": {"type": "exact", "value": NaN}}',
      "2: NaN is no JSON number",
    ),
    ({**GOOD, "id": "a", "demonstration": [{"tool": "add", "arguments": {}}]}, "2: demonstration"),
    (
      {
        **GOOD,
        "id": "a",
        "demonstration": [{"tool": "add", "arguments": {"a": 1}}, {"answer": "x"}],
      },
      "2: demonstration, entry 0: 'b' is a required property",
    ),
    (
      {**GOOD, "id": "a", "demonstration": [{"tool": "sub", "arguments": {}}, LAST]},
      "2: demonstration, entry 0: unknown tool 'sub'",
    ),
  ],
)
def test_broken_line_is_named_before_anything_runs(tmp_path, line, reason):
  with pytest.raises(ValueError, match="tasks") as caught:
    Custom([add], write(tmp_path, GOOD, line))
  assert reason in str(caught.value)


def test_checker_function_must_take_the_fields(tmp_path, module):
  record = one({"type": "has_balance", "owner": "ann"})
  with pytest.raises(ValueError, match=r"1: checker has_balance.*missing.*'want'"):
    Custom(module, write(tmp_path, record))


def test_broken_files(tmp_path, module):
  tasks = write(tmp_path, GOOD)
  with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
    Custom([add], tmp_path / "none.jsonl")
  with pytest.raises(FileNotFoundError, match=r"none\.py does not exist"):
    Custom(str(tmp_path / "none.py"), tasks)
  with pytest.raises(ValueError, match=r"'no\.such\.module' cannot be imported"):
    Custom("no.such.module", tasks)
  (tmp_path / "bad.py").write_text("def f(:\n")
  with pytest.raises(ValueError, match=r"bad\.py: SyntaxError"):
    Custom(str(tmp_path / "bad.py"), tasks)
  (tmp_path / "empty.py").write_text("x = 1\n")
  with pytest.raises(ValueError, match="neither TOOLS nor make_tools"):
    Custom(str(tmp_path / "empty.py"), tasks)
  (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
  with pytest.raises(ValueError, match="not UTF-8"):
    Custom([add], tmp_path / "binary.jsonl")
  with pytest.raises(ValueError, match="holds no task"):
    Custom([add], write(tmp_path, ""))
  with pytest.raises(ValueError, match="no tool"):
    Custom([], tasks)

  def loose(**anything): ...

  with pytest.raises(ValueError, match="tool 'loose', parameter 'anything'"):
    Custom([loose], write(tmp_path, GOOD))
  with pytest.raises(ValueError, match="two tools are named 'add'"):
    Custom([add, add], write(tmp_path, GOOD))


def test_unicode_line_separator_inside_a_string(tmp_path):
  path = tmp_path / "tasks.jsonl"
  text = json.dumps(one({"type": "exact", "value": "x"}, query="a\u2028b"), ensure_ascii=False)
  path.write_text("\ufeff" + text + "\r\n", encoding="utf-8")
  assert Custom([add], path).tasks("train")[0].query == "a\u2028b"


def test_ratio_split_is_stable_when_tasks_are_added(tmp_path):
  records = [one({"type": "exact", "value": "x"}, id=f"t{n}") for n in range(300)]
  for record in records:
    del record["split"]

  def heldout(count, ratio=0.3):
    env = Custom([add], write(tmp_path, *records[:count]), heldout_share=ratio)
    assert len(env.tasks("train")) + len(env.tasks("heldout")) == count
    return {t.id for t in env.tasks("heldout")}

  assert 60 < len(heldout(300)) < 120
  assert heldout(150) <= heldout(300)
  assert heldout(300, 0.0) == set()
  assert len(heldout(300, 1.0)) == 300
  with pytest.raises(ValueError, match="heldout_share"):
    heldout(3, 1.5)


def test_tools_that_say_changed(tmp_path):
  def put(x: int) -> Result:
    return Result(x, changed=True)

  env = Custom([put], write(tmp_path, GOOD))
  assert env.open(env.tasks("train")[0], 0).call(ToolCall("put", {"x": 1})).changed


# --- state ---

STARTS = '''
def make_tools(state):
  """Called with the task's own state."""
  accounts = {} if state is None else state

  def balance(owner: str) -> int:
    """Balance."""
    return accounts[owner]

  def spend(owner: str) -> int:
    """Takes one."""
    accounts[owner] -= 1
    return accounts[owner]

  def count() -> int:
    """Accounts; -1 without a state."""
    return -1 if state is None else len(accounts)

  return [balance, spend, count]
'''


def test_a_task_has_its_own_start_and_every_session_a_copy_of_it(tmp_path):
  (tmp_path / "bank.py").write_text(STARTS)
  checker = {"type": "number", "value": 1}
  states = {"a": {"ann": 3}, "b": {"ann": 70, "bob": 5}, "c": None}
  records = [one(checker, id=k) | ({"state": v} if v else {}) for k, v in states.items()]
  env = Custom(str(tmp_path / "bank.py"), write(tmp_path, *records))
  a, b, c = env.tasks("train")
  asked = ToolCall("spend", {"owner": "ann"})
  first, second = env.open(a, 0), env.open(a, 1)
  assert [first.call(asked).value, first.call(asked).value, second.call(asked).value] == [2, 1, 2]
  assert env.open(b, 0).call(asked).value == 69
  assert env.open(c, 0).call(ToolCall("count", {})).value == -1
  assert a.metadata == {"state": {"ann": 3}}
  assert c.metadata == {}


def test_a_state_that_nothing_receives_is_refused(tmp_path, module):
  record = one({"type": "exact", "value": "x"}, state={"ann": 1})
  for functions in (module, [add]):
    with pytest.raises(ValueError, match=r"1: has a 'state', but nothing.*make_tools\(state\)"):
      Custom(functions, write(tmp_path, record))


def test_tools_that_need_a_state_to_be_made_get_the_first_one(tmp_path):
  def make_tools(state):
    start = state["start"]

    def get() -> int:
      """The start."""
      return start

    return [get]

  plain = one({"type": "exact", "value": 1})
  env = Custom(make_tools, write(tmp_path, plain | {"state": {"start": 4}}))
  assert env.open(env.tasks("train")[0], 0).call(ToolCall("get", {})).value == 4
  with pytest.raises(ValueError, match=r"make_tools\(state = None\) raised TypeError"):
    Custom(make_tools, write(tmp_path, plain))


def test_what_a_factory_may_take(tmp_path):
  tasks = write(tmp_path, GOOD)

  def with_default(seed=3):
    return [add]

  def with_two(state, other):
    return [add]

  assert Custom(with_default, tasks).tasks("train")[0].metadata == {}
  with pytest.raises(ValueError, match="with_two needs state, other: it may take one argument"):
    Custom(with_two, tasks)


def test_names_of_checkers_that_are_taken(tmp_path):
  """`table` raised KeyError in the rewards, `number` was never called."""
  text = (
    MODULE
    + "\n\ndef table(answer, tools):\n  return 1\n\n\ndef number(answer, tools):\n  return 1\n"
  )
  (tmp_path / "named.py").write_text(text)
  path = str(tmp_path / "named.py")
  with pytest.raises(ValueError, match=r"1: checker 'table': this name belongs to an embedded"):
    Custom(path, write(tmp_path, one({"type": "table"})))
  with pytest.raises(ValueError, match=r"1: checker 'number' is built in, and your module has"):
    Custom(path, write(tmp_path, one({"type": "number", "value": 1})))


def test_problems_are_collected_and_what_is_right_is_kept(tmp_path, module):
  problems = []
  records = [GOOD, {**GOOD, "id": "u", "tools": ["sub"]}, '{"id": ', {**GOOD, "id": "v"}, GOOD]

  def untyped(a):
    """Has no schema."""

  env = Custom([add, untyped], write(tmp_path, *records), problems=problems)
  assert [t.id for t in env.tasks("train")] == ["t", "v"]
  assert [p.task for p in problems] == ["", "u", "", "t"]
  words = ("'a': has no type hint", "2: unknown tool 'sub'", "3: Expecting", "5: id 't' is already")
  assert all(word in p.reason for word, p in zip(words, problems, strict=True))
  assert env.open(env.tasks("train")[0], 0).call(ToolCall("add", {"a": 1, "b": 2})).value == 3


def test_a_pattern_of_a_checker_that_does_not_end_is_a_sentence(tmp_path):
  """(a+)+$ froze the run without a message; now the grade fails after a second."""
  checker = {"type": "regex", "pattern": r"(.*)a(.*)a(.*)a(.*)a(.*)a\1\2\3b"}
  with pytest.raises(RuntimeError, match="task t: checker regex .* takes longer than 1 s"):
    grade(tmp_path, checker, "a" * 300)


def test_changes_are_seen_without_result(tmp_path):
  """A tool that returned a plain value after a change had Con 0, and reading again was a repeat."""

  def make_tools():
    accounts = {"ann": 10}

    def balance(owner: str) -> int:
      return accounts[owner]

    def pay(owner: str, amount: int) -> str:
      accounts[owner] += amount
      return "paid"

    def told(owner: str) -> Result:
      accounts[owner] += 1
      return Result("told", changed=False)

    return [balance, pay, told]

  env = Custom(make_tools, write(tmp_path, one({"type": "exact", "value": "x"})))
  session = env.open(env.tasks("train")[0], 0)
  calls = [
    (ToolCall("balance", {"owner": "ann"}), False),
    (ToolCall("pay", {"owner": "ann", "amount": 2}), True),
    (ToolCall("pay", {"owner": "ann", "amount": 0}), False),
    (ToolCall("told", {"owner": "ann"}), False),
  ]
  for call, changed in calls:
    assert session.call(call).changed is changed, call


def test_a_checker_may_use_up_what_it_is_given(tmp_path):
  """A list that one verdict had emptied let the next answers pass."""
  path = tmp_path / "greedy.py"
  path.write_text(
    "def f() -> int:\n  return 1\n\nTOOLS = [f]\n\n"
    "def named(answer, tools, wanted):\n"
    "  for name in [w for w in wanted if w in answer]:\n    wanted.remove(name)\n"
    "  return not wanted\n"
  )
  env = Custom(str(path), write(tmp_path, one({"type": "named", "wanted": ["ann", "bob"]})))
  found = [env.open(env.tasks("train")[0], n).grade(a) for n, a in enumerate(["ann, bob", "no"])]
  assert found == [1, 0]


def test_tools_that_differ_with_the_state_are_refused(tmp_path):
  """The prompt shows every task the tools of the first one."""

  def make_tools(state):
    def balance(owner: str) -> int:
      return 1

    balance.__annotations__["owner"] = Literal[tuple(state)]
    return [balance]

  tasks = [one({"type": "none"}, id=name, state=[name]) for name in ("ann", "bob")]
  env = Custom(make_tools, write(tmp_path, *tasks))
  ann, bob = env.tasks("train")
  env.open(ann, 0)
  with pytest.raises(ValueError, match="task bob: balance is another tool with this task's state"):
    env.open(bob, 0)


@pytest.mark.parametrize(
  "checker", [{"type": "exact", "value": ""}, {"type": "contains_all", "values": ["a", "."]}]
)
def test_a_checker_that_asks_for_nothing_is_refused(tmp_path, checker):
  with pytest.raises(ValueError, match="says nothing: all answers have it or none"):
    grade(tmp_path, checker, "x")


def test_a_turn_that_nobody_can_judge_has_no_verdict(tmp_path):
  turns = [{"reply": "and?", "checker": {"type": "none"}}]
  env = Custom([add], write(tmp_path, one({"type": "none"}, turns=turns)))
  assert env.open(env.tasks("train")[0], 0).reply("bla").solved is None
