import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewards.replays import replay, step, trajectory

from steptool_jax.config import Rewards
from steptool_jax.environments.data_pipeline import DataPipeline
from steptool_jax.environments.faults import Faults, FaultyEnvironment
from steptool_jax.environments.mistakes import imperfect
from steptool_jax.environments.nested_api import NestedApi
from steptool_jax.rewards.rules import annotate, needed
from steptool_jax.rewards.shaping import SHAPINGS, shape
from steptool_jax.types import TRUNCATED, Code, Finish, Malformed, Status, Task, ToolCall

TASK = Task("t", "x", "q", (), {})


def made(marks, solved=1.0, status=Status.ANSWERED):
  """A trajectory with these (SC, Con) on its calls, and Finish unless it is truncated."""
  steps = [step(ToolCall("f", {}), None, success_calling=a, contribution=b) for a, b in marks]
  if status not in TRUNCATED:
    steps.append(step(Finish("x")))
  return trajectory(TASK, steps, solved, status)


def rewards(found, shaping="progress", alpha=1.0, weight=1.0, **rest):
  options = Rewards(shaping=shaping, alpha=alpha, weight=weight)
  return [s.reward for s in shape(found, options, **rest).steps]


# --- by hand ---


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
  assert rewards(made([(sc, con)]), "sum", alpha) == pytest.approx([expected, 1])


@pytest.mark.parametrize(
  ("every", "expected"),
  [
    (1, [0.5, 1, 0, 0.5, 1]),
    (2, [0, 1.5, 0, 0.5, 1]),
    (3, [0, 0, 1.5, 0, 1.5]),
    (0, [0] * 4 + [3]),
  ],
)
def test_steps_that_are_paid_together(every, expected):
  """The sum stays: what differs in a study of granularity is when it is paid, and nothing else."""
  found = made([(1, 0), (1, 1), (0, 0), (1, 0)])
  got = [s.reward for s in shape(found, Rewards(shaping="sum", every=every)).steps]
  assert got == pytest.approx(expected)


def test_fractions_survive():
  got = rewards(made([(0.7, 0.7)], solved=0.5), "sum")
  assert got == pytest.approx([0.7, 0.5], abs=1e-12)
  assert all(type(r) is float for r in got)


# Four calls: good, useless, failed, good for the most part; m = 1, .5, 0, .8; two are needed.
MARKS = [(1, 1), (1, 0), (0, 0), (1, 0.6)]
ANSWERED = {
  "sum": [1, 0.5, 0, 0.8, 1],
  "prefix_mean": [1, -0.25, -0.25, 0.075, 1],  # M = 1, .75, .5, .575
  "progress": [0.5, 0, 0, 0.3, 1],  # P = .5, .5, .5, .8
  # gamma .5: .25; .25 - .5, twice; .4 - .5; 1 - .8
  "potential": [0.25, -0.25, -0.25, -0.1, 0.2],
  "failed_cost": [0, 0, -0.1, 0, 1],
  "episode_mean": [0.25, 0.125, 0, 0.2, 1],
}
CUT = ANSWERED | {"potential": [0.25, -0.25, -0.25, -0.5]}  # Phi = 0 after the budget is spent


@pytest.mark.parametrize("name", SHAPINGS)
def test_every_row_by_hand(name):
  options = {"needed": 2, "gamma": 0.5}
  assert rewards(made(MARKS), name, **options) == pytest.approx(ANSWERED[name])
  for status in TRUNCATED:
    cut = made(MARKS, 0.0, status)
    assert rewards(cut, name, **options) == pytest.approx(CUT[name][:4])
  half = rewards(made(MARKS), name, weight=0.5, **options)
  outcome = [0, 0, 0, 0, 1]
  assert half == pytest.approx([(a + b) / 2 for a, b in zip(ANSWERED[name], outcome, strict=True)])


def test_a_cut_that_bootstraps_keeps_its_potential():
  """V of the state after it holds what is left to earn, - Phi included: 0 there would be paid."""
  for status in TRUNCATED:
    cut = made(MARKS, 0.0, status)
    got = rewards(cut, "potential", needed=2, gamma=0.5, bootstrap=(status.value,))
    assert got == pytest.approx(ANSWERED["potential"][:4])


def test_progress_never_exceeds_the_goal():
  """Where nobody knows how many contributions are needed, one is all."""
  assert rewards(made([(1, 1)] * 3), needed=2) == pytest.approx([0.5, 0.5, 0, 1])
  assert rewards(made([(1, 1)] * 2)) == pytest.approx([1, 0, 1])
  assert rewards(made([(1, 0.4)] * 2)) == pytest.approx([0.4, 0.4, 1])


