"""Figures go to the services that the config names; none of them can stop a run."""

import json
import sys
import types

import pytest

from steptool_jax import validation
from steptool_jax.config import base_config
from steptool_jax.run.workdir.outputs import MetricsWriter
from steptool_jax.run.workdir.sinks import SINKS, Sinks


class Service:
  """wandb, mlflow or trackio, as far as a run uses them; remembers what it was told."""

  def __init__(self):
    self.begun, self.logged, self.ended, self.broken = [], [], 0, False

  def init(self, **about):  # wandb, trackio
    self.begun.append(about)
    return types.SimpleNamespace(log=self.log, finish=self.finish)

  def start_run(self, **about):  # mlflow
    self.begun.append(about)

  def search_runs(self, filter_string, **_):
    mine = [b for b in self.begun if b.get("tags", {}).get("steptool_run", "-") in filter_string]
    return [types.SimpleNamespace(info=types.SimpleNamespace(run_id="r7")) for _ in mine]

  def set_experiment(self, name):
    self.experiment = name

  def log_dict(self, document, name):
    assert document["seed"] == 0

  def log(self, figures, step=None):
    if self.broken:
      raise ConnectionError("no network")
    self.logged.append((step, figures))

  def log_metrics(self, figures, step):
    self.log(figures, step)

  def finish(self):
    self.ended += 1

  end_run = finish


@pytest.fixture
def services(monkeypatch):
  found = {name: Service() for name in SINKS}
  for name, service in found.items():
    monkeypatch.setitem(sys.modules, name, service)
  return found


def config(*sinks):
  found = base_config()
  found.record.sinks = sinks
  return validation.validate(found)


def wrote(workdir, *sinks, steps=(0,), keep=0):
  writer = MetricsWriter(workdir, keep, sinks=Sinks(config(*sinks), workdir))
  for step in steps:
    writer.write(step, "train", {"reward": 0.5 + step})
  writer.close()


@pytest.mark.parametrize("name", SINKS)
def test_a_sink_gets_the_figures_of_metrics_jsonl(services, tmp_path, name):
  wrote(tmp_path, name, steps=(0, 1))
  assert services[name].logged == [(0, {"train/reward": 0.5}), (1, {"train/reward": 1.5})]
  assert services[name].ended == 1
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
  assert sum(len(s.begun) for s in services.values()) == 1


@pytest.mark.parametrize("name", SINKS)
def test_a_run_that_goes_on_is_the_same_run_there(services, tmp_path, name):
  wrote(tmp_path, name)
  wrote(tmp_path, name, steps=(1,), keep=1)
  first, second = services[name].begun
  if name == "mlflow":
    assert second == {"run_id": "r7"}
  else:
    assert (first["name"], first.get("id")) == (second["name"], second.get("id"))
    assert second["resume"] == "allow"


def test_a_sink_that_fails_is_left_alone(services, tmp_path, caplog):
  """The network goes down in the middle: a warning once, and the others go on."""
  services["wandb"].broken = True
  wrote(tmp_path, "wandb", "trackio", steps=(0, 1, 2))
  assert len(services["trackio"].logged) == 3
  assert caplog.text.count("wandb gets no more figures (ConnectionError: no network)") == 1
  assert services["wandb"].ended == 0
  services["wandb"].init = lambda **_: 1 / 0
  wrote(tmp_path, "wandb")


def test_a_package_that_is_missing_is_named_before_any_work(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "trackio", None)
  with pytest.raises(ValueError, match=r"record.sinks: 'trackio' .*steptool-jax\[trackio\]"):
    Sinks(config("trackio"), tmp_path)
  with pytest.raises(ValueError, match=r"config.record.sinks: .*'wandb'"):
    config("wandbb")


@pytest.mark.parametrize("name", SINKS)
def test_the_real_package_offline(monkeypatch, tmp_path, name):
  """With the package itself, where it is installed: what it is called with is what it takes."""
  pytest.importorskip(name, reason="the optional package is missing")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
  monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
  said = []
  monkeypatch.setattr("steptool_jax.run.workdir.sinks.logging.warning", lambda *a: said.append(a))
  wrote(tmp_path, name, steps=(0, 1))
  wrote(tmp_path, name, steps=(2,), keep=2)
  assert said == []
  assert json.loads((tmp_path / "sinks.json").read_text())["id"]
