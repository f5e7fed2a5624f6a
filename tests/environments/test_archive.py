"""The environment whose calls pay off late: what is forgotten at the start fails at the end."""

import pytest
from rewards.replays import replay

from steptool_jax.environments.archive import Archive
from steptool_jax.rewards import rules
from steptool_jax.types import Code, ToolCall

ENV = Archive(num_train=300, num_heldout=200, seed=1)
SPLITS = ("train", "heldout")


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
    assert all(len(o.text) < 60 for o in observations)


def badge_uses(task):
  """(number of the call that gives the badge, of the one that needs it)."""
  names = [call.name for call in task.demonstration[:-1]]
  needs = [n for n in ("open_cabinet", "lock_cabinet", "collect_copy") if n in names]
  return names.index("sign_in"), names.index(needs[0])


def test_from_four_calls_on_a_call_is_of_use_three_and_more_calls_later():
  """The environment's purpose: no task of the study's range is without a late effect."""
  tasks = Archive(num_train=300, num_heldout=0, depths=(4, 6)).tasks("train")
  assert {t.metadata["depth"] for t in tasks} == {4, 5, 6}
  lags = [end - start for start, end in map(badge_uses, tasks)]
  assert min(lags) == 3
  assert max(lags) >= 5


def test_without_the_first_call_the_last_one_fails_and_nothing_mends_it():
  """Signing in late is refused, so no way around the badge leads to the code."""
  task = next(t for t in ENV.tasks("train") if t.metadata["composition"] == "file.code")
  sign_in, *others, opening = task.demonstration[:-1]
  _, observations = run(task, [*others, sign_in, opening])
  assert [o.code == Code.OK for o in observations] == [*[True] * len(others), False, False]
  assert "desk is closed" in observations[-2].text
  assert str(task.checker["answer"]) not in "".join(o.text for o in observations)


def test_a_copy_is_there_only_after_order_and_press():
  """An effect that shows only after another call; a press without an order makes nothing."""
  task = next(t for t in ENV.tasks("train") if t.metadata["composition"] == "file.seal")
  sign_in, find, order, press, collect = task.demonstration[:-1]
  _, observations = run(
    task, [sign_in, find, press, collect, order, collect, press, order, collect]
  )
  codes = [o.code == Code.OK for o in observations]
  assert codes == [True, True, True, False, True, False, True, True, True]
  assert [o.changed for o in observations] == [False] * 4 + [True, False, True, False, False]
  assert observations[-1].value == {"seal": task.checker["answer"]}


def test_what_is_locked_beside_the_task_fails_it():
  lock = next(t for t in ENV.tasks("train") if t.metadata["composition"] == "file.lock")
  session, _ = run(lock, lock.demonstration[:-2])
  assert session.grade("done") == 0.0, "nothing is locked yet"
  read = next(t for t in ENV.tasks("train") if t.metadata["composition"] == "file.code")
  *calls, opening = read.demonstration[:-1]
  session, _ = run(read, [*calls, opening, ToolCall("lock_cabinet", opening.arguments)])
  assert session.grade(read.demonstration[-1].answer) == 0.0


def test_names_and_compositions_are_disjoint():
  """A held-out task's names and ids, and the compositions left to it, are in no train task."""
  train, heldout = (ENV.tasks(split) for split in SPLITS)
  compositions = [{t.metadata["composition"] for t in tasks} for tasks in (train, heldout)]
  assert compositions[1] - compositions[0] == Archive.heldout_compositions
  values = [
    {str(v) for t in tasks for c in t.demonstration[:-1] for v in c.arguments.values()}
    for tasks in (train, heldout)
  ]
  assert not values[0] & values[1]
  frames = [{t.metadata["template"].split(" | ")[1] for t in tasks} for tasks in (train, heldout)]
  assert not frames[0] & frames[1]


def test_every_demonstrated_step_is_marked_and_a_detour_is_not():
  """Progress knows the late steps (queue, press) as well, although they give no value."""
  task = next(t for t in ENV.tasks("train") if t.metadata["composition"] == "file.seal")
  actions = [*task.demonstration]
  actions.insert(3, ToolCall("list_files", {}))
  marked = rules.annotate(task, replay(ENV, task, actions), causal=True)
  assert [step.contribution for step in marked.steps] == [1, 1, 1, 0, 1, 1, 0]
