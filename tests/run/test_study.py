"""Studies: what cells are, how they are run, and that nothing is averaged away."""

import collections
import csv
import dataclasses
import json
import os
import pathlib
import re
import runpy
import sys
import threading
import time

import fakes
import numpy as np
import pytest
import tiny
from resuming import saved

from steptool_jax.data.trajectories import AnnotatedTrajectory, write_trajectories
from steptool_jax.learning.algorithms import ALGORITHMS
from steptool_jax.run import report, study, train
from steptool_jax.run.studies import grid, results
from steptool_jax.types import Status
from steptool_jax.validation import validate

FAKE = (sys.executable, str(pathlib.Path(__file__).parent / "fake_cell.py"))
LINES = (
  "core/shop/ppo: seeds=2 algorithm=ppo",
  "core/shop/steptool: seeds=2 algorithm=steptool loss.kl_coef=0.1",
)


def make(*lines, **changes):
  return tiny.make(study__cells=lines or LINES, **changes)


# --- cells -----------------------------------------------------------------------------------


def test_lines_become_cells():
  cells = grid.plan(make().study)
  names = [f"core/shop/{method}/{seed}" for method in ("ppo", "steptool") for seed in (0, 1)]
  assert [c.name for c in cells] == names
  config = grid.cell_config(make(), cells[3])
  assert (config.algorithm, config.seed, config.loss.kl_coef) == ("steptool", 1, 0.1)
  # A cell does not know of the study: its config is the same whatever else is run.
  assert config.study == dataclasses.replace(make().study, cells=())
  assert grid.cell_config(make(LINES[1], study__parallel=2), cells[3]) == config


def test_values_take_the_type_of_their_field():
  line = (
    "a/b/c: evaluation.greedy=True train.iterations=7 lora.targets=q,up rewards.alpha=2 "
    "environment.name=data_pipeline"
  )
  (cell,) = grid.plan(make(line).study)
  config = grid.cell_config(make(line), cell)
  assert config.evaluation.greedy is True
  assert config.train.iterations == 7
  assert config.lora.targets == ("q", "up")
  assert config.rewards.alpha == 2.0
  assert config.environment.name == "data_pipeline"


@pytest.mark.parametrize(
  ("lines", "message"),
  [
    ((), "is empty"),
    (("a/b: seeds=1",), "is not 'group/environment/method"),
    (("a/b/c",), "is not 'group/environment/method"),
    (("a/b/c: seed",), "is not 'group/environment/method"),
    (("a/b/c: seeds=0",), "must be a number above 0"),
    (("a/b/c: seeds=8 seed=7",), "seed is the cell's own"),
    (("a/b/c: algorithm=ppo", "a/b/c: algorithm=rft"), "a/b/c/0 is named twice"),
    (("a/b/c: seeds=2", "d/b/c: seeds=1"), "a/b/c/0 and d/b/c/0 would be taken for one"),
  ],
)
def test_lines_that_are_none(lines, message):
  with pytest.raises(ValueError, match=message):
    grid.plan(tiny.make(study__cells=lines).study)


def test_cells_that_cannot_be_run_are_all_named_before_any_work(tmp_path):
  config = make(
    *LINES,
    "wide/shop/one: algorithm=nonesuch",
    "wide/shop/two: algorithm=ppo train.iteratons=3",
    "wide/shop/three: algorithm=ppo train.epochs=many",
  )
  with pytest.raises(ValueError, match="cannot be run") as error:
    study.run(config, tmp_path)
  text = str(error.value)
  assert "wide/shop/one: algorithm: no 'nonesuch'; choose one of" in text
  assert "wide/shop/two: config.train.iteratons: no such field; did you mean" in text
  assert "wide/shop/three: config.train.epochs: int is needed, found 'many'" in text
  assert not list(tmp_path.iterdir())


def test_unequal_budgets_are_refused():
  lines = (LINES[0], "core/shop/steptool: algorithm=steptool rollout.tasks=5 sft.steps=1")
  with pytest.raises(ValueError, match=r"core/shop/ppo/0 .*differ in rollout\.tasks, sft\.steps"):
    grid.configs(make(*lines), grid.plan(make(*lines).study))


def test_a_pattern_of_no_cell(tmp_path):
  with pytest.raises(ValueError, match="no cell matches 'core/farm"):
    study.run(make(study__only=("core/farm/*",)), tmp_path)


