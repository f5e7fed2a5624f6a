"""How a case is judged: a refusal that names its file, or a value in which all is as it says."""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Mapping

import numpy as np

from steptool_jax.simulators.errors import InfrastructureError

SECONDS = 20


class Hang(BaseException):
  """The case took longer than SECONDS."""


@contextlib.contextmanager
def limited():
  """Raises Hang in the main thread when the block takes too long."""

  def late(number, frame):
    raise Hang

  before = signal.signal(signal.SIGALRM, late)
  signal.setitimer(signal.ITIMER_REAL, SECONDS)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def outcome(read, name: str) -> str:
  """ "refused", "accepted", or what is wrong with what `read` did.

  read: returns what it made of the file. name: what a refusal must name.
  """
  try:
    with limited():
      value = read()
  except Hang:
    return f"hangs: more than {SECONDS} s"
  except BaseException as error:
    # main makes a sentence of these; RecursionError, a kind of RuntimeError, is none.
    if isinstance(error, (ValueError, OSError, InfrastructureError)) or type(error) is RuntimeError:
      return "refused" if name in str(error) else f"does not name {name}: {error!r:.200}"
    return f"{type(error).__name__}: {error!s:.200}"
  problem = unsound(value)
  return f"accepted {problem}" if problem else "accepted"


def unsound(value, path: str = "") -> str:
  """What makes a figure none, NaN or infinity, and where; "" where all is well."""
  if isinstance(value, float | np.floating):
    return "" if math.isfinite(value) else f"{path} = {value}"
  if isinstance(value, np.ndarray):
    fine = value.dtype.kind != "f" or np.isfinite(value).all()
    return "" if fine else f"{path}: an array with NaN or infinity"
  if dataclasses.is_dataclass(value):
    value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
  if isinstance(value, Mapping):
    parts = value.items()
  elif isinstance(value, list | tuple):
    parts = enumerate(value)
  else:
    return ""
  found = (unsound(part, f"{path}.{key}") for key, part in parts)
  return next(filter(None, found), "")