def test_outcome_only():
  for name in SHAPINGS:
    assert rewards(made(MARKS, 0.5), name, outcome_only=True) == [0, 0, 0, 0, 0.5]
    cut = made([(1, 1), (1, 0)], 0.0, Status.STEP_BUDGET)
    assert rewards(cut, name, outcome_only=True) == [0, 0]


def test_last_step_is_the_outcome_even_where_it_is_a_call():
  """Too many invalid calls in a row: terminated without Finish."""
  calls = made([(1, 1), (0, 0)], 0.0, Status.STEP_BUDGET)
  ended = dataclasses.replace(calls, status=Status.GAVE_UP)
  assert rewards(ended) == [1, 0]
  assert rewards(ended, "potential", gamma=0.5) == [0.5, -1]


@pytest.mark.parametrize("name", SHAPINGS)
def test_lone_answer_and_no_step(name):
  assert rewards(made([], 1.0), name) == [1]
  assert rewards(made([], 0.0, Status.STEP_BUDGET), name) == []


@pytest.mark.parametrize("name", SHAPINGS)
def test_infrastructure_error_earns_nothing(name):
  assert rewards(made([(1, 1), (0, 0)], 1.0, Status.INFRASTRUCTURE_ERROR), name) == [0, 0, 0]


@pytest.mark.parametrize(
  ("kind", "match"),
  [
    ({"alpha": -1}, "alpha"),
    ({"alpha": float("nan")}, "alpha"),
    ({"shaping": "mean"}, "shaping is 'mean': must be one of sum, prefix_mean"),
  ],
)
def test_settings_are_checked(kind, match):
  with pytest.raises(ValueError, match=match):
    shape(made([(1, 1)]), Rewards(**kind))


def test_marks_are_checked():
  with pytest.raises(ValueError, match=r"t, step 1: Con is 1\.5"):
    shape(made([(1, 1), (1, 1.5)]))
  with pytest.raises(ValueError, match="step 0: SC"):
    shape(made([(-0.1, 1)]))
  with pytest.raises(ValueError, match="solved is 2"):
    shape(made([(1, 1)], 2))


# --- over all sequences of marks ---

unit = st.floats(0, 1)
marks_of = st.lists(st.tuples(unit, unit), max_size=8)
statuses = st.sampled_from([s for s in Status if s is not Status.INFRASTRUCTURE_ERROR])


@given(marks_of, marks_of, marks_of, st.tuples(statuses, statuses), st.tuples(unit, unit))
def test_what_a_step_earned_does_not_change_when_later_steps_do(past, one, other, ends, solved):
  """A reward that a later call can still shrink is charged to nobody, and so calls without use
  pay. `episode_mean` is such a reward, and the only one."""
  a, b = (
    made(past + rest, s, end) for rest, s, end in zip((one, other), solved, ends, strict=True)
  )
  # A step that is the last one has the outcome, and the end, in its reward.
  same = min(len(past), len(a.steps) - 1, len(b.steps) - 1)
  for name, row in SHAPINGS.items():
    earned = [rewards(t, name, needed=3, gamma=0.9)[: max(same, 0)] for t in (a, b)]
    if row.causal:
      assert earned[0] == earned[1], name


def test_the_mean_of_an_episode_reads_the_future():
  short, long = (
    rewards(made([(1, 1)]), "episode_mean"),
    rewards(made([(1, 1), (0, 0)]), "episode_mean"),
  )
  assert (short[0], long[0]) == (1, 0.5)
  assert [name for name, row in SHAPINGS.items() if not row.causal] == ["episode_mean"]


@given(marks_of, unit, st.floats(0, 5), st.sampled_from([0, 2, 5]), statuses)
def test_rows_equal_loops(marks, solved, alpha, goal, status):
  """A second writing of the formulas, each over whole lists with NumPy."""
  gamma = 0.9
  found = made(marks, solved, status)
  count = len(marks)
  sc, con = (np.array([m[i] for m in marks]) for i in range(2))
  m = (alpha * sc + con) / (alpha + 1)
  means = np.concatenate([[0.0], np.cumsum(m) / np.arange(1, count + 1)])
  progress = np.concatenate([[0.0], np.minimum(1, np.cumsum(con) / max(goal, 1))])
  last = [] if status in TRUNCATED else [solved]
  phi = [*progress, 0.0] if last else [*progress[:count], 0.0]
  shaped = gamma * np.array(phi[1:]) - phi[:-1] + ([0.0] * count + last)
  expected = {
    "sum": [*m, *last],
    "prefix_mean": [*np.diff(means), *last],
    "progress": [*np.diff(progress), *last],
    "potential": shaped,
    "failed_cost": [*(0.1 * (sc - 1)), *last],
    "episode_mean": [*(m / max(count, 1)), *last],
  }
  assert set(expected) == set(SHAPINGS)
  for name, theirs in expected.items():
    mine = rewards(found, name, alpha, needed=goal, gamma=gamma)
    assert mine == pytest.approx(list(theirs), abs=1e-9), name


