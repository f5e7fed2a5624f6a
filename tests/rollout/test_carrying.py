"""Conversations of several rollouts: what is recorded, what the world has been through, groups."""

import dataclasses

import fakes
import pytest
from rollout.test_continuing import by_text, setting
from rollout.test_tree import ANSWER, LIMITS, Counter, chat_format, echo, task  # noqa: F401

from steptool_jax.rollout import carrying, chain
from steptool_jax.rollout.carrying import Carry, Unfinished
from steptool_jax.rollout.setting import Sampling
from steptool_jax.simulators.runner import ToolRunner
from steptool_jax.types import Code, Malformed, Observation, Status, Trajectory

SCRIPT = (echo(1), Malformed(""), echo(2), ANSWER)
LONG = dataclasses.replace(LIMITS, max_steps=4)


def roll(
  chat_format,  # noqa: F811
  environment,
  calls,
  begun,
  sessions,
  version=0,
  limits=LONG,
  script=SCRIPT,
):
  eng = fakes.ScriptedEngine(chat_format, by_text(*script))
  with ToolRunner(timeout_s=5, workers=2, retries=0) as runner:
    one = setting(eng, environment, chat_format, runner, limits)
    one = dataclasses.replace(one, sampling=Sampling(0, version, 1.0))
    carry = Carry(calls, begun, sessions)
    ((found,), _) = carrying.rollout(one, [(task(), 0)], carry)
  return found


def at_once(chat_format, limits=LONG):  # noqa: F811
  eng = fakes.ScriptedEngine(chat_format, by_text(*SCRIPT))
  with ToolRunner(timeout_s=5, workers=2, retries=0) as runner:
    one = setting(eng, Counter(), chat_format, runner, limits)
    (found,), _ = chain.rollout(one, [(task(), 0)])
  return found


def content(t):
  steps = [(s.tokens.tolist(), s.observation_tokens.tolist(), s.observation) for s in t.steps]
  timeless = [(a, b, o and dataclasses.replace(o, seconds=0.0)) for a, b, o in steps]
  return t.prompt_tokens.tolist(), timeless, t.status, t.solved


@pytest.mark.parametrize("stopped", [False, True])
def test_a_conversation_of_two_rollouts_is_that_of_one(stopped, chat_format):  # noqa: F811
  """Two LLM calls a rollout. Its session stays open; after a stop, a fresh one repeats the call."""
  environment, sessions = Counter(), {}
  first = roll(chat_format, environment, 2, (), sessions)
  assert isinstance(first, Unfinished)
  assert (len(first.trajectory.steps), list(sessions)) == (2, [("t", 0)])
  if stopped:
    sessions.popitem()[1].close()
  found = roll(chat_format, environment, 2, (first.trajectory,), sessions, version=1)
  assert content(found) == content(at_once(chat_format))
  assert found.policy_version == 0, "that of the policy that began it"
  assert (environment.opened, environment.open_sessions, sessions) == (1 + stopped, 0, {})
  assert environment.graded == [((1, 2), "7")], "what was called before has happened once"


def test_without_a_bound_it_ends(chat_format):  # noqa: F811
  found = roll(chat_format, Counter(), 0, (), {})
  assert content(found) == content(at_once(chat_format))


def test_budgets_are_those_of_the_whole_conversation(chat_format):  # noqa: F811
  """Three steps are allowed: one is left after two, and a call there spends the budget."""
  limits = dataclasses.replace(LONG, max_steps=3)
  sessions = {}
  first = roll(chat_format, Counter(), 2, (), sessions, limits=limits)
  found = roll(chat_format, Counter(), 2, (first.trajectory,), sessions, limits=limits)
  assert (found.status, len(found.steps)) == (Status.STEP_BUDGET, 3)
  assert content(found) == content(at_once(chat_format, limits))


def test_a_session_that_cannot_be_repeated_marks_the_whole(chat_format):  # noqa: F811
  """Tools that answer differently after a stop are no failure of the policy."""
  first = roll(chat_format, Counter(), 1, (), {})
  odd = Counter(answer=lambda session, call: Observation("another", Code.OK, 0))
  found = roll(chat_format, odd, 1, (first.trajectory,), {})
  assert (found.status, len(found.steps)) == (Status.INFRASTRUCTURE_ERROR, 1)
  assert odd.open_sessions == 0


def test_no_session_outlives_what_it_belongs_to(chat_format):  # noqa: F811
  """Of a conversation that another process goes on with now, an old session would come back calls
  behind its record, or be handed to a new conversation of the task."""
  environment = Counter()
  sessions = {("t", 7): environment.open(task(), 7)}
  roll(chat_format, environment, 0, (), sessions)
  assert (environment.open_sessions, sessions) == (0, {})


def test_a_rollout_that_fails_leaves_no_session(chat_format):  # noqa: F811
  """The next iteration begins at the record of before, and so must the world."""
  environment, sessions = Counter(), {}
  first = roll(chat_format, environment, 1, (), sessions)
  with pytest.raises(IndexError):
    roll(chat_format, environment, 3, (first.trajectory,), sessions, script=SCRIPT[:2])
  assert (environment.open_sessions, sessions) == (0, {})


def test_no_more_sessions_stay_open_than_there_are_slots(chat_format):  # noqa: F811
  """An MCP server is a process; what is closed repeats its calls."""
  environment, sessions = Counter(), {}
  eng = fakes.ScriptedEngine(chat_format, by_text(*SCRIPT))
  with ToolRunner(timeout_s=5, workers=2, retries=0) as runner:
    one = setting(eng, environment, chat_format, runner, LONG)
    jobs = [(task(), n) for n in range(5)]
    found, _ = carrying.rollout(one, jobs, Carry(2, (), sessions))
    begun = [f.trajectory for f in found]
    assert (len(sessions), environment.open_sessions) == (eng.slots, 2)
    found, _ = carrying.rollout(one, jobs, Carry(0, begun, sessions))
  assert [content(t) for t in found] == [
    content(dataclasses.replace(at_once(chat_format), sample=t.sample)) for t in found
  ]
  assert (environment.opened, environment.open_sessions, sessions) == (5 + 3, 0, {})


def test_values_are_those_that_a_checkpoint_holds(chat_format):  # noqa: F811
  """Rewards read values: a run that goes on in memory must not know more than one that stopped."""
  for value, kept in (((1, 2), [1, 2]), ({"a": {1}}, None), (float("nan"), None)):
    answers = Counter(answer=lambda session, call, v=value: Observation("x", Code.OK, v))
    sessions = {}
    first = roll(chat_format, answers, 1, (), sessions)
    assert first.trajectory.steps[0].observation.value == kept
    sessions.popitem()[1].close()


def some(name, sample):
  return Trajectory(name, sample, None, (), Status.ANSWERED)


def test_groups_are_whole():
  """Two samples each. a: one finished now, one before. b: one goes on. a's second place: whole."""
  found = [some("b", 0), Unfinished(some("b", 1)), some("a", 0), some("a", 3), some("a", 2)]
  whole, carried = carrying.complete_groups(found, [some("a", 1)], 2)
  assert [(t.task_id, t.sample) for t in whole] == [("a", 0), ("a", 1), ("a", 2), ("a", 3)]
  assert [(t.task_id, t.sample) for t in carried.unfinished] == [("b", 1)]
  assert [(t.task_id, t.sample) for t in carried.waiting] == [("b", 0)]
  whole, carried = carrying.complete_groups([some("b", 1)], carried.waiting, 2)
  assert [(t.task_id, t.sample) for t in whole] == [("b", 0), ("b", 1)]
  assert (carried.unfinished, carried.waiting) == ((), ())
