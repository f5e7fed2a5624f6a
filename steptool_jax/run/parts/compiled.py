"""Where compiled programs are kept, so that the next start need not compile them again."""

import hashlib
import os
import pathlib
import platform

import jax
from absl import logging

from steptool_jax.run.hosts import hosts

_MOST_BYTES = 4 * 2**30  # of the default folder; what was not used for the longest time goes
_LEAST_SECONDS = 0.2  # programs that compile faster are not kept


def keep(name: str, workdir: pathlib.Path) -> pathlib.Path | None:
  """Has JAX keep its programs in config.compilation_cache and returns the folder; None = nowhere.

  By default it is the user's cache folder; of several processes, the first of which writes for all,
  WORKDIR/compiled, which all of them see.

  Several processes may share it: one that reads what another is writing, or a killed one has left
  half written, gets an error, which JAX takes as a reason to compile.
  """
  if name in ("", "none") or (name == "auto" and jax.config.jax_compilation_cache_dir):
    # Nothing is kept, or where JAX_COMPILATION_CACHE_DIR says.
    if name != "auto":
      jax.config.update("jax_compilation_cache_dir", None)
    return None
  own = name == "auto" and hosts.peers().count == 1
  folder = default_folder(None if own else workdir) if name == "auto" else pathlib.Path(name)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    if name != "auto":
      raise ValueError(
        f"config.compilation_cache: {folder} cannot be made ({error.strerror}); name a folder that "
        "you may write to, or 'none'"
      ) from error
    logging.warning("compiled programs are not kept: %s (%s)", folder, error.strerror)
    return None
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
  jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES if own else -1)
  return folder


def default_folder(workdir: pathlib.Path | None = None) -> pathlib.Path:
  """A folder for this kind of machine in the user's cache folder, or in the workdir.

  What XLA compiles for a CPU runs on CPUs with the same instructions only, and homes are shared.
  """
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  base = workdir or pathlib.Path(home) / "steptool_jax"
  kind = jax.default_backend()
  if kind == "cpu":
    kind += "-" + hashlib.sha256(_processor().encode()).hexdigest()[:12]
  return base / "compiled" / kind


def _processor() -> str:
  """What this machine's processor is and can do."""
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:
    return f"{platform.machine()} {platform.processor()}"
  wanted = ("model name", "flags", "Features", "CPU part")
  lines = [line for line in text.split("\n\n")[0].splitlines() if line.startswith(wanted)]
  return "\n".join([platform.machine(), *lines])
