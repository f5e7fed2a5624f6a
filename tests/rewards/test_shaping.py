import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewards.replays import replay, step, trajectory

from steptool_jax.environments.data_pipeline import DataPipeline
from steptool_jax.environments.faults import Faults, FaultyEnvironment
from steptool_jax.environments.mistakes import imperfect
from steptool_jax.environments.nested_api import NestedApi
from steptool_jax.rewards.rules import annotate
from steptool_jax.rewards.shaping import shape
from steptool_jax.types import Code, Finish, Malformed, Status, Task, ToolCall

TASK = Task("t", "x", "q", (), {})


def made(marks, solved=1.0, status=Status.ANSWERED):
  """A trajectory with these (SC, Con) on its calls, and Finish unless it is truncated."""
  steps = [step(ToolCall("f", {}), None, success_calling=a, contribution=b) for a, b in marks]
  if status not in (Status.STEP_BUDGET, Status.TOKEN_BUDGET):
    steps.append(step(Finish("x")))
  return trajectory(TASK, steps, solved, status)


def rewards(*args, **options):
  return [s.reward for s in shape(*args, **options).steps]


@pytest.mark.parametrize(
  ("alpha", "sc", "con", "expected"),
  [
    (1, 1, 0.6, 0.8),  # the released annotations
    (1, 1, 0, 0.5),
    (1, 0, 0.4, 0.2),
    (1, 2 / 3, 1 / 3, 0.5),  # means over judge runs
    (1, 1, 1, 1.0),
    (0, 1, 0.7, 0.7),
    (3, 1, 0.2, 0.8),
    (0.25, 1, 0, 0.2),
  ],
)
def test_paper_numbers(alpha, sc, con, expected):
  assert rewards(made([(sc, con)]), alpha=alpha, normalization="none") == pytest.approx(
    [expected, 1]
  )


def test_fractions_survive():
  got = rewards(made([(0.7, 0.7)], solved=0.5))
  assert got == pytest.approx([0.7, 0.5], abs=1e-12)
  assert all(type(r) is float for r in got)


def test_mean_by_hand():
  marks = [(1, 1), (1, 0), (0, 0), (1, 0.6)]
  assert rewards(made(marks), normalization="mean") == pytest.approx([0.25, 0.125, 0, 0.2, 1])
  assert rewards(made(marks), normalization="none") == pytest.approx([1, 0.5, 0, 0.8, 1])
  assert rewards(made(marks)) == rewards(made(marks), normalization="mean")


def test_outcome_only():
  assert rewards(made([(1, 1), (1, 0)], 0.5), outcome_only=True) == [0, 0, 0.5]
  cut = made([(1, 1), (1, 0)], 0.0, Status.STEP_BUDGET)
  assert rewards(cut, outcome_only=True) == [0, 0]


def test_truncated_last_step_is_intermediate():
  cut = made([(1, 1), (1, 0)], 0.0, Status.TOKEN_BUDGET)
  assert rewards(cut, normalization="none") == [1, 0.5]
  assert rewards(cut, normalization="mean") == [0.5, 0.25]


def test_last_step_is_the_outcome_even_where_it_is_a_call():
  """Too many invalid calls in a row: terminated without Finish."""
  calls = made([(1, 1), (0, 0)], 0.0, Status.STEP_BUDGET)
  ended = dataclasses.replace(calls, status=Status.GAVE_UP)
  assert rewards(ended) == [1, 0]


def test_lone_answer_and_no_step():
  assert rewards(made([], 1.0)) == [1]
  assert rewards(made([], 0.0, Status.STEP_BUDGET)) == []


def test_infrastructure_error_earns_nothing():
  assert rewards(made([(1, 1)], 1.0, Status.INFRASTRUCTURE_ERROR)) == [0, 0]


@pytest.mark.parametrize(
  ("kind", "match"),
  [
    ({"alpha": -1}, "alpha"),
    ({"alpha": float("nan")}, "alpha"),
    ({"normalization": "sum"}, "normalization"),
  ],
)
def test_settings_are_checked(kind, match):
  with pytest.raises(ValueError, match=match):
    shape(made([(1, 1)]), **kind)


