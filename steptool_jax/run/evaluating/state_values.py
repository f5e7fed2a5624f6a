"""Values of the states of recorded conversations under a policy, kept on disk as they are found."""

import hashlib
import json
import pathlib
import statistics
from collections.abc import Sequence

from steptool_jax.rollout import continuing
from steptool_jax.rollout.setting import Sampling, Setting
from steptool_jax.run.hosts import hosts
from steptool_jax.run.parts import rollouts
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.workdir.outputs import read_jsonl
from steptool_jax.types import Task, Trajectory

_FILE = "monte_carlo.jsonl"


class Kept:
  """WORKDIR/monte_carlo.jsonl: {"key", "values"} a trajectory.

  policy: tells one policy from another. rollouts: conversations that were rolled out here. down:
  of the last states that were asked for none had an outcome, not even one in front of all calls.
  """

  def __init__(self, parts: Parts, policy: str):
    self._parts, self._policy = parts, policy
    self._path: pathlib.Path = parts.workdir / _FILE
    lines = read_jsonl(self._path)
    self._found = {line["key"]: line["values"] for line in lines if line["values"] is not None}
    self.rollouts, self.down = 0, False

  def values(
    self, variables: dict, pairs: Sequence[tuple[Task, Trajectory]]
  ) -> list[list[float] | None]:
    """V_0 … V_{S-1} of each trajectory; None where the tools failed all that went on from a state.

    Interrupted where the run is asked to stop; what was found before is on disk.
    """
    keys = [self._key(trajectory) for _, trajectory in pairs]
    missing = [n for n, key in enumerate(keys) if key not in self._found]
    states = [(n, start) for n in missing for start in continuing.starts(*pairs[n])]
    self.down = False
    if states:
      found = self._rolled(variables, [start for _, start in states])
      self.down = not any(found)
      with self._path.open("a") as file:
        for n in missing:
          outcomes = [o for (m, _), o in zip(states, found, strict=True) if m == n]
          if not all(outcomes):  # not kept: the next start asks again
            continue
          values = self._found[keys[n]] = [statistics.fmean(o) for o in outcomes]
          file.write(json.dumps({"key": keys[n], "values": values}) + "\n")
    return [self._found.get(key) for key in keys]

  def _rolled(self, variables: dict, states: Sequence[continuing.Start]) -> list[list[float]]:
    p = self._parts
    attempts = p.config.annotate.monte_carlo.samples
    setting = Setting(
      p.engine,
      p.engine.lay_out(variables),
      p.environment,
      p.policy.chat_format,
      p.limits,
      p.runner,
      Sampling(p.config.seed, rollouts.EVALUATION, p.config.rollout.temperature),
      p.config.model.system or None,
      hosts.peers(),
    )
    with hosts.bar(desc="go on", leave=False, unit="rollout") as bar:

      def on_done(trajectory: Trajectory) -> None:
        self.rollouts += 1
        bar.update()

      return continuing.outcomes(setting, states, attempts, p.stop, on_done)

  def _key(self, trajectory: Trajectory) -> str:
    c = self._parts.config
    settings = (self._policy, c.seed, c.rollout.temperature, c.annotate.monte_carlo.samples)
    found = hashlib.sha256(f"{settings} {trajectory.task_id} {trajectory.sample}".encode())
    for step in trajectory.steps:
      found.update(step.tokens.tobytes() + step.observation_tokens.tobytes())
    return found.hexdigest()[:32]
