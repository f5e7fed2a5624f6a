import gc
import importlib.metadata
import os
import pathlib
import sys
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute: quick compilations halve their time.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# jaxlib 0.11 has this no more, and a flag that it does not know ends the process without a word.
if importlib.metadata.version("jaxlib").startswith("0.10."):
  QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
# Tracing makes millions of objects, few in cycles: a tenth of the time went into looking for them.
gc.set_threshold(20_000, 10, 10)
# Runs that keep their programs by default keep them nowhere else than in the tests' own folder.
_KEPT = tempfile.TemporaryDirectory(prefix="steptool_jax_kept_")
os.environ["XDG_CACHE_HOME"] = _KEPT.name
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import official_data  # noqa: E402

# Files that take minutes come first, so that none of them is left over for one process in the end.
LONG = (
  "test_multihost",
  "test_offline",
  "test_resume",
  "test_algorithm_runs",
  "test_export",
  "test_devices",
)


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session")
def shared():
  """The folder that holds stabletoolbench/ and steptool/; the test is skipped without it."""
  folder = official_data.DATA
  if not (folder / "steptool").is_dir():
    pytest.skip(f"the official data are not in {folder} (set STEPTOOL_DATA)")
  return folder
