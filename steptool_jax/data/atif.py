"""Trajectories in ATIF v1.4, the Agent Trajectory Interchange Format of the Harbor project.

One JSON file a trajectory: the user's query, then a step for every turn with its call, what came
of it, the ids that the model saw and sampled, and their log-probs. What ATIF has no field for (SC,
Con, reward, codes, IsSolved) stands in `extra`.
"""

import json
import pathlib
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import numpy as np

from steptool_jax.data.trajectories import AnnotatedTrajectory
from steptool_jax.files import write_text
from steptool_jax.types import Finish, Malformed, Step, ToolCall, by_call

VERSION = "ATIF-v1.4"


def write_folder(folder: pathlib.Path, records: Iterable[AnnotatedTrajectory]) -> int:
  """FOLDER/000001.json and so on, in the order of the records; returns how many."""
  folder.mkdir(parents=True, exist_ok=True)
  for old in folder.glob("[0-9]*.json"):  # of an earlier command
    old.unlink()
  count = 0
  for count, record in enumerate(records, start=1):
    text = json.dumps(to_atif(record), ensure_ascii=False, allow_nan=False, indent=2)
    write_text(folder / f"{count:06}.json", text + "\n")
  return count


def to_atif(record: AnnotatedTrajectory) -> dict[str, Any]:
  """The root object; timestamps, which nobody has recorded, are left out."""
  t = record.trajectory
  steps: list[dict[str, Any]] = [{"step_id": 1, "source": "user", "message": record.query}]
  seen, sampled, prompts = t.prompt_tokens, 0, 0
  for step in t.steps:
    if step.prompt_tokens is not None:
      seen = step.prompt_tokens
    steps.append(_step(len(steps) + 1, step, seen, record.logprobs_known))
    prompts, sampled = prompts + len(seen), sampled + len(step.tokens)
    seen = np.concatenate([seen, step.tokens, step.observation_tokens])
  return {
    "schema_version": VERSION,
    "session_id": f"{t.task_id}/{t.sample}/{t.policy_version}",
    "agent": {"name": "steptool_jax", "version": metadata.version("steptool-jax")},
    "steps": steps,
    "final_metrics": {
      "total_prompt_tokens": prompts,
      "total_completion_tokens": sampled,
      "total_cost_usd": t.cost,
      "total_steps": len(steps),
    },
    "extra": {
      "task_id": t.task_id,
      "sample": t.sample,
      "policy_version": t.policy_version,
      "status": str(t.status),
      "solved": float(t.solved),
    },
  }


def _step(number: int, step: Step, seen: np.ndarray, logprobs_known: bool) -> dict[str, Any]:
  """An agent's step. seen: int32[P], all ids in front of it."""
  action, observation = step.action, step.observation
  metrics: dict[str, Any] = {
    "prompt_tokens": len(seen),
    "completion_tokens": len(step.tokens),
    "prompt_token_ids": [int(i) for i in seen],
    "completion_token_ids": [int(i) for i in step.tokens],
  }
  if logprobs_known and np.isfinite(step.logprobs).all():
    metrics["logprobs"] = [float(x) for x in step.logprobs]
  out: dict[str, Any] = {"step_id": number, "source": "agent", "message": _said(action)}
  if not isinstance(action, Malformed) and action.thought:
    out["reasoning_content"] = action.thought
  calls = [part for part in by_call([step]) if isinstance(part.action, ToolCall)]
  if calls:
    out["tool_calls"] = [
      {
        "tool_call_id": _call_id(number, k),
        "function_name": part.action.name,
        "arguments": dict(part.action.arguments),
      }
      for k, part in enumerate(calls)
    ]
  extra = {
    "success_calling": float(step.success_calling),
    "contribution": float(step.contribution),
    "reward": float(step.reward),
  }
  if observation is not None:
    answers = [part.observation for part in calls] if len(calls) > 1 else [observation]
    out["observation"] = {
      "results": [
        ({"source_call_id": _call_id(number, k)} if calls else {}) | {"content": answer.text}
        for k, answer in enumerate(answers)
        if answer is not None
      ]
    }
    extra["code"] = str(observation.code)
    metrics["cost_usd"] = float(observation.cost)
  return out | {"metrics": metrics, "extra": extra}


def _call_id(number: int, k: int) -> str:
  return f"call_{number}" if not k else f"call_{number}_{k}"


def _said(action: Any) -> str:
  if isinstance(action, Finish):
    return action.answer
  return f"(malformed: {action.reason})" if isinstance(action, Malformed) else ""
