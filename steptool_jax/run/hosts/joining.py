"""The processes of a run find each other."""

import contextlib
import importlib.util
import ipaddress
import os
import pathlib
import threading
from collections.abc import Iterator

import jax
from absl import logging

from steptool_jax.run.hosts import ending, hosts

HEARTBEAT_S = 45  # a process that is silent for so long is dead
START_S = 300  # to wait for all processes at the start
_ALL = (
  f"start all of them within {START_S} s, with one --coordinator that all can reach "
  "(--processes=1 runs alone)"
)
_WITHOUT_A_WORD = (
  "ended without a word of its own: it was killed, or another process of this run is gone and jax "
  f"ended this one with it (see above, and what the others say); {ending.AGAIN}"
)


@contextlib.contextmanager
def joined(coordinator: str, count: int, index: int) -> Iterator[None]:
  """The processes of a run, until all are done. Enter it before any jax computation.

  Args:
    coordinator: host:port of process 0; "auto" = what Slurm, Open MPI or the platform say; "" =
      JAX_COORDINATOR_ADDRESS, else what a Cloud TPU says, else one process.
    count, index: of processes, and this one's; -1 = JAX_NUM_PROCESSES and JAX_PROCESS_ID, or as
      the platform says. count 1 = alone, wherever this is.

  Raises:
    ValueError, RuntimeError: an incomplete description of the processes; not all of them came.
  """
  coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
  count = _number(count, "--processes", "JAX_NUM_PROCESSES")
  index = _number(index, "--process", "JAX_PROCESS_ID")
  if count == 1 or not (coordinator or count > 0 or _on_a_tpu()):
    yield
    return
  with ending.Will() as will:
    will.write(ending.signed(index, f"ended before all had found each other; {_ALL}"))
    try:
      _connect(coordinator, count, index)
    except OSError as error:
      if coordinator or count > 0:
        raise
      # Of a pod, agreement.py refuses hosts that run alone.
      logging.warning("no TPU metadata here (%.200s): this host runs alone", error)
    if jax.process_count() == 1:
      will.write("")
      yield
      return
    hosts.become(hosts.Joined(jax.process_index(), jax.process_count()))
    will.write(ending.signed(hosts.peers().index, _WITHOUT_A_WORD))
    if not hosts.primary():
      logging.set_verbosity(logging.WARNING)
    done = threading.Event()
    watch = threading.Thread(target=ending.watch, args=(done,), name="peers", daemon=True)
    watch.start()
    try:
      yield
      hosts.lead(lambda: None)  # nobody leaves while process 0 still writes
    except BaseException as error:
      ending.leave(error)
    finally:
      done.set()
      watch.join()


def _number(value: int, flag: str, variable: str) -> int:
  text = os.environ.get(variable, "")
  if value >= 0 or not text:
    return value
  if not text.isdecimal():
    raise ValueError(f"environment variable {variable}: {text!r} is no number; see {flag}")
  return int(text)


def _connect(coordinator: str, count: int, index: int) -> None:
  described = {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
  if coordinator in ("", "auto") and count < 0 and index < 0:
    described = {}
  elif not coordinator or coordinator == "auto" or count < 0 or not 0 <= index < count:
    raise ValueError(
      f"--coordinator={coordinator} --processes={count} --process={index}: several processes need "
      "all three, host:port of process 0, their number and 0 <= --process < --processes (or "
      "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID)"
    )
  # Its handler of SIGTERM would keep a process alive that has nothing to save yet; while training,
  # ours tells the others (opening.Stop).
  jax.config.update("jax_enable_preemption_service", False)
  # Two programs in flight on one CPU process may meet in another order than on the next one, and
  # wait for each other in gloo for ever.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  if "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ and _is_loopback(coordinator):
    described["coordinator_bind_address"] = coordinator  # else it listens on every address
  try:
    jax.distributed.initialize(
      **described,
      initialization_timeout=START_S,
      heartbeat_timeout_seconds=HEARTBEAT_S,
      shutdown_timeout_seconds=HEARTBEAT_S,
    )
  except (RuntimeError, ValueError) as error:
    raise RuntimeError(
      f"the processes did not find each other ({str(error)[:300]}); {_ALL}"
    ) from error


def _is_loopback(coordinator: str) -> bool:
  """Whether host:port is of this machine alone."""
  host = coordinator.rpartition(":")[0].strip("[]")
  try:
    return host == "localhost" or ipaddress.ip_address(host).is_loopback
  except ValueError:  # a name
    return False


def _on_a_tpu() -> bool:
  """Whether TPU chips are attached; on them jax.distributed finds the other hosts by itself.

  Not where the platform names this host alone, as notebooks do.
  """
  first = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
  if importlib.util.find_spec("libtpu") is None or first == "cpu":
    return False
  names = [os.environ.get(f"TPU_{what}", "") for what in ("WORKER_HOSTNAMES", "PROCESS_ADDRESSES")]
  if any("," in name for name in names):  # GKE
    return True
  if any(names) and "MEGASCALE_NUM_SLICES" not in os.environ:
    return False
  return any(pathlib.Path("/dev").glob("accel[0-9]*")) or any(
    pathlib.Path("/dev/vfio").glob("[0-9]*")
  )
