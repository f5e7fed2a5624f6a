"""Iterations of RL whose conversations are scripted, and whose trajectories reach no update."""

import contextlib
import types

import fakes
import numpy as np
import tiny

from steptool_jax.policy.kv_slots import Decoded
from steptool_jax.run.parts import build, opening, services
from steptool_jax.run.training import iteration, phase
from steptool_jax.run.training.progress import Progress
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.types import Code, Finish, Observation, ToolCall


class Script:
  """An engine whose slots say the given turns, one after the other."""

  def __init__(self, slots, turns):
    self.slots, self.turns, self.said = slots, turns, np.zeros(slots, int)
    self.classes = ((slots, 1000),)

  def init(self):
    return None

  def lay_out(self, variables):
    return variables

  def append(self, variables, state, pieces):
    return state

  def rewind(self, state, lengths):
    for slot, length in lengths.items():
      if length == 0:
        self.said[slot] = 0
    return state

  def fork(self, state, sources):
    return state

  def decode(self, variables, state, limits, seeds, stop_ids, temperature):
    tokens = np.zeros((self.slots, max(map(len, self.turns))), np.int32)
    count = np.zeros(self.slots, int)
    for slot in limits:
      ids = self.turns[self.said[slot]]
      tokens[slot, : len(ids)], count[slot] = ids, len(ids)
      self.said[slot] += 1
    return state, Decoded(tokens, np.full(tokens.shape, -1.0, np.float32), count, count > 0)


class Session:
  def __init__(self, broken, cost, latency):
    self.broken, self.cost, self.latency = broken, cost, latency

  def call(self, call):
    if self.broken:
      raise InfrastructureError("the simulator is down")
    return Observation('{"id": 1}', Code.OK, value={"id": 1}, cost=self.cost, latency=self.latency)

  def grade(self, answer):
    return 1.0

  def close(self):
    pass


class Scripted:
  """The tasks of an environment; every call succeeds, or finds its simulator down."""

  def __init__(self, environment, broken, costs):
    self.name, self.tasks = environment.name, environment.tasks
    self.broken, self.costs = broken, costs

  def open(self, task, sample):
    return Session(sample in self.broken, *self.costs.get(sample, (0.0, 0.0)))


def bare_phase(config):
  """RL with a small model and neither mesh nor state; it compiles nothing before it is used."""
  policy = types.SimpleNamespace(model=fakes.tiny_config())
  return phase.Phase(config, policy, None, Progress(phase="rl"), 1, 8)


class Iterations:
  """`run` does one; `learnt` collects what reaches the update."""

  def __init__(self, parts):
    self.parts, self.phase, self.learnt = parts, bare_phase(parts.config), []
    self.phase.variables = dict
    self.phase.pack = self.learnt.extend

  def run(self):
    return iteration.run_iteration(self.parts, self.phase, recorder=None)


@contextlib.contextmanager
def scripted(config, folder, broken=(), costs=None):
  """Every sample of `broken` ends in an infrastructure error; costs: sample -> (cost, latency) of
  each of its calls."""
  config = tiny.replace(config, rollout__max_steps=3, rollout__tool_retries=0)
  environment = build.build_environment(config)
  policy = build.build_policy(config, environment, folder)
  call = ToolCall(environment.tasks("train")[0].tools[0].name, {})
  turns = [policy.chat_format.render_action(a) for a in (call, Finish("1"))]
  with build.build_runner(config) as runner:
    yield Iterations(
      opening.Parts(
        config=config,
        workdir=folder,
        mesh=None,
        environment=Scripted(environment, broken, costs or {}),
        services=services.NO_SERVICES,
        policy=policy,
        engine=Script(config.rollout.slots, turns),
        limits=config.rollout,
        runner=runner,
        stop=opening.Stop(),
      )
    )
