import functools
import os

import pytest
from jax.experimental.compilation_cache import compilation_cache

from steptool_jax.learning.programs import update
from steptool_jax.policy import engine
from steptool_jax.run.training import setup

_KEPT = [
  (module, name, functools.lru_cache(maxsize=32)(getattr(module, name)))
  for module, name in (
    (engine, "make_engine"),
    (setup, "build_learner"),
    (update, "compile_programs"),
  )
]


@pytest.fixture(scope="module", autouse=True)
def traced_once():
  """Equal runs in one process share their programs: to trace and lower them takes half the time.

  In this folder's tests alone: others make an engine again after they have changed what it reads.
  """
  with pytest.MonkeyPatch.context() as patch:
    for kept in _KEPT:
      patch.setattr(*kept)
    yield


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
  """Compiled programs that all runs of this folder share, in both processes of pytest-xdist."""
  compilation_cache.reset_cache()  # what compiled before has settled that there is none
  folder = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    folder = folder.parent
  return str(folder / "compiled")
