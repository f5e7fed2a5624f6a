"""python -m steptool_jax.main --config=FILE[:arg] --workdir=DIR [--mode=M] [--config.a.b=value]

On several hosts the same command on each; see run/hosts/joining.py and launch/.
"""

import importlib
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from steptool_jax import validation
from steptool_jax.run.hosts import hosts, joining

MODES = (
  *("train", "evaluate", "check", "annotate", "export", "bench", "serve", "report", "study"),
  "compile",
)
SEVERAL = ("train", "evaluate", "export")  # on several processes

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, FILE.py or FILE.py:arg.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; everything is written there.")
_MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  "",
  "host:port of process 0, or 'auto' (Slurm, Open MPI); found by itself on Cloud TPUs and GKE.",
)
_PROCESSES = flags.DEFINE_integer("processes", -1, "Processes of this run; 1 = alone, anywhere.")
_PROCESS = flags.DEFINE_integer("process", -1, "Number of this one, from 0.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "--mode=compile: TPU slice, such as v5e:4x4.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]!r}; fields are set with --config.NAME=VALUE")
  logging.set_verbosity(logging.INFO)
  logging.get_absl_logger().setLevel(logging.INFO)
  summary = _or_exit(_dispatch)
  if hosts.primary():
    for name, value in summary.items():
      print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
  if summary.get("exit_code"):  # the mode worked, and found what must not go on
    sys.exit(summary["exit_code"])


def _dispatch() -> dict[str, Any]:
  config = validation.validate(_CONFIG.value)
  if (_MODE.value == "compile") != (_TOPOLOGY.value is not None):
    raise ValueError(f"--topology names the slice of --mode=compile; the mode is {_MODE.value}")
  options = {} if _TOPOLOGY.value is None else {"topology": _TOPOLOGY.value}
  workdir = pathlib.Path(_WORKDIR.value).absolute()
  workdir.mkdir(parents=True, exist_ok=True)
  with joining.joined(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value):
    try:
      if hosts.peers().count > 1 and _MODE.value not in SEVERAL:
        raise ValueError(f"--mode={_MODE.value} runs in one process; start it without --processes")
      mode = importlib.import_module(f"steptool_jax.run.{_MODE.value}")
      return mode.run(config, workdir, **options)
    except Exception:
      name = "error.txt" if hosts.primary() else f"error_{hosts.peers().index}.txt"
      (workdir / name).write_text(traceback.format_exc())
      raise


def _parse(argv: list[str]) -> list[str]:
  try:
    return app.parse_flags_with_usage(argv)
  except AttributeError:  # config_flags, for a field that does not exist
    for word in argv:
      if word.startswith("--config."):
        _or_exit(validation.check_name, word.removeprefix("--config.").partition("=")[0])
    raise


def _or_exit(function: Callable[..., Any], *args: Any) -> Any:
  """A mistake of input, or a run that cannot go on: a sentence helps; the rest is in error.txt."""
  try:
    return function(*args)
  except (ValueError, OSError, RuntimeError) as error:
    sys.exit(f"steptool_jax: {error}")


def run() -> None:
  app.run(main, flags_parser=_parse)


if __name__ == "__main__":
  run()
