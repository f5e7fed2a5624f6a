"""What the terminal shows when a run has ended: bars, a task again, what to do next."""

import numpy as np

from steptool_jax.data.trajectories import AnnotatedTrajectory, write_trajectories
from steptool_jax.run.training import closing
from steptool_jax.types import (
  Code,
  Finish,
  Malformed,
  Observation,
  Status,
  Step,
  ToolCall,
  Trajectory,
)

RATES = {"pass_rate_base": 0.14, "pass_rate_sft": 0.18, "pass_rate_rl": 0.5433}


def record(task, solved, *actions):
  ids = np.array([1], np.int32)
  steps = tuple(
    Step(
      ids,
      np.array([-0.5], np.float32),
      action,
      None if isinstance(action, Finish) else Observation("x" * 300, Code.OK),
    )
    for action in actions
  )
  trajectory = Trajectory(task, 0, ids, steps, Status.ANSWERED, solved)
  return AnnotatedTrajectory(trajectory, True, "what is it?", {})


def wrote(workdir, base, rl):
  (workdir / "moments").mkdir()
  write_trajectories(workdir / "moments/heldout_base.jsonl", base)
  write_trajectories(workdir / "moments/heldout_rl.jsonl", rl)


def test_bars_are_as_long_as_their_shares():
  start, sft, rl = closing.bars([("start", 0.0), ("SFT", 0.5), ("RL", 1.0)])
  assert [line.count("#") for line in (start, sft, rl)] == [0, 30, 60]
  assert rl.endswith("100.0%")


def test_a_task_that_was_missed_and_is_solved_now_stands_side_by_side(tmp_path):
  """Not one that was solved before, nor one that is still missed; within 100 columns."""
  call = ToolCall("find", {"name": "y" * 200})
  wrote(
    tmp_path,
    [
      record("a", 1.0, Finish("1")),
      record("b", 0.0, Malformed("no JSON"), Finish("none", gave_up=True)),
      record("c", 0.0, Finish("2")),
    ],
    [
      record("a", 1.0, Finish("1")),
      record("b", 1.0, call, call, Finish("703")),
      record("c", 0.0, Finish("2")),
    ],
  )
  lines = closing.lines(tmp_path, RATES)
  text = "\n".join(lines)
  assert max(len(line) for line in lines if str(tmp_path) not in line) <= 100
  assert "54.3%" in text
  assert any("malformed: no JSON" in line and "find(name=y" in line for line in lines)
  assert "gives up" in text
  assert "answers: 703" in text
  assert f"--workdir={tmp_path}" in text


FIXED = """
held out      start  ########                                                       14.0%
                SFT  ###########                                                    18.0%
                 RL  #################################                              54.3%

Task: what is it?

  at the start                                     now
  -----------------------------------------------  -----------------------------------------------
  malformed: no JSON                               find(name=lamp)
    xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx    xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
      …                                                …
  gives up                                         answers: 703

  answered, not solved                             answered, solved

Next
  every conversation, step by step, in one page:
    steptool report --config=… --workdir=WORKDIR
  your own tools: write tools.py and tasks.jsonl as in docs/tools.md, then
    steptool check --config=own_tools
    steptool train --config=own_tools"""


def test_a_fixed_run_looks_like_this(tmp_path):
  """Bars, columns or the next step moved, or a log got a terminal's codes."""
  wrote(
    tmp_path,
    [record("b", 0.0, Malformed("no JSON"), Finish("none", gave_up=True))],
    [record("b", 1.0, ToolCall("find", {"name": "lamp"}), Finish("703"))],
  )
  text = "\n".join(closing.lines(tmp_path, RATES))
  assert text.replace(str(tmp_path), "WORKDIR") == FIXED
  shown = "\n".join(closing.lines(tmp_path, RATES, terminal=True))
  assert shown.replace("█", "#").replace("\033[1m", "").replace("\033[0m", "") == text
  assert shown.count("█") == 52
  assert "\033[1mNext\033[0m" in shown


