"""--mode=check: what is wrong with tools, tasks, checkers and demonstrations, before any training.

Prints a table, worst first. WORKDIR/summary_check.json, and summary.json where there is none, have
the figures and all findings, check.jsonl a row for every task that was looked at. Reads no weights.
Exit code 1 where there is an error.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any

from steptool_jax.checking import check as checking
from steptool_jax.checking import findings
from steptool_jax.config import Config
from steptool_jax.environments.base import AGENTS, SPLITS
from steptool_jax.files import write_text
from steptool_jax.run.checks import environments
from steptool_jax.run.hosts import hosts
from steptool_jax.run.workdir import outputs


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Checks config.check.tasks tasks of each split; returns the summary, with its exit code.

  ValueError for environments 'harness' and 'verifiers'.
  """
  if (name := config.environment.name) in AGENTS:
    raise ValueError(
      f"config.environment.name: --mode=check replays demonstrations, and {name!r} has none; its "
      "agent and its tasks are read, and refused where they are wrong, as any mode begins"
    )
  started = time.monotonic()
  with hosts.bar(desc="check", unit="task", leave=False) as bar:
    extent = checking.Extent(tasks=config.check.tasks, workers=config.rollout.tool_workers)
    report = environments.report_on(config, workdir, extent, bar.update)
  summary = {"environment": config.environment.name, **report.summary()}
  summary |= {"seconds": time.monotonic() - started, "exit_code": int(report.errors > 0)}
  ordered = [dataclasses.asdict(f) for f in findings.worst_first(report.findings)]
  rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in report.rows)
  outputs.write_summary(workdir, "check", summary | {"findings": ordered})
  write_text(workdir / "check.jsonl", rows)
  hosts.say(findings.table(report.findings))
  if "checked_tasks" in summary:  # the environment could be opened
    tasks = sum(summary[f"{split}_tasks"] for split in SPLITS)
    looked = f"{summary['checked_tasks']} of {tasks} tasks were looked at"
    if summary["checked_tasks"] < tasks:
      looked += " (check.tasks of each split; 0 = all)"
    hosts.say(f"{looked}; {summary['demonstrations']} demonstrations of these were replayed")
  return {"mode": "check"} | summary
