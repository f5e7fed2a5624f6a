import dataclasses
import importlib.util
import json
import pathlib

import pytest
import tiny

from steptool_jax import validation
from steptool_jax.config import Config, base_config
from steptool_jax.environments import base
from steptool_jax.learning.algorithms import ALGORITHMS
from steptool_jax.policy import families
from steptool_jax.policy.formats import hfconfig
from steptool_jax.run import train
from steptool_jax.run.parts import build

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def load(name):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("[!_]*.py")))
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
  ("arg", "expected"),
  [
    ("", ("nested_api", "steptool")),
    ("data_pipeline", ("data_pipeline", "steptool")),
    ("data_pipeline/ppo", ("data_pipeline", "ppo")),
    ("nested_api/grpo", ("nested_api", "grpo")),
  ],
)
def test_smollm2_takes_an_environment_too(arg, expected):
  """An environment was taken for an algorithm, or the algorithm behind it was dropped."""
  config = validation.validate(load("smollm2_135m").get_config(arg))
  assert (config.environment.name, config.algorithm) == expected


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
    ("lora.targets", ("qkv",), r"config\.lora\.targets: there is no 'qkv'; did you mean '[qkv]'"),
    ("archer.tau", 1.5, r"config\.archer\.tau: must be at most 1"),
    ("environment.market.spread", 0.5, r"market\.spread: must be at least 1"),
    ("environment.faults.timeout", 1.1, r"faults\.timeout: must be in \[0, 1\]"),
    ("rollout.max_steps", 0, r"config\.rollout\.max_steps: must be above 0"),
    ("rollout.search.width", 0, r"config\.rollout\.search\.width: must be above 0"),
    ("model.remat", "dot", r"config\.model\.remat: 'dot' is not one of .*did you mean 'dots'"),
    ("model.architecture.family", "gpt", r"architecture\.family: 'gpt' is not one of 'llama'"),
    # Nothing bounded these: the run ended in a traceback, in NaN or trained nonsense.
    ("train.optimizer.b1", 2.0, r"optimizer\.b1: must be below 1"),
    ("train.optimizer.eps", 0.0, r"optimizer\.eps: must be at least 1e-20"),
    ("train.optimizer.weight_decay", -0.1, r"optimizer\.weight_decay: must be in \[0, 1\]"),
    ("lora.alpha", -16.0, r"config\.lora\.alpha: must be above 0"),
    ("loss.entropy_coef", -0.1, r"config\.loss\.entropy_coef: must not be negative"),
    ("loss.kl_coef", 1e300, r"config\.loss\.kl_coef: must be at most 1000000000"),
    ("seed", 2**40, r"config\.seed: must be at most 2147483647"),
    ("serve.port", 70_000, r"config\.serve\.port: must be at most 65535"),
    ("rollout.tool_timeout", 1e12, r"config\.rollout\.tool_timeout: must be at most 86400"),
    ("rollout.temperature", 1e-300, r"config\.rollout\.temperature: must be at least 0.0001"),
    ("evaluation.temperature", 1e-300, r"config\.evaluation\.temperature: must be 0 \(greedy\)"),
    ("mesh.fsdp", 0, r"config\.mesh\.fsdp: 0; give a number of devices"),
    ("mesh.fsdp", -1, r"config\.mesh\.data: -1; give a number"),
    ("mesh.tensor", -2, r"config\.mesh\.tensor: must be at least -1"),
    ("model.architecture.head_dim", 31, r"architecture\.head_dim: 31 must be even"),
    ("model.architecture.num_kv_heads", 3, r"num_kv_heads: 3 does not divide num_heads = 4"),
    ("model.architecture.num_layers", 10**9, r"architecture\.num_layers: must be at most 2048"),
    ("environment.min_calls", 6, r"min_calls: 6 is more than max_calls = 5"),
    ("environment.num_train", -1, r"environment\.num_train: must not be negative"),
    ("lora.targets", ("q", "q"), r"config\.lora\.targets: names 'q' twice"),
    ("loss.surrogate", "dualclip", r"surrogate: 'dualclip' is not one of .*mean 'dual_clip'"),
    ("loss.dual_clip", 1.0, r"config\.loss\.dual_clip: must be above 1"),
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


