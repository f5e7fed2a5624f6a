import dataclasses
import random

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewards.replays import replay, step, trajectory

from steptool_jax.environments.markets.market import Market, MarketEnvironment
from steptool_jax.environments.nested_api import NestedApi
from steptool_jax.rewards import orchestra
from steptool_jax.rewards.orchestra import Filters, Preference
from steptool_jax.rewards.rules import annotate, needed
from steptool_jax.rewards.shaping import shape
from steptool_jax.types import Code, Finish, Malformed, Observation, Status, Task, ToolCall


def made(calls, solved=1.0, status=Status.ANSWERED, task="t", reward=0.0):
  """calls: (tool, USD, seconds); a reward on the last step."""
  steps = [
    step(ToolCall(tool, {}), Observation("{}", Code.OK, cost=cost, latency=latency))
    for tool, cost, latency in calls
  ]
  steps.append(step(Finish("x"), reward=reward))
  return trajectory(Task(task, "x", "q", (), {}), steps, solved, status)


def total(group, *preferences):
  found = orchestra.final_rewards(group, preferences * len(group))
  assert all(tuple(parts) == orchestra.PARTS for parts in found)
  return [sum(parts.values()) for parts in found]


def test_latencies_10_and_20_with_equal_outcome_give_1_and_0():
  """The released code, which takes min and max of the negatives, gives 3.0 and 4.0."""
  group = [made([("f", 0.0, 10.0)]), made([("f", 0.0, 15.0), ("f", 0.0, 5.0)])]
  assert total(group, Preference(outcome=1.0, latency=1.0)) == [1.0, 0.0]
  assert total(group[::-1], Preference(outcome=1.0, latency=1.0)) == [0.0, 1.0]


def test_a_group_by_hand():
  group = [
    made([("f", 0.01, 2.0), ("g", 0.02, 1.0)]),  # 0.03 USD, 3 s, g once
    made([("g", 0.05, 4.0), ("g", 0.06, 5.0)]),  # 0.11 USD, 9 s, g twice
    made([("f", 0.01, 1.0)], solved=0.0),  # the cheapest and quickest, but wrong
    made([("f", 0.07, 1.0)], solved=0.5),  # half solved is not solved
  ]
  p = Preference(outcome=1.0, cost=0.5, latency=0.25, tools={"g": 0.8, "f": -0.4})
  found = orchestra.final_rewards(group, [p] * 4)
  # outcome 1; cost (0.11 - 0.03) / 0.10; latency (9 - 3) / 8; g 1 / 2 and f at most once: 0 of 1
  assert found[0] == pytest.approx(
    {"outcome": 1.0, "cost": 0.5 * 0.8, "latency": 0.25 * 0.75, "preference": 0.8 * 0.5}
  )
  # the costliest and slowest; g twice, f never
  assert found[1] == pytest.approx(
    {"outcome": 1.0, "cost": 0.0, "latency": 0.0, "preference": 0.8 + 0.4}
  )
  assert found[2] == found[3] == dict.fromkeys(orchestra.PARTS, 0.0)


rollouts = st.tuples(
  st.booleans(),
  st.lists(
    st.tuples(st.sampled_from("fgh"), st.sampled_from([0, 0.1, 0.2]), st.sampled_from([0, 1, 7])),
    max_size=4,
  ),
)
weight = st.floats(0, 1)


@given(
  st.lists(rollouts, min_size=1, max_size=6),
  weight,
  weight,
  weight,
  st.dictionaries(st.sampled_from("fgh"), st.floats(-1, 1).filter(bool)),
)
def test_equals_the_oracle(group, outcome, cost, latency, tools):
  made_group = [made(calls, float(solved)) for solved, calls in group]
  got = total(made_group, Preference(outcome, cost, latency, tools))
  expected = oracles.orchestra(
    [solved for solved, _ in group],
    [t.cost for t in made_group],
    [t.latency for t in made_group],
    {t: [sum(name == t for name, *_ in calls) for _, calls in group] for t in "fgh"},
    outcome,
    cost,
    latency,
    tools,
  )
  np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
  most = outcome + cost + latency + sum(map(abs, tools.values()))
  assert all(0 <= r <= most + 1e-9 for r in got)


