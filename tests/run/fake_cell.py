"""Stands in for run/cell.py: FOLDER CORES…; acts as the seed says, in no time.

seed 0: ends well. seed 1: fails always. seed 2: fails once. seed 3: runs until SIGTERM, and ends
well when it is started again.
"""

import json
import pathlib
import signal
import sys
import time

folder = pathlib.Path(sys.argv[1])
config = json.loads((folder / "cell_config.json").read_text())
starts = folder / "starts"
starts.write_text((starts.read_text() if starts.exists() else "") + " ".join(sys.argv[2:]) + "\n")
first = starts.read_text().count("\n") == 1
seed = config["seed"]


def end(interrupted=False):
  rate = 0.8 if config["algorithm"] == "steptool" else 0.5
  records = [
    {"step": k, "heldout/pass_rate": rate * k / 4, "heldout/llm_calls": 10 * k} for k in range(5)
  ]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  summary = {"pass_rate_sft": 0.0, "pass_rate_rl": rate, "interrupted": interrupted}
  (folder / "summary.json").write_text(json.dumps(summary))
  sys.exit(0)


if seed == 1 or (seed == 2 and first):
  (folder / "error.txt").write_text("Traceback\nValueError: no luck\n")
  sys.exit(1)
if seed == 3 and first:
  signal.signal(signal.SIGTERM, lambda number, frame: end(interrupted=True))
  (folder / "running").touch()
  time.sleep(60)
end()
