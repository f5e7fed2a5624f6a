"""What every mode starts from: all parts of a run, built once, and rollouts with them."""

import contextlib
import dataclasses
import pathlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from steptool_jax.config import Config
from steptool_jax.environments.base import Environment
from steptool_jax.evaluation.metrics import rollout_metrics
from steptool_jax.learning.algorithms import get_algorithm
from steptool_jax.policy.engine import Engine
from steptool_jax.rewards import orchestra, responses, rules, shaping
from steptool_jax.rollout import chain, tree
from steptool_jax.rollout.conversation import Limits
from steptool_jax.rollout.strategy import Search
from steptool_jax.run.hosts import allocator, hosts
from steptool_jax.run.parts import build
from steptool_jax.run.parts.services import Services, open_services
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.runner import ToolRunner
from steptool_jax.types import Status, Task, Trajectory

EVALUATION = -1  # the policy version of evaluation rollouts: the same keys at every evaluation


class Stop:
  """Set by SIGTERM (and the first Ctrl-C); asked at every safe point.

  In training also by a notice that the host will go away (maintenance.py). On several processes the
  answers are exchanged wherever it is asked, so that all stop at the same point.
  """

  def __init__(self):
    self.requested = False

  def __call__(self) -> bool:
    return self.requested

  def request(self) -> None:
    self.requested = True

  @contextlib.contextmanager
  def listening(self) -> Iterator["Stop"]:
    def handle(number, frame):
      del frame
      self.request()
      if number == signal.SIGINT:
        signal.signal(number, before[number])  # the second one ends the run at once

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
      signal.signal(number, handle)
    try:
      yield self
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class Workbench:
  config: Config
  workdir: pathlib.Path
  mesh: Mesh
  environment: Environment
  services: Services
  policy: build.Policy
  engine: Engine
  limits: Limits
  runner: ToolRunner
  stop: Stop


@contextlib.contextmanager
def open_workbench(config: Config, workdir: pathlib.Path, stop: Stop) -> Iterator[Workbench]:
  """Builds all parts; everything that can be wrong with the input is found here."""
  hosts.refuse_differences(config, workdir)
  if config.compilation_cache:
    jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  if jax.default_backend() == "cpu":
    allocator.keep_memory()
  mesh = build.build_mesh(config)
  with jax.set_mesh(mesh), open_services(config) as services, build.build_runner(config) as runner:
    environment = build.build_environment(config, services)
    policy = build.build_policy(config, environment, workdir)
    yield Workbench(
      config=config,
      workdir=workdir,
      mesh=mesh,
      environment=environment,
      services=services,
      policy=policy,
      engine=build.build_engine(config, policy, mesh),
      limits=build.build_limits(config),
      runner=runner,
      stop=stop,
    )


def collect(
  bench: Workbench,
  variables: dict,
  jobs: Sequence[tuple[Task, int]],
  version: int,
  temperature: float,
  label: str,
) -> tuple[list[Trajectory], chain.Stats]:
  """Rolls out (task, sample) jobs and puts rewards on the trajectories.

  Evaluations are always rewarded as scheme 'steptool': Eq. 2 compares a task's samples and says
  nothing about a single one, and so the figures of all schemes are the same.
  """
  trajectories, stats = roll(bench, variables, jobs, version, temperature, label)
  tasks = [task for task, _ in jobs]
  if bench.services.judging is not None:
    trajectories = judge(bench, tasks, trajectories)
  scheme = "steptool" if version == EVALUATION else bench.config.rewards.scheme
  return reward(bench, tasks, trajectories, scheme), stats


def judge(
  bench: Workbench, tasks: Sequence[Task], trajectories: Sequence[Trajectory]
) -> list[Trajectory]:
  """The same trajectories with the judge's verdicts; process 0 asks it, once for all."""

  def verdicts() -> list[list[Any]]:
    _, marked = bench.services.judging.judge(tasks, trajectories)
    return [[t.solved, t.status] for t in marked]

  return [
    dataclasses.replace(t, solved=solved, status=Status(status))
    for t, (solved, status) in zip(trajectories, hosts.lead(verdicts), strict=True)
  ]


def roll(
  bench: Workbench,
  variables: dict,
  jobs: Sequence[tuple[Task, int]],
  version: int,
  temperature: float,
  label: str,
  limits: Limits | None = None,
  strategy: Search | None = None,
) -> tuple[list[Any], chain.Stats]:
  """Trajectories of (task, sample) jobs, or SearchResults with a strategy; without rewards.

  limits: instead of the workbench's. Where verdicts come later (services.judging), `solved` says
  no more than that there is an answer.
  """
  word = "pass" if bench.services.judging is None else "answered"
  with hosts.bar(total=len(jobs), desc=label, leave=False, unit="task") as bar:
    solved: list[float] = []

    def on_done(trajectory: Trajectory) -> None:
      solved.append(trajectory.solved)
      bar.update()
      bar.set_postfix_str(f"{word} {sum(solved) / len(solved):.0%}", refresh=False)

    parts = (
      *(bench.engine, variables, bench.environment, jobs, bench.policy.chat_format),
      *(limits or bench.limits, bench.runner),
      chain.Sampling(bench.config.seed, version, temperature),
    )
    keywords = {
      "system": bench.config.model.system or None,
      "peers": hosts.peers(),
      "should_stop": bench.stop,
      "on_done": on_done,
    }
    try:
      if strategy is not None:
        return tree.search(*parts, strategy, **keywords)
      return chain.rollout(*parts, **keywords)
    except InfrastructureError as error:
      raise RuntimeError(f"{label}: {error}") from error


def reward(
  bench: Workbench,
  tasks: Sequence[Task],
  trajectories: Sequence[Trajectory],
  scheme: str = "steptool",
) -> list[Trajectory]:
  """The same trajectories with SC, Con and r on every step; `scheme` as config.rewards.scheme.

  By comparison with the demonstration and the final answer where answers are checked by rule; by
  the text rule "evidence" where they are free text.
  """
  outcome_only = get_algorithm(bench.config.algorithm).rewards == "outcome"
  c = bench.config.rewards
  finals: Sequence[dict[str, float] | None] = [None] * len(tasks)
  if scheme != "steptool":
    usual = orchestra.Preference(c.orchestra.outcome, c.orchestra.cost, c.orchestra.latency)
    preferences = [usual.of(task.metadata.get("preference", {})) for task in tasks]
    finals = orchestra.final_rewards(trajectories, preferences)
  shaped = []
  for task, trajectory, final in zip(tasks, trajectories, finals, strict=True):
    if bench.services.judging is None:
      marked = rules.annotate(task, trajectory)
    else:
      marked = responses.score(task.query, trajectory)
    shaped.append(shaping.shape(marked, c.alpha, c.normalization, outcome_only, final))
  return shaped


def evaluate_policy(
  bench: Workbench, variables: dict, num_tasks: int, label: str, temperature: float
) -> tuple[dict[str, float], list[Trajectory]]:
  """Figures on the first `num_tasks` held-out tasks, one conversation each."""
  tasks = bench.environment.tasks("heldout")[:num_tasks]
  if not tasks:
    raise ValueError(
      "no held-out tasks: the environment has none, or config.evaluation.tasks is 0; evaluation "
      "needs at least one"
    )
  trajectories, _ = collect(
    bench,
    variables,
    [(task, 0) for task in tasks],
    EVALUATION,
    temperature,
    label,
  )
  if all(t.status is Status.INFRASTRUCTURE_ERROR for t in trajectories):
    raise RuntimeError("evaluation: every conversation ended in an infrastructure error")
  return rollout_metrics(trajectories), trajectories
