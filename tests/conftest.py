import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute: quick compilations halve their time.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
sys.path.insert(0, str(pathlib.Path(__file__).parent))
