import json

import pytest

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
    ({"type": "number", "value": 3, "tolerance": 0.1}, ["3.2", "2.8", "3"], ["3.5", "three"]),
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
    ("[" * 100_000, "tasks.jsonl:2: "),
    ({**GOOD, "id": 7}, "2: field 'id' must be a non-empty string"),
    ({"id": "a", "checker": {"type": "exact", "value": 1}}, "2: field 'query'"),
    ({**GOOD, "id": "t"}, "2: id 't' is already used in line 1"),
    ({**GOOD, "id": "a", "quary": 1}, "2: unknown field 'quary'"),
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
