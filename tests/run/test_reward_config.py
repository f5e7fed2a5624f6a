import pytest
import tiny

from steptool_jax.environments.market import MarketEnvironment
from steptool_jax.run.parts import build

PRICES = {"environment__market__prices": True}


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (
      {"rewards__scheme": "orchestra_step"},
      r"config\.rewards\.scheme: 'orchestra_step' is not one of .*did you mean 'orchestra_steps'",
    ),
    (
      PRICES | {"rewards__scheme": "orchestra"},
      r"'orchestra' pays the last step only, but algorithm 'steptool' .* use 'orchestra_steps', or",
    ),
    (
      PRICES | {"rewards__scheme": "orchestra_steps", "algorithm": "ppo"},
      r"'orchestra_steps' pays every step, but algorithm 'ppo' .* use 'orchestra', or",
    ),
    (
      PRICES | {"rewards__scheme": "orchestra", "algorithm": "sft"},
      r"algorithm 'sft' reads no rewards; use 'steptool'",
    ),
    (
      PRICES | {"rewards__scheme": "orchestra", "algorithm": "eto"},
      r"algorithm 'eto' reads no rewards; use 'steptool'",
    ),
    (
      PRICES | {"rewards__scheme": "orchestra", "algorithm": "ppo", "rollout__samples": 1},
      r"compares the samples of a task, and config\.rollout\.samples is 1; set it to 2",
    ),
    (
      {"rewards__scheme": "orchestra", "algorithm": "ppo"},
      r"calls have none; set config\.environment\.market\.prices to True",
    ),
    (
      PRICES
      | {"rewards__scheme": "orchestra_steps"}
      | {f"rewards__orchestra__{name}": 0.0 for name in ("outcome", "cost", "latency")},
      r"config\.rewards\.orchestra: all weights are 0",
    ),
    ({"rewards__orchestra__cost": 1.5}, r"config\.rewards\.orchestra\.cost: must be in \[0, 1\]"),
    ({"rewards__filters__min_deviation": -0.1}, r"min_deviation: must not be negative"),
    (
      {"rewards__filters__min_deviation": 0.1, "rollout__samples": 1},
      r"min_deviation: with config\.rollout\.samples = 1 no group deviates",
    ),
    (
      {"rewards__filters__malformed": True, "data__path": "x.jsonl"},
      r"config\.rewards: stored trajectories .* leave scheme and filters",
    ),
    (
      {"environment__market__specialists": ("small",)},
      r"market\.specialists: set, but config\.environment\.market\.prices is False",
    ),
    ({"environment__market__preferences": True}, r"market\.preferences: set, but"),
    (
      PRICES | {"environment__market__specialists": ("smal",)},
      r"market\.specialists: there is no 'smal'; did you mean 'small'",
    ),
    (
      PRICES
      | {
        "environment__market__specialists": ("small",),
        "environment__name": "custom",
        "environment__functions": "tools.py",
        "environment__tasks": "tasks.jsonl",
      },
      r"they know nested_api and data_pipeline, not 'custom'",
    ),
    (PRICES | {"environment__market__asked": 0.5}, r"market\.asked: 0\.5, but there are no"),
    (PRICES | {"environment__market__spread": 0.5}, r"market\.spread: must be at least 1"),
  ],
)
def test_what_makes_no_sense_is_refused_with_the_nearest_choice(changes, words):
  with pytest.raises(ValueError, match=words):
    tiny.make(**changes)


@pytest.mark.parametrize(
  ("algorithm", "scheme"),
  [
    ("ppo", "orchestra"),
    ("steptool", "orchestra_steps"),
    ("steptool_no_step_rewards", "orchestra"),
    ("grpo", "orchestra"),
    ("grpo_step", "orchestra_steps"),
    ("gigpo", "orchestra"),
    ("archer", "orchestra"),
  ],
)
def test_schemes_that_fit_their_algorithm(algorithm, scheme):
  tiny.make(algorithm=algorithm, rewards__scheme=scheme, **PRICES)


def test_the_market_is_built_where_it_is_asked_for():
  specialists = {"environment__market__specialists": ("small", "large")}
  environment = build.build_environment(tiny.make(**PRICES, **specialists))
  assert isinstance(environment, MarketEnvironment)
  names = {spec.name for task in environment.tasks("train") for spec in task.tools}
  assert {"ask_small", "ask_large"} <= names
  assert "ask_medium" not in names
  assert not isinstance(build.build_environment(tiny.make()), MarketEnvironment)
