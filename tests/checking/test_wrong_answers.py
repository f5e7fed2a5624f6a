"""Wrong answers: which are tried, and which checkers pass one."""

import pytest

from steptool_jax.checking import answers
from steptool_jax.checking.findings import ERROR, WARNING
from steptool_jax.environments.checkers import normal
from steptool_jax.simulators.runner import ToolRunner
from steptool_jax.types import Finish, Task


def task(answer="12", query="How many has Bob?", checker=None):
  demonstration = (Finish(answer),) if answer is not None else ()
  return Task("t", "fake", query, (), checker or {"type": "exact", "value": answer}, demonstration)


class Fake:
  """An environment whose checker is a function of the answer."""

  name = "fake"

  def __init__(self, check):
    self.check = check

  def open(self, task, sample):
    return self

  def grade(self, answer):
    return float(self.check(answer))

  def close(self):
    pass


def tried(*args):
  return {w.kind: w.text for w in answers.wrong_answers(*args)}


def test_what_is_tried():
  found = answers.wrong_answers(task(), ["7", "12", "12.0", " 12.", "12.4", "90"])
  texts = [(w.kind, w.text) for w in found]
  assert texts[:2] == [("empty", ""), ("echo", "How many has Bob?")]
  assert sorted(t for k, t in texts if k == "other") == ["12.4", "7", "90"]
  assert texts[-1] == ("list", "7, 12.4, 12, 90")


def test_nothing_that_may_be_right_is_tried():
  assert "empty" not in tried(task(""), [])
  assert "echo" not in tried(task("How many has Bob?"), [])
  assert "list" not in tried(task(), [])
  assert "other" not in tried(task(None, checker={"type": "contains_all", "values": ["x"]}), ["X."])


@pytest.mark.parametrize(
  ("checker", "tried_too"),
  [
    ({"type": "number", "value": 12, "tolerance": 0.5}, []),
    ({"type": "number", "value": 12}, ["12.4"]),
    ({"type": "near_enough"}, []),  # a function of the user's own, which may have a tolerance
  ],
)
def test_numbers_within_the_checkers_tolerance_are_not_tried(checker, tried_too):
  found = answers.wrong_answers(task(checker=checker), ["12.4", "90"])
  assert [w.text for w in found if w.kind == "other" and w.text != "90"] == tried_too


@pytest.mark.parametrize(
  ("check", "kinds"),
  [
    (lambda a: a == "12", set()),
    (lambda a: True, {"empty", "echo", "other", "list"}),
    (lambda a: "Bob" in a, {"echo"}),
    (lambda a: normal(a).isdigit(), {"other"}),
    (lambda a: "12" in a, {"list"}),
  ],
)
def test_checkers_that_pass_one_are_named(check, kinds):
  wrong = answers.wrong_answers(task(), ["7", "90"])
  with ToolRunner(timeout_s=5.0) as runner:
    found = answers.passing(Fake(check), task(), wrong, runner)
  assert {f.kind for f in found} == {f"wrong answer ({kind})" for kind in kinds}
  assert all(f.level == (WARNING if "list" in f.kind else ERROR) for f in found)
  assert all(f.task == "t" for f in found)


def test_a_checker_that_hangs_or_raises_is_an_error():
  import threading

  hang = threading.Event()
  wrong = answers.wrong_answers(task(), ["7"])
  with ToolRunner(timeout_s=0.1) as runner:
    (hung,) = answers.passing(Fake(lambda a: hang.wait(5)), task(), wrong, runner)
    hang.set()
    (raised,) = answers.passing(Fake(lambda a: {}[a]), task(), wrong, runner)
  assert "takes longer than 0.1 s" in hung.what
  assert "the checker fails on a wrong answer" in raised.what
  assert hung.level == raised.level == ERROR


def test_without_a_demonstration_the_right_answer_in_another_writing_is_not_tried():
  number = {"type": "number", "value": 1234, "tolerance": 1}
  assert "other" not in tried(task(None, checker=number), ["1,234", "$1235"])
  assert tried(task(None, checker=number), ["1,236"])["other"] == "1,236"
  found = answers.wrong_answers(task(None, checker={"type": "regex", "pattern": "5|6"}), ["6"])
  assert [w.level for w in found if w.kind == "other"] == [WARNING]
