"""Environment 'verifiers': one of that package's, whose agents talk to the policy's server.

Since 0.4 such an environment runs its own agents, tools and rubric against an OpenAI-compatible
endpoint, which is what environment 'harness' offers: here it is the `run` of one. The package reads
the tasks, plays the episode and says its reward; we record what was sampled, and pay that reward.
"""

import asyncio
import importlib
import json
import math
import os
import tomllib
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steptool_jax.config import Config
from steptool_jax.environments.base import SPLITS
from steptool_jax.serving.harness import Harness
from steptool_jax.types import Task

NAME, FIELD = "verifiers", "config.environment.verifiers"
_BLOCKS = ("env", "select")  # of the file that its own `eval` takes


class Verifiers(Harness):
  """The environment. which: id of an installed taskset, or a TOML file with [env] and [select].

  ValueError where the package, the file or the environment is not there, or is of a kind that
  cannot be trained on: without an end, or with several seats for the policy.
  """

  name = NAME

  def __init__(self, which: str, heldout_share: float, timeout_s: float):
    self.timeout_s, self._vf = timeout_s, _load()
    blocks = _blocks(which)
    try:
      self._config = self._vf.resolve_env_config(blocks["env"])
      taskset = self._vf.load_environment(self._config).taskset
      taskset = taskset.select(self._vf.SelectConfig(**blocks["select"]))
      theirs = list(taskset) if taskset.bounded else None
    except Exception as error:  # what the environment's own code raises
      raise ValueError(f"{FIELD}: {which}: {type(error).__name__}: {error}") from error
    if theirs is None:
      raise ValueError(f"{FIELD}: {which} has no last task; bound it: [select] limit in its file")
    self._check_seats(which)
    self._theirs: dict[str, Any] = {}
    found: dict[str, list[Task]] = {split: [] for split in SPLITS}
    for k, task in enumerate(theirs):
      name = f"{self._config.env_id}/{k if task.data.idx is None else task.data.idx}"
      self._theirs[name] = task
      share = zlib.crc32(_content(task)) % 10_000 / 10_000
      split = "heldout" if share < heldout_share else "train"
      record = {"record": {"id": name}}
      found[split].append(Task(name, NAME, task.data.prompt_text, (), {}, metadata=record))
    self._tasks = {split: tuple(tasks) for split, tasks in found.items()}
    self._served: tuple[Any, Any, Any] = (None, None, None)  # event loop, environment, its task

  def _check_seats(self, which: str) -> None:
    """One seat is the policy's: what others say must not be learnt, nor a second attempt."""
    seats = importlib.import_module("verifiers.v1.configs.agent").agent_config_fields(self._config)
    ours = [name for name, spec in seats.items() if spec.client is None]
    if len(ours) != 1:
      raise ValueError(
        f"{FIELD}: {which}: the policy can play one seat, and the seats without a client of their "
        f"own are {', '.join(ours) or 'none'}; give the others base_url and model in the file: "
        "[env.SEAT] model, [env.SEAT.client] base_url"
      )
    for block, retries in (
      ("env", self._config.retries),
      (f"env.{ours[0]}", seats[ours[0]].retries),
    ):
      if retries.max_retries or retries.rules:
        raise ValueError(
          f"{FIELD}: {which}: [{block}.retries] would put two attempts into one trajectory; leave "
          "it out: a run that fails is marked, and not learnt from"
        )

  async def run(self, task: Mapping[str, Any], base_url: str, api_key: str) -> dict[str, float]:
    """An episode of the package. RuntimeError where it failed: never trained on."""
    environment = await self._environment()
    variable = f"STEPTOOL_{uuid.uuid4().hex}"  # a client has the NAME of its key
    os.environ[variable] = api_key
    try:
      client = self._vf.EvalClientConfig(base_url=base_url, api_key_var=variable)
      context = self._vf.ModelContext(model="policy", client=client)
      episode = await environment.run_episode(self._theirs[task["id"]], context)
    finally:
      del os.environ[variable]
    return reward_of(episode, base_url)

  async def _environment(self) -> Any:
    """The package's environment, with its servers up as long as this event loop runs."""
    loop = asyncio.get_running_loop()
    if self._served[0] is not loop or (self._served[1].done() and self._served[1].exception()):
      ready = loop.create_future()
      self._served = loop, ready, asyncio.ensure_future(self._serve(ready))
    return await asyncio.shield(self._served[1])

  async def _serve(self, ready: asyncio.Future) -> None:
    """Until it is cancelled, as the harness does at the end of a rollout with all that is left."""
    try:
      environment = self._vf.load_environment(self._config)
      async with environment.serving():
        ready.set_result(environment)
        await asyncio.Event().wait()
    except Exception as error:
      if ready.done():
        raise
      ready.set_exception(error)


def reward_of(episode: Any, base_url: str) -> dict[str, float]:
  """What an episode pays: its reward goes to the last step. RuntimeError where it failed."""
  if not episode.ok:
    errors = [*episode.errors, *(e for t in episode.traces for e in t.errors)]
    why = f"{errors[-1].type}: {errors[-1].message}" if errors else "the episode is not ok"
    raise RuntimeError(why)
  ours = [t for t in episode.traces if t.agent.config.client.base_url == base_url]
  if len(ours) != 1:
    raise RuntimeError(f"the policy was asked for {len(ours)} traces, of which one can be paid")
  reward = float(ours[0].reward)
  if not math.isfinite(reward):
    raise RuntimeError(f"its reward is {reward}")
  return {"solved": min(max(reward, 0.0), 1.0), "rewards": reward}


def _load() -> Any:
  try:
    return importlib.import_module("verifiers.v1")
  except ImportError as error:
    raise ValueError(
      f"environment 'verifiers' needs the package verifiers, 0.4 or newer ({error}): pip install "
      "'steptool-jax[verifiers]'"
    ) from error


def _blocks(which: str) -> dict[str, dict[str, Any]]:
  """{"env": …, "select": …} of an id, or of a file."""
  if not which.endswith(".toml"):
    return {"env": {"taskset": {"id": which}}, "select": {}}
  try:
    read = tomllib.loads(Path(which).read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f"{FIELD}: {which}: {error}") from error
  if "env" not in read or read.keys() - set(_BLOCKS):
    raise ValueError(
      f"{FIELD}: {which} has {', '.join(read) or 'nothing'}; it must have [env] and may have "
      "[select]: model, sampling and how many runs there are, is said in the config's own fields"
    )
  return {name: read.get(name, {}) for name in _BLOCKS}


def _content(task: Any) -> bytes:
  """What a task is, wherever it stands: equal tasks lie in one split."""
  return json.dumps(task.data.model_dump(mode="json", exclude={"idx"}), sort_keys=True).encode()


def from_config(config: Config, services: Any) -> Verifiers:
  """The row of base.ENVIRONMENTS."""
  del services
  c = config.environment
  return Verifiers(c.verifiers, c.heldout_share, c.harness_timeout)
