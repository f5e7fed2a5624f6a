"""python -m steptool_jax.run.cell FOLDER [CORE …]: one cell of a study, in a process of its own.

Reads FOLDER/cell_config.json, which the study wrote, and trains in FOLDER. The process keeps to the
given cores, so that cells side by side do not slow each other down. It holds FOLDER/lock: a process
that the last study left behind ends before the next one begins.
"""

import os
import pathlib
import signal
import sys
import threading
import time
import traceback

from absl import logging

from steptool_jax import validation
from steptool_jax.files import read_json
from steptool_jax.run import train
from steptool_jax.run.workdir import lock


def main(folder: pathlib.Path, cores: list[int]) -> int:
  """Exit status: 0 for a run that ended or was stopped, 1 for one that failed (error.txt)."""
  if cores and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, cores)  # before the backend counts its threads
  logging.set_verbosity(logging.INFO)
  _end_with_parent()
  with lock.held(folder, "train", wait=True):
    try:
      train.run(validation.validate(read_json(folder / "cell_config.json")), folder)
    except Exception:
      (folder / "error.txt").write_text(traceback.format_exc())
      traceback.print_exc()
      return 1
  return 0


def _end_with_parent() -> None:
  """SIGTERM to this process, which saves, when the study is gone (kill -9)."""
  parent = os.getppid()

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
  sys.exit(main(pathlib.Path(sys.argv[1]), [int(core) for core in sys.argv[2:]]))
