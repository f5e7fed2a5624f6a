import os

import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
  """Compiled programs that all runs of this folder share, in both processes of pytest-xdist."""
  compilation_cache.reset_cache()  # what compiled before has settled that there is none
  folder = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    folder = folder.parent
  return str(folder / "compiled")
