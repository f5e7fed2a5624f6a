"""--mode=chat: type to WORKDIR's newest checkpoint, or the model, and watch what it does.

  any text      a question of yours, with the tools and the world of the present task
  /task ID      a held-out task of the environment, checked and rewarded as in training
  /tasks        their first few
  /quit         or the end of the input

Every call is shown as it is made, with what came of it; then each step's SC, Con and reward, and
the critic's value of the state that it began in.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steptool_jax.config import Config
from steptool_jax.environments.base import AGENTS, TURNS, Environment, Session
from steptool_jax.learning.algorithms import get_algorithm, resolve
from steptool_jax.policy import model, sharding
from steptool_jax.rollout import chain
from steptool_jax.rollout.setting import Sampling, Setting
from steptool_jax.run.parts import build, opening, rollouts
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.training import restore
from steptool_jax.run.workdir import outputs
from steptool_jax.types import Finish, Malformed, Observation, Task, ToolCall, ToolCalls, Trajectory

_LISTED = 8  # tasks that /tasks shows
_SHOWN = 300  # characters of an observation


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Until the input ends; ValueError for an environment without tasks, or whose tools are not ours.

  The summary counts what was asked.
  """
  if (name := config.environment.name) in AGENTS:
    raise ValueError(
      f"config.environment.name: {name!r} calls its tools itself; --mode=serve with "
      "serve.what=policy lets your agent, or any client, talk to the checkpoint"
    )
  # One conversation at a time; several devices share out slots, so each has one.
  slots = jax.device_count()
  config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, slots=slots))
  with opening.open_parts(config, workdir, opening.Stop()) as parts:
    variables, source = restore.policy_variables(parts)
    tasks = {task.id: task for task in parts.environment.tasks("heldout")}
    if not tasks:
      raise ValueError("environment: there are no held-out tasks, whose tools could be offered")
    print(f"{source}; /task ID, /tasks, /quit, or a question of your own,")
    print(f"which meets the world of the last task (at first {next(iter(tasks))})")
    asked = _converse(parts, variables, tasks)
  return outputs.write_summary(workdir, "chat", {"source": source, "conversations": asked})


def _converse(parts: Parts, variables: dict, tasks: dict[str, Task]) -> int:
  """Answers one line after the other; how many conversations there were."""
  present, asked = next(iter(tasks.values())), 0
  while (line := _line()) not in (None, "/quit", "quit", "exit"):
    word, _, name = line.partition(" ")
    if not line:
      continue
    if word == "/tasks":
      for task in list(tasks.values())[:_LISTED]:
        print(f"  {task.id}  {task.query}")
    elif word == "/task" and name.strip() in tasks:
      present = tasks[name.strip()]
      _attempt(parts, variables, present, asked, checked=True)
      asked += 1
    elif word.startswith("/"):
      print(f"  there is no {line!r}; /tasks lists tasks, /task ID attempts one, /quit ends")
    else:
      # A question that is typed has no checker, and nobody who goes on after the answer.
      known = {k: v for k, v in present.metadata.items() if k != TURNS}
      question = dataclasses.replace(present, query=line, demonstration=(), metadata=known)
      _attempt(parts, variables, question, asked, checked=False)
      asked += 1
  return asked


def _line() -> str | None:
  """The next line that is typed; None at the end."""
  print("> ", end="", flush=True)
  line = sys.stdin.readline()
  return line.strip() if line else None


def _attempt(parts: Parts, variables: dict, task: Task, number: int, checked: bool) -> None:
  setting = Setting(
    parts.engine,
    parts.engine.lay_out(variables),
    _Watched(parts.environment, checked),
    parts.policy.chat_format,
    parts.limits,
    parts.runner,
    Sampling(parts.config.seed, rollouts.EVALUATION, parts.config.evaluation.temperature),
    parts.config.model.system or None,
  )
  print(f"  {task.query}")
  (trajectory,), stats = chain.rollout(setting, [(task, number)])
  for why in stats.failures:
    print(f"  {why}")
  if checked:
    (trajectory,) = rollouts.judge(parts, [task], [trajectory])
  (trajectory,) = rollouts.reward(parts, [task], [trajectory])
  values = None
  row = get_algorithm(parts.config.algorithm)
  if resolve(row, parts.config).critic.kind == "value":
    values = step_values(parts.policy.model, variables, trajectory, build.slot_tokens(parts.config))
  for line in table(trajectory, values, checked):
    print(f"  {line}")


