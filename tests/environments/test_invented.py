"""The environment whose tools nobody has seen: every task is solvable, strict, and of its own."""

import random
import re

import pytest

from steptool_jax.environments import names
from steptool_jax.environments.invented import words
from steptool_jax.environments.invented.environment import Invented
from steptool_jax.types import Code, ToolCall

ENV = Invented(num_train=150, num_heldout=100, seed=1)
SPLITS = ("train", "heldout")
FRAMES = (words.READ_FRAMES, words.SET_FRAMES, words.ADD_FRAMES, words.GIVE_FRAMES)


def run(task, calls):
  session = ENV.open(task, 0)
  return session, [session.call(call) for call in calls]


@pytest.mark.parametrize("split", SPLITS)
def test_the_demonstration_solves_every_task(split):
  for task in ENV.tasks(split):
    *calls, last = task.demonstration
    session, observations = run(task, calls)
    assert all(o.code == Code.OK for o in observations), task
    assert session.grade(last.answer) == 1.0, task
    assert session.grade(None) == 0.0
    assert len(calls) == task.metadata["depth"]
    names = [tool.name for tool in task.tools]
    assert len(set(names)) == len(names)
    assert {call.name for call in calls} <= set(names)


def test_a_wrong_answer_and_a_change_beside_the_task_fail():
  asked = [t for t in ENV.tasks("train") if t.checker["type"] == "value"]
  for task in asked:
    session, _ = run(task, task.demonstration[:-1])
    assert session.grade(f"1{task.checker['answer']}") == 0.0
  for task in (t for t in ENV.tasks("train") if t.checker["changes"]):
    *calls, last = task.demonstration
    session, _ = run(task, calls[:-1])
    assert session.grade(last.answer) == 0.0, "nothing has changed yet"
  reads = next(t for t in asked if not t.checker["changes"] and _setter(t))
  *calls, last = reads.demonstration
  session, observations = run(reads, [*calls, _setter(reads)])
  assert observations[-1].changed
  assert session.grade(last.answer) == 0.0


def _setter(task):
  """A call of this question's world that sets a field to a text, where there is one."""
  drawn = ENV._draw(task.metadata["split"], task.metadata["number"])
  for tool in drawn.world.tools:
    key, *values = tool.spec.parameters["required"]
    schema = tool.spec.parameters["properties"]
    if tool.does == "set" and schema[values[0]]["type"] == "string":
      return ToolCall(
        tool.spec.name,
        {key: next(iter(drawn.world.kinds[tool.kind].things))} | {values[0]: "something else"},
      )
  return None


def test_no_answer_is_known_before_the_call_that_tells_it():
  """Else a task could be solved without its calls."""
  for task in ENV.tasks("train"):
    if task.checker["type"] == "value" and not task.checker["changes"]:
      _, observations = run(task, task.demonstration[:-1])
      said = [task.query, *(o.text for o in observations[:-1])]
      answer = str(task.checker["answer"])
      assert not any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", s) for s in said), task
      assert answer in observations[-1].text


def test_sessions_are_private_and_tasks_a_function_of_the_seed():
  task = next(t for t in ENV.tasks("train") if t.checker["changes"])
  run(task, task.demonstration[:-1])
  session, _ = run(task, [])
  assert session.grade("done") == 0.0, "the other session's change is seen"
  again = Invented(num_train=20, num_heldout=0, seed=1).tasks("train")
  assert list(again) == list(ENV.tasks("train")[:20])
  assert again[0].query != Invented(num_train=1, num_heldout=0, seed=2).tasks("train")[0].query


def test_most_heldout_tools_and_all_made_up_words_are_new():
  """What is shared is English; what a held-out task is about has to be copied."""
  train = {tool.name for task in ENV.tasks("train") for tool in task.tools}
  held = [tool.name for task in ENV.tasks("heldout") for tool in task.tools]
  assert sum(name not in train for name in held) > 0.6 * len(held)
  made = [{words.made_up(random.Random(n), split) for n in range(2000)} for split in SPLITS]
  assert not made[0] & made[1]
  english = {*words.KINDS, *words.VALUES, *words.LINKS, *words.FIELDS}
  for split in SPLITS:
    frames = " ".join(
      [
        *(text for table in FRAMES for text in table[split]),
        *(question for _, questions in words.FIELDS.values() for question in questions),
        *words.THEN_TELL,
        *words.GREETINGS,
      ]
    )
    said = {w for task in ENV.tasks(split) for w in re.findall("[a-z]{7,}", task.query.lower())}
    invented = said - english - {*frames.lower().replace("?", " ").replace(":", " ").split()}
    assert len(invented) > 50
    assert [word for word in invented if not names.belongs(word, split)] == []


def test_depths_and_tools_are_bounded_and_bad_numbers_named():
  few = Invented(num_train=60, num_heldout=0, depths=(2, 3), tools_per_task=4).tasks("train")
  assert {t.metadata["depth"] for t in few} == {2, 3}
  assert max(len(t.tools) for t in few) == 4
  with pytest.raises(ValueError, match="environment.tools_per_task: 3, but tasks of up to 4 calls"):
    Invented(tools_per_task=3)
  with pytest.raises(ValueError, match="depths is 5 to 6: tasks have 1 to 4"):
    Invented(depths=(5, 6))
  with pytest.raises(ValueError, match="must not be negative"):
    Invented(num_train=-1)


def test_names_are_found_whatever_their_case_and_unknown_ones_are_said():
  task = next(
    t for t in ENV.tasks("train") for c in t.demonstration[:1] if c.name.startswith("find")
  )
  (call, *_), (argument, *_) = task.demonstration, task.demonstration[0].arguments
  _, (right, upper, wrong) = run(
    task,
    [
      call,
      ToolCall(call.name, {argument: call.arguments[argument].upper()}),
      ToolCall(call.name, {argument: "nobody at all"}),
    ],
  )
  assert right.text == upper.text
  assert wrong.code == Code.NOT_FOUND
  assert "nobody at all" in wrong.text
