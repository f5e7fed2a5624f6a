import importlib.util
import json
import pathlib

import pytest

from steptool_jax import validation
from steptool_jax.config import base_config
from steptool_jax.learning.algorithms import ALGORITHMS

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def load(name):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("*.py")))
def test_every_config_file_is_valid(name):
  module = load(name)
  config = validation.validate(module.get_config())
  assert f"configs/{name}.py" in module.__doc__, "the run command stands on top"
  assert validation.differences(config, json.loads(validation.to_json(config))) == []


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
@pytest.mark.parametrize("config", ["quickstart", "smollm2_135m", "stabletoolbench", "llama3_1_8b"])
def test_an_argument_picks_the_algorithm(config, name):
  config = load(config).get_config(name)
  if name == "sft":
    config.sft.steps = 1
  assert validation.validate(config).algorithm == name


@pytest.mark.parametrize(
  ("path", "value", "words"),
  [
    (
      "rollout.taks",
      3,
      r"config\.rollout\.taks: no such field; did you mean config\.rollout\.tasks",
    ),
    ("rollout.tasks", 2.5, r"config\.rollout\.tasks: int is needed, found float 2\.5"),
    ("rollout.tasks", True, r"config\.rollout\.tasks: int is needed"),
    ("rollout.tasks", 0, r"config\.rollout\.tasks: must be above 0"),
    ("advantage.gamma", 1.5, r"config\.advantage\.gamma: must be in \[0, 1\]"),
    ("advantage.gamma", float("nan"), r"config\.advantage\.gamma: must be finite"),
    ("loss.kl", "rewards", r"config\.loss\.kl: 'rewards' is not one of.*did you mean 'reward'"),
    ("algorithm", "stepTool", r"algorithm: no 'stepTool'; choose one of"),
    ("rollout.max_tokens", 4096, r"config\.train\.row_tokens: 512 is less than"),
    ("algorithm", "sft", r"config\.sft\.steps: 0, but algorithm 'sft'"),
    ("environment.name", "custom", r"config\.environment\.functions: a file is needed"),
    ("model", 3, r"config\.model: a group of fields is needed"),
    ("lora.targets", (1, 2), r"config\.lora\.targets: a tuple of strings"),
  ],
)
def test_bad_fields_are_refused_by_name(path, value, words):
  values = base_config().to_dict()
  *groups, last = path.split(".")
  target = values
  for group in groups:
    target = target[group]
  target[last] = value
  with pytest.raises(ValueError, match=words):
    validation.validate(values)


def test_an_int_is_a_float_and_a_list_is_a_tuple():
  values = base_config().to_dict()
  values["advantage"]["gamma"] = 1
  values["lora"]["targets"] = ["q", "v"]
  config = validation.validate(values)
  assert config.advantage.gamma == 1.0
  assert isinstance(config.advantage.gamma, float)
  assert config.lora.targets == ("q", "v")