@dataclasses.dataclass(frozen=True)
class _Watched:
  """The environment, whose sessions say what is called."""

  environment: Environment
  checked: bool

  @property
  def name(self) -> str:
    return self.environment.name

  def open(self, task: Task, sample: int) -> Session:
    return _WatchedSession(self.environment.open(task, sample), self.checked)


@dataclasses.dataclass(frozen=True)
class _WatchedSession:
  session: Session
  checked: bool

  def call(self, call: ToolCall) -> Observation:
    if call.thought:
      print(f"  {call.thought}")
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
    print(f"  {call.name}({arguments})", flush=True)
    observation = self.session.call(call)
    print(f"    {observation.code}: {observation.text[:_SHOWN]}", flush=True)
    return observation

  def reply(self, answer: str) -> Observation | None:
    print(f"  answers: {answer}")
    said = self.session.reply(answer)
    print(f"  {said.text}" if said is not None else "  (no more to say)", flush=True)
    return said

  def grade(self, answer: str | None) -> float:
    """A question that somebody has typed has no checker."""
    return self.session.grade(answer) if self.checked else 0.0

  def close(self) -> None:
    self.session.close()


def table(trajectory: Trajectory, values: Sequence[float] | None, checked: bool) -> list[str]:
  """The steps with what they earned, and how the conversation ended; as lines."""
  lines = [f"{'step':>4}  {'SC':>3}  {'Con':>3}  {'reward':>6}  {'value':>6}  action"]
  for k, step in enumerate(trajectory.steps):
    value = "" if values is None else f"{values[k]:.3f}"
    said = f"{step.success_calling:3g}  {step.contribution:3g}  {step.reward:6.3f}  {value:>6}"
    lines.append(f"{k + 1:4}  {said}  {_named(step.action)}")
  verdict = f"solved {trajectory.solved:g}" if checked else "your question has no checker"
  return [*lines, f"{trajectory.status}; {verdict}"]


def _named(action: Any) -> str:
  if isinstance(action, Malformed):
    return f"malformed: {action.reason}"
  if isinstance(action, Finish):
    return "gives up" if action.gave_up else f"answers: {action.answer}"
  if isinstance(action, ToolCalls):
    return ", ".join(call.name for call in action.calls)
  return action.name


def step_values(
  config: model.ModelConfig, variables: dict, trajectory: Trajectory, size: int
) -> np.ndarray:
  """float32[S], V of the state that each step begins in: at the last id in front of the step.

  size: ids that a conversation has at most; one program for all.
  """
  if not trajectory.steps:
    return np.zeros(0, np.float32)
  found = []
  for part in trajectory.parts:
    steps = trajectory.steps[part.start : part.stop]
    pieces = [p for step in steps for p in (step.tokens, step.observation_tokens)]
    ids = np.concatenate([part.prompt, *pieces])[:size]
    lengths = np.cumsum([len(part.prompt), *map(len, pieces)])
    starts = lengths[:-1:2] - 1
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : len(ids)] = ids
    found.append(np.asarray(_values(config)(variables, tokens, len(ids)))[0, starts])
  return np.concatenate(found)


@functools.lru_cache(maxsize=1)
def _values(config: model.ModelConfig) -> Callable:
  def values(variables: dict, tokens_1T: jax.Array, count: jax.Array) -> jax.Array:
    positions_1T = jnp.arange(tokens_1T.shape[1])[None]
    segments_1T = (positions_1T < count).astype(jnp.int32)
    hidden = model.forward(config, variables, tokens_1T, positions_1T, segments_1T)
    return model.project_values(variables, hidden)

  return sharding.jit(values)
