"""Rollouts that go on from the middle: what the engine sees, what the world has been through."""

import dataclasses

import fakes
import numpy as np
import pytest
from rollout.test_tree import ANSWER, LIMITS, Counter, chat_format, echo, task  # noqa: F401

from steptool_jax.rollout import branching, chain, continuing
from steptool_jax.rollout.setting import Sampling, Setting
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.runner import ToolRunner
from steptool_jax.types import Code, Finish, Malformed, Observation, Status, Step


def setting(eng, environment, chat_format, runner, limits=LIMITS):  # noqa: F811
  return Setting(eng, None, environment, chat_format, limits, runner, Sampling(0, 0, 1.0))


def by_text(*actions):
  """The n-th turn of every conversation is actions[n]: what stands in the slot decides."""
  return lambda text: actions[text.count("<|result|>")]


def recorded(chat_format, *actions, limits=LIMITS):  # noqa: F811
  eng = fakes.ScriptedEngine(chat_format, by_text(*actions))
  with ToolRunner(timeout_s=5, workers=2, retries=0) as runner:
    (found,), _ = chain.rollout(setting(eng, Counter(), chat_format, runner, limits), [(task(), 0)])
  return found


def go_on(chat_format, trajectory, actions, attempts=2, environment=None, limits=LIMITS):  # noqa: F811
  environment = environment or Counter()
  eng = fakes.ScriptedEngine(chat_format, by_text(*actions))
  states = continuing.starts(task(), trajectory)
  with ToolRunner(timeout_s=5, workers=2, retries=0) as runner:
    found = continuing.outcomes(
      setting(eng, environment, chat_format, runner, limits), states, attempts
    )
  assert environment.open_sessions == 0
  return found, eng, environment


def test_every_state_is_gone_on_from(chat_format):  # noqa: F811
  """Recorded: +1, +2, wrong answer. Those that go on call +5 first, then answer right: the world
  must hold what the recorded calls did, and the slot what was recorded, token by token."""
  t = recorded(chat_format, echo(1), echo(2), Finish("8"))
  found, eng, environment = go_on(chat_format, t, [echo(5), echo(5), ANSWER])
  assert found == [[1.0, 1.0]] * 3
  done = sorted(set(environment.graded))
  assert done == [((1, 2), "7"), ((1, 5), "7"), ((5, 5), "7")]
  after = [continuing.Start(task(), 0, t.prompt_tokens, t.steps[:k]).shown.tolist() for k in (1, 2)]
  contexts = [context for context, _ in eng.turns]
  assert all(contexts.count(shown) == 2 for shown in after)


def test_steps_that_were_made_count(chat_format):  # noqa: F811
  """Three steps are allowed: after two of them one is left, and a call there spends the budget."""
  t = recorded(chat_format, echo(1), echo(2), Finish("8"))
  found, _, environment = go_on(chat_format, t, [echo(5)] * 3 + [ANSWER], attempts=1)
  assert found == [[0.0]] * 3
  assert {len(done) for done, _ in environment.graded} == {3}


def test_invalid_calls_in_a_row_go_on_being_counted(chat_format):  # noqa: F811
  """Two malformed turns end it: one recorded and one after it, not two more."""
  limits = dataclasses.replace(LIMITS, max_invalid=2)
  t = recorded(chat_format, Malformed(""), ANSWER, limits=limits)
  found, eng, _ = go_on(chat_format, t, [Malformed("")] * 3, attempts=1, limits=limits)
  assert found == [[0.0], [0.0]]
  assert len(eng.turns) == 2 + 1


def test_a_world_that_answers_differently_is_no_outcome(chat_format):  # noqa: F811
  """A value of 0 would say that the step was bad; it says that the tools are not repeatable."""
  t = recorded(chat_format, echo(1), Finish("8"))
  odd = Counter(answer=lambda session, call: Observation("another sum", Code.OK, 0))
  found, _, _ = go_on(chat_format, t, [ANSWER, ANSWER], environment=odd)
  assert found == [[1.0, 1.0], []]


@pytest.mark.parametrize("again", ["hello", "goodbye", None])
def test_a_user_who_says_something_else_is_no_state_to_go_on_from(again):
  """A model that plays the user says other words: the session would not be the recorded one."""

  class Session:
    closed = False

    def reply(self, answer):
      return None if again is None else Observation(again, Code.OK)

    def close(self):
      self.closed = True

  class Environment:
    name = "talk"
    session = Session()

    def open(self, task, sample):
      return self.session

  ids = np.zeros(1, np.int32)
  step = Step(ids, ids.astype(np.float32), Finish("7"), Observation("hello", Code.OK))
  environment = Environment()
  if again == "hello":
    assert branching.replay(environment, task(), 0, (step,)) is environment.session
  else:
    with pytest.raises(InfrastructureError, match="the user answered differently"):
      branching.replay(environment, task(), 0, (step,))
  assert environment.session.closed == (again != "hello")


def test_keys_do_not_depend_on_other_states(chat_format):  # noqa: F811
  """A run that goes on after a stop, with other states in its round, must find the same values."""
  t = recorded(chat_format, echo(1), echo(2), Finish("8"))
  numbers = [s.number(0) for s in continuing.starts(task(), t)]
  assert len(set(numbers)) == 3
  assert numbers[1] == continuing.Start(task(), 5, t.prompt_tokens, t.steps[:1]).number(0)
  assert numbers[1] != continuing.starts(task(), t)[1].number(1)
  assert t.status is Status.ANSWERED
  assert np.all([n < 2**64 for n in numbers])


def test_it_stops_when_asked_to(chat_format):  # noqa: F811
  t = recorded(chat_format, echo(1), Finish("8"))
  eng = fakes.ScriptedEngine(chat_format, by_text(ANSWER, ANSWER))
  with ToolRunner(timeout_s=5, workers=2, retries=0) as runner:
    one = setting(eng, Counter(), chat_format, runner)
    with pytest.raises(chain.Interrupted):
      continuing.outcomes(one, continuing.starts(task(), t), 1, should_stop=lambda: True)
