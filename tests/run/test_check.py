"""--mode=check: planted faults are named, clean sets are clean, nothing that hangs hangs it."""

import json
import pathlib
import sys
import time

import faulty_tasks
import pytest
import tiny

from steptool_jax.run import check
from steptool_jax.run.checks import environments
from steptool_jax.run.parts import watchdog


def checked(folder, **changes):
  """(summary, findings, rows) of a check in this process."""
  config = tiny.make(**changes)
  summary = check.run(config, folder)
  document = json.loads((folder / "summary_check.json").read_text())
  assert document | summary == document
  rows = [json.loads(line) for line in (folder / "check.jsonl").read_text().splitlines()]
  return summary, document["findings"], rows


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
  """Everything planted at once."""
  folder = tmp_path_factory.mktemp("faulty")
  planted = [record for records, _, _ in faulty_tasks.FAULTS.values() for record in records]
  fields = faulty_tasks.write(folder, faulty_tasks.GOOD + planted + ['{"id": "cut", '])
  started = time.monotonic()
  found = checked(folder, **fields, rollout__tool_timeout=0.3, rollout__max_tokens=320)
  return *found, time.monotonic() - started


def test_the_watchdog_hears_of_all_that_is_the_users(tmp_path, monkeypatch):
  """A tool that held the interpreter's lock froze --mode=check without a word."""
  heard = []

  class Hears(watchdog.Watchdog):
    def during(self, what):
      heard.append(what.partition(" ")[0])
      return super().during(what)

  monkeypatch.setattr(environments, "Watchdog", Hears)
  fields = faulty_tasks.write(tmp_path, faulty_tasks.GOOD)
  checked(tmp_path, **fields, rollout__tool_timeout=3.0)
  assert {"opening", "grading", "balance"} <= set(heard), set(heard)


@pytest.mark.parametrize("name", faulty_tasks.FAULTS)
def test_a_planted_fault_is_named(faulty, name):
  _, kind, words = faulty_tasks.FAULTS[name]
  found = [f for f in faulty[1] if f["task"] == name and f["kind"] == kind]
  assert any(words in f["what"] for f in found), [f for f in faulty[1] if f["task"] == name]
  assert all(f["remedy"] for f in found)


def test_a_failing_call_is_an_error_unless_the_demonstration_recovers(faulty):
  levels = {f["task"]: f["level"] for f in faulty[1] if f["kind"] == "call"}
  assert levels == {"fails": "error", "hangs": "error", "recovers": "warning"}


def test_faults_of_tools_and_of_unreadable_lines(faulty):
  texts = {(f["level"], f["kind"]): f["what"] for f in faulty[1] if not f["task"]}
  assert "'owner': has no type hint" in texts["error", "tool"]
  assert "tasks.jsonl" in texts["error", "line"]
  assert texts["warning", "room"].startswith("1 of ")


def test_what_is_right_has_no_finding(faulty):
  right = {record["id"] for record in faulty_tasks.GOOD} - {"good"}  # whose id comes twice
  assert not [f for f in faulty[1] if f["task"] in right]
  assert not [f for f in faulty[1] if f["task"] == "good" and f["kind"] != "line"]


def test_the_summary_counts_and_a_hanging_tool_does_not_hang_it(faulty):
  summary, findings, rows, seconds = faulty
  assert summary["exit_code"] == 1
  assert summary["errors"] == sum(f["level"] == "error" for f in findings) > 8
  assert sum(summary["found"].values()) == len(findings)
  assert [f["level"] for f in findings] == sorted(f["level"] for f in findings)
  by_id = {row["id"]: row for row in rows}
  assert by_id["rich"]["solved"] == 1
  assert by_id["rich"]["success_calling"] == by_id["rich"]["contribution"] == [1.0]
  assert by_id["hangs"]["codes"] == ["timeout"]
  assert not by_id["steps"]["fits"]
  assert summary["not_reached"] == 0
  assert seconds < 60


