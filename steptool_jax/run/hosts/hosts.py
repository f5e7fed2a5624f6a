"""The processes of one run: start-up, what they tell each other, and how all of them stop.

Every process runs the same command and takes the same path. What they exchange goes two ways:
small JSON data in lockstep through collectives of the devices (`gather`), and the word of process 0
through the key-value store of jax.distributed (`lead`), where others may wait for minutes.

A process that stops with an error says so in the store; a thread in every other one looks there
and ends its process with that sentence, even while it waits in a collective. One that dies without
a word is missed by its neighbours' sockets (CPU, GPU) or by its heartbeat (everywhere). Without the
heartbeat, or without process 0, which has the store, jax aborts a process in C++: then its `_Will`
speaks.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from tqdm import tqdm

import steptool_jax
from steptool_jax import validation
from steptool_jax.config import Config
from steptool_jax.rollout.peers import ALONE, Peers
from steptool_jax.types import TokenBatch

HEARTBEAT_S = 45  # a process that is silent for so long is dead
START_S = 300  # to wait for all processes at the start
_SMALL = 4096  # bytes of the first exchange; longer messages take a second one
_FAILED = "steptool_jax/failed"  # the first error, {"process", "text"}
_LOOK_S, _GRACE_S, _LINGER_S = 0.5, 1.0, 5.0
_A_DAY_MS = 86_400_000
_ALL = (
  f"start all of them within {START_S} s, with one --coordinator that all can reach "
  "(--processes=1 runs alone)"
)
_AGAIN = (
  "start all processes again with the same command: training goes on from its newest whole "
  "checkpoint"
)
_WITHOUT_A_WORD = (
  "ended without a word of its own: it was killed, or another process of this run is gone and jax "
  f"ended this one with it (see above, and what the others say); {_AGAIN}"
)
# What a _Will runs. The pipe closes with the process that writes, however it ends.
_EXECUTOR = """
import sys
text = ""
for text in sys.stdin:
  pass
if text.strip():
  sys.stderr.write("\\n" + text)
"""


class _Joined:
  """This process among the others; they exchange JSON data."""

  def __init__(self):
    self.index, self.count = jax.process_index(), jax.process_count()

  def gather(self, document: Any) -> list[Any]:
    data = json.dumps([self.index, document]).encode()
    longest, found = self._exchange(data, _SMALL)
    if longest > _SMALL:
      _, found = self._exchange(data, 1 << (longest - 1).bit_length())
    return [document for _, document in sorted(map(json.loads, found), key=lambda pair: pair[0])]

  def _exchange(self, data: bytes, size: int) -> tuple[int, list[bytes]]:
    """(bytes that the longest message needs, messages that fit into `size`)."""
    buffer = np.zeros(size, np.uint8)
    head = np.frombuffer(len(data).to_bytes(8, "little"), np.uint8)
    body = np.frombuffer(data, np.uint8)[: size - 8]
    buffer[:8], buffer[8 : 8 + len(body)] = head, body
    rows = multihost_utils.process_allgather(buffer)
    lengths = [int.from_bytes(row[:8].tobytes(), "little") for row in rows]
    messages = [row[8 : 8 + n].tobytes() for row, n in zip(rows, lengths, strict=True)]
    return max(lengths) + 8, messages


class _Will:
  """A small process that says a sentence for this one, should this one end without a word.

  In a process that is killed, or that jax aborts, no Python runs any more. (jaxlib 0.10.2 has a
  callback for the latter, but cannot hand it its argument: std::bad_cast.)
  """

  def __init__(self):
    # Signals to all of a job mean the run. It inherits that they are blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
      self._process = subprocess.Popen(
        [sys.executable, "-ISc", _EXECUTOR],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
      )
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)

  def write(self, sentence: str) -> None:
    """What it is to say, in the place of what was written before; "" for nothing."""
    with contextlib.suppress(OSError):  # it was killed
      self._process.stdin.write(f"{sentence}\n".encode())
      self._process.stdin.flush()

  def __enter__(self) -> "_Will":
    return self

  def __exit__(self, *_: object) -> None:
    self.write("")
    with contextlib.suppress(OSError):
      self._process.stdin.close()
    self._process.wait()


_peers: Peers = ALONE
_speaking = threading.Lock()
_numbers = itertools.count()


def peers() -> Peers:
  """The processes of this run."""
  return _peers


def primary() -> bool:
  """Whether this process writes what one process writes: metrics, summary, export."""
  return _peers.index == 0


def gather(document: Any) -> list[Any]:
  """JSON data of every process, in their order; all call it."""
  return _peers.gather(document)


def lead(work: Callable[[], Any]) -> Any:
  """What `work` returns in process 0 (JSON data), in all; the others wait for it."""
  if _peers.count == 1:
    return work()
  key = f"steptool_jax/lead/{next(_numbers)}"
  if not primary():
    return json.loads(_store().blocking_key_value_get(key, _A_DAY_MS))
  result = work()  # an error reaches the others through the store
  _store().key_value_set(key, json.dumps(result))
  return result


def bar(**arguments: Any) -> tqdm:
  """A progress bar, in process 0 alone."""
  return tqdm(mininterval=0.5, disable=not primary(), **arguments)


def say(text: str) -> None:
  """A line above the progress bar, from process 0 alone."""
  if primary():
    tqdm.write(text)


# --- start -----------------------------------------------------------------------------------


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
  global _peers
  coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
  count = _number(count, "--processes", "JAX_NUM_PROCESSES")
  index = _number(index, "--process", "JAX_PROCESS_ID")
  if count == 1 or not (coordinator or count > 0 or _on_a_tpu()):
    yield
    return
  with _Will() as will:
    will.write(_signed(index, f"ended before all had found each other; {_ALL}"))
    _connect(coordinator, count, index)
    if jax.process_count() == 1:
      will.write("")
      yield
      return
    _peers = _Joined()
    will.write(_signed(_peers.index, _WITHOUT_A_WORD))
    if not primary():
      logging.set_verbosity(logging.WARNING)
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(done, will), name="peers", daemon=True)
    watch.start()
    try:
      yield
      lead(lambda: None)  # nobody leaves while process 0 still writes
    except BaseException as error:
      _leave(error, will)
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


def _on_a_tpu() -> bool:
  """Whether TPU chips are attached; on them jax.distributed finds the other hosts by itself."""
  if importlib.util.find_spec("libtpu") is None or "cpu" in os.environ.get("JAX_PLATFORMS", ""):
    return False
  if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):  # GKE
    return True
  return any(pathlib.Path("/dev").glob("accel[0-9]*")) or any(
    pathlib.Path("/dev/vfio").glob("[0-9]*")
  )


def refuse_differences(config: Config, workdir: pathlib.Path) -> None:
  """ValueError where processes differ in config or code, or do not share the workdir."""
  if jax.process_count() != _peers.count:
    raise ValueError(
      f"jax sees {jax.process_count()} processes, but jax.distributed was not started; leave out "
      "--processes=1, or give --coordinator, --processes and --process"
    )
  if _peers.count == 1:
    return
  mark = workdir / f".shared-{lead(lambda: secrets.token_hex(8))}"
  lead(lambda: mark.touch())
  mine = {
    "config": json.loads(validation.to_json(config)),
    "code": _code(),
    "workdir": str(workdir) if mark.exists() else "",
  }
  found = gather(mine)
  if primary():
    mark.unlink()
  for index, theirs in enumerate(found):
    if theirs["config"] != found[0]["config"]:
      first = validation.validate(found[0]["config"])
      names = ", ".join(validation.differences(first, theirs["config"]))
      raise ValueError(
        f"process {index} has another config than process 0; different: {names}; start all "
        "processes with the same command"
      )
    if theirs["code"] != found[0]["code"]:
      raise ValueError(
        f"process {index} runs other code than process 0 ({theirs['code']} and "
        f"{found[0]['code']}); install the same version of steptool_jax and jax on all hosts"
      )
    if not theirs["workdir"]:
      raise ValueError(
        f"--workdir: {workdir} of process 0 is not seen by process {index}; all hosts need one "
        "shared folder (NFS, Filestore, a mounted bucket)"
      )


def refuse_different_batches(batch: TokenBatch) -> None:
  """RuntimeError where the processes are about to train on different data."""
  if _peers.count == 1:
    return
  digest = 0
  for array in jax.tree.leaves(batch):
    digest = zlib.crc32(array, digest)
  found = gather(digest)
  if len(set(found)) > 1:
    raise RuntimeError(
      f"the processes have different batches (checksums {found}): their tasks, files or "
      "environments differ; every host must see the same data"
    )


def _code() -> str:
  """Versions, and a digest of this package's source."""
  root = pathlib.Path(steptool_jax.__file__).parent
  digest = hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
  versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib")]
  return f"{', '.join(versions)}, source {digest.hexdigest()[:12]}"


