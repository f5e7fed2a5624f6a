"""A metadata server of our own that announces maintenance."""

import contextlib
import http.server
import threading
import time

import pytest
import tiny

from steptool_jax.run import train
from steptool_jax.run.hosts import maintenance
from steptool_jax.run.parts import opening
from steptool_jax.run.workdir import checkpoint


class Metadata(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    asked = self.headers["Metadata-Flavor"] == "Google", self.path
    self.server.asked.append(asked)
    status, text = self.server.values.get(self.path.rsplit("/", 1)[1], (404, ""))
    self.send_response(status)
    self.end_headers()
    self.wfile.write(text.encode())

  def log_message(self, *_):
    pass


@pytest.fixture
def server(monkeypatch):
  with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as made:
    made.asked = []
    made.values = {"maintenance-event": (200, "NONE"), "preempted": (200, "FALSE\n")}
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{made.server_port}")
    monkeypatch.setattr(maintenance, "PERIOD_S", 0.02)
    yield made
    made.shutdown()


@contextlib.contextmanager
def watched():
  stop = opening.Stop()
  with maintenance.watched(stop.request):
    yield stop


def until(ready):
  limit = time.monotonic() + 20
  while not ready():
    assert time.monotonic() < limit
    time.sleep(0.01)


@pytest.mark.parametrize(
  ("name", "value"),
  [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE\n")],
)
def test_a_notice_stops_the_run(server, name, value, caplog):
  with watched() as stop:
    until(lambda: len(server.asked) > 4)
    assert not stop()
    server.values[name] = (503, "")  # for a moment
    seen = len(server.asked)
    until(lambda: len(server.asked) > seen + 2)
    assert not stop()
    server.values[name] = (200, value)
    until(stop)
  assert f"this host is about to go away ({name}: {value.strip()})" in caplog.text
  paths = [f"/computeMetadata/v1/instance/{sign}" for sign in ("maintenance-event", "preempted")]
  assert set(server.asked) == {(True, path) for path in paths}


def test_a_training_run_saves(server, tmp_path):
  server.values["preempted"] = (200, "TRUE")
  # Without SFT: asked to stop while it still looks at demonstrations, a run has nothing to save.
  config = tiny.make(evaluation__tasks=0, evaluation__every=0, sft__steps=0)
  assert train.run(config, tmp_path)["interrupted"] is True
  assert checkpoint.numbers(tmp_path)


def test_a_host_that_only_moves_goes_on(server):
  server.values["maintenance-event"] = (200, "MIGRATE_ON_HOST_MAINTENANCE")
  with watched() as stop:
    until(lambda: len(server.asked) > 6)
    assert not stop()


def test_nobody_is_asked_again_where_nobody_answers(server):
  server.values.clear()
  with watched() as stop:
    until(lambda: server.asked)
    time.sleep(0.2)
  assert len(server.asked) == 1
  assert not stop()


def test_no_question_leaves_a_machine_without_tpus(server, monkeypatch):
  monkeypatch.delenv("GCE_METADATA_HOST")
  monkeypatch.setattr(maintenance.threading, "Thread", None)
  with watched():
    pass
  assert not server.asked
