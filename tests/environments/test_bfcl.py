"""bfcl: our verdicts are those of the package's own checker, on gold, cut and perturbed calls."""

import random

import pytest

pytest.importorskip("bfcl_eval", reason="the optional package bfcl-eval is missing (--no-deps)")
pytest.importorskip("mpmath", reason="the optional package mpmath is missing")

from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker, multi_turn_utils
from environments.altering import KINDS, alter

from steptool_jax.environments.benchmarks import bfcl
from steptool_jax.rewards import rules
from steptool_jax.rollout.replaying import perform
from steptool_jax.types import Code, Finish, ToolCall

ENV = bfcl.Bfcl()
TASKS = [*ENV.tasks("train"), *ENV.tasks("heldout")]


def written(call):
  """A call as the package's model handlers write it, for its executor."""
  return f"{call.name}({','.join(f'{k}={v!r}' for k, v in call.arguments.items())})"


def official(task, turns, name):
  """The verdict of the package's own checker; turns: lists of calls, one step each."""
  entry, gold = ENV._package.of(task)
  decoded = [[[written(call)] for call in turn] for turn in turns]
  if len(decoded) != len(gold):
    return False  # as its runner says of a run that was cut
  kept = set(vars(multi_turn_utils))
  found = multi_turn_checker.multi_turn_checker(
    decoded, gold, entry, task.metadata["category"], name
  )
  for added in set(vars(multi_turn_utils)) - kept:  # instances live in its globals
    del vars(multi_turn_utils)[added]
  return found["valid"]


def turns_of(actions):
  turns = [[]]
  for action in actions:
    if isinstance(action, Finish):
      turns.append([])
    else:
      turns[-1].append(action)
  return turns[:-1]


def ours(task, turns):
  session = ENV.open(task, 0)
  for turn in turns[:-1]:
    for call in turn:
      session.call(call)
    if session.reply("done") is None:
      return False
  for call in turns[-1]:
    session.call(call)
  return session.grade("done") == 1.0


def test_splits_share_no_world():
  """The four categories of one number are variants of one task."""
  numbers = [{t.id.rsplit("_", 1)[1] for t in ENV.tasks(split)} for split in ("train", "heldout")]
  assert not numbers[0] & numbers[1]
  assert len(TASKS) == 800
  assert 0.2 < len(ENV.tasks("heldout")) / 800 < 0.4


def test_gold_trajectories_are_right_by_both():
  for task in TASKS:
    turns = turns_of(task.demonstration)
    assert ours(task, turns), task.id
    assert official(task, turns, "gold"), task.id


def perturbed(task, rng):
  """Calls left out, made twice, in another order, with another value, to nowhere; turns swapped."""
  turns = [list(turn) for turn in turns_of(task.demonstration)]
  for _ in range(rng.randint(1, 2)):
    full = [k for k, turn in enumerate(turns) if turn]
    turn = turns[rng.choice(full)] if full else turns[0]
    kind = rng.choice([*KINDS, "cut", "move", "extra"])
    k = rng.randrange(len(turn)) if turn else 0
    if kind == "cut":
      turns = turns[: rng.randint(1, len(turns))]
    elif kind == "extra":
      turns[rng.randrange(len(turns))].append(ToolCall("pwd", {}))
    elif turn and kind == "move":
      turns[rng.randrange(len(turns))].append(turn.pop(k))
    elif turn:
      alter(turn, k, kind, rng)
  return turns


def test_verdicts_on_perturbed_trajectories_are_the_packages():
  rng = random.Random(0)
  verdicts = []
  for k in range(240):
    task = rng.choice(TASKS)
    turns = perturbed(task, rng)
    verdicts.append(ours(task, turns))
    assert verdicts[-1] == official(task, turns, f"p{k}"), (task.id, turns)
  assert 30 < sum(verdicts) < 210  # both kinds are there


def test_replayed_demonstrations_are_solved_and_paid():
  rng = random.Random(1)
  for task in rng.sample(TASKS, 20):
    found = perform(ENV, task, task.demonstration)
    assert found.solved == 1.0, task.id
    marked = rules.annotate(task, found, causal=True)
    for step in marked.steps:
      if isinstance(step.action, ToolCall) and step.observation.code is Code.OK:
        assert step.contribution == 1.0, (task.id, step.action)


def test_a_call_keeps_its_arguments():
  """Some tools keep a list that they are given and add to it later: the record must not change."""
  task = next(t for t in TASKS if t.id == "bfcl/multi_turn_base_90")
  before = repr(task.demonstration)
  for _ in range(2):
    assert ours(task, turns_of(task.demonstration))
  assert repr(task.demonstration) == before


def test_withheld_functions_come_with_the_users_message():
  task = next(t for t in TASKS if t.metadata["category"] == "miss_func")
  entry, _ = ENV._package.of(task)
  ((turn, names),) = entry["missed_function"].items()
  assert not {spec.name for spec in task.tools} & set(names)
  session = ENV.open(task, 0)
  said = [session.reply("done").text for _ in range(int(turn))]
  assert all(name in said[-1] for name in names)
  assert "updated some more functions" in said[-1]


def test_nothing_that_is_written_is_evaluated():
  session = ENV.open(TASKS[0], 0)
  for name in ("_load_scenario", "__init__", "__class__", "kill", "eval", "import os"):
    assert session.call(ToolCall(name, {})).code in (Code.UNKNOWN_TOOL, Code.TOOL_ERROR)
  with pytest.raises(ValueError, match="malformed node"):
    bfcl._parsed("f(x=__import__('os').getcwd())")
