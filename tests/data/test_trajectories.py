import dataclasses
import json

import numpy as np
import pytest
from exact_records import EMPTY, RECORD, STEPS, exactly, unknown

from steptool_jax.data import trajectories
from steptool_jax.types import Code, Observation, ToolCall


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
    ("[]", "not a trajectory of format 1 or 2"),
    (edited("format", value=3), "not a trajectory of format 1 or 2"),
    (edited("status", value=...), "the field 'status' is missing"),
    (edited("status", value="lost"), "'lost' is not a valid Status"),
    (edited("solved", value="1"), "'1' must be of type float"),
    (edited("prompt_tokens", value=[1, 2**31]), "32-bit integers"),
    (edited("prompt_tokens", value=[1, 2**70]), "32-bit integers"),
    (edited("prompt_tokens", value=[1.5]), "32-bit integers"),
    (edited("steps", 1, "logprobs", value=[-0.5]), "step 1: the log-probs"),
    (edited("steps", 1, "logprobs", value=None), "None must be of type list"),
    (edited("logprobs_known", value=False), "must be of type NoneType"),
    (edited("steps", 1, "action", value={}), "the field 'malformed' is missing"),
    (edited("steps", 1, "action", value=3), "wrong type"),
    (edited("steps", 0, "observation", "code", value="fine"), "'fine' is not a valid Code"),
    (edited("metadata", "x", value=float("nan")), "NaN is no JSON number"),
    # All of these were trained on, or ended without the file's name.
    (edited("steps", 0, "tokens", value=[]), "a step without tokens"),
    (edited("steps", 0, "logprobs", 2, value=5.0), "a log-prob is 5: must not be above 0"),
    (edited("steps", 0, "logprobs", 2, value="-1"), "logprobs must be a list of numbers"),
    (edited("steps", 0, "logprobs", 2, value=None), "logprobs must be a list of numbers"),
    (edited("steps", 0, "reward", value=5.5).replace("5.5", "1e999"), "1e999 is no JSON number"),
    (edited("steps", 0, "contribution", value=1.5), r"contribution is 1.5: must be in \[0, 1\]"),
    (edited("solved", value=-1.0), r"solved is -1.0: must be in \[0, 1\]"),
    (edited("prompt_tokens", value=[]), "prompt_tokens: empty, but there are steps"),
    (edited("prompt_tokens", value=[True]), "32-bit integers"),
    (edited("steps", value={}), "must be of type list"),
    (edited("reward_parts", value={"a": "b"}), "'b' must be of type float"),
    ('{"format": 1, "format": 1}', "the key 'format' stands twice"),
    ("[" * 100_000, "nested without end"),
    ('{"format": ' + "[" * 200 + "]" * 200 + "}", "nested deeper than 100"),
    ('{"format": ' + "9" * 5000 + "}", "Exceeds the limit"),
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


def test_a_reader_of_before_refuses_segments():
  """It would pass over a step's own prompt and train behind what the model never saw."""
  whole = trajectories.to_document(RECORD)
  assert whole["format"] == 2
  steps = [dataclasses.replace(s, prompt_tokens=None) for s in RECORD.trajectory.steps]
  plain = dataclasses.replace(RECORD.trajectory, steps=tuple(steps))
  assert trajectories.to_document(dataclasses.replace(RECORD, trajectory=plain))["format"] == 1
  whole["steps"][2]["prompt_tokens"] = []
  with pytest.raises(ValueError, match="prompt_tokens of a step: empty"):
    trajectories.from_document(whole)


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
