"""The folder of official data."""

import os
import pathlib

import pytest


@pytest.fixture(scope="session")
def data():
  """The folder that holds stabletoolbench/ and steptool/; the test is skipped without it."""
  default = pathlib.Path(__file__).parents[3] / "shared" / "data"
  folder = pathlib.Path(os.environ.get("STEPTOOL_DATA", default))
  if not (folder / "steptool").is_dir():
    pytest.skip(f"the official data are not in {folder} (set STEPTOOL_DATA)")
  return folder
