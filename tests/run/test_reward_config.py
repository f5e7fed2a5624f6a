import json

import pytest
import tiny

from steptool_jax import validation
from steptool_jax.environments.markets.market import MarketEnvironment
from steptool_jax.run.parts import build

PRICES = {"environment__market__prices": True}


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (
      {"rewards__scheme": "orchestra_step"},
      r"config\.rewards\.scheme: 'orchestra_step' is not one of .*did you mean 'orchestra_steps'",
    ),
    ({"rewards__spread": True}, r"rewards\.spread: True, but .* set advantage\.level to 'token'"),
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
    ({"rewards__source": "model"}, r"model\.path: '' with rewards\.source = 'model'"),
    ({"rewards__model__path": "x"}, r"model\.path: 'x' with rewards\.source = 'progress'"),
    (
      {"rewards__source": "model", "rewards__model__path": "x", "rewards__model__watch": 1},
      r"model\.watch: 1 iteration has no trend",
    ),
    (
      {"rewards__source": "model", "rewards__model__path": "x", "algorithm": "rft"},
      r"'model' gives chances, but algorithm 'rft' chooses",
    ),
    (
      {"rewards__source": "info_gain", "algorithm": "ppo"},
      r"'info_gain' is about steps, but algorithm 'ppo'.*use 'steptool'",
    ),
    (
      {"rewards__source": "info_gain", "data__path": "x"},
      r"stored trajectories .* leave source, scheme and filters",
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
    (
      {"rewards__shaping": "episode_mean"},
      r"config\.rewards\.shaping: 'episode_mean' reads the future.*use 'progress', or set "
      r"config\.rewards\.unsafe=True",
    ),
    (
      {"rewards__source": "hindsight", "algorithm": "grpo_step"},
      r"config\.rewards\.source: 'hindsight' reads the future.*use 'progress'",
    ),
    (
      {"rewards__shaping": "potential", "algorithm": "steptool_no_step_grained"},
      r"'potential' must cancel out.*ends an episode with every step",
    ),
    (
      {"rewards__shaping": "potential", "advantage__level": "token"},
      r"'potential' must cancel out.*level = 'token'",
    ),
    (
      {"environment__name": "harness", "environment__functions": "agent.py"}
      | {"environment__tasks": "tasks.jsonl", "sft__steps": 0, "model__tokenizer": "auto"}
      | {"rewards__source": "model", "rewards__model__path": "x"},
      r"source: 'model', but environment 'harness' pays with its own rewards",
    ),
    (
      {"rewards__shaping": "potential", "rewards__every": 0},
      r"'potential' must cancel out.*rewards.every = 0",
    ),
    (
      PRICES
      | {"rewards__source": "model", "rewards__model__path": "x"}
      | {"algorithm": "grpo", "rewards__scheme": "orchestra"},
      r"'model' gives chances, but rewards.scheme 'orchestra'",
    ),
    (
      {"rewards__spread": True, "advantage__level": "released"},
      r"rewards\.spread: True.* level 'released'",
    ),
    (
      {"advantage__bootstrap": ("step_budget",), "advantage__level": "released"},
      r"advantage\.bootstrap: level 'released'",
    ),
    (
      {"advantage__bootstrap": ("step_budget",), "critic__kind": "group"},
      r"advantage\.bootstrap: .*'group' takes what a state is worth from other samples",
    ),
    (
      {"advantage__bootstrap": ("step_budget",), "algorithm": "steptool_no_step_grained"},
      r"advantage\.bootstrap: .*every step is an episode",
    ),
    (
      {"advantage__level": "released", "algorithm": "steptool_no_step_grained"},
      r"advantage\.level: 'released' knows no episodes of one step",
    ),
    (
      {"algorithm": "archer", "critic__kind": "group"},
      r"critic\.kind: 'group', but algorithm 'archer' .* use 'ridge'",
    ),
    (
      {"algorithm": "sft", "loss__aggregation": "trajectory"},
      r"loss\.aggregation: 'trajectory', but it belongs to RL",
    ),
    (
      {"algorithm": "gspo", "loss__kl": "reward"},
      r"loss\.kl: 'reward', but algorithm 'gspo' divides by the deviation",
    ),
    (
      {"critic__kind": "group", "data__path": "x", "algorithm": "ppo"},
      r"critic\.kind: 'group' compares samples of a task, but of stored",
    ),
    (
      {"algorithm": "dr_grpo", "rollout__fold": 1, "train__minibatches": 2},
      r"aggregation: 'constant'.*set train\.minibatches to 1",
    ),
    (
      {"rewards__shaping": "prefix_means"},
      r"config\.rewards\.shaping: 'prefix_means' is not one of .*did you mean 'prefix_mean'",
    ),
    ({"rewards__weight": -1.0}, r"config\.rewards\.weight: must not be negative"),
    ({"rewards__orchestra__cost": 1.5}, r"config\.rewards\.orchestra\.cost: must be in \[0, 1\]"),
    ({"rewards__filters__min_deviation": -0.1}, r"min_deviation: must not be negative"),
    (
      {"rewards__filters__min_deviation": 0.1, "rollout__samples": 1},
      r"min_deviation: with config\.rollout\.samples = 1 no group deviates",
    ),
    (
      {"rewards__filters__malformed": True, "data__path": "x.jsonl"},
      r"config\.rewards: stored trajectories .* leave source, scheme and filters",
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


@pytest.mark.parametrize(
  "changes",
  [
    {"rewards__shaping": "episode_mean", "rewards__source": "hindsight", "rewards__unsafe": True},
    {"rewards__shaping": "episode_mean", "algorithm": "ppo"},  # pays outcomes alone
    {"rewards__shaping": "episode_mean", "data__path": "x.jsonl"},  # paid by the file
    {"rewards__shaping": "episode_mean", "annotate__input": "x.jsonl"},
    {"rewards__shaping": "sum"},
  ],
)
def test_what_reads_the_future_is_for_stored_trajectories_or_for_who_asks_for_it(changes):
  tiny.make(**changes)


def test_a_config_of_before_is_told_the_new_name():
  """The nearest name alone would be that of another field."""
  old = {"rewards": {"normalization": "mean"}}
  with pytest.raises(
    ValueError, match=r"normalization: no such field; use config\.rewards\.shaping"
  ):
    validation.validate(old)


def test_a_run_of_before_does_not_go_on_with_other_rewards():
  """Its saved config has no shaping: taken for today's default, it would be paid otherwise."""
  saved = json.loads(validation.to_json(tiny.make()))
  saved["rewards"] = {"alpha": 1.0, "normalization": "mean"}
  del saved["advantage"]["bootstrap"]
  found = validation.differences(tiny.make(), saved)
  assert found == ["advantage.bootstrap", "rewards.shaping", "rewards.source"]
