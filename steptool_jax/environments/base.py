"""The contract of an environment: tasks with tools, private sessions, a checker made of rules.

Everything here is host side. A session belongs to one conversation and shares no state with any
other, so that the result of a rollout never depends on its neighbours.
"""

import importlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from steptool_jax.config import Config
from steptool_jax.types import Observation, Task, ToolCall

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
# Name in the config -> module with `from_config(config, services) -> Environment`; imported when it
# is asked for, since a run needs one of them only.
ENVIRONMENTS: dict[str, str] = {
  "nested_api": "steptool_jax.environments.nested_api",
  "data_pipeline": "steptool_jax.environments.data_pipeline",
  "archive": "steptool_jax.environments.archive",
  "invented": "steptool_jax.environments.invented.environment",
  "toolbench": "steptool_jax.toolbench.environment",
  "bfcl": "steptool_jax.environments.benchmarks.bfcl",
  "tau2": "steptool_jax.environments.benchmarks.tau2",
  "custom": "steptool_jax.environments.custom",
  "harness": "steptool_jax.serving.harness",
  "openenv": "steptool_jax.environments.benchmarks.openenv",
  "verifiers": "steptool_jax.serving.verifiers",
}
# Those whose agents call their tools themselves, and the model over HTTP (serving/harness.py).
AGENTS = ("harness", "verifiers")


# In a task's metadata, true: after a final answer the user may go on (Session.reply).
TURNS = "turns"
# In a task's metadata, text: what kind of task it is; held-out figures are told for each kind.
KIND = "kind"


@runtime_checkable
class Session(Protocol):
  """One attempt at one task: a private copy of the world.

  Two more members are there where they are needed. `side_by_side = True`: calls of one turn may
  run at the same time, since tools share nothing. `reply(answer) -> Observation | None`: of tasks
  with TURNS, the user's next message after a final answer, whose `solved` is the verdict on the
  turn that ends (None: nobody knows); None when the user has no more to say. Blocks as `call`.
  """

  def call(self, call: ToolCall) -> Observation:
    """Answers one call; blocks; safe from any thread. A tool failure is an observation."""
    ...

  def grade(self, answer: str | None) -> float:
    """IsSolved in {0, .5, 1} for this final answer in the present state; None = no answer."""
    ...

  def close(self) -> None:
    """Frees the private state; harmless when repeated."""
    ...


@runtime_checkable
class Environment(Protocol):
  name: str

  def tasks(self, split: Split) -> Sequence[Task]:
    """The tasks of a split, always in the same order; ValueError for another split name."""
    ...

  def open(self, task: Task, sample: int) -> Session:
    """A fresh session; `sample` numbers the attempts at one task (for seeds of simulators)."""
    ...


class Problem(NamedTuple):
  """What is wrong with a tool, or with one line of a tasks file."""

  task: str  # id, "" where it could not be read and for a tool
  reason: str  # with "file:line: " in front where it is a line's


def make(config: Config, services: Any = None, **options: Any) -> Environment:
  """The environment of config.environment, without market and faults.

  services: run/parts/services.py's Services, which toolbench and an MCP server's tools come from.
  """
  module = importlib.import_module(ENVIRONMENTS[config.environment.name])
  return module.from_config(config, services, **options)


def generator_fields(config: Config) -> dict[str, Any]:
  """The arguments of an environment that generates its tasks."""
  c = config.environment
  return {
    "num_train": c.num_train,
    "num_heldout": c.num_heldout,
    "seed": c.seed,
    "depths": (c.min_calls, c.max_calls),
    "tools_per_task": c.tools_per_task or None,
    "max_observation_chars": config.rollout.max_observation_chars,
  }


def check_split(split: str) -> Split:
  if split not in SPLITS:
    raise ValueError(f"split {split!r} does not exist: use one of {', '.join(SPLITS)}")
  return split