def test_more_cores_than_there_are(tmp_path):
  with pytest.raises(ValueError, match=r"study\.parallel: 99 cells of 1 cores"):
    study.run(make(study__parallel=99, study__cores=1), tmp_path)


# --- runs, with cells that only pretend ----------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
  monkeypatch.setattr(study, "COMMAND", FAKE)


def table(workdir):
  found = json.loads((workdir / "results/table.json").read_text())
  return {row["method"]: row for row in found["rows"]}


def test_a_failed_cell_is_tried_again_then_marked_and_in_no_mean(fake, tmp_path):
  lines = tuple(line.replace("seeds=2", "seeds=3") for line in LINES)
  summary = study.run(make(*lines, study__parallel=2, study__cores=1), tmp_path)
  failed = ["core/shop/ppo/1", "core/shop/steptool/1"]
  assert (summary["done"], summary["failed"], summary["left"]) == (4, failed, 0)
  assert summary["interrupted"] is False
  state = grid.read_state(tmp_path / "cells/core/shop/ppo/1")
  assert (state.status, state.attempts) == ("failed", 2)
  assert state.note == "ValueError: no luck (attempt 2)"
  rows = table(tmp_path)
  assert (rows["ppo"]["cells"], rows["ppo"]["done"]) == (3, 2)
  assert rows["ppo"]["missing"] == ["seed 1 failed: ValueError: no luck (attempt 2)"]
  assert rows["ppo"]["figures"]["final"][0] == 0.5
  assert rows["steptool"]["figures"]["final"][0] == 0.8
  # Half of the best final rate, .4, is where ppo's line to .5 at 40 calls stands at 32.
  assert rows["ppo"]["crossings"]["0.5"][0] == pytest.approx(32)
  assert rows["ppo"]["crossings"]["0.7"][0] == "never"
  assert rows["steptool"]["figures"]["area"][0] == pytest.approx(0.4)
  page = (tmp_path / "results/report.html").read_text()
  assert "core/shop/ppo/1: failed and is in no mean (ValueError: no luck (attempt 2))" in page
  # Started again, a study that is done does nothing, and a failed cell stays marked.
  starts = tmp_path / "cells/core/shop/ppo/1/starts"
  before = starts.read_text()
  assert before.count("\n") == 2
  again = study.run(make(*lines), tmp_path)
  assert (again["done"], again["failed"]) == (4, failed)
  assert starts.read_text() == before


def test_differences_are_between_equal_seeds(fake, tmp_path):
  """Seed 1 fails always and is in no pair; others are compared with the first method and the one
  of the short name."""
  lines = (
    "core/shop/ppo: seeds=3 algorithm=ppo",
    "core/shop/steptool: seeds=3 algorithm=steptool",
    "wide/shop/steptool_cut: seeds=1 algorithm=ppo",
  )
  study.run(make(*lines), tmp_path)
  with (tmp_path / "results/differences.csv").open() as file:
    found = {(row["method"], row["against"]): row for row in csv.DictReader(file)}
  assert list(found) == [("steptool", "ppo"), ("steptool_cut", "ppo"), ("steptool_cut", "steptool")]
  expected = {("steptool", "ppo"): (2, 0.3, 0.15), ("steptool_cut", "steptool"): (1, -0.3, -0.15)}
  for pair, (seeds, final, area) in expected.items():
    row = found[pair]
    assert int(row["seeds"]) == seeds
    assert [float(row["final"]), float(row["area"])] == pytest.approx([final, area])
    assert row["greedy"] == "", "no cell has it"
    assert bool(row["final_low"]) == (seeds > 1), "one seed has no interval"
    assert row["final_p"] == ("0.5" if seeds == 2 else "1.0")
    assert (row["final_holm"], row["final_clear"]) == ("", "False"), "clear with too few seeds"
  page = (tmp_path / "results/report.html").read_text()
  assert ">+30.0<small>+30.0 to +30.0</small><small>p 0.500</small>" in page
  assert ">-30.0<small></small><small>p 1.000</small>" in page
  assert "Bold, a clear difference: 8 seeds or more" in page
  stored = json.loads((tmp_path / "results/table.json").read_text())
  assert stored["clear"] == {"fewest_seeds": 8, "largest_p": 0.05}
  assert stored["differences"][0]["figures"]["final"]["mean"] == pytest.approx(0.3)


