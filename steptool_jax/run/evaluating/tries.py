"""evaluation.samples conversations a task, at the start of RL and at the end: pass@k, and whether
what is solved is new (evaluation/tries.py).

    WORKDIR/tries_start.json, tries_end.json    {task: tries, solved, sequences of tools}
"""

import json
import logging
import math

from steptool_jax.evaluation import tries
from steptool_jax.files import read_json, write_text
from steptool_jax.run.hosts import hosts
from steptool_jax.run.parts import rollouts
from steptool_jax.run.parts.opening import Parts

START, END = "start", "end"


def measure(parts: Parts, variables: dict, moment: str) -> dict[str, float]:
  """Figures for the summary: pass_at_<k>_<moment>, and at the end new_sequences.

  The keys are those of evaluations, so both moments meet the same luck. Interrupted as rollout.
  """
  e = parts.config.evaluation
  tasks = parts.environment.tasks("heldout")[: e.sampled_tasks]
  jobs = [(task, k) for task in tasks for k in range(e.samples)]
  found, _ = rollouts.roll(
    *(parts, variables, jobs, rollouts.EVALUATION, e.temperature, f"{e.samples} tries, {moment}")
  )
  found = rollouts.judge(parts, [task for task, _ in jobs], found)
  mine = tries.document(found)
  figures = {f"pass_at_{k}_{moment}": value for k, value in tries.pass_at_all(mine).items()}

  def keep() -> dict[str, float]:
    write_text(parts.workdir / f"tries_{moment}.json", json.dumps(mine))
    if moment != END:
      return {}
    try:
      before = read_json(parts.workdir / f"tries_{START}.json")
    except (OSError, ValueError) as error:
      logging.warning("new_sequences: left out, the tries at the start cannot be read (%s)", error)
      return {}
    return {"new_sequences": tries.new_sequences(before, mine)}

  figures |= hosts.lead(keep)
  return {name: value for name, value in figures.items() if math.isfinite(value)}
