"""Orbax checkpoints of everything that a run needs to go on, written asynchronously."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import orbax.checkpoint as ocp
from absl import logging

from steptool_jax.types import TrainState


def _worth_reading(record) -> bool:
  return record.levelname != "INFO" or "orbax" not in record.pathname


# Orbax reports dozens of lines a checkpoint; its warnings and errors stay.
logging.get_absl_handler().addFilter(_worth_reading)


class Checkpoints:
  """Numbered checkpoints under WORKDIR/checkpoints: the TrainState, a small JSON `meta`, and the
  replay as JSON where there is one.

  meta holds the phase, how many of its iterations are done (the task cursor and all keys follow
  from it) and the results so far.
  """

  def __init__(self, workdir: pathlib.Path, keep: int):
    self._directory = (workdir / "checkpoints").absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    self._manager = ocp.CheckpointManager(self._directory, options=options)

  def save(
    self,
    number: int,
    state: TrainState,
    meta: Mapping[str, Any],
    replay: Sequence[Mapping[str, Any]] = (),
  ) -> None:
    """Copies the state off the device and writes in the background."""
    if number in self._manager.all_steps():
      return
    items = {
      "state": ocp.args.StandardSave(_without_empty(state)),
      "meta": ocp.args.JsonSave(dict(meta)),
    }
    if replay:
      items["replay"] = ocp.args.JsonSave(list(replay))
    self._manager.save(number, args=ocp.args.Composite(**items))

  def latest_meta(self) -> dict[str, Any] | None:
    """meta of the newest checkpoint; None where there is none."""
    number = self._manager.latest_step()
    if number is None:
      return None
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    return dict(self._manager.restore(number, args=args)["meta"])

  def latest_replay(self) -> list[dict[str, Any]]:
    """The replay of the newest checkpoint; empty where it has none."""
    number = self._manager.latest_step()
    if not (self._directory / str(number) / "replay").exists():
      return []
    args = ocp.args.Composite(replay=ocp.args.JsonRestore())
    return list(self._manager.restore(number, args=args)["replay"])

  def restore(self, abstract: TrainState) -> TrainState:
    """The newest state, placed as `abstract` (ShapeDtypeStructs with shardings) says.

    Raises:
      ValueError: it belongs to another model (names the checkpoint and the remedy).
    """
    number = self._manager.latest_step()
    wanted = _without_empty(abstract)
    try:
      args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
      restored = self._manager.restore(number, args=args)["state"]
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"checkpoint {self._directory / str(number)} does not fit this model and config "
        f"({str(error)[:300]}); use another --workdir, or the config that wrote it"
      ) from error
    return abstract._replace(**restored)

  def wait(self) -> None:
    """Blocks until everything is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.wait_until_finished()
    self._manager.close()


def _without_empty(state: TrainState) -> dict[str, Any]:
  """Fields as a dict; an empty subtree has nothing to save."""
  return {
    name: value
    for name, value in state._asdict().items()
    if value or not isinstance(value, dict | tuple)
  }