def test_flags_in_two_words_and_folders_with_spaces(tmp_path):
  words = ["train", "--config", "own_tools", "--config.seed", "3", "--workdir", "/x/my runs"]
  flags = closing.config_flags(words)
  assert flags == ["--config=own_tools", "--config.seed=3"]
  text = "\n".join(closing.lines(tmp_path / "my runs", RATES, flags=flags, own=True))
  place = f"'--workdir={tmp_path}/my runs'"
  assert f"steptool report --config=own_tools {place}" in text
  assert f"steptool chat --config=own_tools --config.seed=3 {place}" in text


def test_the_next_command_is_the_users_own(tmp_path):
  """It named no config, and told someone with own tools to write tools."""
  flags = ["--config=smollm2_135m", "--config.environment.tasks=my tasks.jsonl"]
  text = "\n".join(closing.lines(tmp_path, RATES, flags=flags, own=True))
  assert f"steptool report --config=smollm2_135m --workdir={tmp_path}" in text
  assert f"chat --config=smollm2_135m '{flags[1]}' --workdir={tmp_path}" in text
  assert "tools.py" not in text
  assert "Nothing was solved" not in text


def test_nothing_solved_is_said_with_its_remedy(tmp_path):
  """24 iterations at 0 % ended without a word on why."""
  text = " ".join(closing.lines(tmp_path, dict.fromkeys(RATES, 0.0)))
  assert "Nothing was solved" in text
  assert "sft.steps" in text


def test_kinds_of_tasks_worst_first_and_those_that_never_succeed(tmp_path):
  """A set whose pass rate rose hid that two kinds of its tasks were never solved."""
  kinds = {
    "pass_rate_base": {"fee": 0.0, "late": 0.0, "where": 0.1},
    "pass_rate_sft": {"fee": 0.5, "late": 0.0, "where": 0.2},
    "pass_rate_rl": {"fee": 1.0, "late": 0.0, "where": 0.25, "n\new": 0.9},
  }
  lines = closing.lines(tmp_path, RATES | {"kinds": kinds})
  at = lines.index("kind of task    start      SFT       RL")
  assert lines[at + 1 : at + 5] == [
    "late             0.0%     0.0%     0.0%",
    "where           10.0%    20.0%    25.0%",
    "n ew                              90.0%",
    "fee              0.0%    50.0%   100.0%",
  ]
  assert "no task was solved of kind late" in lines[at + 5]
  assert closing.unsolved({"a": 0.0, "b": 0.0}) == ""  # said of all tasks together
  assert closing.unsolved({"a": 0.1}) == ""


def test_rl_that_ended_below_sft_is_said_with_what_may_help(tmp_path):
  worse = " ".join(closing.lines(tmp_path, RATES | {"pass_rate_rl": 0.17}))
  assert "RL ended below SFT" in worse
  assert "learning_rate" in worse
  assert "below SFT" not in " ".join(closing.lines(tmp_path, RATES))


def test_a_tool_cannot_command_the_terminal(tmp_path):
  """What a tool said was printed as it was: it could clear the screen, or set its title."""
  call = ToolCall("find", {"name": "a\033[2Jb\x07"})
  told = closing.side_by_side(
    record("a", 0.0, Finish("1")), record("a", 1.0, call, Finish("\x9bm"))
  )
  assert all(line.isprintable() for line in told)
  assert any("a [2Jb" in line for line in told)


def test_without_records_or_figures_it_says_less_and_never_fails(tmp_path):
  assert closing.lines(tmp_path, {}) == []
  assert any("54.3%" in line for line in closing.lines(tmp_path, RATES))
  wrote(tmp_path, [record("a", 0.0, Finish("1"))], [record("a", 1.0, Finish("1"))])
  (tmp_path / "moments/heldout_rl.jsonl").write_text("{")
  assert closing.improved(tmp_path) is None


def test_a_long_conversation_is_cut(tmp_path):
  call = ToolCall("find", {})
  before = record("a", 0.0, Finish("1"))
  lines = closing.side_by_side(before, record("a", 1.0, *[call] * 20, Finish("1")))
  assert lines[-1] == "  …"
  assert len(lines) < 30
