"""One self-contained HTML page from the cells of a study, or from a single run.

Everything is in the page: style, script and data, no network. The page allows its own script by
its hash and no other (Content-Security-Policy), values in the markup are escaped by jinja2, and the
data are read as JSON and put into the page as text, so what a tool says is never markup.
"""

import base64
import collections
import hashlib
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import markupsafe

from steptool_jax.evaluation import behaviour, comparison, panels, viewer
from steptool_jax.evaluation.comparison import DONE, Cell, Row
from steptool_jax.evaluation.figures import FIGURES, SHARE
from steptool_jax.evaluation.panels import percent, plain
from steptool_jax.evaluation.viewer import Entry, Pair

_ASSETS = pathlib.Path(__file__).parent.parent / "assets" / "report"
_SCRIPTS = ("page.js", "charts.js", "viewer.js", "steps.js")
_MOST_CASES = 200

_MOMENTS = {
  "heldout_base": "held-out, before training",
  "heldout_sft": "held-out, after SFT",
  "heldout_rl": "held-out, after RL",
  "heldout_greedy": "held-out, at the end, greedy",
  "trajectories": "evaluation",
}


def write(title: str, cells: Sequence[Cell], problems: Sequence[str], most: int) -> tuple[str, int]:
  """(the page, trajectories in it); most: trajectories, shared out evenly by the moments."""
  entries, pairs, left_out = _entries(cells, most)
  index, chunks = viewer.payload(entries, pairs)
  begun = {_row_name(cell) for cell in cells if cell.status != comparison.WAITING}
  rows = [row for row in comparison.rows(cells) if _row_name(row) in begun]
  scripts = "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS)
  style = (_ASSETS / "report.css").read_text(encoding="utf-8")
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_ASSETS),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters["wrapping"] = _wrapping
  page = environment.get_template("report.html").render(
    title=title,
    single=len(cells) == 1,
    cards=_cards(cells, rows),
    problems=[*problems, *left_out, *_cell_problems(cells)],
    rows=[_row(row) for row in rows],
    differences=[_difference(found) for found in comparison.differences(cells)],
    charts=markupsafe.Markup(viewer.script_json(panels.charts(cells))),
    tools=panels.tool_use(cells),
    recoveries=panels.recoveries(cells),
    reactions=behaviour.REACTIONS,
    levels=comparison.LEVELS,
    fewest_seeds=comparison.FEWEST_SEEDS,
    largest_p=comparison.LARGEST_P,
    more_titles=[FIGURES[name].label for name in _MORE],
    cases=[_case(pair, entries) for pair in pairs[:_MOST_CASES]],
    more_cases=max(len(pairs) - _MOST_CASES, 0),
    config=_config(cells),
    shown=len(entries),
    index=markupsafe.Markup(index),
    chunks=[markupsafe.Markup(chunk) for chunk in chunks],
    script=markupsafe.Markup(scripts),
    style=markupsafe.Markup(style),
    script_hash=_hash(scripts),
    style_hash=_hash(style),
  )
  return page, len(entries)


def _wrapping(name: str) -> markupsafe.Markup:
  """A long_name that may go on in the next line after an underscore."""
  return markupsafe.Markup("_<wbr>").join(name.split("_"))


def _hash(text: str) -> str:
  return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- trajectories ------------------------------------------------------------------------------


