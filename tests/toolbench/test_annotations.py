import json

import pytest
from rewards.replays import step, trajectory
from toolbench.measuring import measured

from steptool_jax.config import Rewards
from steptool_jax.rewards import scores as scores_lib
from steptool_jax.rewards.scores import StepScores
from steptool_jax.rewards.shaping import shape
from steptool_jax.toolbench.formats import training_rows
from steptool_jax.toolbench.formats.judged import read_annotations
from steptool_jax.types import Finish, Status, Task, ToolCall

ANNOTATIONS = "steptool/data/reward_annotation/qwen2/G123_example_5.json"
TASK = Task("t", "x", "q", (), {})


def made(calls, status=Status.ANSWERED):
  return trajectory(TASK, [step(ToolCall("f", {}))] * calls + [step(Finish("x"))], 0.0, status)


def rewards(scores):
  got = shape(scores_lib.apply(scores, made(len(scores.contribution))), Rewards(shaping="sum"))
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
  read = read_annotations(written(tmp_path, entry()))["7"]
  texts, scores = read.transcript, read.scores
  assert (texts.query, texts.steps, texts.answer) == ("q", (('f {"a": 1}', "r"),), "x")
  assert scores.success_calling == (0.5,)
  assert scores.contribution == pytest.approx((0.7,))
  assert scores.solved == 0.75
  assert rewards(scores) == pytest.approx([0.5 * 0.5 + 0.5 * 3.5 / 5, 0.75])


def test_wrong_annotations_are_named(tmp_path):
  short = {k: {"succeed_tool_calling": [1], "contributions": []} for k in ("0", "1")}
  with pytest.raises(ValueError, match=r"a\.json.*7.*contributions.*0 scores for 1 steps"):
    read_annotations(written(tmp_path, entry(process_reward=short)))
  high = {k: {"succeed_tool_calling": [1], "contributions": [6]} for k in ("0", "1")}
  with pytest.raises(ValueError, match="integers of 0 to 5"):
    read_annotations(written(tmp_path, entry(process_reward=high)))
  with pytest.raises(OSError, match="absent"):
    read_annotations(tmp_path / "absent.json")


def test_released_rewards_from_the_annotation_file(shared):
  """r = .5 SC + .5 Con / 5 and IsSolved, worked out anew from the raw file."""
  scored = read_annotations(shared / ANNOTATIONS)
  assert len(scored) == 5
  raw = json.loads((shared / ANNOTATIONS).read_text())
  points = {"AnswerStatus.Solved": 1, "AnswerStatus.Unsure": 0.5, "AnswerStatus.Unsolved": 0}
  for query_id, read in scored.items():
    scores = read.scores
    runs = list(raw[query_id]["process_reward"].values())
    solved = [points[v] for v in raw[query_id]["is_solved"].values()]
    expected = [
      sum(0.5 * run["succeed_tool_calling"][k] + 0.5 * run["contributions"][k] / 5 for run in runs)
      / len(runs)
      for k in range(len(scores.contribution))
    ]
    assert rewards(scores) == pytest.approx([*expected, sum(solved) / len(solved)])


def test_released_rows_agree_with_the_annotation_file_in_part(shared):
  """Four of the five annotated trajectories are rows of the same model's training file, with the
  same calls. Five of their eleven rewards are the formula's, the others those of other
  judge runs.
  """
  by_query = {
    read.query: (read.transcript, read.scores)
    for read in read_annotations(shared / ANNOTATIONS).values()
  }
  path = shared / "steptool/data_train/qwen2/step_grained_for_ppo_example.csv"
  pairs = {}
  for number, row in enumerate(training_rows.read_step_rows(path), start=1):
    texts = measured.row_transcript(row)
    if texts.query in by_query:
      annotated, scores = by_query[texts.query]
      assert [call for call, _ in texts.steps] == [call for call, _ in annotated.steps]
      pairs[number] = (list(row.rewards), rewards(scores))
  rounded = {n: [[round(x, 4) for x in side] for side in pair] for n, pair in pairs.items()}
  assert rounded == {
    1: [[1.0, 1.0, 1.0], [1.0, 0.8667, 1.0]],
    2: [[0.9667, 1.0, 1.0], [1.0, 1.0, 1.0]],
    4: [[0.9667, 0.8333], [1.0, 0.8333]],
    5: [[0.4333, 0.6667, 0.0], [0.1333, 0.4333, 0.3333]],
  }


def test_every_released_reward_comes_from_three_judge_runs(shared):
  """Numbers are traced to scores that make them where no annotation is at hand."""

  def runs(success, contribution):
    for k in range(3):
      share = contribution // 3 + (k < contribution % 3)
      yield StepScores((float(k < success),), (share / 5,), 1.0)

  grid = [
    rewards(scores_lib.mean(list(runs(success, contribution))))[0]
    for success in range(4)
    for contribution in range(16)
  ]
  files = sorted(shared.glob("steptool/data_train/*/step_grained_for_ppo_example.csv"))
  rows = [row for file in files for row in training_rows.read_step_rows(file)]
  steps = [reward for row in rows for reward in row.rewards[:-1]]
  assert len(steps) == 71
  assert all(min(abs(reward - value) for value in grid) < 1e-9 for reward in steps)
  finals = [k / 6 for k in range(7)]
  assert all(min(abs(row.rewards[-1] - value) for value in finals) < 1e-9 for row in rows)


def test_apply():
  scores = StepScores((1.0, 0.0), (0.4, 0.0), 0.5)
  got = scores_lib.apply(scores, made(2))
  marks = [(s.success_calling, s.contribution) for s in got.steps]
  assert (marks, got.solved) == ([(1, 0.4), (0, 0), (0, 0)], 0.5)
  with pytest.raises(ValueError, match="t: 2 scores for 3 calls"):
    scores_lib.apply(scores, made(3))
  with pytest.raises(ValueError, match="infrastructure"):
    scores_lib.apply(scores, made(2, Status.INFRASTRUCTURE_ERROR))


def test_mean_and_ranges():
  got = scores_lib.mean([StepScores((1.0,), (1.0,), 1.0), StepScores((0.0,), (0.4,), 0.5)])
  assert (got.success_calling, got.solved) == ((0.5,), 0.75)
  assert got.contribution == pytest.approx((0.7,))
  with pytest.raises(ValueError, match="no judge run"):
    scores_lib.mean([])
  with pytest.raises(ValueError, match="zip"):
    scores_lib.mean([StepScores((1.0,), (1.0,), 1.0), StepScores((), (), 1.0)])
  with pytest.raises(ValueError, match="outside"):
    StepScores((1.0,), (5.0,), 1.0)
  with pytest.raises(ValueError, match="one of each"):
    StepScores((1.0,), (), 1.0)
