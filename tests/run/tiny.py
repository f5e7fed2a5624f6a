"""A run that takes seconds, for tests: random weights, 40 tasks, 2 SFT steps, 3 RL iterations.

As a config file for main (--config=tests/run/tiny.py:lora) and as a module.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys

from steptool_jax import config as config_lib
from steptool_jax.validation import validate

ROOT = pathlib.Path(__file__).parents[2]


def get_config(arg=""):
  """':lora' puts adapters on; ':calls' takes the quickstart's model, whose calls reach tools."""
  config = config_lib.base_config()
  config.model.tokenizer, config.model.chat_format = "compact", "compact"
  a = config.model.architecture
  a.vocab_size, a.hidden_size, a.intermediate_size, a.num_layers = 512, 32, 48, 2
  a.num_heads, a.num_kv_heads, a.head_dim = 4, 2, 8
  e = config.environment
  e.num_train, e.num_heldout, e.tools_per_task, e.max_calls = 40, 10, 5, 2
  r = config.rollout
  r.tasks, r.samples, r.slots = 4, 2, 8
  r.max_tokens, r.max_steps, r.max_step_tokens, r.decode_chunk = 320, 4, 40, 8
  config.loss.logprob_chunk = 64
  # Random weights earn no reward; the bonus gives RL a gradient all the same.
  config.loss.entropy_coef = 0.1
  config.sft.steps, config.sft.batch, config.sft.micro_rows = 2, 4, 4
  config.sft.optimizer.learning_rate = 2e-2
  t = config.train
  t.iterations, t.minibatches, t.micro_rows, t.row_tokens = 3, 2, 4, 320
  t.optimizer.learning_rate = 2e-2
  config.evaluation.every, config.evaluation.tasks, config.evaluation.curve_tasks = 2, 4, 2
  config.checkpoint.every = 1
  if arg == "lora":
    config.lora.rank = 4
  if arg == "calls":
    config.model.path, config.model.tokenizer = "asset:quickstart", ""
    e.tools_per_task = 8
    r.max_steps, r.max_step_tokens, r.decode_chunk = 3, 24, 24
    config.sft.steps = config.evaluation.tasks = config.evaluation.every = 0
    t.minibatches, t.optimizer.learning_rate = 1, 1e-3
    # Adam divides by the gradient's size: where that is rounding noise, so would be the update.
    t.optimizer.eps = 1e-3
  return config


def make(arg="", **changes) -> config_lib.Config:
  """The frozen config; changes as sft__steps=0."""
  config = get_config(arg)
  for name, value in changes.items():
    *groups, last = name.split("__")
    target = config
    for group in groups:
      target = target[group]
    target[last] = value
  return validate(config)


def replace(config, **changes):
  """A frozen dataclass with changes; nested ones as sft__steps=0."""
  for name, value in changes.items():
    group, _, rest = name.partition("__")
    if rest:
      value = replace(getattr(config, group), **{rest: value})
    config = dataclasses.replace(config, **{group: value})
  return config


def command(workdir, *flags, config=f"{ROOT}/tests/run/tiny.py") -> list[str]:
  """main in a process of its own."""
  main_module = (sys.executable, "-m", "steptool_jax.main")
  return [*main_module, f"--config={config}", f"--workdir={workdir}", *flags]


def environment() -> dict[str, str]:
  paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
  return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}


def main(workdir, *flags, **kwargs) -> subprocess.CompletedProcess:
  return subprocess.run(
    command(workdir, *flags, **kwargs),
    env=environment(),
    capture_output=True,
    text=True,
    timeout=200,
    check=False,
  )