def _entries(cells: Sequence[Cell], most: int) -> tuple[list[Entry], list[Pair], list[str]]:
  """The first trajectories of every moment of every cell, and the tasks that turned."""
  moments = [(cell, name) for cell in cells for name in sorted(cell.run.moments, key=_moment_order)]
  sizes = [len(cell.run.moments[name]) for cell, name in moments]
  share = _most_of_each(sizes, most)
  entries: list[Entry] = []
  numbers: dict[tuple[str, str, str, int], int] = {}
  for cell, name in moments:
    place = cell.name if len(cells) > 1 else ""
    for record in cell.run.moments[name][:share]:
      numbers[cell.name, name, record.trajectory.task_id, record.trajectory.sample] = len(entries)
      entries.append(Entry(place, _label(name), record))
  pairs = []
  for cell in cells:
    ends = (cell.run.before, cell.run.after)
    if None in ends:
      continue
    found = [[r.trajectory for r in cell.run.moments[name][:share]] for name in ends]
    for case in behaviour.turned_cases(*found):
      old, new = (numbers[cell.name, name, case.task_id, case.sample] for name in ends)
      pairs.append(Pair(old, new, case))
  pairs.sort(key=lambda pair: (not pair.case.corrected, not pair.case.again))
  left = sum(sizes) - len(entries)
  note = f"{left} of {sum(sizes)} trajectories are left out of this page (report.trajectories)"
  return entries, pairs, [note] if left else []


def _moment_order(moment: str) -> tuple[int, str]:
  """Held-out moments in the order of training, then the training iterations."""
  return (list(_MOMENTS).index(moment) if moment in _MOMENTS else len(_MOMENTS)), moment


def _label(moment: str) -> str:
  kind, _, number = moment.partition("_")
  if kind == "train" and number.isdecimal():
    return f"training, iteration {int(number)}"
  return _MOMENTS.get(moment, moment)


def _most_of_each(sizes: Sequence[int], most: int) -> int:
  """Trajectories a moment so that all together are at most `most`."""
  low, high = 0, max(sizes, default=0)
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if sum(min(s, middle) for s in sizes) <= most else (low, middle - 1)
  return low


def _case(pair: Pair, entries: Sequence[Entry]) -> dict[str, Any]:
  after = entries[pair.after]
  return vars(pair.case) | vars(pair) | {"cell": after.cell, "query": after.record.query}


# --- summary and tables --------------------------------------------------------------------------


def _cards(cells: Sequence[Cell], rows: Sequence[Row]) -> list[dict[str, str]]:
  if len(cells) == 1:
    s = cells[0].run.summary
    names = {
      "pass_rate_base": "pass rate at the start",
      "pass_rate_sft": "after SFT",
      "pass_rate_rl": "after RL",
      "pass_rate_greedy": "at the end, greedy",
      "pass_rate": "pass rate",
    }
    cards = [
      {"label": label, "value": percent(s[key])}
      for key, label in names.items()
      if comparison.known(s.get(key))
    ]
    more = {"conversations": "conversations", "seconds": "seconds", "peak_rss_gib": "GiB of memory"}
    cards += [
      {"label": label, "value": f"{s[key]:,.4g}" if s[key] < 1e4 else f"{s[key]:,.0f}"}
      for key, label in more.items()
      if comparison.known(s.get(key))
    ]
    return cards
  cards = [
    {"label": "cells done", "value": f"{sum(c.status == DONE for c in cells)} / {len(cells)}"}
  ]
  failed = sum(c.status == comparison.FAILED for c in cells)
  if failed:
    cards.append({"label": "cells failed", "value": str(failed)})
  panels: dict[tuple[str, str], list[Row]] = {}
  for row in rows:
    if "final" in row.figures:
      panels.setdefault((row.group, row.environment), []).append(row)
  for (group, environment), members in panels.items():
    best = max(members, key=lambda row: row.figures["final"][0])
    place = " ".join(part for part in (group, environment) if part)
    label = f"best on {place}: {best.method}"
    cards.append({"label": label, "value": percent(best.figures["final"][0])})
  return cards


def _row_name(cell: Cell | Row) -> str:
  return "/".join(part for part in (cell.group, cell.environment, cell.method) if part)


