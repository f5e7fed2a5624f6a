"""Where else a run's figures go: Weights & Biases, MLflow, trackio (config.record.sinks).

metrics.jsonl and TensorBoard are always written; a sink gets the same figures under the same names.
Each is configured as its package wants it (WANDB_MODE=offline, MLFLOW_TRACKING_URI, …). One that
fails on the way is left alone with a warning: it never stops a run. A run that goes on after a stop
goes on in the same run of its sink, by an id that is kept in WORKDIR/sinks.json.
"""

import importlib
import json
import pathlib
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from absl import logging

from steptool_jax.config import Config
from steptool_jax.files import read_json, write_text
from steptool_jax.run.hosts import hosts
from steptool_jax.validation import to_json


class About(NamedTuple):
  """What a sink is told of the run. id: the same after a stop."""

  project: str
  name: str
  id: str
  config: Mapping[str, Any]
  workdir: pathlib.Path


class Sink(Protocol):
  def log(self, step: int, figures: Mapping[str, float]) -> None: ...

  def close(self) -> None: ...


class _Wandb:
  def __init__(self, wandb: Any, about: About):
    self._run = wandb.init(
      project=about.project,
      name=about.name,
      id=about.id,
      resume="allow",
      config=dict(about.config),
      dir=str(about.workdir),
    )

  def log(self, step: int, figures: Mapping[str, float]) -> None:
    self._run.log(dict(figures), step=step)

  def close(self) -> None:
    self._run.finish()


class _Mlflow:
  def __init__(self, mlflow: Any, about: About):
    self._mlflow = mlflow
    mlflow.set_experiment(about.project)
    found = mlflow.search_runs(
      filter_string=f"tags.steptool_run = '{about.id}'", output_format="list", max_results=1
    )
    if found:
      mlflow.start_run(run_id=found[0].info.run_id)
    else:
      mlflow.start_run(run_name=about.name, tags={"steptool_run": about.id})
      mlflow.log_dict(dict(about.config), "config.json")

  def log(self, step: int, figures: Mapping[str, float]) -> None:
    self._mlflow.log_metrics(dict(figures), step=step)

  def close(self) -> None:
    self._mlflow.end_run()


class _Trackio:
  def __init__(self, trackio: Any, about: About):
    self._trackio = trackio
    name = f"{about.name}-{about.id}"
    trackio.init(project=about.project, name=name, config=dict(about.config), resume="allow")

  def log(self, step: int, figures: Mapping[str, float]) -> None:
    self._trackio.log(dict(figures), step=step)

  def close(self) -> None:
    self._trackio.finish()


# Name in the config, of the package and of the extra -> what writes to it.
SINKS: dict[str, Callable[[Any, About], Sink]] = {
  "wandb": _Wandb,
  "mlflow": _Mlflow,
  "trackio": _Trackio,
}


class Sinks:
  """All sinks of a run, in process 0 alone."""

  def __init__(self, config: Config, workdir: pathlib.Path):
    """ValueError for a sink whose package is not there, which names the extra."""
    self._open: dict[str, Sink] = {}
    if not config.record.sinks or not hosts.primary():
      return
    packages = {name: _package(name) for name in config.record.sinks}
    said = json.loads(to_json(config))
    about = About(config.record.project, workdir.name, _id(workdir), said, workdir)
    for name, package in packages.items():
      self._try(name, lambda name=name, package=package: self._add(name, package, about))

  def _add(self, name: str, package: Any, about: About) -> None:
    self._open[name] = SINKS[name](package, about)

  def log(self, step: int, figures: Mapping[str, float]) -> None:
    for name, sink in [*self._open.items()]:
      self._try(name, lambda sink=sink: sink.log(step, figures))

  def close(self) -> None:
    for name, sink in [*self._open.items()]:
      self._try(name, sink.close)
    self._open = {}

  def _try(self, name: str, work: Callable[[], Any]) -> None:
    try:
      work()
    except Exception as error:  # a package of others, and the network behind it
      self._open.pop(name, None)
      logging.warning(
        "record.sinks: %s gets no more figures (%s: %s); metrics.jsonl has everything",
        name,
        type(error).__name__,
        str(error)[:300],
      )


def _package(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ValueError(
      f"config.record.sinks: {name!r} needs its package ({error}); pip install "
      f"'steptool-jax[{name}]', or leave it out"
    ) from error


def _id(workdir: pathlib.Path) -> str:
  path = workdir / "sinks.json"
  try:
    return str(read_json(path)["id"])
  except (OSError, ValueError, KeyError, TypeError):
    found = uuid.uuid4().hex[:12]
    write_text(path, json.dumps({"id": found}) + "\n")
    return found
