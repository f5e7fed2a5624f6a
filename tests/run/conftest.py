import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
  """Compiled programs that all runs of this folder share."""
  compilation_cache.reset_cache()  # what compiled before has settled that there is none
  return str(tmp_path_factory.mktemp("compiled"))