# --- the end ---------------------------------------------------------------------------------


def _store() -> Any:
  """The key-value store of jax.distributed, for which jax has no public name."""
  from jax._src import distributed

  return distributed.global_state.client


def _failure() -> dict[str, Any] | None:
  """What the first process that failed said, if another one did."""
  try:
    failure = json.loads(_store().key_value_try_get(_FAILED))
  except Exception:  # nothing there, or nobody to ask any more
    return None
  return failure if failure["process"] != _peers.index else None


def _watch(done: threading.Event, will: _Will) -> None:
  while not done.wait(_LOOK_S):
    failure = _failure()
    if failure is not None and not done.wait(_GRACE_S):
      _end(_with_it(failure), will)


def _leave(error: BaseException, will: _Will) -> None:
  """Ends this process at once: a normal exit would wait for processes that do not come any more."""
  text = f"{error}" if isinstance(error, ValueError | OSError | RuntimeError) else repr(error)
  if is_lost(error):
    time.sleep(2 * _LOOK_S)  # it may have said why
    failure = _failure()
    if failure is not None:
      text = _with_it(failure)
    else:
      text = f"another process died or cannot be reached ({text[:200]}); {_AGAIN}"
  # Another one may have been first, or the store is gone.
  with contextlib.suppress(Exception):
    _store().key_value_set(_FAILED, json.dumps({"process": _peers.index, "text": text}))
  _end(text, will)


def _with_it(failure: dict[str, Any]) -> str:
  return f"process {failure['process']} stopped: {failure['text']}; this one stops with it"


def is_lost(error: BaseException | None) -> bool:
  """Whether a collective or the store failed, and not this process: another one is gone."""
  words = ("gloo", "nccl", "coordination", "socket closed", "connection re", "barrier")
  kinds = RuntimeError | ValueError | TimeoutError
  said = str(error).lower() if isinstance(error, kinds) else ""
  return _peers.count > 1 and any(word in said for word in words)


def _signed(index: int, text: str) -> str:
  return f"steptool_jax: {f'process {index}' if index >= 0 else 'this process'}: {text}"


def _end(text: str, will: _Will) -> None:
  """Ends this process with a sentence; a thread that has another one waits here for the end."""
  _speaking.acquire()
  # On a line of its own, below a progress bar.
  print(f"\n{_signed(_peers.index, text)}", file=sys.stderr, flush=True)
  will.write("")
  sys.stdout.flush()
  if primary():
    time.sleep(_LINGER_S)  # the store ends with this process, and others may not have looked yet
  os._exit(1)
