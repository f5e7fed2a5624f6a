"""The files of an evaluation in the official formats.

    WORKDIR/answers/rollout_<k>/<subset>/<query id>_<method>.json   official answers
    WORKDIR/converted/rollout_<k>/<subset>.json                     official converted answers
    WORKDIR/pass_rate/rollout_<k>/<subset>_rollout_<k>.json         official verdicts

The folder rollout_<k> stands where official tools expect the name of a model. With
evaluation.stored=WORKDIR/pass_rate the verdicts give the figures once more.
"""

import collections
import pathlib
import shutil
from typing import Any

from steptool_jax.run.evaluating.figures import Judged
from steptool_jax.run.parts import build
from steptool_jax.run.parts.opening import Parts
from steptool_jax.toolbench.formats import judged
from steptool_jax.toolbench.formats.answers import cot_answer, dfs_answer, write_answer, write_json
from steptool_jax.toolbench.formats.converted import convert, read_converted
from steptool_jax.types import Status


def clear(workdir: pathlib.Path) -> None:
  """Removes what an earlier evaluation, perhaps of other tasks, has written."""
  for name in ("answers", "converted", "pass_rate"):
    for old in (workdir / name).glob("rollout_*"):
      shutil.rmtree(old)


def write(parts: Parts, run: Judged, folder: str, method: str) -> None:
  """Writes one repetition under the name `folder`; the run has a judge."""
  codec, strategy = parts.policy.chat_format.codec, build.build_search(parts.config)
  verdicts = dict(zip(map(int, run.rate.task_ids), run.rate.verdicts, strict=True))
  # The files of a subset: file name -> (query id, converted answer, verdicts).
  written: dict[str, dict[str, Any]] = collections.defaultdict(dict)
  for n, (solution, final) in enumerate(zip(run.solutions, run.trajectories, strict=True)):
    if final.status is Status.INFRASTRUCTURE_ERROR:
      continue  # it would be scored as a failure of the model
    task = solution.task
    if solution.search is not None:
      answer = dfs_answer(task, solution.search, strategy, parts.limits, codec.decode)
    else:
      answer = cot_answer(task, solution.attempts, parts.limits, codec.decode)
      answer["forward_args"] |= {
        "max_llm_calls": build.build_budget(parts.config),
        "pass_at": parts.config.evaluation.attempts,
      }
    subset = task.metadata["subset"]
    path = write_answer(parts.workdir / "answers" / folder / subset, task, method, answer)
    query_id = path.name.removesuffix(f"_{method}.json")
    written[subset][path.name] = query_id, convert(answer, method), verdicts[n]
  for subset, found in written.items():
    rows = [found[name] for name in sorted(found)]  # as the official converter reads a folder
    path = parts.workdir / "converted" / folder / f"{subset}.json"
    write_json(path, {query_id: converted for query_id, converted, _ in rows})
    answers = read_converted(path)
    judged.write_results(
      parts.workdir / "pass_rate" / folder / f"{subset}_{folder}.json",
      [answers[query_id].judged(given) for query_id, _, given in rows],
    )
