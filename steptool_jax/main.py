"""python -m steptool_jax.main --config=FILE[:arg] [--workdir=DIR] [--mode=M] [--config.a.b=value]

or  steptool [M] --config=…, with the same meaning. FILE may be the name of a config that comes with
the package (quickstart). Without a workdir it is runs/<name of the config>.

  train     SFT on demonstrations, then RL; the same command again goes on (the default)
  evaluate  held-out figures of WORKDIR's newest checkpoint, or of the model where there is none
  check     what is wrong with tools, tasks, checkers and demonstrations, before any training
  annotate  step rewards for stored trajectories
  reward_model  a model of these rewards, to train with in the place of rules
  export    the newest checkpoint as a Hugging Face folder, WORKDIR/export
  report    WORKDIR/report.html, from what a run or a study left there
  study     a grid of training runs, compared
  serve     the policy as an OpenAI-compatible server, or the simulator of APIs (serve.what)
  chat      type to the newest checkpoint; its calls and rewards step by step
  bench     how fast the update and the engine are on this machine
  compile   what the programs need on a TPU slice, without one (--topology)

The fields that --config.a.b=value sets stand in steptool_jax/config.py, each with its meaning, unit
and default; configs/ has examples. On several hosts the same command on each; see launch/.
"""

import contextlib
import difflib
import functools
import importlib
import logging as standard_logging
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from steptool_jax import validation
from steptool_jax.config import Config
from steptool_jax.run.hosts import hosts, joining
from steptool_jax.run.workdir import lock
from steptool_jax.simulators.errors import InfrastructureError

MODES = (
  "train",
  "evaluate",
  "check",
  "annotate",
  "reward_model",
  "export",
  "report",
  "study",
  "serve",
  "chat",
  "bench",
  "compile",
)
SEVERAL = ("train", "evaluate", "export")  # on several processes
BESIDE = ("check", "report", "serve", "chat")  # may use a workdir in which a run is at work

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, FILE.py or FILE.py:arg; or the name of one in the package."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; everything is written there. Default: runs/<config>."
)
_MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do; see above.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  "",
  "host:port of process 0, or 'auto' (Slurm, Open MPI); found by itself on Cloud TPUs and GKE. It "
  "listens on every address, on that of JAX_COORDINATOR_BIND_ADDRESS, or for localhost on that.",
)
_PROCESSES = flags.DEFINE_integer("processes", -1, "Processes of this run; 1 = alone, anywhere.")
_PROCESS = flags.DEFINE_integer("process", -1, "Number of this one, from 0.")
_PROGRAMS = flags.DEFINE_list(
  "programs", None, "--mode=compile: only these, such as append,decode."
)
_TOPOLOGY = flags.DEFINE_string("topology", None, "--mode=compile: TPU slice, such as v5e:4x4.")
flags.mark_flags_as_required(["config"])
# A wheel has them within the package, a checkout beside it.
_CONFIGS = pathlib.Path(__file__).parent / "configs"
if not _CONFIGS.is_dir():
  _CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]!r}; fields are set with --config.NAME=VALUE")
  logging.set_verbosity(logging.INFO)
  logging.get_absl_logger().setLevel(logging.INFO)
  # At this level jax says that there is no libtpu, which reads like a failure on a laptop.
  standard_logging.getLogger("jax._src.xla_bridge").setLevel(standard_logging.WARNING)
  summary = _or_exit(_dispatch)
  if hosts.primary():
    for name, value in summary.items():
      for line in _lines(name, value):
        print(line)
  if summary.get("exit_code"):  # the mode worked, and found what must not go on
    sys.exit(summary["exit_code"])


def _lines(name: str, value: Any) -> Iterator[str]:
  """`name: value`; the figures of a table have a line each, `name.figure: value`."""
  if isinstance(value, dict):
    for key, inner in value.items():
      yield from _lines(f"{name}.{key}", inner)
  elif isinstance(value, (list, tuple)):
    yield f"{name}: {' '.join(map(_figure, value)) or 'none'}"
  else:
    yield f"{name}: {_figure(value)}"


