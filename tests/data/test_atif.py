"""ATIF v1.4, as its specification spells it."""

import json

import numpy as np

from steptool_jax.data import atif
from steptool_jax.data.trajectories import AnnotatedTrajectory
from steptool_jax.types import Code, Finish, Observation, Status, Step, ToolCall, Trajectory


def test_a_trajectory_by_hand(tmp_path):
  """Another field name or another order of ids, and no other tool reads it as what it is."""
  call = Step(
    np.array([5, 6], np.int32),
    np.array([-0.5, -1.0], np.float32),
    ToolCall("find", {"name": "Ann"}, "look her up"),
    Observation("id 7", Code.OK, cost=0.25),
    np.array([7], np.int32),
    success_calling=1.0,
    contribution=0.5,
    reward=0.75,
  )
  end = Step(np.array([8], np.int32), np.array([-2.0], np.float32), Finish("7"), reward=1.0)
  prompt = np.array([1, 2, 3], np.int32)
  t = Trajectory("t1", 2, prompt, (call, end), Status.ANSWERED, 1.0, policy_version=4)
  record = AnnotatedTrajectory(t, query="Who is Ann?")
  assert atif.write_folder(tmp_path / "atif", [record]) == 1
  found = json.loads((tmp_path / "atif" / "000001.json").read_text())
  version = found["agent"].pop("version")
  assert version
  assert found == {
    "schema_version": "ATIF-v1.4",
    "session_id": "t1/2/4",
    "agent": {"name": "steptool_jax"},
    "steps": [
      {"step_id": 1, "source": "user", "message": "Who is Ann?"},
      {
        "step_id": 2,
        "source": "agent",
        "message": "",
        "reasoning_content": "look her up",
        "tool_calls": [
          {"tool_call_id": "call_2", "function_name": "find", "arguments": {"name": "Ann"}}
        ],
        "observation": {"results": [{"source_call_id": "call_2", "content": "id 7"}]},
        "metrics": {
          "prompt_tokens": 3,
          "completion_tokens": 2,
          "prompt_token_ids": [1, 2, 3],
          "completion_token_ids": [5, 6],
          "logprobs": [-0.5, -1.0],
          "cost_usd": 0.25,
        },
        "extra": {"success_calling": 1.0, "contribution": 0.5, "reward": 0.75, "code": "ok"},
      },
      {
        "step_id": 3,
        "source": "agent",
        "message": "7",
        "metrics": {
          "prompt_tokens": 6,
          "completion_tokens": 1,
          "prompt_token_ids": [1, 2, 3, 5, 6, 7],
          "completion_token_ids": [8],
          "logprobs": [-2.0],
        },
        "extra": {"success_calling": 0.0, "contribution": 0.0, "reward": 1.0},
      },
    ],
    "final_metrics": {
      "total_prompt_tokens": 9,
      "total_completion_tokens": 3,
      "total_cost_usd": 0.25,
      "total_steps": 3,
    },
    "extra": {
      "task_id": "t1",
      "sample": 2,
      "policy_version": 4,
      "status": "answered",
      "solved": 1.0,
    },
  }


def test_unknown_logprobs_are_left_out():
  """NaN is no JSON, and 0 would say that the token was certain."""
  nan = np.array([np.nan], np.float32)
  step = Step(np.array([8], np.int32), nan, Finish("7"))
  t = Trajectory("t1", 0, np.array([1], np.int32), (step,), Status.ANSWERED)
  metrics = atif.to_atif(AnnotatedTrajectory(t, logprobs_known=False))["steps"][1]["metrics"]
  assert "logprobs" not in metrics


def test_a_step_with_a_prompt_of_its_own():
  """What stood in front of it is what another tool reads, not the history that was taken back."""
  logprobs = np.array([-2.0], np.float32)
  steps = (
    Step(np.array([8], np.int32), logprobs, ToolCall("f", {}), None, np.array([9], np.int32)),
    Step(np.array([7], np.int32), logprobs, Finish("7"), prompt_tokens=np.array([4, 9], np.int32)),
    Step(np.array([6], np.int32), logprobs, Finish("7")),
  )
  t = Trajectory("t1", 0, np.array([1], np.int32), steps, Status.ANSWERED)
  found = atif.to_atif(AnnotatedTrajectory(t))
  seen = [step["metrics"]["prompt_token_ids"] for step in found["steps"][1:]]
  assert seen == [[1], [4, 9], [4, 9, 7]]
  assert found["final_metrics"]["total_prompt_tokens"] == 6
