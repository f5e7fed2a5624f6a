"""launch/worker.sh and launch/local_pod.sh around a stand-in for python."""

import json
import os
import signal
import subprocess
import time

import pytest
import tiny

STAND_IN = """#!/usr/bin/env python3
import json, os, pathlib, signal, sys, time
workdir = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir="))[10:])
index = os.environ.get("JAX_PROCESS_ID", "0")
names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PLATFORMS")
told = {name: os.environ.get(name) for name in names} | {"argv": sys.argv[1:]}

def save(*_):
  time.sleep(0.3)
  (workdir / "summary_train.json").write_text('{"interrupted": true}')
  sys.exit(0)

signal.signal(signal.SIGTERM, save)
(workdir / f"told_{index}.json").write_text(json.dumps(told))
if "--fail=" + index in sys.argv:
  sys.exit(3)
if "--wait" in sys.argv:
  while True:
    time.sleep(0.05)
(workdir / "summary_train.json").write_text('{"interrupted": false}')
"""


@pytest.fixture
def start(tmp_path):
  python = tmp_path / "python"
  python.write_text(STAND_IN)
  python.chmod(0o755)
  (tmp_path / "run").mkdir()

  def launch(script, *arguments):
    return subprocess.Popen(
      [tiny.ROOT / "launch" / script, *arguments, f"--workdir={tmp_path / 'run'}"],
      env=os.environ | {"PYTHON": str(python), "PORT": "1234", "LOGS": str(tmp_path)},
      stderr=subprocess.PIPE,
      text=True,
    )

  return launch


def told(tmp_path, index):
  path = tmp_path / "run" / f"told_{index}.json"
  limit = time.monotonic() + 30
  while not path.exists() or not path.read_text():
    assert time.monotonic() < limit
    time.sleep(0.02)
  return json.loads(path.read_text())


def test_every_process_gets_the_same_command(start, tmp_path):
  pod = start("local_pod.sh", "3", "--config=a b.py")
  assert pod.wait(30) == 0
  for index in range(3):
    assert told(tmp_path, index) == {
      "JAX_COORDINATOR_ADDRESS": "localhost:1234",
      "JAX_NUM_PROCESSES": "3",
      "JAX_PLATFORMS": "cpu",
      "argv": ["-m", "steptool_jax.main", "--config=a b.py", f"--workdir={tmp_path / 'run'}"],
    }


def test_a_process_that_fails_is_named(start, tmp_path):
  pod = start("local_pod.sh", "2", "--config=x", "--fail=1")
  assert pod.wait(30) == 3
  assert "process 1 ended with status 3" in pod.stderr.read()


@pytest.mark.parametrize("script", [["worker.sh"], ["local_pod.sh", "2"]])
def test_sigterm_lets_the_run_save_and_tells_the_scheduler_that_it_is_not_done(
  script, start, tmp_path
):
  run = start(*script, "--config=x", "--wait")
  for index in range(len(script)):
    told(tmp_path, index)
  time.sleep(0.2)
  run.send_signal(signal.SIGTERM)
  assert run.wait(30) == 75
  assert json.loads((tmp_path / "run" / "summary_train.json").read_text()) == {"interrupted": True}


def test_a_wrong_command_is_explained(start):
  pod = start("local_pod.sh", "none")
  assert pod.wait(30) == 2
  assert pod.stderr.read().startswith("usage: ")


def test_what_a_pod_runs_is_a_valid_script(tmp_path):
  """What all hosts run stands in quotation marks, where bash does not read it."""
  stub = tmp_path / "gcloud"
  stub.write_text(
    '#!/bin/sh\nfor word; do case $word in --command=*) echo "${word#--command=}";; esac; done\n'
  )
  stub.chmod(0o755)
  names = {"NAME": "n", "ZONE": "z", "SHARE": "10.0.0.2:/vol1"}
  environment = os.environ | names | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
  scripts = [
    subprocess.run(
      [tiny.ROOT / "launch" / "tpu_pod.sh", *words],
      env=environment,
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for words in (["setup"], ["run", "--config=a b.py"])
  ]
  assert "'10.0.0.2:/vol1' /data" in scripts[0]
  assert "(3, 11)" in scripts[0]
  assert "$apt install" in scripts[0]
  for script in scripts:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
  # Run as a host would, without tail: the run outlives the shell that began it.
  home = tmp_path / "steptool_jax" / "launch"
  home.mkdir(parents=True)
  (home / "worker.sh").write_text('#!/bin/sh\nsleep 0.5\necho "$PYTHON $*"\n')
  (home / "worker.sh").chmod(0o755)
  begin = scripts[1][: scripts[1].index("tail -n")]
  subprocess.run(["bash", "-c", begin], env=os.environ | {"HOME": str(tmp_path)}, check=True)
  log, limit = tmp_path / "steptool_jax.log", time.monotonic() + 30
  while not log.exists() or not log.read_text():
    assert time.monotonic() < limit
    time.sleep(0.05)
  assert log.read_text() == ".venv/bin/python --config=a b.py\n"