def test_a_tool_that_always_raises_is_named_once(tmp_path):
  """Warnings of 48 calls hid that a tool never worked."""
  names = ("eve", "joe", "tim")
  broken = [
    faulty_tasks.task(
      *(name, f"{name}, or Ann?", faulty_tasks.number(10)),
      *(("mute", {"owner": name}), faulty_tasks.ANN, "10"),
      tools=["balance", "mute"],
    )
    for name in names
  ]
  summary, findings, _ = checked(tmp_path, **faulty_tasks.write(tmp_path, broken[:2]))
  assert summary["found"]["error: tool"] == 1  # 'untyped'; two calls are few
  (tmp_path / "more").mkdir()
  fields = faulty_tasks.write(tmp_path / "more", [*faulty_tasks.GOOD, *broken])
  summary, findings, _ = checked(tmp_path / "more", **fields)
  (found,) = [f for f in findings if f["level"] == "error" and "untyped" not in f["what"]]
  assert found["what"] == "mute raised in all of its 3 calls of these demonstrations"


def test_wrong_lines_are_not_said_to_be_an_empty_split(tmp_path):
  """Where every line of a split is wrong, advice about splits was misleading."""
  wrong = ['{"id": "cut", ', faulty_tasks.GOOD[1]]
  _, findings, _ = checked(tmp_path, **faulty_tasks.write(tmp_path, wrong), sft__steps=0)
  assert {f["kind"] for f in findings if f["level"] == "error"} == {"line", "tool"}


def test_tasks_whose_calls_can_earn_nothing_are_named(tmp_path):
  """With checkers that have no value, and no demonstrations, steptool was its outcome-only twin."""
  has = {"type": "has_balance", "owner": "ann", "want": 15}
  silent = [faulty_tasks.task(name, f"Pay 5 to Ann, {name}!", has) for name in ("x", "y")]
  valued = [faulty_tasks.task(f"z{n}", f"Who has {n}?", faulty_tasks.number(n)) for n in (0, 5)]
  fields = faulty_tasks.write(tmp_path, [*silent, *valued, faulty_tasks.GOOD[1]])
  (warned,) = [f for f in checked(tmp_path, **fields)[1] if f["kind"] == "reward"]
  assert warned["what"].startswith("no call can earn anything in 2 of 4 training tasks (x is")
  for others in ({"algorithm": "grpo"}, {"rewards__shaping": "failed_cost"}):
    assert not [f for f in checked(tmp_path, **fields, **others)[1] if f["kind"] == "reward"]


def test_kinds_that_training_never_shows_are_named(tmp_path, capsys):
  """A whole kind of held-out tasks without a demonstration ended at 0 %, and nothing said why."""
  records = [
    *(record | {"kind": "who"} for record in faulty_tasks.GOOD),
    faulty_tasks.task("s", "Bob?", faulty_tasks.number(5), kind="short"),
    faulty_tasks.task("h", "Ann?", faulty_tasks.number(10), kind="short", split="heldout"),
    faulty_tasks.task("n", "And?", faulty_tasks.number(10), kind="new", split="heldout"),
  ]
  fields = faulty_tasks.write(tmp_path, records)
  _, findings, _ = checked(tmp_path, **fields, check__tasks=2)
  assert [f["what"] for f in findings if f["kind"] == "kind"] == [
    "held-out tasks of kind 'new' have no training task of their kind",
    "held-out tasks of kind 'short' have no demonstration of their kind in training",
  ]
  assert (
    "4 of 6 tasks were looked at (check.tasks of each split; 0 = all); 3 demonst"
    in capsys.readouterr().out
  )
  _, findings, _ = checked(tmp_path, **fields, sft__steps=0)
  assert len([f for f in findings if f["kind"] == "kind"]) == 1


