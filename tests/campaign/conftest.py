"""The campaign borrows the valid files of the other rooms' tests."""

import pathlib
import sys

for room in ("data", "run", "toolbench"):
  sys.path.append(str(pathlib.Path(__file__).parents[1] / room))