def test_marks_are_checked():
  with pytest.raises(ValueError, match=r"t, step 1: Con is 1\.5"):
    shape(made([(1, 1), (1, 1.5)]))
  with pytest.raises(ValueError, match="step 0: SC"):
    shape(made([(-0.1, 1)]))
  with pytest.raises(ValueError, match="solved is 2"):
    shape(made([(1, 1)], 2))


unit = st.floats(0, 1)


@given(st.lists(st.tuples(unit, unit), max_size=20), unit, st.floats(0, 10))
def test_mean_never_sums_above_one(marks, solved, alpha):
  got = rewards(made(marks, solved), alpha=alpha)
  assert -1e-9 <= sum(got[:-1]) <= 1 + 1e-9
  assert got[-1] == solved


@given(st.lists(st.tuples(unit, unit), min_size=1, max_size=8), st.integers(0, 7))
def test_a_failed_call_in_between_never_raises_the_return(marks, at):
  """Whatever the discount: earlier rewards shrink, later ones come later."""
  plain = rewards(made(marks))
  retried = rewards(
    made([*marks[: at % (len(marks) + 1)], (0, 0), *marks[at % (len(marks) + 1) :]])
  )
  for gamma in (1.0, 0.9):
    assert returns(retried, gamma) <= returns(plain, gamma) + 1e-9


def returns(got, gamma=1.0):
  return sum(r * gamma**k for k, r in enumerate(got))


ENVS = [NestedApi(30, 0, seed=4), DataPipeline(30, 0, seed=4)]


def total(env, task, actions, gamma=1.0, **options):
  return returns(rewards(annotate(task, replay(env, task, actions)), **options), gamma)


@pytest.mark.parametrize("gamma", [1.0, 0.95])
@pytest.mark.parametrize("env", ENVS, ids=lambda e: e.name)
def test_first_try_success_is_never_outscored(env, gamma):
  rng = random.Random(0)
  for task in env.tasks("train"):
    gold = task.demonstration
    best = total(env, task, gold, gamma)
    retries = [gold[0], *gold]  # repeated
    wrong_first = [ToolCall(gold[0].name, {"x": 1}), *gold]
    malformed_first = [Malformed("?"), *gold]
    spam = [ToolCall(s.name, gold[0].arguments) for s in task.tools if s.name != gold[0].name]
    for actions in (
      retries,
      wrong_first,
      malformed_first,
      [*gold[:-1], *gold[:-1], gold[-1]],
      [*spam, *gold],
      *(imperfect(env, task, rng, 0.4) for _ in range(5)),
    ):
      # A spoiled sequence that skips a call still passes on what that call would have told; under
      # a discount such foreknowledge pays, and no policy has it.
      if gamma == 1.0 or len(actions) >= len(gold):
        assert total(env, task, actions, gamma) <= best + 1e-9, actions
    for actions in (retries, wrong_first, malformed_first, [*gold[:-1], *gold]):
      assert total(env, task, actions, gamma) < best


@pytest.mark.parametrize("env", ENVS, ids=lambda e: e.name)
def test_spam_earns_less_than_answering(env):
  for task in env.tasks("train"):
    best = total(env, task, task.demonstration)
    spam = [ToolCall(s.name, dict.fromkeys(s.parameters["properties"], "x")) for s in task.tools]
    cut = replay(env, task, spam * 3, Status.STEP_BUDGET)
    assert returns(rewards(annotate(task, cut))) <= 0.5
    assert returns(rewards(annotate(task, cut))) < best / 3
    # Asking the same once more, after every useful call, is worth nothing even when it adds up.
    doubled = [a for call in task.demonstration[:-1] for a in (call, call)]
    repeated = total(env, task, [*doubled, task.demonstration[-1]], normalization="none")
    assert repeated <= total(env, task, task.demonstration, normalization="none")