def test_a_group_where_all_are_the_same_or_of_one_earns_nothing_and_is_no_nan():
  p = Preference(1.0, 1.0, 1.0, {"f": 1.0})
  assert total([made([("f", 0.1, 0.2)])] * 3, p) == [0.0] * 3
  assert total([made([("f", 0.1, 0.2)])], p) == [0.0]
  # The same calls in another order are the same sum to the last bit.
  a, b, c = ("f", 0.1, 0.1), ("f", 0.2, 0.2), ("f", 0.3, 0.3)
  assert total([made([a, b, c]), made([c, b, a])], p) == [0.0, 0.0]


def test_a_missing_rollout_moves_no_minimum_and_no_maximum():
  """An infrastructure error says nothing about the policy: peers let it move the group's scale."""
  p = Preference(1.0, 1.0, 1.0)
  group = [made([("f", 0.1, 1.0)]), made([("f", 0.3, 2.0)]), made([("f", 0.2, 4.0)], solved=0.0)]
  lost = made([("f", 9.0, 99.0)], solved=1.0, status=Status.INFRASTRUCTURE_ERROR)
  assert total([group[0], lost, *group[1:]], p) == [
    total(group, p)[0],
    0.0,
    *total(group, p)[1:],
  ]
  assert total([lost], p) == [0.0]


def test_groups_are_the_trajectories_of_a_task_in_any_order():
  p, q = Preference(latency=1.0, outcome=0.0), Preference(cost=1.0, outcome=0.0)
  quick, slow = made([("f", 2.0, 1.0)], task="a"), made([("f", 1.0, 3.0)], task="a")
  cheap, dear = made([("f", 1.0, 50.0)], task="b"), made([("f", 2.0, 70.0)], task="b")
  found = orchestra.final_rewards([quick, dear, slow, cheap], [p, q, p, q])
  assert [sum(parts.values()) for parts in found] == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"cost": 1.5}, r"preference\.cost is 1\.5: must be in \[0, 1\]"),
    ({"outcome": float("nan")}, r"preference\.outcome is nan"),
    ({"tools": {"f": -2}}, r"preference\.tools\['f'\] is -2: must be in \[-1, 1\]"),
  ],
)
def test_weights_are_checked(fields, match):
  with pytest.raises(ValueError, match=match):
    Preference(**fields)


def test_what_a_user_wants_stands_in_place_of_the_usual_weights():
  usual = Preference(0.9, 0.2, 0.3)
  assert usual.of({}) == usual
  assert usual.of({"cost": 1.0, "tools": {"f": -1.0}}) == Preference(0.9, 1.0, 0.3, {"f": -1.0})


# --- with step rewards ---

ENV = MarketEnvironment(NestedApi(25, 0, seed=4), Market(specialists=("small", "large")))


def rewarded(task, group, preference):
  """The group's trajectories under Eq. 2 plus step rewards."""
  finals = orchestra.final_rewards(group, [preference] * len(group))
  return [
    shape(annotate(task, t, causal=True), final=final, needed=needed(task))
    for t, final in zip(group, finals, strict=True)
  ]


def test_eq_2_is_the_last_steps_reward_and_parts_add_up():
  task = ENV.tasks("train")[0]
  group = [
    replay(ENV, task, actions)
    for actions in (task.demonstration, [task.demonstration[0], *task.demonstration])
  ]
  first, retry = rewarded(task, group, Preference(1.0, 0.5, 0.5))
  count = len(task.demonstration) - 1
  assert [s.reward for s in first.steps] == pytest.approx([1 / count] * count + [1.0])
  assert retry.steps[-1].reward == 0.0
  assert [s.reward for s in retry.steps] == pytest.approx(
    [1 / count, 0.0, *[1 / count] * (count - 1), 0.0]
  )
  names = {"success_calling", "contribution", *orchestra.PARTS}
  for t in (first, retry):
    assert set(t.reward_parts) == names
    assert sum(t.reward_parts.values()) == pytest.approx(sum(s.reward for s in t.steps))
  assert first.reward_parts == pytest.approx(
    {"success_calling": 0.0, "contribution": 1.0, "cost": 0.5, "latency": 0.5}
    | {"outcome": 0.0, "preference": 0.0}
  )


