"""Annotated trajectories as JSON lines: one trajectory a line, nothing lost.

Token ids come back as int32, log-probs as float32 with the same bits, rewards as the same floats.
A file is written beside its place and moved there when it is whole, so a reader sees the old file
or the new one. A line that cannot be read is named; nothing is skipped.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from steptool_jax.files import parse_json, replacing
from steptool_jax.types import (
  Action,
  Code,
  Finish,
  Malformed,
  Observation,
  Status,
  Step,
  ToolCall,
  ToolCalls,
  Trajectory,
)

_ROUNDING = 1e-3  # a log-prob of nearly 0 may be as far above it
# Of a line; a reader refuses what it does not know. 2: steps have prompts of their own.
_FORMATS = (1, 2)


@dataclasses.dataclass(frozen=True, eq=False)
class AnnotatedTrajectory:
  """A trajectory with rewards, and what a trainer must know of where it comes from.

  logprobs_known: False when nobody recorded the behaviour policy. The steps' log-probs are NaN
  then, so that a trainer that forgets to compute them fails at once instead of learning from zeros.
  """

  trajectory: Trajectory
  logprobs_known: bool = True
  query: str = ""
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # JSON data

  def __post_init__(self):
    for k, step in enumerate(self.trajectory.steps):
      finite = np.isfinite(step.logprobs)
      if len(step.logprobs) != len(step.tokens) or not (
        finite.all() if self.logprobs_known else np.isnan(step.logprobs).all()
      ):
        wanted = "finite" if self.logprobs_known else "NaN, since logprobs_known is False"
        raise ValueError(
          f"trajectory of task {self.trajectory.task_id!r}, step {k}: the log-probs must be "
          f"{wanted}, one for each token"
        )


def write_trajectories(path: str | pathlib.Path, records: Iterable[AnnotatedTrajectory]) -> int:
  """Writes all records, atomically; returns their number.

  ValueError for what JSON cannot carry back (a tuple, NaN, keys that are no text in arguments or
  values): the file at `path` stays what it was.
  """
  count = 0
  with replacing(path, encoding="ascii", newline="\n") as file:
    for record in records:
      file.write(dump(record) + "\n")
      count += 1
  return count


def read_trajectories(path: str | pathlib.Path) -> Iterator[AnnotatedTrajectory]:
  """The records of a file, one by one; ValueError that names the file and the line."""
  path = pathlib.Path(path)
  with path.open("rb") as file:
    for number, line in enumerate(file, start=1):
      try:
        if not line.endswith(b"\n"):
          raise ValueError("the line has no end, the file was cut")
        yield load(line.decode("utf-8"))
      except ValueError as error:
        raise ValueError(
          f"{path}, line {number}: {error}; write the file again, or delete this line"
        ) from error


def dump(record: AnnotatedTrajectory) -> str:
  """One record as a line of ASCII JSON, without the line's end."""
  try:
    return json.dumps(to_document(record), allow_nan=False, separators=(",", ":"))
  except ValueError as error:
    raise ValueError(f"task {record.trajectory.task_id!r}: {error}") from error


def load(line: str) -> AnnotatedTrajectory:
  """Inverts `dump`; ValueError for a line that `dump` did not write."""
  return from_document(parse_json(line))


def to_document(record: AnnotatedTrajectory) -> dict[str, Any]:
  """One record as JSON data; ValueError for what JSON cannot carry back."""
  trajectory = record.trajectory
  steps = [
    {
      "tokens": _ids(step.tokens),
      "logprobs": _floats(step.logprobs) if record.logprobs_known else None,
      "action": _dump_action(step.action),
      "observation": observation_document(step.observation),
      "observation_tokens": _ids(step.observation_tokens),
      "success_calling": float(step.success_calling),
      "contribution": float(step.contribution),
      "reward": float(step.reward),
    }
    for step in trajectory.steps
  ]
  own = [k for k, step in enumerate(trajectory.steps) if step.prompt_tokens is not None]
  for k in own:
    steps[k]["prompt_tokens"] = _ids(trajectory.steps[k].prompt_tokens)
  return {
    "format": _FORMATS[bool(own)],
    "task_id": trajectory.task_id,
    "sample": int(trajectory.sample),
    "query": record.query,
    "prompt_tokens": _ids(trajectory.prompt_tokens),
    "steps": steps,
    "status": str(trajectory.status),
    "solved": float(trajectory.solved),
    "policy_version": int(trajectory.policy_version),
    "reward_parts": {name: float(part) for name, part in trajectory.reward_parts.items()},
    "logprobs_known": record.logprobs_known,
    "metadata": _plain(record.metadata, "metadata"),
  }


