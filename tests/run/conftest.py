import functools
import os

import pytest
from jax.experimental.compilation_cache import compilation_cache

from steptool_jax.learning import update
from steptool_jax.policy import engine
from steptool_jax.run.training import setup


@pytest.fixture(scope="session", autouse=True)
def traced_once():
  """Equal runs in one process share their programs: to trace and lower them takes half the time."""
  keep = functools.lru_cache(maxsize=32)
  with pytest.MonkeyPatch.context() as patch:
    for module, name in (
      (engine, "make_engine"),
      (setup, "build_learner"),
      (update, "compile_programs"),
    ):
      patch.setattr(module, name, keep(getattr(module, name)))
    yield


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
  """Compiled programs that all runs of this folder share, in both processes of pytest-xdist."""
  compilation_cache.reset_cache()  # what compiled before has settled that there is none
  folder = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    folder = folder.parent
  return str(folder / "compiled")
