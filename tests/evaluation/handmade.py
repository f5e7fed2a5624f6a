"""Trajectories written down by hand, for tests of what is counted on them."""

import json
import pathlib

import numpy as np

from steptool_jax.data.trajectories import AnnotatedTrajectory, write_trajectories
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


def call(name, code=Code.OK, injected=False, changed=False, text="", **arguments) -> Step:
  answer = text or str(code)
  observation = Observation(answer, code, injected=injected, changed=changed)
  return _step(ToolCall(name, arguments, thought=f"try {name}"), observation)


def finish(answer="42") -> Step:
  return _step(Finish(answer))


def give_up() -> Step:
  return _step(Finish("", gave_up=True))


def malformed() -> Step:
  return _step(Malformed("no JSON"), Observation("no JSON", Code.MALFORMED))


def trajectory(*steps, task="t", sample=0, solved=0.0, status=None) -> Trajectory:
  if status is None:
    last = steps[-1].action
    status = Status.STEP_BUDGET
    if isinstance(last, Finish):
      status = Status.GAVE_UP if last.gave_up else Status.ANSWERED
  return Trajectory(task, sample, np.arange(3, dtype=np.int32), steps, status, solved)


def _step(action, observation=None) -> Step:
  return Step(
    tokens=np.array([4, 5], np.int32),
    logprobs=np.array([-0.5, -0.25], np.float32),
    action=action,
    observation=observation,
    success_calling=float(observation is not None and observation.code is Code.OK),
    contribution=0.5,
    reward=0.25,
  )


# --- a workdir -------------------------------------------------------------------------------


def annotated(found, query="", **metadata) -> AnnotatedTrajectory:
  """A stored trajectory with the texts of all tokens, as a run keeps them."""
  texts = [[f"{_name(s.action)} ", "<|end|>"] for s in found.steps]
  return AnnotatedTrajectory(found, query=query, metadata={"texts": texts} | metadata)


def workdir(folder, moments, curve=(0.1, 0.3, 0.4), seed=0) -> pathlib.Path:
  """What a training run leaves: moments maps names to trajectories or to annotated ones."""
  folder.mkdir(parents=True, exist_ok=True)
  config = {"algorithm": "steptool", "seed": seed, "environment": {"name": "shop"}}
  (folder / "config.json").write_text(json.dumps(config))
  summary = {"pass_rate_base": curve[0], "pass_rate_rl": curve[-1], "interrupted": False}
  (folder / "summary.json").write_text(json.dumps(summary))
  records = [
    {"step": k, "heldout/pass_rate": y, "heldout/llm_calls": 100.0 * k, "heldout/rl_seconds": k}
    for k, y in enumerate(curve)
  ]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  for name, found in moments.items():
    found = [t if isinstance(t, AnnotatedTrajectory) else annotated(t) for t in found]
    write_trajectories(folder / "moments" / f"{name}.jsonl", found)
  return folder


def _name(action) -> str:
  return action.name if isinstance(action, ToolCall) else type(action).__name__.lower()
