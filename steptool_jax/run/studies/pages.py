"""The report's page from workdirs: the cells that it shows, and the file."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from steptool_jax.evaluation import behaviour, comparison, records, report
from steptool_jax.evaluation.comparison import DONE, STARTED, Cell
from steptool_jax.files import write_text
from steptool_jax.run.studies import grid

_TRACES = ("config.json", "summary.json", "metrics.jsonl", "moments", "trajectories.jsonl")


@dataclasses.dataclass(frozen=True)
class Page:
  path: pathlib.Path
  cells: Sequence[Cell]
  trajectories: int  # that are on it


def write_study(workdir: pathlib.Path, plan: Sequence[grid.Planned], most: int) -> Page:
  """WORKDIR/results/report.html of a study, with at most about `most` trajectories."""
  cells, notes = _read_cells(workdir, plan, most)
  return _write(workdir / "results/report.html", f"Study {workdir.name}", cells, most, notes)


def write_run(workdir: pathlib.Path, most: int) -> Page:
  """WORKDIR/report.html of a run; FileNotFoundError for a folder that holds nothing of one."""
  if not any((workdir / name).exists() for name in _TRACES):
    raise FileNotFoundError(
      f"{workdir} holds no run (none of {', '.join(_TRACES)}); give --workdir of a run or a study"
    )
  cell = _single_cell(workdir)
  parts = (cell.method, f"on {cell.environment}" if cell.environment else "", f"seed {cell.seed}")
  title = f"{workdir.name}: {' '.join(part for part in parts if part)}"
  return _write(workdir / "report.html", title, [cell], most, [])


def _write(
  path: pathlib.Path, title: str, cells: Sequence[Cell], most: int, notes: Sequence[str]
) -> Page:
  text, shown = report.write(title, cells, notes, most)
  write_text(path, text, errors="replace")
  return Page(path, cells, shown)


def _single_cell(workdir: pathlib.Path) -> Cell:
  run_ = records.read_run(workdir)
  c = run_.config
  environment = c.get("environment", {})
  return Cell(
    name=workdir.name,
    group="",
    environment=environment.get("name", "") if isinstance(environment, Mapping) else "",
    method=str(c.get("algorithm", run_.summary.get("mode", "run"))),
    seed=c.get("seed", 0),
    status=DONE if run_.summary and not run_.summary.get("interrupted") else STARTED,
    note="",
    run=run_,
    facts=_facts(run_),
  )


def _read_cells(
  workdir: pathlib.Path, plan: Sequence[grid.Planned], most: int
) -> tuple[list[Cell], list[str]]:
  """(the cells of a study, what to say of them), with at most about `most` trajectories in all.

  The figures are of all trajectories; those that are kept are tasks that turned, then others.
  """
  cells = []
  share = max(most // max(2 * len(plan), 1), 1)  # for each of the two moments of a cell
  left = 0
  for planned in plan:
    folder = grid.folder(workdir, planned.name)
    state = grid.read_state(folder)
    run_ = records.read_run(folder)
    moments = {name: run_.moments[name] for name in (run_.before, run_.after) if name}
    cell = Cell(
      name=planned.name,
      group=planned.group,
      environment=planned.environment,
      method=planned.method,
      seed=planned.seed,
      status=state.status,
      note=state.note,
      run=dataclasses.replace(run_, moments=_most_telling(moments, share)),
      facts=_facts(run_),
    )
    left += sum(map(len, run_.moments.values())) - sum(map(len, cell.run.moments.values()))
    cells.append(cell)
  note = f"{left} trajectories are in the figures and not on this page (report.trajectories)"
  return cells, [note] if left else []


def _most_telling(moments: dict[str, tuple], share: int) -> dict[str, tuple]:
  """`share` of each moment, the same tasks in both: those that turned first."""
  found = [[r.trajectory for r in records_] for records_ in moments.values()]
  cases = behaviour.turned_cases(*found) if len(found) == 2 else []
  order = {(case.task_id, case.sample): k for k, case in enumerate(cases)}

  def place(record) -> int:
    return order.get((record.trajectory.task_id, record.trajectory.sample), len(order))

  return {name: tuple(sorted(found, key=place)[:share]) for name, found in moments.items()}


def _facts(run_: records.Run) -> dict[str, comparison.Facts]:
  names = {name for name in (run_.before, run_.after, "trajectories") if name in run_.moments}
  return {name: comparison.facts_of([r.trajectory for r in run_.moments[name]]) for name in names}