def test_retries_after_injected_faults_earn_nothing_themselves():
  env = FaultyEnvironment(ENVS[0], Faults(seed=1, transient=1.0, max_consecutive=1))
  for task in env.tasks("train"):
    calls = [a for call in task.demonstration[:-1] for a in (call, call)]
    result = annotate(task, replay(env, task, [*calls, task.demonstration[-1]]))
    assert result.solved == 1
    marks = [(s.success_calling, s.contribution) for s in result.steps[:-1]]
    assert marks == [(0, 0), (1, 1)] * (len(calls) // 2)
    assert {s.observation.code for s in result.steps[:-1]} == {Code.UNAVAILABLE, Code.OK}
    assert sum(rewards(result)[:-1]) == pytest.approx(0.5)


# --- a retry, and spam, over all sequences of marks ---

useful = st.lists(st.tuples(st.just(1.0), unit), min_size=1, max_size=6)
wasted = st.sampled_from([(0.0, 0.0), (1.0, 0.0)])  # failed or repeated; executed, but no use
discounts = st.sampled_from([1.0, 0.99, 0.9])


@given(useful, st.lists(st.tuples(st.integers(0, 6), st.just((0.0, 0.0))), min_size=1, max_size=6))
def test_a_retry_never_outscores_a_first_try(marks, tries):
  """Failed tries before any of the calls, then the same calls: less at any discount and alpha."""
  for alpha in (0.0, 1.0, 5.0):
    first = rewards(made(marks), alpha=alpha)
    retried = rewards(made(with_others(marks, tries)), alpha=alpha)
    for gamma in (1.0, 0.9):
      assert returns(retried, gamma) <= returns(first, gamma)
    if alpha:
      assert sum(retried) < sum(first)


@given(st.integers(1, 6), st.lists(st.tuples(st.integers(0, 6), wasted), min_size=1), discounts)
def test_no_useless_call_raises_what_useful_ones_earn(count, others, gamma):
  """Here successful ones too: a policy that answers has nothing to gain from calls that it adds."""
  marks = [(1.0, 1.0)] * count
  assert returns(rewards(made(with_others(marks, others))), gamma) < returns(
    rewards(made(marks)), gamma
  )


@given(
  st.lists(st.just((1.0, 0.0)), min_size=1, max_size=30),
  st.lists(st.tuples(unit, unit), max_size=8),
  st.floats(0, 3),
  st.sampled_from([Status.STEP_BUDGET, Status.GAVE_UP, Status.ANSWERED]),
)
def test_spam_of_successful_calls_earns_less_than_an_answer(spam, marks, alpha, status):
  """However the spam ends, and however badly the way to the right answer went."""
  answered = returns(rewards(made(marks, 1.0), alpha=alpha), 0.99)
  assert returns(rewards(made(spam, 0.0, status), alpha=alpha), 0.99) < answered
  # What the paper's sum pays for it, and what a naive reward would:
  if len(spam) > 4:
    summed = rewards(made(spam, 0.0, status), alpha=1.0, normalization="none")
    assert sum(summed) > sum(rewards(made([(1.0, 1.0)]), normalization="none"))


def with_others(marks, others):
  """The marks in their order, with others at the places that they name."""
  out = [[mark] for mark in marks]
  for at, mark in others:
    out[at % len(marks)].insert(0, mark)
  return [mark for group in out for mark in group]


@given(
  st.lists(st.tuples(unit, unit), min_size=1, max_size=6),
  unit,
  st.floats(0, 5),
  st.sampled_from(list(Status)),
  st.sampled_from(["mean", "none"]),
  st.none() | st.dictionaries(st.sampled_from("abc"), unit),
)
def test_parts_add_up_to_the_rewards(marks, solved, alpha, status, normalization, final):
  """The last step may be a call too, whose marks are not paid."""
  steps = [step(ToolCall("f", {}), None, success_calling=a, contribution=b) for a, b in marks]
  shaped = shape(trajectory(TASK, steps, solved, status), alpha, normalization, False, final)
  assert sum(shaped.reward_parts.values()) == pytest.approx(sum(s.reward for s in shaped.steps))
  last = {"solved"} if final is None else set(final)
  assert set(shaped.reward_parts) == {"success_calling", "contribution", *last}
