"""What every mode starts from: all parts of a run, built once, and the word to stop."""

import contextlib
import dataclasses
import os
import pathlib
import signal
from collections.abc import Iterator

import jax
from absl import logging
from jax.sharding import Mesh

from steptool_jax.config import Config, Limits
from steptool_jax.environments.base import Environment
from steptool_jax.policy.engine import Engine
from steptool_jax.policy.length_classes import LengthClasses
from steptool_jax.rollout.remote import HttpEngine
from steptool_jax.run.hosts import agreement, allocator, ending, hang, hosts
from steptool_jax.run.parts import build, compiled, remote
from steptool_jax.run.parts.services import Services, open_services
from steptool_jax.run.parts.watchdog import Watchdog
from steptool_jax.simulators.runner import ToolRunner


class Stop:
  """Set by SIGTERM (and the first Ctrl-C); asked at every safe point.

  In training also by a notice that the host will go away (maintenance.py). On several processes the
  answers are exchanged wherever it is asked, so that all stop at the same point.
  """

  def __init__(self):
    self.requested = False

  def __call__(self) -> bool:
    hang.stamp()  # every loop of rollouts and updates asks
    return self.requested

  def glance(self) -> bool:
    """The same, of those who only wait: it is no progress."""
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
class Parts:
  config: Config
  workdir: pathlib.Path
  mesh: Mesh
  environment: Environment
  services: Services
  policy: build.Policy
  engine: Engine | LengthClasses | HttpEngine
  limits: Limits
  runner: ToolRunner
  stop: Stop


def _say_devices(mesh: Mesh) -> None:
  """What computes, and that it is not the GPU where there is one."""
  device = mesh.devices.flat[0]
  logging.info("devices: %d of %s (%s)", mesh.size, device.platform, device.device_kind)
  gpus = [path for path in ("/dev/nvidia0", "/dev/dxg") if pathlib.Path(path).exists()]
  if device.platform == "cpu" and gpus and "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
    logging.warning(
      "this machine has a GPU (%s), and jax computes on the CPU: install the extra 'cuda' or "
      "'cuda12', whichever fits its driver, or set JAX_PLATFORMS=cpu",
      gpus[0],
    )


@contextlib.contextmanager
def open_parts(config: Config, workdir: pathlib.Path, stop: Stop) -> Iterator[Parts]:
  """Builds all parts; everything that can be wrong with the input is found here."""
  build.refuse_missing_model(config)
  agreement.refuse_differences(config, workdir)
  compiled.keep(config.compilation_cache, workdir)
  if jax.default_backend() == "cpu":
    allocator.keep_memory()
  mesh = build.build_mesh(config)
  _say_devices(mesh)
  name = "frozen.txt" if hosts.primary() else f"frozen_{hosts.peers().index}.txt"
  with (
    hang.watched(config.hang_after, workdir, ending.end),
    jax.set_mesh(mesh),
    Watchdog(workdir / name, held_s=config.hang_after) as watchdog,
    open_services(config) as services,
    build.build_runner(config, watchdog.during) as runner,
    contextlib.ExitStack() as stack,
  ):
    environment = build.build_environment(config, services)
    policy = build.build_policy(config, environment, workdir, runner)
    yield Parts(
      config=config,
      workdir=workdir,
      mesh=mesh,
      environment=environment,
      services=services,
      policy=policy,
      engine=stack.enter_context(remote.opened(config, policy, mesh, workdir)),
      limits=config.rollout,
      runner=runner,
      stop=stop,
    )
