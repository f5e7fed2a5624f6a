"""What a training run says in the terminal when it has ended: how far it came, and one task again.

    held out      start  ########                                  14.0 %
                    SFT  ##########                                18.0 %
                     RL  ###################################       59.0 %

Below it a held-out task that was missed at the start and is solved now, both conversations side by
side, and what to do next. Plain text in a log; blocks and bold letters in a terminal. What tools
say has no control characters here: a terminal would obey them.
"""

import itertools
import pathlib
import re
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from steptool_jax.data.trajectories import AnnotatedTrajectory, read_trajectories
from steptool_jax.types import Finish, Malformed, Trajectory, by_call

_BAR = 60  # characters of 100 %
_WIDTH = 47  # of each of the two conversations
_LINES = 24
_NAMED = 8  # kinds of tasks in one sentence
# What a person can do where there is no reward to learn from.
NOTHING_EARNED = (
  ": RL learns from what is tried and paid. Give SFT more (sft.steps, sft.tasks, demonstrations; "
  "its loss should end well below 1), a higher sft.optimizer.learning_rate, or take a model that "
  "knows your tools' words"
)
_RL_BELOW_SFT = (
  "RL ended below SFT. Try a lower train.optimizer.learning_rate, more conversations in an "
  "iteration (rollout.tasks, rollout.samples) or a higher loss.kl_coef; the report shows what it "
  "learnt instead."
)
_STAGES = (("start", "pass_rate_base"), ("SFT", "pass_rate_sft"), ("RL", "pass_rate_rl"))


def lines(
  workdir: pathlib.Path,
  summary: Mapping[str, Any],
  terminal: bool = False,
  flags: Sequence[str] = (),
  own: bool = False,
) -> list[str]:
  """The text, at most 100 columns wide; nothing where no pass rate was measured.

  terminal: whether it goes to one that shows blocks and bold letters. flags: --config… of the
  command that ends here, for those that follow. own: the tools were the user's own.
  """
  shares = [(name, float(summary[key])) for name, key in _STAGES if key in summary]
  if not shares:
    return []
  out = ["", *bars(shares, "█" if terminal else "#")]
  kinds = [summary.get("kinds", {}).get(key, {}) for _, key in _STAGES if key in summary]
  if any(kinds):
    out += ["", *by_kind([name for name, _ in shares], kinds)]
    out += textwrap.wrap(unsolved(kinds[-1]), 98)
  pair = improved(workdir)
  if pair is not None:
    out += ["", *side_by_side(*pair)]
  if not any(share for _, share in shares):
    out += ["", *textwrap.wrap(f"Nothing was solved{NOTHING_EARNED}.", 98)]
  elif summary.get("pass_rate_rl", 1.0) < summary.get("pass_rate_sft", 0.0):
    out += ["", *textwrap.wrap(_RL_BELOW_SFT, 98)]
  following = _next(workdir, flags, own)
  if terminal:
    following[0] = f"\033[1m{following[0]}\033[0m"
  return [*out, "", *following]


def on_terminal() -> bool:
  """Whether standard output is a terminal that can show blocks."""
  return sys.stdout.isatty() and (sys.stdout.encoding or "").lower().startswith("utf")


def bars(shares: Sequence[tuple[str, float]], mark: str = "#") -> list[str]:
  """A line a stage, as many marks long as its share of 1."""
  return [
    f"{'' if k else 'held out':<10}{name:>9}  {mark * round(_BAR * share):<{_BAR}}{share:8.1%}"
    for k, (name, share) in enumerate(shares)
  ]


def by_kind(stages: Sequence[str], kinds: Sequence[Mapping[str, float]]) -> list[str]:
  """A line for every kind of task, with its pass rate at each stage; the worst at the end first."""
  names = sorted(dict.fromkeys(itertools.chain(*kinds)), key=lambda kind: kinds[-1].get(kind, 0.0))
  width = min(max(map(len, [*names, "kind of task"])), 40)
  rows = [f"{'kind of task':<{width}}" + "".join(f"{stage:>9}" for stage in stages)]
  for name in names:
    rates = "".join(f"{rates[name]:9.1%}" if name in rates else " " * 9 for rates in kinds)
    rows.append(f"{_plain(name)[:width]:<{width}}{rates}".rstrip())
  return rows


