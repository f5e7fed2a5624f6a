"""The script results/rule_judges.py as a module."""

import importlib.util
import pathlib
import sys

_PATH = pathlib.Path(__file__).parents[2] / "results" / "rule_judges.py"
_SPEC = importlib.util.spec_from_file_location("rule_judges", _PATH)
measured = sys.modules["rule_judges"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(measured)
