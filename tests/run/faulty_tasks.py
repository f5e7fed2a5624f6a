"""A small custom environment with planted faults, each in a task of its own."""

import json
import pathlib
from typing import Any

TOOLS = '''
import time


def make_tools(state):
  accounts = dict(state or {"ann": 10, "bob": 5})

  def balance(owner: str) -> int:
    """Balance of an account."""
    return accounts[owner]

  def pay(owner: str, amount: int) -> str:
    """Pay into an account."""
    accounts[owner] += amount
    return "paid"

  def wait(seconds: float) -> str:
    """Waits."""
    time.sleep(seconds)
    return "waited"

  def mute(owner: str) -> int:
    return accounts[owner]

  def untyped(owner) -> int:
    """Has no schema."""
    return accounts[owner]

  return [balance, pay, wait, mute, untyped]


def always(answer, tools):
  return True


def has_balance(answer, tools, owner, want):
  return tools["balance"](owner) == want


def whole(answer, tools, want):
  return int(answer) == want
'''


def task(name: str, query: str, checker: dict[str, Any], *actions: Any, **fields: Any) -> dict:
  """A task of split train whose demonstration makes these calls: (tool, arguments)…, answer."""
  entries = [{"tool": t, "arguments": a} for t, a in actions[:-1]]
  entries += [{"answer": a} for a in actions[-1:]]
  record = {"id": name, "query": query, "checker": checker, "split": "train"}
  return record | ({"demonstration": entries} if entries else {}) | {"tools": SEEN} | fields


SEEN = ["balance", "pay", "wait"]
ANN = ("balance", {"owner": "ann"})
BOB = ("balance", {"owner": "bob"})


def number(value: float) -> dict[str, Any]:
  return {"type": "number", "value": value}


GOOD = [
  task("good", "What does Ann have?", number(10), ANN, "10"),
  task("good too", "What does Bob own?", number(5), BOB, "5", split="heldout"),
  task("rich", "What is Ann's balance?", number(70), ANN, "70", state={"ann": 70}),
]
# id -> (records, kind, words of the finding)
FAULTS: dict[str, tuple[list[Any], str, str]] = {
  "wrong": (
    [task("wrong", "And Bob?", number(6), BOB, "5")],
    "verdict",
    "its own checker gives its demonstration 0",
  ),
  "fails": (
    [task("fails", "And Eve?", number(1), ("balance", {"owner": "eve"}), "0")],
    "call",
    "call 1, balance: tool_error, error: KeyError: 'eve'",
  ),
  "recovers": (
    [task("recovers", "Eve, or Ann?", number(10), ("balance", {"owner": "eve"}), ANN, "10")],
    "call",
    "call 1, balance: tool_error",
  ),
  "hangs": (
    [task("hangs", "Wait.", number(77), ("wait", {"seconds": 3.0}), "77")],
    "call",
    "call 1, wait: timeout",
  ),
  "leak": (
    [task("leak", "what does ann have? ", number(10), ANN, "10", split="heldout")],
    "leak",
    "training has the same query: good",
  ),
  "empty": (
    [task("empty", "Anything?", {"type": "always"}, ANN, "10")],
    "wrong answer (empty)",
    "gives 1 to an empty answer",
  ),
  "echo": (
    [
      task(
        *("echo", "Is it 10 or 11?", {"type": "regex", "pattern": ".*10.*"}),
        *(ANN, "It is 10."),
      )
    ],
    "wrong answer (echo)",
    "gives 1 to the query given back",
  ),
  "other": (
    [
      task("other", "How much?", {"type": "regex", "pattern": r"\d+ coins"}, ANN, "10 coins"),
      task("other 2", "How few?", {"type": "regex", "pattern": "5 coins"}, BOB, "5 coins"),
    ],
    "wrong answer (other)",
    "gives 1 to another task's answer",
  ),
  "unseen": (
    [task("unseen", "Whose is it?", {"type": "exact", "value": "Herbert"}, ANN, "Herbert")],
    "answer",
    "its answer 'herbert' is in no result of its calls, nor in the query",
  ),
  "raises": (
    [task("raises", "As a word?", {"type": "whole", "want": 10}, ANN, "10")],
    "checker",
    "fails on a wrong answer",
  ),
  "room": (
    [task("room", "x " * 800 + "?", number(10), ANN, "10")],
    "room",
    "leaves no room for a step",
  ),
  "steps": (
    [
      task(
        "steps",
        "Pay in small coins.",
        number(88),
        *[("pay", {"owner": "bob", "amount": n}) for n in range(1, 8)],
        "88",
      )
    ],
    "fit",
    "takes 8 turns, rollout.max_steps is 4",
  ),
  "good": ([GOOD[0]], "line", "id 'good' is already used in line 1"),
  "unknown": (
    [task("unknown", "Which?", number(1), tools=["balanse"])],
    "line",
    "unknown tool 'balanse'",
  ),
}


def write(folder: pathlib.Path, records: list[Any], tools: str = TOOLS) -> dict[str, str]:
  """The two files; the config fields that name them."""
  (folder / "tools.py").write_text(tools)
  lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
  (folder / "tasks.jsonl").write_text("\n".join(lines) + "\n")
  return {
    "environment__name": "custom",
    "environment__functions": str(folder / "tools.py"),
    "environment__tasks": str(folder / "tasks.jsonl"),
  }