def unsolved(kinds: Mapping[str, float]) -> str:
  """A sentence where of some kind of task, and not of all, nothing was solved; else ""."""
  missed = [kind for kind, rate in kinds.items() if not rate]
  if not missed or len(missed) == len(kinds):
    return ""
  named = _plain(", ".join(missed[:_NAMED])) + (", …" if len(missed) > _NAMED else "")
  return (
    f"no task was solved of kind {named}: give these more demonstrations, since RL learns from "
    "what succeeds now and then"
  )


def improved(workdir: pathlib.Path) -> tuple[AnnotatedTrajectory, AnnotatedTrajectory] | None:
  """The records of a held-out task, missed at the start and solved at the end: the shortest one."""
  files = [workdir / "moments" / f"heldout_{moment}.jsonl" for moment in ("base", "rl")]
  if not all(file.is_file() for file in files):
    return None
  try:
    before, after = ({_key(r.trajectory): r for r in read_trajectories(f)} for f in files)
  except ValueError:  # a damaged record is no reason to fail a run that has ended
    return None
  found = [
    (before[key], record)
    for key, record in after.items()
    if key in before and record.trajectory.solved == 1 and before[key].trajectory.solved == 0
  ]
  return min(found, key=lambda pair: pair[1].trajectory.num_tokens, default=None)


def _key(trajectory: Trajectory) -> tuple[str, int]:
  return trajectory.task_id, trajectory.sample


def side_by_side(before: AnnotatedTrajectory, after: AnnotatedTrajectory) -> list[str]:
  """Two conversations about one task."""
  columns = [
    [title, "-" * _WIDTH, *_told(record.trajectory)]
    for title, record in (("at the start", before), ("now", after))
  ]
  rows = itertools.zip_longest(*columns, fillvalue="")
  both = [f"  {left:<{_WIDTH}}  {right}".rstrip() for left, right in rows]
  cut = ["  …"] if len(both) > _LINES else []
  return [*textwrap.wrap(_plain(f"Task: {before.query}"), 98), "", *both[:_LINES], *cut]


def _told(trajectory: Trajectory) -> list[str]:
  out: list[str] = []
  for step in by_call(trajectory.steps):
    action = step.action
    if isinstance(action, Finish):
      out += _wrapped("gives up" if action.gave_up else f"answers: {action.answer}")
    elif isinstance(action, Malformed):
      out += _wrapped(f"malformed: {action.reason}")
    else:
      arguments = ", ".join(f"{name}={value}" for name, value in action.arguments.items())
      out += _wrapped(f"{action.name}({arguments})")
    if step.observation is not None:
      out += _wrapped(f"  {step.observation.text}")
  return [*out, "", f"{trajectory.status}, {'solved' if trajectory.solved == 1 else 'not solved'}"]


def _plain(text: str) -> str:
  return "".join(c if c.isprintable() else " " for c in text)


def _wrapped(text: str) -> list[str]:
  found = textwrap.wrap(
    _plain(text),
    _WIDTH,
    subsequent_indent="    ",
    max_lines=2,
    placeholder=" …",
    drop_whitespace=True,
  )
  return found or [""]


def config_flags(words: Sequence[str]) -> list[str]:
  """Those of a command line that name the config and its fields, each in one word."""
  found = []
  for k, word in enumerate(words):
    if re.match(r"--?config[.=]|--?config$", word):
      two = "=" not in word and k + 1 < len(words)
      found.append(f"{word}={words[k + 1]}" if two else word)
  return found


def _next(workdir: pathlib.Path, flags: Sequence[str], own: bool) -> list[str]:
  named = shlex.join(flag for flag in flags if re.match("--?config=", flag)) or "--config=…"
  place = shlex.quote(f"--workdir={workdir}")
  following = [
    "Next",
    "  every conversation, step by step, in one page:",
    f"    steptool report {named} {place}",
  ]
  if own:
    return [
      *following,
      "  talk to it, and watch its calls:",
      f"    steptool chat {shlex.join(flags)} {place}",
    ]
  return [
    *following,
    "  your own tools: write tools.py and tasks.jsonl as in docs/tools.md, then",
    "    steptool check --config=own_tools",
    "    steptool train --config=own_tools",
  ]