def _figure(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def _dispatch() -> dict[str, Any]:
  config = validation.validate(_CONFIG.value)
  if (_MODE.value == "compile") != (_TOPOLOGY.value is not None):
    raise ValueError(f"--topology names the slice of --mode=compile; the mode is {_MODE.value}")
  options = {} if _TOPOLOGY.value is None else {"topology": _TOPOLOGY.value}
  if _PROGRAMS.value:
    if _MODE.value != "compile":
      raise ValueError(f"--programs names those of --mode=compile; the mode is {_MODE.value}")
    options["only"] = _PROGRAMS.value
  workdir = pathlib.Path(_WORKDIR.value or _usual_workdir()).absolute()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(
      f"--workdir: {workdir} cannot be made ({error.strerror}); name a folder that you may write to"
    ) from error
  with (
    joining.joined(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value),
    _alone(workdir, _MODE.value),
  ):
    try:
      if hosts.peers().count > 1 and _WORKDIR.value is None:
        raise ValueError(
          "--workdir: is needed on several hosts; name a folder that all of them share"
        )
      if hosts.peers().count > 1 and _MODE.value not in SEVERAL:
        raise ValueError(f"--mode={_MODE.value} runs in one process; start it without --processes")
      mode = importlib.import_module(f"steptool_jax.run.{_MODE.value}")
      return mode.run(config, workdir, **options)
    except Exception:
      name = "error.txt" if hosts.primary() else f"error_{hosts.peers().index}.txt"
      with contextlib.suppress(OSError):  # a full disk must not hide the error
        (workdir / name).write_text(traceback.format_exc())
      raise


def _usual_workdir() -> str:
  """runs/ and the config's name, with its argument: equal commands go on with each other's run."""
  file, _, argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
  named = "-".join([pathlib.Path(file).stem, *re.findall(r"[\w.]+", argument)])
  hosts.say(f"--workdir is not given: runs/{named}")
  return f"runs/{named}"


def _alone(workdir: pathlib.Path, mode: str) -> contextlib.AbstractContextManager:
  """The workdir for this run; the processes of one run share it."""
  free = mode in BESIDE or not hosts.primary()
  return contextlib.nullcontext() if free else lock.held(workdir, mode)


def _parse(argv: list[str]) -> list[str]:
  if argv[1:2] == ["help"] or {"--help", "-help", "-h"} & set(argv[1:]):
    # absl would show the text of the console script, which has none.
    print(f"{__doc__}\nflags:\n{flags.FLAGS.module_help(sys.modules[__name__])}")
    sys.exit()
  argv = _with_mode(argv)
  for k, word in enumerate(argv):
    if re.fullmatch("--?config(=.*)?", word):
      at = k if "=" in word else k + 1
      if at < len(argv):
        flag, equals, value = argv[at].partition("=") if at == k else ("", "", argv[at])
        argv[at] = flag + equals + _found(value)
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    what = _wrong_value(str(error)) or str(error).rstrip(".")
    if flags.FLAGS["config"].value is None and "--config=None" in what:
      what = "--config is needed: a file, or the name of a config of the package (quickstart)"
    sys.exit(f"steptool_jax: {what}; --help explains all modes")
  except Exception as error:
    for word in argv:
      if word.startswith("--config."):
        _or_exit(validation.check_name, word.removeprefix("--config.").partition("=")[0])
    sys.exit(f"steptool_jax: --config: it cannot be loaded ({type(error).__name__}: {error})")


def _with_mode(argv: list[str]) -> list[str]:
  """`steptool report …` as --mode=report; a copy. Exits where a mode is given twice, or unknown."""
  if len(argv) < 2 or argv[1].startswith("-"):
    return list(argv)
  word, rest = argv[1], argv[2:]
  if word not in MODES:
    near = difflib.get_close_matches(word, MODES, n=1, cutoff=0.0)[0]
    sys.exit(
      f"steptool_jax: unknown argument {word!r}: no mode; did you mean {near}? Fields are set with "
      "--config.NAME=VALUE"
    )
  if any(re.match("--?mode(=|$)", other) for other in rest):
    sys.exit(f"steptool_jax: {word} is a mode, and --mode names one, too; leave one of them out")
  return [argv[0], f"--mode={word}", *rest]


def _found(value: str) -> str:
  """The config file that FILE[:arg] names, a packaged one by its name; exits where none is."""
  file, colon, argument = value.partition(":")
  if pathlib.Path(file).is_file():
    return value
  names = sorted(path.stem for path in _CONFIGS.glob("[a-z]*.py"))
  if file in names:
    return f"{_CONFIGS / file}.py{colon}{argument}"
  sys.exit(
    f"steptool_jax: --config: there is no file {file!r}, and no config of that name comes with the "
    f"package: {', '.join(names)}"
  )


def _wrong_value(message: str) -> str:
  """What the type of a config field is, where the message is about one; else ""."""
  found = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
  if not found:
    return ""
  default = functools.reduce(getattr, found[1].split("."), Config())
  return f"config.{found[1]}: {type(default).__name__} is needed, found {found[2]!r}"


def _or_exit(function: Callable[..., Any], *args: Any) -> Any:
  """A mistake of input, or a run that cannot go on: a sentence helps; the rest is in error.txt."""
  try:
    return function(*args)
  except (ValueError, OSError, RuntimeError, InfrastructureError) as error:
    sys.exit(f"steptool_jax: {error}")


def run() -> None:
  app.run(main, flags_parser=_parse)


if __name__ == "__main__":
  run()