@pytest.mark.parametrize(
  "environment",
  [
    {},
    {"environment__name": "data_pipeline", "environment__max_calls": 4},
    {"environment__name": "archive", "environment__max_calls": 5},
  ],
)
def test_embedded_environments_are_clean(tmp_path, environment):
  fields = {"rollout__max_tokens": 500, "train__row_tokens": 500, "rollout__max_steps": 6}
  changes = {"environment__tools_per_task": 6, "environment__min_calls": 2} | fields
  if environment:
    changes["environment__min_calls"] = 3
  summary, findings, rows = checked(
    tmp_path, **changes | environment, rollout__max_step_tokens=64, check__tasks=25
  )
  assert findings == []
  assert (summary["exit_code"], summary["checked_tasks"], len(rows)) == (0, 35, 35)
  assert summary["solved"] == summary["fitting"] == 35
  assert summary["success_calling"] == summary["contribution"] == 1.0
  assert not (tmp_path / "tokenizer").exists(), "a check binds nothing"


def test_a_set_over_an_mcp_server(tmp_path):
  pytest.importorskip("mcp", reason="the optional package mcp is missing")
  server = pathlib.Path(tiny.ROOT / "tests/simulators/mcp_server.py")
  add = ("add", {"a": 20, "b": 3})
  tools = ["add", "slow_double", "fail"]
  tasks = [
    faulty_tasks.task(
      "sum",
      "Twice 20+3?",
      faulty_tasks.number(46),
      add,
      ("slow_double", {"a": 23}),
      "46",
      tools=tools,
    ),
    faulty_tasks.task(
      "failing",
      "Fail.",
      faulty_tasks.number(3),
      ("fail", {"reason": "no"}),
      "4",
      tools=tools,
      split="heldout",
    ),
  ]
  fields = faulty_tasks.write(tmp_path, tasks) | {"environment__functions": ""}
  summary, findings, rows = checked(
    tmp_path, **fields, environment__mcp=(sys.executable, str(server))
  )
  named = {(f["task"], f["kind"]) for f in findings}
  assert {("failing", "call"), ("failing", "verdict"), ("", "description")} <= named
  assert not [f for f in findings if f["task"] == "sum"]
  assert [row["solved"] for row in rows] == [1, 0]
  assert summary["exit_code"] == 1


def test_a_model_that_is_not_there_costs_the_token_counts_only(tmp_path):
  summary, findings, rows = checked(
    tmp_path, model__path="SmolLM2-135M-Instruct", model__tokenizer="", check__tasks=5
  )
  (finding,) = findings
  assert (finding["level"], finding["kind"]) == ("warning", "tokenizer")
  assert "'SmolLM2-135M-Instruct'" in finding["what"]
  assert (summary["exit_code"], summary["solved"], len(rows)) == (0, 10, 10)


def test_what_cannot_be_opened_is_a_finding(tmp_path):
  fields = faulty_tasks.write(tmp_path, faulty_tasks.GOOD)
  summary, findings, rows = checked(tmp_path, **fields | {"environment__functions": "none.py"})
  assert [f["kind"] for f in findings] == ["environment"]
  assert "none.py does not exist" in findings[0]["what"]
  assert (summary["exit_code"], rows) == (1, [])


def test_the_command_prints_the_table_and_exits_with_1(tmp_path):
  wrong = faulty_tasks.FAULTS["wrong"][0]
  fields = faulty_tasks.write(tmp_path, faulty_tasks.GOOD + wrong)
  flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
  flags.append("--config.environment.functions=" + fields["environment__functions"])
  done = tiny.main(tmp_path / "run", "--mode=check", *flags)
  assert done.returncode == 1, done.stderr
  table = done.stdout + done.stderr
  assert "error    wrong" in table
  assert "errors: 2" in done.stdout, done.stdout  # and the tool without a type hint
  assert "Traceback" not in table
  assert (tmp_path / "run/summary_check.json").exists()