def from_document(document: Any) -> AnnotatedTrajectory:
  """Inverts `to_document`; ValueError for anything else."""
  if not isinstance(document, dict) or document.get("format") not in _FORMATS:
    raise ValueError(f"not a trajectory of format {' or '.join(map(str, _FORMATS))}")
  try:
    known = _typed(document["logprobs_known"], bool)
    parts = _typed(document.get("reward_parts", {}), dict)  # files of before there were any
    trajectory = Trajectory(
      task_id=_typed(document["task_id"], str),
      sample=_typed(document["sample"], int),
      prompt_tokens=_load_ids(document["prompt_tokens"]),
      steps=tuple(_load_step(step, known) for step in _typed(document["steps"], list)),
      status=Status(document["status"]),
      solved=_share(document, "solved"),
      policy_version=_typed(document["policy_version"], int),
      reward_parts={name: _typed(part, float) for name, part in parts.items()},
    )
    if trajectory.steps and not len(trajectory.prompt_tokens):
      raise ValueError("prompt_tokens: empty, but there are steps")
    return AnnotatedTrajectory(
      trajectory,
      known,
      _typed(document["query"], str),
      _typed(document["metadata"], dict),
    )
  except KeyError as error:
    raise ValueError(f"the field {error} is missing") from error
  except (TypeError, AttributeError) as error:
    raise ValueError(f"a field has the wrong type ({error})") from error


def _load_step(entry: Mapping[str, Any], known: bool) -> Step:
  tokens = _load_ids(entry["tokens"])
  if not len(tokens):
    raise ValueError("a step without tokens: nothing was sampled in it")
  if known:
    if not set(map(type, _typed(entry["logprobs"], list))) <= {float}:
      raise ValueError("logprobs must be a list of numbers such as -0.5")
    logprobs = np.asarray(entry["logprobs"], np.float32)
    if len(logprobs) and logprobs.max() > _ROUNDING:
      raise ValueError(f"a log-prob is {logprobs.max():g}: must not be above 0")
  else:
    logprobs = np.full(len(tokens), np.nan, np.float32)
    _typed(entry["logprobs"], type(None))
  prompt = entry.get("prompt_tokens")
  if prompt is not None and not len(_load_ids(prompt)):
    raise ValueError("prompt_tokens of a step: empty, but there is something in front of it")
  return Step(
    tokens=tokens,
    logprobs=logprobs,
    action=_load_action(entry["action"]),
    observation=observation_of(entry["observation"]),
    observation_tokens=_load_ids(entry["observation_tokens"]),
    success_calling=_share(entry, "success_calling"),
    contribution=_share(entry, "contribution"),
    reward=_typed(entry["reward"], float),
    prompt_tokens=None if prompt is None else _load_ids(prompt),
  )


# --- actions and observations ----------------------------------------------------------------


def _dump_action(action: Action) -> dict[str, Any]:
  if isinstance(action, ToolCall):
    arguments = _plain(action.arguments, f"arguments of {action.name!r}")
    return {"call": action.name, "arguments": arguments, "thought": action.thought}
  if isinstance(action, ToolCalls):
    return {"calls": [_dump_action(call) for call in action.calls], "thought": action.thought}
  if isinstance(action, Finish):
    return {"finish": action.answer, "gave_up": action.gave_up, "thought": action.thought}
  return {"malformed": action.reason}


def _load_action(entry: Mapping[str, Any]) -> Action:
  if "call" in entry:
    return ToolCall(
      _typed(entry["call"], str),
      _typed(entry["arguments"], dict),
      _typed(entry["thought"], str),
    )
  if "calls" in entry:
    calls = tuple(_load_action(call) for call in _typed(entry["calls"], list))
    if len(calls) < 2 or not all(isinstance(call, ToolCall) for call in calls):
      raise ValueError("calls: must be two or more calls")
    return ToolCalls(calls, _typed(entry["thought"], str))
  if "finish" in entry:
    return Finish(
      _typed(entry["finish"], str),
      _typed(entry["gave_up"], bool),
      _typed(entry["thought"], str),
    )
  return Malformed(_typed(entry["malformed"], str))


