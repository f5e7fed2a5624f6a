"""Orbax checkpoints of everything that a run needs to go on, written asynchronously.

WORKDIR/checkpoints/<number>/ holds the TrainState, a small JSON `meta`, the replay as JSON where
there is one, and `check`: shape, dtype and a fingerprint of every array, of both texts and of
itself. A
checkpoint that cannot be read, or is not as it was saved, is corrupt: the one before takes its
place. One with other shapes belongs to another model and is refused. On another mesh the arrays are
laid out anew, and their fingerprints are the same.
"""

import contextlib
import json
import pathlib
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from steptool_jax.files import read_json, write_text
from steptool_jax.policy import sharding
from steptool_jax.run.hosts import ending, hosts
from steptool_jax.types import TrainState

SCORES = "scores.json"  # in WORKDIR: {number of a checkpoint: pass rate of evaluation.selection}
_WAIT_S = 600  # for the slowest process to write its part


def _worth_reading(record) -> bool:
  return record.levelname != "INFO" or "orbax" not in record.pathname


# Orbax reports dozens of lines a checkpoint; its warnings and errors stay.
logging.get_absl_handler().addFilter(_worth_reading)


class Restored(NamedTuple):
  """What a checkpoint holds."""

  state: TrainState
  meta: dict[str, Any]
  replay: list[dict[str, Any]]


class Checkpoints:
  """Writes numbered checkpoints and keeps the `keep` newest and the `keep_best` best ones.

  meta holds the phase, how many of its iterations are done (the task cursor and all keys follow
  from it) and the results so far.
  """

  def __init__(self, workdir: pathlib.Path, keep: int, keep_best: int = 0):
    self._workdir, self._keep, self._keep_best = workdir, keep, keep_best
    self._directory = (workdir / "checkpoints").absolute()
    self._scores = read_scores(workdir)
    hosts.lead(lambda: self._directory.mkdir(parents=True, exist_ok=True))
    everyone = set(range(hosts.peers().count))
    options = ocp.CheckpointManagerOptions(
      create=False,
      preservation_policy=self,
      cleanup_tmp_directories=True,  # what a killed run or a full disk has left
      enable_async_checkpointing=True,
      async_options=ocp.AsyncOptions(timeout_secs=_WAIT_S),
      # Named processes wait for each other in the store, and not in collectives: these must keep
      # the order of the main thread.
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        active_processes=everyone if len(everyone) > 1 else None
      ),
    )
    self._manager = ocp.CheckpointManager(self._directory, options=options)

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Orbax's preservation policy; `checkpoints` in the order of their numbers."""
    del context
    numbers = [info.step for info in checkpoints]
    scored = sorted((n for n in numbers if n in self._scores), key=lambda n: (self._scores[n], n))
    kept = {*numbers[-self._keep :], *scored[max(len(scored) - self._keep_best, 0) :]}
    return [n in kept for n in numbers]

  def save(
    self,
    number: int,
    state: TrainState,
    meta: Mapping[str, Any],
    replay: Sequence[Mapping[str, Any]] = (),
  ) -> None:
    """Copies the state off the device and writes in the background.

    OSError where this or an earlier one cannot be written.
    """
    if self.holds(number):
      return
    arrays = _without_empty(state)
    marks = zip(_layout(arrays).items(), fingerprints(arrays), strict=True)
    check = {"arrays": {path: [text, mark] for (path, text), mark in marks}}
    check |= {"replay": len(replay), "texts": _mark(meta, replay)}
    check |= {"itself": _mark(check, ())}
    items = {
      "state": ocp.args.StandardSave(arrays),
      "meta": ocp.args.JsonSave(dict(meta)),
      "check": ocp.args.JsonSave(check),
    }
    if replay:
      items["replay"] = ocp.args.JsonSave(list(replay))
    with self._explained():
      self._manager.save(number, args=ocp.args.Composite(**items))

  def holds(self, number: int) -> bool:
    """Whether there is a checkpoint `number`, or one is being written."""
    return number in self._manager.all_steps()

  def score(self, number: int, value: float) -> None:
    """Notes how good the policy of checkpoint `number` is; nothing where there is none."""
    if not self.holds(number):
      return
    self._scores[number] = value
    if hosts.primary():
      write_text(self._workdir / SCORES, json.dumps(self._scores))

  def newest(self, abstract_of: Callable[[dict[str, Any]], TrainState]) -> Restored | None:
    """The newest whole checkpoint; corrupt newer ones are moved to WORKDIR/corrupt then."""
    return newest(self._workdir, abstract_of, set_aside=self._set_aside)

  def _set_aside(self, number: int) -> None:
    def move() -> None:
      place = self._workdir / "corrupt"
      place.mkdir(exist_ok=True)
      taken = len(list(place.iterdir()))
      (self._directory / str(number)).rename(place / f"{number}_{taken}")

    hosts.lead(move)
    # A host that still sees it, as of a share's listing of moments ago, would take it for saved.
    deadline = time.monotonic() + _WAIT_S
    while (self._directory / str(number)).exists() and time.monotonic() < deadline:
      time.sleep(1.0)
    self._manager.reload()

  def wait(self) -> None:
    """Blocks until everything is on disk; OSError where it cannot be written."""
    with self._explained():
      self._manager.wait_until_finished()

  def close(self) -> None:
    with self._explained():
      self._manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
    if not ending.is_lost(error):  # a process that is gone writes its part no more
      self.close()

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    try:
      yield
    except (OSError, ValueError, RuntimeError) as error:
      if ending.is_lost(error):
        raise
      whole = numbers(self._workdir)
      raise OSError(
        f"a checkpoint could not be written to {self._directory} ({str(error)[:300]}); "
        f"{f'{whole[0]} is the newest whole one' if whole else 'there is none yet'}; make room, "
        "and run the same command to go on from there"
      ) from error


