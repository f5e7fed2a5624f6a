"""Where the official data are: STEPTOOL_DATA, or shared/data beside the checkout."""

import os
import pathlib

_BESIDE = pathlib.Path(__file__).parents[2] / "shared" / "data"
DATA = pathlib.Path(os.environ.get("STEPTOOL_DATA", _BESIDE))