def _cell_problems(cells: Sequence[Cell]) -> list[str]:
  out = []
  waiting = collections.Counter(
    _row_name(cell) for cell in cells if cell.status == comparison.WAITING
  )
  for cell in cells:
    place = f"{cell.name}: " if len(cells) > 1 else ""
    if cell.status == comparison.FAILED:
      out.append(f"{place}failed and is in no mean ({cell.note})")
    elif cell.status != comparison.WAITING:
      out += [f"{place}{problem}" for problem in cell.run.problems]
  return out + [f"{name}: {n} of its cells not started yet" for name, n in waiting.items()]


def _row(row: Row) -> dict[str, Any]:
  f = row.figures
  plateau = "no curve"
  if row.plateau is not None:
    p = row.plateau
    plateau = {
      None: "too few points to tell",
      True: "plateau",
      False: f"still {100 * p.rise:+.1f} points",
    }[p.reached]
  return vars(row) | {
    "seeds": f"{row.done}" if row.done == row.cells else f"{row.done} of {row.cells}",
    "final": interval(f.get("final"), percent),
    "greedy": interval(f.get("greedy"), percent),
    "start": interval(f.get("start"), percent),
    "area": interval(f.get("area"), percent),
    "plateau": plateau,
    "crossings": [crossing(row.crossings.get(level)) for level in comparison.LEVELS],
    "more": [interval(f.get(name), _format_of(name)) for name in _MORE],
  }


def _difference(found: comparison.Difference) -> dict[str, Any]:
  def points(share: float) -> str:
    return f"{100 * share:+.1f}"

  def cell(c: comparison.Contrast | None) -> dict[str, Any]:
    if c is None:
      return interval(None, points) | {"p": "", "sure": False}
    p = f"p {c.p:.3f}" + ("" if c.adjusted is None else f", Holm {c.adjusted:.3f}")
    return interval((c.mean, c.low, c.high), points) | {"p": p, "sure": c.clear}

  return vars(found) | {"figures": [cell(found.figures.get(key)) for key in comparison.COMPARED]}


def interval(value: tuple[float, float, float] | None, form) -> dict[str, str]:
  """What a cell of the table shows: the mean, and the interval below it where there is one."""
  if value is None:
    return {"mean": "–", "range": ""}
  mean, low, high = value
  known = math.isfinite(low) and math.isfinite(high)
  return {"mean": form(mean), "range": f"{form(low).rstrip(' %')} to {form(high)}" if known else ""}


def crossing(value: tuple[float, float, float] | None) -> dict[str, str]:
  """The same of a number of steps, which may be infinite: never."""
  if value is None:
    return {"mean": "–", "range": ""}
  mean, low, high = (plain(v) if math.isfinite(v) else "never" for v in value)
  told = not math.isnan(value[1]) and {mean, low, high} != {"never"}
  return {"mean": mean, "range": f"{low} to {high}" if told else ""}


_MORE = (  # further columns of the table
  "calls_per_task",
  "useless_calls",
  "invalid_call_rate",
  "invocation_success",
  "recovered_from_fault",
  "solved_after_fault",
  "repeated_after_ok",
  "diversity",
  "entropy",
  "train_area",
  "pass_at_1_start",
  "pass_at_1_end",
  "pass_at_16_start",
  "pass_at_16_end",
  "new_sequences",
  "llm_calls_per_solved",
  "tokens_per_solved",
  "cost_per_solved",
  "latency_per_solved",
  "seconds",
)


def _format_of(name: str) -> Callable[[float], str]:
  return percent if FIGURES[name].unit == SHARE else plain


def _config(cells: Sequence[Cell]) -> dict[str, str]:
  """A single run's fields that stand in its config.json, flat."""
  flat: dict[str, str] = {}

  def walk(tree: Mapping[str, Any], prefix: str) -> None:
    for key, value in tree.items():
      if isinstance(value, Mapping):
        walk(value, f"{prefix}{key}.")
      else:
        flat[f"{prefix}{key}"] = str(value)

  if len(cells) == 1:
    walk(cells[0].run.config, "")
  return flat