def numbers(workdir: pathlib.Path) -> list[int]:
  """The numbers of the finished checkpoints, the newest first."""
  directory = workdir / "checkpoints"
  return sorted(ocp.utils.checkpoint_steps(directory), reverse=True) if directory.is_dir() else []


def read_scores(workdir: pathlib.Path) -> dict[int, float]:
  """{number of a checkpoint: its pass rate in evaluation.selection}, of those that have one."""
  path = workdir / SCORES
  try:
    return {int(number): float(value) for number, value in read_json(path).items()}
  except FileNotFoundError:
    return {}
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"{path} is damaged ({error}); put back a copy, or delete it: then no checkpoint counts as "
      "evaluated"
    ) from error


def newest(
  workdir: pathlib.Path,
  abstract_of: Callable[[dict[str, Any]], TrainState],
  order: Sequence[int] | None = None,
  set_aside: Callable[[int], None] = lambda number: None,
) -> Restored | None:
  """The newest whole checkpoint; None where the workdir has none.

  Args:
    workdir: of the run.
    abstract_of: meta -> the state that it belongs to, as ShapeDtypeStructs with shardings.
    order: numbers to try, instead of all from the newest on.
    set_aside: called with each corrupt one after an older one was restored; where none is whole,
      all stay where they are.

  Raises:
    ValueError: it belongs to another model (names checkpoint, array and remedy).
    RuntimeError: all checkpoints are corrupt, or none is left but in WORKDIR/corrupt.
  """
  order = hosts.lead(lambda: numbers(workdir)) if order is None else order
  corrupt: list[int] = []
  for number in order:
    directory = (workdir / "checkpoints" / str(number)).absolute()
    found, problem = _restore(directory, abstract_of)
    if found is not None:
      for number_ in corrupt:
        set_aside(number_)
      return found
    logging.error("checkpoint %s is corrupt and not used: %s", directory, problem)
    corrupt.append(number)
  aside = hosts.lead(lambda: sorted(p.name for p in (workdir / "corrupt").glob("*")))
  if corrupt or aside:
    names = ", ".join([*map(str, corrupt), *(f"corrupt/{name}" for name in aside)])
    raise RuntimeError(
      f"all checkpoints of {workdir} are corrupt ({names}); put back a copy of one, or start anew "
      "with another --workdir"
    )
  return None


