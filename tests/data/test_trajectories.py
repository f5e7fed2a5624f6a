import dataclasses
import json

import numpy as np
import pytest

from steptool_jax.data import trajectories
from steptool_jax.data.trajectories import AnnotatedTrajectory
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


def step(action, observation=None, seed=0, **rest):
  rng = np.random.default_rng(seed)
  # Log-probs of every magnitude, the smallest subnormal and minus zero among them.
  bits = np.array([0x80000000, 0x80000001, 0xC2C80001, 0xBF000000, 0xBEAAAAAB], np.uint32)
  logprobs = np.concatenate([bits.view(np.float32), rng.normal(-1, 1, 3).astype(np.float32)])
  tokens = np.array([0, 1, 2**31 - 1, -1, 128_000, 5, 6, 7], np.int32)
  return Step(tokens, logprobs, action, observation, **rest)


STEPS = (
  step(
    ToolCall("f", {"a": [1, 2.5, None, True, "\ud800 \u2028 ü"], "b": {"c": 10**30}}, "hm\n"),
    Observation('{"x": "</s>\n"}', Code.OK, {"x": [0.1, 1e-300]}, True, False, 0.25, 0.003, 1.1),
    observation_tokens=np.array([9, 8], np.int32),
    success_calling=1 / 3,
    contribution=0.1 + 0.2,
    reward=2 / 3,
  ),
  step(Malformed("no 'Action:'"), Observation("e", Code.MALFORMED, injected=True), 1, reward=-0.0),
  step(Finish("ja", False, "so"), None, 2, reward=1.0),
)
RECORD = AnnotatedTrajectory(
  Trajectory(
    *("t/ü", 3, np.array([1, 5], np.int32), STEPS, Status.ANSWERED, 5e-324, 17),
    reward_parts={"solved": 0.1 + 0.2, "cost": 1 / 3},
  ),
  query="Rain?",
  metadata={"source": ["a.csv", 4]},
)
EMPTY = AnnotatedTrajectory(
  Trajectory("e", 0, np.zeros(0, np.int32), (), Status.INFRASTRUCTURE_ERROR)
)


def unknown(record):
  steps = tuple(
    dataclasses.replace(s, logprobs=np.full(len(s.tokens), np.nan, np.float32))
    for s in record.trajectory.steps
  )
  trajectory = dataclasses.replace(record.trajectory, steps=steps)
  return dataclasses.replace(record, trajectory=trajectory, logprobs_known=False)