@pytest.mark.parametrize(("name", "value"), [("ratio", "step"), ("surrogate", "cispo")])
def test_a_ratio_is_refused_where_the_loss_has_none(name, value):
  """It would be read by nothing, and a study of it would compare equals."""
  values = base_config().to_dict()
  values["loss"][name] = value
  validation.validate(values | {"algorithm": "steptool"})
  with pytest.raises(ValueError, match=rf"loss\.{name}: '{value}', but .* 'eto' has no ratio"):
    validation.validate(values | {"algorithm": "eto"})


def test_an_int_is_a_float_and_a_list_is_a_tuple():
  values = base_config().to_dict()
  values["advantage"]["gamma"] = 1
  values["lora"]["targets"] = ["q", "v"]
  config = validation.validate(values)
  assert config.advantage.gamma == 1.0
  assert isinstance(config.advantage.gamma, float)
  assert config.lora.targets == ("q", "v")


def test_no_adapter_is_refused_where_adapters_are_on():
  values = base_config().to_dict()
  values["lora"]["targets"] = ()
  validation.validate(values)
  values["lora"]["rank"] = 4
  with pytest.raises(ValueError, match=r"config\.lora\.targets: empty; choose from q, k"):
    validation.validate(values)


def test_a_config_of_an_older_version_is_compared_by_the_fields_that_we_have():
  """No run could be resumed after a field was added or removed otherwise."""
  config = validation.validate(base_config())
  saved = json.loads(validation.to_json(config))
  saved["simulator"]["http_retries"] = 9  # removed since
  del saved["advantage"]["omega"]  # added since
  assert validation.differences(config, saved) == []
  saved["loss"]["kl_coef"] = 7.0
  assert validation.differences(config, saved) == ["loss.kl_coef"]
  other = dataclasses.replace(config, advantage=dataclasses.replace(config.advantage, omega=0.5))
  assert validation.differences(other, saved) == ["advantage.omega", "loss.kl_coef"]


def test_an_environment_is_a_file_and_a_row(tmp_path, monkeypatch):
  """Nothing else has to know its name."""
  (tmp_path / "toy_world.py").write_text(
    "class Toy:\n"
    "  name = 'toy'\n"
    "  def __init__(self, size): self.size = size\n"
    "  def tasks(self, split): return [split] * self.size\n"
    "  def open(self, task, sample): return None\n"
    "def from_config(config, services): return Toy(config.environment.num_train)\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setitem(base.ENVIRONMENTS, "toy", "toy_world")
  values = base_config().to_dict()
  values["environment"] |= {"name": "toy", "num_train": 3}
  environment = build.build_environment(validation.validate(values))
  assert environment.tasks("train") == ["train"] * 3


def test_every_number_has_bounds():
  """A field without them would let 1e300, -5 or 2**70 through to where it is a traceback."""

  def unbounded(group, path="config"):
    for field in dataclasses.fields(group):
      value, bounds = getattr(group, field.name), field.metadata
      if dataclasses.is_dataclass(value):
        yield from unbounded(value, f"{path}.{field.name}")
      elif type(value) in (int, float) and (
        (bounds["above"] is bounds["least"] is None) or bounds["most"] is bounds["below"] is None
      ):
        yield f"{path}.{field.name}"

  assert not list(unbounded(Config()))


def test_weights_that_rounding_would_hold_are_refused(tmp_path):
  """With all weights in bfloat16 three quarters of them never moved, and no figure said so."""
  config = tiny.make(model__param_dtype="bfloat16", model__dtype="bfloat16")
  with pytest.raises(
    ValueError, match=r"param_dtype: 'bfloat16', but with lora.rank = 0 .*float32"
  ):
    train.run(config, tmp_path)
  assert load("steptool_offline").get_config("sft").model.param_dtype == "float32"


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_random_model_of_every_family_can_be_exported(family, tmp_path):
  """Gemma's was refused at the end of its training."""
  changes = {"path": "", "tokenizer": "compact", "architecture__family": family}
  changes |= {"architecture__num_layers": 6}
  if families.FAMILIES[family].experts:
    changes |= {"architecture__num_experts": 4, "architecture__experts_per_token": 2}
  config = tiny.make(**{f"model__{name}": value for name, value in changes.items()})
  made = build.random_model(config)
  raw = hfconfig.raw_config_of(made)
  hfconfig.check_same_model(made, raw)
  # transformers refuses fields of another type than its own, as a float for an int.
  (tmp_path / "config.json").write_text(json.dumps(raw))
  transformers = pytest.importorskip("transformers")
  assert transformers.AutoConfig.from_pretrained(tmp_path).hidden_size == made.hidden_size