def test_a_retry_never_outscores_and_spam_earns_less_in_a_group():
  """Peers pay for every further call; here neither Eq. 2 with step rewards nor alone does."""
  rng = random.Random(0)
  for task in ENV.tasks("train"):
    gold = task.demonstration
    tools = [s for s in task.tools if not s.name.startswith("ask_")]
    spam = [ToolCall(s.name, dict.fromkeys(s.parameters["properties"], "x")) for s in tools]
    useless = [ToolCall("list_products", {}), ToolCall("search_help", {"text": "x"})]
    group = [
      replay(ENV, task, gold),
      replay(ENV, task, [gold[0], *gold]),
      replay(ENV, task, [ToolCall(gold[0].name, {"x": 1}), *gold]),
      replay(ENV, task, [Malformed("?"), *gold]),
      replay(ENV, task, [*useless, *gold]),
      replay(ENV, task, [*useless, *spam * 2], Status.STEP_BUDGET),
    ]
    preference = Preference(1.0, rng.random(), rng.random())
    steps = [
      sum(0.99**k * s.reward for k, s in enumerate(t.steps))
      for t in rewarded(task, group, preference)
    ]
    alone = total(group, preference)
    assert steps[0] > max(steps[1:])
    assert alone[0] >= max(alone[1:])
    assert steps[0] > 0.9 > 0.5 >= steps[-1]
    assert alone[-1] == 0.0


# --- filters ---


def kept(group, **fields):
  left, taken = orchestra.keep(group, Filters(**fields))
  return [group.index(t) for t in left], [
    taken[f"dropped_{name}"] for name in ("malformed", "unfinished", "even")
  ]


def even(task, *rewards):
  return [made([], task=task, reward=r) for r in rewards]


def test_filters_are_off_unless_asked_for():
  cut = dataclasses.replace(made([]), status=Status.TOKEN_BUDGET)
  assert kept([*even("a", 1, 1), cut]) == ([0, 1, 2], [0, 0, 0])


def test_groups_that_hardly_deviate_are_dropped_whole():
  # Deviations by hand: 0, 0.5, 0.0999…, 0.1.
  group = even("a", 1, 1) + even("b", 0, 1) + even("c", 0.5, 0.6998) + even("d", 0, 0.2)
  assert kept(group, min_deviation=0.1) == ([2, 3, 6, 7], [0, 0, 4])
  # A missing rollout leaves a smaller group; of one nothing is left to compare with.
  assert kept([*even("a", 0, 1), *even("b", 1)], min_deviation=0.1) == ([0, 1], [0, 0, 1])


def test_a_trajectory_counts_once_however_long_it_is():
  """In ToolOrchestra each turn is a sample, so that long trajectories weigh more."""
  long = made([("f", 0, 0)] * 9, reward=1.0)
  group = [long, *even("t", 0.8, 0.8, 0.8)]
  deviation = np.std([1.0, 0.8, 0.8, 0.8])  # 0.087; with ten entries for the long one 0.084
  assert kept(group, min_deviation=deviation - 1e-6)[0] == [0, 1, 2, 3]
  assert kept(group, min_deviation=deviation + 1e-6)[0] == []


def test_malformed_and_unfinished_trajectories_are_left_out_before_the_deviation_is_taken():
  wrong = made([], reward=0.0)
  wrong = dataclasses.replace(
    wrong, steps=(step(Malformed("?"), Observation("e", Code.MALFORMED)), *wrong.steps)
  )
  cut = dataclasses.replace(made([], reward=0.0), status=Status.STEP_BUDGET)
  group = [*even("t", 1, 1), wrong, cut]
  assert kept(group, malformed=True) == ([0, 1, 3], [1, 0, 0])
  assert kept(group, unfinished=True) == ([0, 1, 2], [0, 1, 0])
  assert kept(group, malformed=True, unfinished=True, min_deviation=0.1) == ([], [1, 1, 2])