def test_an_interrupted_study_goes_on(fake, tmp_path, monkeypatch):
  """A cell that runs when time is up saves, and the same command makes up for it."""
  line = "core/shop/ppo: seeds=4 algorithm=ppo"
  config = make(line, study__only=("*/0", "*/3"), study__hours=1.0)
  running, clock = tmp_path / "cells/core/shop/ppo/3/running", time.monotonic
  monkeypatch.setattr(time, "monotonic", lambda: clock() + (7200 if running.exists() else 0))
  first = study.run(config, tmp_path)
  assert (first["cells"], first["done"], first["left"]) == (4, 1, 3)
  assert first["interrupted"] is True
  stopped = grid.read_state(tmp_path / "cells/core/shop/ppo/3")
  assert (stopped.status, stopped.attempts) == ("unfinished", 0)
  assert table(tmp_path)["ppo"]["missing"][-1] == (
    "seed 3 unfinished: stopped; goes on with the same command"
  )
  monkeypatch.undo()
  monkeypatch.setattr(study, "COMMAND", FAKE)
  second = study.run(config, tmp_path)
  assert (second["done"], second["left"], second["interrupted"]) == (2, 2, False)
  assert (tmp_path / "cells/core/shop/ppo/0/starts").read_text().count("\n") == 1
  curves = list(csv.DictReader((tmp_path / "results/curves.csv").open()))
  mine = [
    r for r in curves if r["cell"] == "core/shop/ppo/3" and r["figure"] == "heldout/pass_rate"
  ]
  assert [float(r["value"]) for r in mine] == [0.5 * k / 4 for k in range(5)]
  assert [float(r["llm_calls"]) for r in mine] == [0, 10, 20, 30, 40]


def test_a_cell_that_was_begun_with_another_config_is_refused(fake, tmp_path):
  line = "core/shop/ppo: algorithm=ppo"
  study.run(make(line, checkpoint__every=1), tmp_path)
  study.run(make(line, checkpoint__every=2, report__trajectories=9), tmp_path)  # as good as equal
  before = (tmp_path / "summary.json").read_text()
  with pytest.raises(ValueError, match=r"ppo/0 was begun .*: evaluation\.tasks, rollout\.samples;"):
    study.run(make(line, rollout__samples=3, evaluation__tasks=5), tmp_path)
  assert (tmp_path / "summary.json").read_text() == before


def test_sigterm_stops_the_study_and_its_cells(fake, tmp_path):
  line = "core/shop/ppo: seeds=4 algorithm=ppo"
  running = tmp_path / "cells/core/shop/ppo/3/running"

  def stop():
    limit = time.monotonic() + 30
    while not running.exists() and time.monotonic() < limit:
      time.sleep(0.05)
    os.kill(os.getpid(), 15)

  thread = threading.Thread(target=stop)
  thread.start()
  summary = study.run(make(line, study__only=("*/3",)), tmp_path)
  thread.join()
  assert summary["interrupted"] is True
  assert results.interrupted(tmp_path / "cells/core/shop/ppo/3")


def test_each_place_has_its_own_cores(fake, tmp_path):
  study.run(make(study__only=("*/0",), study__cores=1), tmp_path)
  core = str(sorted(os.sched_getaffinity(0))[0])
  assert (tmp_path / "cells/core/shop/ppo/0/starts").read_text() == core + "\n"


def test_the_page_of_a_study_shows_the_tasks_that_turned(tmp_path):
  """Room for one trajectory a moment: it is that of the case, not the first."""
  grid.write_plan(tmp_path, grid.plan(make("core/shop/ppo: algorithm=ppo").study))
  folder = grid.folder(tmp_path, "core/shop/ppo/0")
  rng = np.random.default_rng(0)

  def rolled(task, solved):
    found = fakes.random_trajectory(rng, status=Status.ANSWERED)
    return AnnotatedTrajectory(dataclasses.replace(found, task_id=task, solved=solved), query=task)

  for moment, solved in (("base", 0.0), ("rl", 1.0)):
    found = [rolled("stays failed", 0.0), rolled("turned", solved)]
    write_trajectories(folder / "moments" / f"heldout_{moment}.jsonl", found)
  config = make("core/shop/ppo: algorithm=ppo", report__trajectories=2)
  assert report.run(config, tmp_path)["trajectories"] == 2
  page = (tmp_path / "results/report.html").read_text()
  assert page.count('<span class="query">turned</span>') == 1
  assert "stays failed" not in page
  assert "2 trajectories are in the figures and not on this page" in page


