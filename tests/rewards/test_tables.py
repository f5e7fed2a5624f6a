import json
import pathlib

import pytest
from replays import step, trajectory

from steptool_jax.data import training_rows
from steptool_jax.rewards import tables
from steptool_jax.rewards.shaping import shape
from steptool_jax.rewards.tables import StepScores
from steptool_jax.types import Finish, Status, Task, ToolCall

DATA = pathlib.Path("/work/shared/data/steptool")
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is absent")
TASK = Task("t", "x", "q", (), {})


def made(calls, status=Status.ANSWERED):
  return trajectory(TASK, [step(ToolCall("f", {}))] * calls + [step(Finish("x"))], 0.0, status)


def rewards(scores):
  got = shape(tables.apply(scores, made(len(scores.contribution))), 1.0, "none")
  return [s.reward for s in got.steps]


def entry(**changes):
  line = "Step 1: " + repr({"name": "f", "arguments": '{"a": 1}', "response": "r"})
  finish = {"name": "Finish", "arguments": '{"return_type": "give_answer", "final_answer": "x"}'}
  base = {
    "query": "q",
    "tool_names": ["f"],
    "answer_steps": [line],
    "process_reward": {
      "0": {"succeed_tool_calling": [1], "contributions": [5]},
      "1": {"succeed_tool_calling": [0], "contributions": [2]},
    },
    "final_step": "Final step: " + repr({**finish, "response": ""}),
    "is_solved": {"0": "AnswerStatus.Solved", "1": "AnswerStatus.Unsure"},
  }
  return {**base, **changes}


def written(tmp_path, document):
  file = tmp_path / "a.json"
  file.write_text(json.dumps({"7": document}))
  return file


def test_read_by_hand(tmp_path):
  texts, scores = tables.read(written(tmp_path, entry()))["7"]
  assert (texts.query, texts.steps, texts.answer) == ("q", (('f {"a": 1}', "r"),), "x")
  assert scores.success_calling == (0.5,)
  assert scores.contribution == pytest.approx((0.7,))
  assert (scores.solved, scores.runs) == (0.75, 2)
  assert rewards(scores) == pytest.approx([0.5 * 0.5 + 0.5 * 3.5 / 5, 0.75])


def test_wrong_annotations_are_named(tmp_path):
  short = {k: {"succeed_tool_calling": [1], "contributions": []} for k in ("0", "1")}
  with pytest.raises(ValueError, match=r"a\.json.*7.*contributions.*0 scores for 1 steps"):
    tables.read(written(tmp_path, entry(process_reward=short)))
  high = {k: {"succeed_tool_calling": [1], "contributions": [6]} for k in ("0", "1")}
  with pytest.raises(ValueError, match="integers of 0 to 5"):
    tables.read(written(tmp_path, entry(process_reward=high)))
  with pytest.raises(OSError, match="absent"):
    tables.read(tmp_path / "absent.json")


@needs_data
def test_released_rewards_from_the_annotation_file():
  """r = .5 SC + .5 Con / 5 and IsSolved, worked out anew from the raw file."""
  scored = tables.read(DATA / "data/reward_annotation/qwen2/G123_example_5.json")
  assert len(scored) == 5
  raw = json.loads((DATA / "data/reward_annotation/qwen2/G123_example_5.json").read_text())
  points = {"AnswerStatus.Solved": 1, "AnswerStatus.Unsure": 0.5, "AnswerStatus.Unsolved": 0}
  for query_id, (_, scores) in scored.items():
    runs = list(raw[query_id]["process_reward"].values())
    solved = [points[v] for v in raw[query_id]["is_solved"].values()]
    expected = [
      sum(0.5 * run["succeed_tool_calling"][k] + 0.5 * run["contributions"][k] / 5 for run in runs)
      / len(runs)
      for k in range(len(scores.contribution))
    ]
    assert rewards(scores) == pytest.approx([*expected, sum(solved) / len(solved)])


@needs_data
def test_every_released_reward_comes_from_three_judge_runs():
  """The released rows are of other judge runs than the released annotations (the same
  trajectories have other numbers), so the numbers are traced to scores that make them.
  """

  def runs(success, contribution):
    for k in range(3):
      share = contribution // 3 + (k < contribution % 3)
      yield StepScores((float(k < success),), (share / 5,), 1.0)

  grid = [
    rewards(tables.mean(list(runs(success, contribution))))[0]
    for success in range(4)
    for contribution in range(16)
  ]
  files = sorted(DATA.glob("data_train/*/step_grained_for_ppo_example.csv"))
  rows = [row for file in files for row in training_rows.read_step_rows(file)]
  steps = [reward for row in rows for reward in row.rewards[:-1]]
  assert len(steps) == 71
  assert all(min(abs(reward - value) for value in grid) < 1e-9 for reward in steps)
  finals = [k / 6 for k in range(7)]
  assert all(min(abs(row.rewards[-1] - value) for value in finals) < 1e-9 for row in rows)


def test_apply():
  scores = StepScores((1.0, 0.0), (0.4, 0.0), 0.5)
  got = tables.apply(scores, made(2))
  marks = [(s.success_calling, s.contribution) for s in got.steps]
  assert (marks, got.solved) == ([(1, 0.4), (0, 0), (0, 0)], 0.5)
  with pytest.raises(ValueError, match="t: 2 scores for 3 calls"):
    tables.apply(scores, made(3))
  with pytest.raises(ValueError, match="infrastructure"):
    tables.apply(scores, made(2, Status.INFRASTRUCTURE_ERROR))


def test_annotate_by_task_id():
  scores = StepScores((1.0,), (0.4,), 1.0)
  (got,) = tables.annotate({"t": scores}, [made(1)])
  assert got.solved == 1
  with pytest.raises(ValueError, match=r"no annotation for 1 tasks, e\.g\. \['t'\]"):
    tables.annotate({"u": scores}, [made(1)])


def test_mean_and_ranges():
  got = tables.mean([StepScores((1.0,), (1.0,), 1.0), StepScores((0.0,), (0.4,), 0.5)])
  assert (got.success_calling, got.solved, got.runs) == ((0.5,), 0.75, 2)
  assert got.contribution == pytest.approx((0.7,))
  with pytest.raises(ValueError, match="no judge run"):
    tables.mean([])
  with pytest.raises(ValueError, match="zip"):
    tables.mean([StepScores((1.0,), (1.0,), 1.0), StepScores((), (), 1.0)])
  with pytest.raises(ValueError, match="outside"):
    StepScores((1.0,), (5.0,), 1.0)
  with pytest.raises(ValueError, match="one of each"):
    StepScores((1.0,), (), 1.0)


@pytest.mark.parametrize(
  ("arguments", "answer"),
  [
    ('{"return_type": "give_answer", "final_answer": "a\nb"}', "a\nb"),
    ('{"return_type": "give_up_and_restart", "final_answer": "a"}', ""),
    ('{"return_type": "give_answer"}', ""),
    ('{"return_type": "give_answer", "final_answer": "cut \\"of', 'cut "of'),
    ('{"return_type": "give_up_and_restart", "final_answer": "cut', ""),
    ("prose", ""),
    ("[1]", ""),
  ],
)
def test_answer_of(arguments, answer):
  assert tables.answer_of(arguments) == answer
