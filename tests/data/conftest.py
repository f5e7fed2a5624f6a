"""The small tokenizers of tests/dialogue, and the folder of official data."""

import importlib.util
import os
import pathlib

import pytest

_PATH = pathlib.Path(__file__).parents[1] / "dialogue" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("dialogue_fixtures", _PATH)
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
directories, codecs = _MODULE.directories, _MODULE.codecs


@pytest.fixture(scope="session")
def shared():
  """The folder that holds stabletoolbench/ and steptool/; the test is skipped without it."""
  default = pathlib.Path(__file__).parents[3] / "shared" / "data"
  folder = pathlib.Path(os.environ.get("STEPTOOL_DATA", default))
  if not (folder / "steptool").is_dir():
    pytest.skip(f"the official data are not in {folder} (set STEPTOOL_DATA)")
  return folder
