"""What a tool does to the whole process: hold the interpreter's lock, or end it."""

import signal
import subprocess
import sys
import time

import pytest
import tiny

from steptool_jax.run.parts.watchdog import Watchdog

# Runs one call with a watchdog of half a second.
_PROGRAM = """
import os, pathlib, re, sys, time
from steptool_jax.run.parts.watchdog import Watchdog
from steptool_jax.simulators.runner import ToolRunner
from steptool_jax.types import Code, Observation, ToolCall

class Session:
  def call(self, call):
    def ends(): os._exit(3)
    def freezes(): re.match("(a+)+$", "a" * 50 + "b")
    def hangs(): time.sleep(60)
    locals()[call.name]()

with Watchdog(pathlib.Path(sys.argv[1]), 0.5) as watchdog:
  with ToolRunner(timeout_s=1.5, announce=watchdog.during) as runner:
    print("began", flush=True)
    future = runner.submit(Session(), ToolCall(sys.argv[2], {"n": 7}))
    assert future.result().code is Code.TIMEOUT
"""


@pytest.mark.parametrize(
  ("tool", "status", "words"),
  [
    (
      "freezes",
      -signal.SIGKILL,
      "no Python has run for 0.5 s, a call holds the interpreter's lock",
    ),
    ("ends", 3, "the process ended, or was killed, in the middle of a call"),
    ("hangs", 0, ""),  # a time-out's work; being stopped for longer than the limit is no freeze
  ],
)
def test_a_call_that_freezes_or_ends_the_process_is_named(tool, status, words, tmp_path):
  """(a+)+$ in a tool froze a run without a message for ever; os._exit ended it without one."""
  command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "frozen.txt"), tool]
  process = subprocess.Popen(
    command, env=tiny.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "began\n"
  if tool == "hangs":
    time.sleep(0.3)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.2)
    process.send_signal(signal.SIGCONT)
  _, said = process.communicate(timeout=60)
  assert process.returncode == status, said
  assert words in said
  assert (f'{tool} {{"n": 7}}' in said) == bool(words)
  assert ("in freezes" in said) == (tool == "freezes")  # the stack
  if words:
    assert (tmp_path / "frozen.txt").read_text() in said
  else:
    assert said == ""


_HELD = """
import ctypes, pathlib, sys, time
from steptool_jax.run.parts.watchdog import Watchdog

def hold():
  if sys.argv[2] == "holds":
    ctypes.PyDLL(None).sleep(60)  # Python's own sleep would let other threads run
  time.sleep(4)

with Watchdog(pathlib.Path(sys.argv[1]), 1.0, held_s=1.0):
  print("began", flush=True)
  hold()
"""


@pytest.mark.parametrize("how", ["holds", "suspended"])
def test_what_holds_the_interpreter_outside_of_a_call_is_ended(how, tmp_path):
  """A run that was suspended for longer than hang_after was ended when it went on."""
  command = [sys.executable, "-c", _HELD, str(tmp_path / "frozen.txt"), how]
  process = subprocess.Popen(
    command, env=tiny.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "began\n"
  if how == "suspended":
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
  _, said = process.communicate(timeout=60)
  if how == "suspended":
    assert (process.returncode, said) == (0, "")
    return
  assert process.returncode == -signal.SIGKILL
  assert "no Python has run for 1 s, something in C holds the interpreter's lock; config" in said
  assert "in hold" in said


def test_a_short_hang_after_ends_no_run_that_lives(tmp_path):
  """Beats come every quarter of a minute."""
  program = _HELD.replace("1.0, held_s=1.0", "60.0, held_s=0.2")
  command = [sys.executable, "-c", program, str(tmp_path / "frozen.txt"), "lives"]
  done = subprocess.run(
    command, env=tiny.environment(), capture_output=True, text=True, timeout=60, check=False
  )
  assert (done.returncode, done.stderr) == (0, "")


def test_what_the_run_before_has_died_of_is_said_at_the_next_start(tmp_path, caplog):
  report = tmp_path / "frozen.txt"
  report.write_text("steptool_jax: a call holds the lock: look {}\n")
  with Watchdog(report):
    assert "the run before this one: steptool_jax: a call holds the lock: look {}" in caplog.text
  assert not report.exists()
