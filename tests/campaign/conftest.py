"""The campaign borrows the valid files of the other rooms' tests; it ends with a table.

STEPTOOL_CAMPAIGN_FIGURES=FILE python -m pytest -m campaign tests/campaign   # also as JSON
"""

import json
import os
import pathlib
import sys

for room in ("data", "run", "simulators", "toolbench"):
  sys.path.append(str(pathlib.Path(__file__).parents[1] / room))


def pytest_terminal_summary(terminalreporter):
  import figures

  if not figures.ROWS:
    return
  terminalreporter.section("campaign")
  for name, count, outcomes in figures.ROWS:
    found = ", ".join(f"{how} {number}" for how, number in outcomes.items())
    terminalreporter.write_line(f"{name:<48} {count:>5}  {found}")
  for name, count in figures.totals().items():
    terminalreporter.write_line(f"{name + ', in all':<48} {count:>5}")
  if "STEPTOOL_CAMPAIGN_FIGURES" in os.environ:
    rows = [{"name": n, "cases": c, "outcomes": o} for n, c, o in figures.ROWS]
    text = json.dumps({"totals": figures.totals(), "rows": rows}, indent=1)
    pathlib.Path(os.environ["STEPTOOL_CAMPAIGN_FIGURES"]).write_text(text + "\n")