@given(marks_of, marks_of, unit, statuses, statuses)
def test_potentials_add_up_to_nothing(one, other, solved, a, b):
  """Discounted, whatever a trajectory does: so the best policy is that of the outcome alone."""
  for marks, status in ((one, a), (other, b)):
    found = made(marks, solved, status)
    plain = returns(rewards(found, outcome_only=True), 0.9)
    assert returns(rewards(found, "potential", needed=3, gamma=0.9), 0.9) == pytest.approx(plain)


@given(marks_of, unit, st.integers(0, 5), statuses)
def test_progress_sums_up_to_one_at_most(marks, solved, goal, status):
  got = rewards(made(marks, solved, status), needed=goal)
  earned = sum(got) - (0 if status in TRUNCATED else solved)
  assert -1e-9 <= earned <= 1 + 1e-9
  assert min(got, default=0) >= 0


def returns(got, gamma=1.0):
  return sum(r * gamma**k for k, r in enumerate(got))


ENVS = [NestedApi(30, 0, seed=4), DataPipeline(30, 0, seed=4)]


def total(env, task, actions, gamma=1.0, causal=True):
  marked = annotate(task, replay(env, task, actions), causal)
  return returns(rewards(marked, needed=needed(task)), gamma)


@pytest.mark.parametrize("gamma", [1.0, 0.95])
@pytest.mark.parametrize("env", ENVS, ids=lambda e: e.name)
def test_first_try_success_is_never_outscored(env, gamma):
  rng = random.Random(0)
  for task in env.tasks("train"):
    gold = task.demonstration
    best = total(env, task, gold, gamma)
    assert gamma < 1 or best == pytest.approx(2)
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
      assert total(env, task, actions, 0.95) < total(env, task, gold, 0.95)


@pytest.mark.parametrize("env", ENVS, ids=lambda e: e.name)
def test_spam_earns_less_than_answering(env):
  for task in env.tasks("train"):
    spam = [ToolCall(s.name, dict.fromkeys(s.parameters["properties"], "x")) for s in task.tools]
    cut = annotate(task, replay(env, task, spam * 3, Status.STEP_BUDGET), causal=True)
    assert returns(rewards(cut, needed=needed(task))) <= 0.5
    assert returns(rewards(cut, "prefix_mean")) <= 0.5


def test_retries_after_injected_faults_earn_nothing_themselves():
  env = FaultyEnvironment(ENVS[0], Faults(seed=1, transient=1.0, max_consecutive=1))
  for task in env.tasks("train"):
    calls = [a for call in task.demonstration[:-1] for a in (call, call)]
    for causal in (True, False):
      result = annotate(task, replay(env, task, [*calls, task.demonstration[-1]]), causal)
      assert result.solved == 1
      marks = [(s.success_calling, s.contribution) for s in result.steps[:-1]]
      assert marks == [(0, 0), (1, 1)] * (len(calls) // 2)
      assert {s.observation.code for s in result.steps[:-1]} == {Code.UNAVAILABLE, Code.OK}
      assert sum(rewards(result, needed=needed(task))[:-1]) == pytest.approx(1)
      assert sum(rewards(result, "prefix_mean")[:-1]) == pytest.approx(0.5)


@given(
  st.lists(st.tuples(unit, unit), min_size=1, max_size=6),
  unit,
  st.floats(0, 5),
  st.sampled_from(list(Status)),
  st.sampled_from(sorted(SHAPINGS)),
  st.none() | st.dictionaries(st.sampled_from("abc"), unit),
)
def test_parts_add_up_to_the_rewards(marks, solved, alpha, status, name, final):
  """The last step may be a call too, whose marks are not paid."""
  steps = [step(ToolCall("f", {}), None, success_calling=a, contribution=b) for a, b in marks]
  found = trajectory(TASK, steps, solved, status)
  shaped = shape(found, Rewards(alpha=alpha, shaping=name, weight=0.7), final=final, needed=2)
  assert sum(shaped.reward_parts.values()) == pytest.approx(sum(s.reward for s in shaped.steps))
  last = {"solved"} if final is None else set(final)
  assert set(shaped.reward_parts) == {"success_calling", "contribution", *last}
  if name == "failed_cost":
    assert shaped.reward_parts["contribution"] == pytest.approx(0)
  if name in ("progress", "potential"):
    assert shaped.reward_parts["success_calling"] == pytest.approx(0)
