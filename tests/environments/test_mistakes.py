import itertools
import random

import numpy as np
import pytest

from steptool_jax.environments.data_pipeline import DataPipeline
from steptool_jax.environments.mistakes import imperfect
from steptool_jax.environments.nested_api import NestedApi
from steptool_jax.types import Finish, ToolCall

ENVS = [NestedApi(150, 0, seed=1), DataPipeline(150, 0, seed=1)]


def pass_rate(env, rate, rng):
  solved = 0.0
  for task in env.tasks("train"):
    session = env.open(task, 0)
    actions = imperfect(env, task, rng, rate)
    assert isinstance(actions[-1], Finish)
    assert all(isinstance(a, ToolCall) for a in actions[:-1])
    names = {spec.name for spec in task.tools}
    for action in actions[:-1]:
      assert action.name in names
      session.call(action)
    solved += session.grade(actions[-1].answer)
  return solved / 150


@pytest.mark.parametrize("env", ENVS, ids=lambda e: e.name)
def test_rate_spoils_and_zero_is_the_demonstration(env):
  for task in env.tasks("train"):
    assert imperfect(env, task, random.Random(0), 0.0) == task.demonstration
  rates = [pass_rate(env, rate, random.Random(3)) for rate in (0.0, 0.3, 0.8)]
  assert rates[0] == 1
  assert 0.2 < rates[1] < 0.85
  assert rates[2] < 0.3


@pytest.mark.parametrize("env", ENVS, ids=lambda e: e.name)
def test_every_kind_of_mistake_happens(env):
  rng = random.Random(0)
  kinds = set()
  for task in env.tasks("train"):
    gold = task.demonstration
    actions = imperfect(env, task, rng, 0.3)
    tools = [a.name for a in gold if isinstance(a, ToolCall)]
    if any(a == b for a, b in itertools.pairwise(actions)):
      kinds.add("twice")
    if any(isinstance(a, ToolCall) and a.name not in tools for a in actions):
      kinds.add("other tool")
    if len(actions) < len(gold):
      kinds.add("short")
    if actions[-1] != gold[-1]:
      assert actions[-1] == Finish("none")
      kinds.add("given up")
  assert kinds == {"twice", "other tool", "short", "given up"}


@pytest.mark.parametrize("env", ENVS, ids=lambda e: e.name)
def test_no_value_is_used_before_it_is_known(env):
  """An imitator of values out of nowhere would learn to make values up."""
  rng = random.Random(2)
  for task in env.tasks("train"):
    known = 0  # gold calls whose results the demonstrator may have seen, and one more
    gold = [a for a in task.demonstration if isinstance(a, ToolCall)]
    for action in imperfect(env, task, rng, 0.5):
      if isinstance(action, ToolCall):
        allowed = [v for call in gold[: known + 1] for v in call.arguments.values()]
        assert all(v in allowed for v in action.arguments.values())
        known += known < len(gold) and action == gold[known]


def test_numpy_generators_fit_and_repeat():
  env = ENVS[0]
  task = env.tasks("train")[0]
  twice = [imperfect(env, task, np.random.default_rng(5), 0.7) for _ in range(2)]
  assert twice[0] == twice[1]


def test_bad_arguments():
  env = ENVS[0]
  task = env.tasks("train")[0]
  with pytest.raises(ValueError, match="rate"):
    imperfect(env, task, random.Random(0), 1.5)
  with pytest.raises(ValueError, match="belongs to nested_api"):
    imperfect(ENVS[1], task, random.Random(0), 0.5)