def _restore(
  directory: pathlib.Path, abstract_of: Callable[[dict[str, Any]], TrainState]
) -> tuple[Restored | None, str]:
  """(what it holds, "") or (None, what is wrong); the same in all processes."""

  def texts() -> tuple[Any, Any, list[Any]]:
    meta, check = _read_json(directory / "meta"), _sound(_read_json(directory / "check"))
    replay = _read_json(directory / "replay") if check["replay"] else []
    if "texts" in check and check["texts"] != _mark(meta, replay):  # older ones have none
      raise ValueError("meta or replay are not as they were saved")
    return meta, check["arrays"], replay

  found, problem = _attempt(texts)
  if problem:
    return None, problem
  meta, saved, replay = found
  abstract = abstract_of(meta)
  wanted = _without_empty(abstract)
  _refuse_other_layout(directory, {path: text for path, (text, _) in saved.items()}, wanted)
  arrays, problem = _attempt(
    lambda: ocp.StandardCheckpointHandler().restore(
      ocp.utils.epath.Path(directory / "state"), args=ocp.args.StandardRestore(wanted)
    )
  )
  if problem:
    return None, problem
  marks = zip(saved.items(), fingerprints(arrays), strict=True)
  wrong = [path for (path, (_, mark)), now in marks if mark != now]
  if wrong:
    return None, f"{len(wrong)} arrays are not as they were saved, {wrong[0]} among them"
  return Restored(abstract._replace(**arrays), meta, replay), ""


def _attempt(read: Callable[[], Any]) -> tuple[Any, str]:
  """(what `read` returns, ""), or (None, why it failed), in one process or another.

  Raises what is the machine's fault and not the file's: no memory, no right to read, no answer.
  """
  result, problem = None, ""
  try:
    result = read()
  except (MemoryError, PermissionError, TimeoutError):
    raise
  except Exception as error:  # damage shows in many ways
    if "RESOURCE_EXHAUSTED" in str(error):
      raise
    problem = f"{type(error).__name__}: {str(error)[:300]}"
  problems = [text for text in hosts.gather(problem) if text]
  return (None, problems[0]) if problems else (result, "")


def _mark(meta: Mapping[str, Any], replay: Sequence[Mapping[str, Any]]) -> int:
  """A 32-bit number for JSON data."""
  return zlib.crc32(json.dumps([dict(meta), list(replay)], sort_keys=True).encode())


def _sound(check: Any) -> dict[str, Any]:
  """The check; ValueError where it is not as it was saved."""
  mark = check.pop("itself", None) if isinstance(check, dict) else None
  if mark is None:  # older ones have none
    arrays = check.get("arrays") if isinstance(check, dict) else None
    pairs = arrays.values() if isinstance(arrays, dict) else (None,)
    whole = all(isinstance(p, list) and [type(x) for x in p] == [str, int] for p in pairs)
  else:
    whole = mark == _mark(check, ())
  if not whole:
    raise ValueError("check is not as it was saved")
  return check


def _read_json(directory: pathlib.Path) -> Any:
  return ocp.JsonCheckpointHandler().restore(ocp.utils.epath.Path(directory))


def _refuse_other_layout(
  directory: pathlib.Path, theirs: Mapping[str, str], wanted: dict[str, Any]
) -> None:
  ours = _layout(wanted)
  different = [p for p in theirs.keys() | ours.keys() if theirs.get(p) != ours.get(p)]
  if different:
    path = min(different)
    raise ValueError(
      f"checkpoint {directory} does not fit this model and config ({len(different)} arrays differ; "
      f"{path} is {theirs.get(path, 'not there')} in it, {ours.get(path, 'not there')} here); use "
      "another --workdir, or the config that wrote it"
    )


def _layout(arrays: dict[str, Any]) -> dict[str, str]:
  """{path: "float32[2,3]"} of all arrays."""
  return {
    sharding.path_string(path): f"{x.dtype}[{','.join(map(str, x.shape))}]"
    for path, x in jax.tree_util.tree_leaves_with_path(arrays)
  }


def fingerprints(arrays: dict[str, Any]) -> list[int]:
  """A 32-bit number for each array, in the order of `_layout`."""
  return np.asarray(jax.jit(_marks)(jax.tree.leaves(arrays))).tolist()


def _marks(leaves: list[jax.Array]) -> jax.Array:
  """Sum of bits times odd position numbers, modulo 2^32: exact, however the arrays are sharded."""

  def mark(x):
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
      place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

  return jnp.stack([mark(x) for x in leaves])


def _without_empty(state: TrainState) -> dict[str, Any]:
  """Fields as a dict; an empty subtree has nothing to save."""
  return {
    name: value
    for name, value in state._asdict().items()
    if not (isinstance(value, dict | tuple) and not value)
  }