def exactly(value):
  """Everything of a record in a form that == compares by bits and types."""
  if isinstance(value, np.ndarray):
    return str(value.dtype), value.shape, value.tobytes()
  if dataclasses.is_dataclass(value):
    fields = {f.name: exactly(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return type(value).__name__, fields
  if isinstance(value, dict):
    return {k: exactly(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [exactly(v) for v in value]
  return type(value).__name__, repr(value)


def test_nothing_is_lost(tmp_path):
  path = tmp_path / "deep" / "t.jsonl"
  records = [RECORD, EMPTY, unknown(RECORD), unknown(EMPTY)]
  assert trajectories.write_trajectories(path, records) == 4
  assert path.read_bytes().count(b"\n") == 4
  assert exactly(list(trajectories.read_trajectories(path))) == exactly(records)


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / "t.jsonl"
  trajectories.write_trajectories(path, [RECORD])
  before = path.read_bytes()

  def records():
    yield RECORD
    raise RuntimeError("stopped")

  with pytest.raises(RuntimeError, match="stopped"):
    trajectories.write_trajectories(path, records())
  assert path.read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


def replaced(**change):
  first = dataclasses.replace(STEPS[0], **change)
  return dataclasses.replace(
    RECORD, trajectory=dataclasses.replace(RECORD.trajectory, steps=(first,))
  )


@pytest.mark.parametrize(
  ("record", "match"),
  [
    (replaced(action=ToolCall("f", {"a": (1, 2)})), r"arguments of 'f': \(1, 2\) \(tuple\)"),
    (replaced(action=ToolCall("f", {"a": float("nan")})), "arguments of 'f': nan"),
    (replaced(action=ToolCall("f", {1: 2})), "the key 1 is no text"),
    (replaced(observation=Observation("x", Code.OK, {1, 2})), r"observation: \{1, 2\} \(set\)"),
    (replaced(reward=float("inf")), "t/ü.*not JSON compliant"),
    (replaced(tokens=np.zeros(8, np.int64)), r"int32\[N\], found int64\[8\]"),
    (replaced(logprobs=np.zeros(8)), r"float32\[N\], found float64"),
  ],
)
def test_what_json_would_change_is_refused(record, match, tmp_path):
  with pytest.raises(ValueError, match=match):
    trajectories.write_trajectories(tmp_path / "t.jsonl", [record])
  assert not list(tmp_path.iterdir())


def test_logprobs_must_fit_the_flag():
  with pytest.raises(ValueError, match="step 0: the log-probs must be NaN"):
    dataclasses.replace(RECORD, logprobs_known=False)
  with pytest.raises(ValueError, match="'t/ü', step 0: the log-probs must be finite"):
    dataclasses.replace(unknown(RECORD), logprobs_known=True)
  with pytest.raises(ValueError, match="one for each token"):
    replaced(logprobs=np.zeros(7, np.float32))


GOOD = json.loads(trajectories.dump(RECORD))


def edited(*path, value):
  document = json.loads(json.dumps(GOOD))
  place = document
  for key in path[:-1]:
    place = place[key]
  if value is ...:
    del place[path[-1]]
  else:
    place[path[-1]] = value
  return json.dumps(document)


@pytest.mark.parametrize(
  ("line", "match"),
  [
    ("{", "Expecting property name"),
    ("", "Expecting value"),
    ("[]", "not a trajectory of format 1"),
    (edited("format", value=2), "not a trajectory of format 1"),
    (edited("status", value=...), "the field 'status' is missing"),
    (edited("status", value="lost"), "'lost' is not a valid Status"),
    (edited("solved", value="1"), "'1' must be of type float"),
    (edited("prompt_tokens", value=[1, 2**31]), "32-bit integers"),
    (edited("prompt_tokens", value=[1, 2**70]), "32-bit integers"),
    (edited("prompt_tokens", value=[1.5]), "32-bit integers"),
    (edited("steps", 1, "logprobs", value=[0.5]), "step 1: the log-probs"),
    (edited("steps", 1, "logprobs", value=None), "None must be of type list"),
    (edited("logprobs_known", value=False), "must be of type NoneType"),
    (edited("steps", 1, "action", value={}), "the field 'malformed' is missing"),
    (edited("steps", 1, "action", value=3), "wrong type"),
    (edited("steps", 0, "observation", "code", value="fine"), "'fine' is not a valid Code"),
    (edited("metadata", "x", value=float("nan")), "NaN is no JSON number"),
  ],
)
def test_a_broken_line_is_named(line, match, tmp_path):
  path = tmp_path / "t.jsonl"
  good = trajectories.dump(RECORD)
  path.write_text(f"{good}\n{line}\n{good}\n")
  reader = trajectories.read_trajectories(path)
  next(reader)
  with pytest.raises(ValueError, match=rf"t\.jsonl, line 2: .*{match}.*write the file again"):
    next(reader)


def test_a_cut_file_is_named(tmp_path):
  path = tmp_path / "t.jsonl"
  trajectories.write_trajectories(path, [RECORD, RECORD])
  path.write_bytes(path.read_bytes()[:-1])  # still valid JSON
  reader = trajectories.read_trajectories(path)
  next(reader)
  with pytest.raises(ValueError, match="line 2: the line has no end"):
    next(reader)


def test_a_file_of_before_there_were_prices_and_parts_is_read():
  document = trajectories.to_document(RECORD)
  del document["reward_parts"]
  for step in document["steps"]:
    for name in ("cost", "latency"):
      (step["observation"] or {}).pop(name, None)
  read = trajectories.from_document(document).trajectory
  assert (read.reward_parts, read.cost, read.latency) == ({}, 0.0, 0.0)
  assert exactly(read.steps[1].tokens) == exactly(STEPS[1].tokens)