def observation_document(observation: Observation | None) -> dict[str, Any] | None:
  """An observation as JSON data; ValueError for a value that JSON cannot carry back."""
  if observation is None:
    return None
  several: dict[str, Any] = {}
  if observation.parts:
    several["parts"] = [observation_document(part) for part in observation.parts]
  if observation.solved is not None:
    several["solved"] = float(observation.solved)
  return several | {
    "text": observation.text,
    "code": str(observation.code),
    "value": _plain(observation.value, "value of an observation"),
    "changed": bool(observation.changed),
    "injected": bool(observation.injected),
    "seconds": float(observation.seconds),
    "cost": float(observation.cost),
    "latency": float(observation.latency),
  }


def observation_of(entry: Mapping[str, Any] | None) -> Observation | None:
  """Inverts `observation_document`."""
  if entry is None:
    return None
  return Observation(
    text=_typed(entry["text"], str),
    code=Code(entry["code"]),
    value=entry["value"],
    changed=_typed(entry["changed"], bool),
    injected=_typed(entry["injected"], bool),
    seconds=_typed(entry["seconds"], float),
    cost=_typed(entry.get("cost", 0.0), float),
    latency=_typed(entry.get("latency", 0.0), float),
    parts=tuple(observation_of(part) for part in _typed(entry.get("parts", []), list)),
    solved=_share(entry, "solved") if "solved" in entry else None,
  )


def with_values(trajectory: Trajectory, change: Callable[[Any], Any]) -> Trajectory:
  """The same with `change` of every value that a tool returned, those of several calls included."""

  def changed(observation: Observation) -> Observation:
    parts = tuple(map(changed, observation.parts))
    return dataclasses.replace(observation, value=change(observation.value), parts=parts)

  steps = tuple(
    step
    if step.observation is None
    else dataclasses.replace(step, observation=changed(step.observation))
    for step in trajectory.steps
  )
  return dataclasses.replace(trajectory, steps=steps)


# --- plain values ----------------------------------------------------------------------------


def _ids(tokens: np.ndarray) -> list[int]:
  array = np.asarray(tokens)
  if array.ndim != 1 or array.dtype != np.int32:
    raise ValueError(f"token ids must be int32[N], found {array.dtype}{list(array.shape)}")
  return array.tolist()


def _floats(values: np.ndarray) -> list[float]:
  array = np.asarray(values)
  if array.ndim != 1 or array.dtype != np.float32:
    raise ValueError(f"log-probs must be float32[N], found {array.dtype}{list(array.shape)}")
  return array.tolist()  # as float64, which holds every float32 exactly


def _load_ids(values: Any) -> np.ndarray:
  array = np.array(_typed(values, list), None if values else np.int32)
  wrong = not set(map(type, values)) <= {int} or array.dtype.kind != "i"
  if wrong or (array != array.astype(np.int32)).any():
    raise ValueError("token ids must be a list of 32-bit integers")
  return array.astype(np.int32)


def _share(entry: Mapping[str, Any], name: str) -> float:
  value = _typed(entry[name], float)
  if not 0 <= value <= 1:
    raise ValueError(f"{name} is {value!r}: must be in [0, 1]")
  return value


def _plain(value: Any, where: str) -> Any:
  """JSON data that reads back equal; ValueError for the rest."""
  if isinstance(value, Mapping):
    for key in value:
      if not isinstance(key, str):
        raise ValueError(f"{where}: the key {key!r} is no text, JSON would change it")
    return {key: _plain(entry, where) for key, entry in value.items()}
  if isinstance(value, list):
    return [_plain(entry, where) for entry in value]
  exact = value is None or type(value) in (str, bool, int)
  if not exact and not (type(value) is float and math.isfinite(value)):
    raise ValueError(
      f"{where}: {value!r:.60} ({type(value).__name__}) is no JSON data; use lists, text, finite "
      "numbers, booleans and None"
    )
  return value


def _typed(value: Any, kind: type) -> Any:
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise ValueError(f"{value!r:.60} must be of type {kind.__name__}")
  return value
