"""The small tokenizers of tests/dialogue."""

import importlib.util
import pathlib

_PATH = pathlib.Path(__file__).parents[1] / "dialogue" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("dialogue_fixtures", _PATH)
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
directories, codecs = _MODULE.directories, _MODULE.codecs