def test_a_report_of_a_study_that_has_hardly_begun(fake, tmp_path):
  grid.write_plan(tmp_path, grid.plan(make().study))
  found = report.run(make(), tmp_path)
  assert (found["cells"], found["trajectories"]) == (4, 0)
  page = (tmp_path / "results/report.html").read_text()
  assert "core/shop/ppo: 2 of its cells not started yet" in page
  assert "<table>" not in page, "rows without a figure"


# --- one real cell -------------------------------------------------------------------------------


def test_a_cell_run_again_gives_the_same_bits(tmp_path, compiled, monkeypatch):
  """A cell in a study, a process of its own, learns the same as a run by itself."""
  line = "core/shop/steptool: algorithm=steptool evaluation.greedy=True"
  small = {"train__iterations": 1, "evaluation__tasks": 2, "evaluation__temperature": 1.0}
  config = make(line, compilation_cache=compiled, **small)
  monkeypatch.setenv("PYTHONPATH", tiny.environment()["PYTHONPATH"])
  assert study.run(config, tmp_path / "study")["done"] == 1
  cell = tmp_path / "study/cells/core/shop/steptool/0"
  again = tmp_path / "again"
  train.run(validate(json.loads((cell / "cell_config.json").read_text())), again)
  mine, theirs = (json.loads((f / "summary.json").read_text()) for f in (cell, again))
  for name in ("pass_rate_base", "pass_rate_sft", "pass_rate_rl", "pass_rate_greedy"):
    assert mine[name] == theirs[name], name
  arrays, others = saved(cell)[0], saved(again)[0]
  for path, array in arrays.items():
    np.testing.assert_array_equal(array, others[path], err_msg=path)
  for name in ("heldout_base", "heldout_rl", "heldout_greedy", "train_000000"):
    texts = [(f / f"moments/{name}.jsonl").read_text() for f in (cell, again)]
    assert re.sub(SECONDS, "", texts[0]) == re.sub(SECONDS, "", texts[1]) != ""


SECONDS = r'"seconds":[^,]*'


# --- configs/study.py ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed():
  return runpy.run_path(str(tiny.ROOT / "configs" / "study.py"))["get_config"]


def test_the_committed_study(committed):
  study_ = validate(committed()).study
  cells = grid.plan(study_)
  sizes = collections.Counter(cell.group for cell in cells)
  assert sizes == {
    "core": 4 * (7 * 8 + 5 * 4),
    "depth": 4 * 3 * 8,
    "granularity": 3 * 8,
    "sources": 4,
    "plateau": 2 * 3 * 4,
    "delayed": 3 * 8,
    "new": 3 * 4,
  }
  found = grid.configs(validate(committed()), cells)
  faulty = found["core/data_pipeline_faults/ppo/4"]
  assert (faulty.seed, faulty.environment.name) == (4, "data_pipeline")
  assert faulty.environment.faults.timeout == 0.04
  deep = found["depth/5_calls/steptool/2"].environment
  assert (deep.min_calls, deep.max_calls, deep.faults.timeout) == (5, 5, 0.0)


def test_a_cell_of_the_committed_study_by_name(committed):
  whole = validate(committed())
  (cell,) = [c for c in grid.plan(whole.study) if c.name == "core/nested_api_faults/steptool/3"]
  assert validate(committed(cell.name)) == grid.cell_config(whole, cell)
  with pytest.raises(ValueError, match="no such cell; they are named as core/nested_api/outcome/0"):
    committed("core/nested_api/ppo")


def test_all_algorithms_as_the_quickstart_trains_them(committed):
  config = validate(committed("algorithms"))
  cells = grid.plan(config.study)
  assert {(c.method, c.seed) for c in cells} == {(n, s) for n in ALGORITHMS for s in range(3)}
  first = [cell for cell in cells if cell.seed == 0]
  found = grid.configs(config, first)
  quickstart = runpy.run_path(str(tiny.ROOT / "configs" / "quickstart.py"))["get_config"]
  for cell in first:
    mine, usual = found[cell.name], validate(quickstart(cell.method))
    assert cell.method == mine.algorithm
    for part in ("model", "sft", "advantage", "loss", "archer", "dpo", "rewards"):
      assert getattr(mine, part) == getattr(usual, part), (cell.name, part)
    assert mine.train.optimizer == usual.train.optimizer


@pytest.mark.parametrize(
  ("start", "environment"), [("pipeline_base", "data_pipeline"), ("archive_base", "archive")]
)
def test_the_starts_of_other_environments(committed, start, environment):
  config = validate(committed(start))
  assert (config.algorithm, config.environment.name) == ("sft", environment)
