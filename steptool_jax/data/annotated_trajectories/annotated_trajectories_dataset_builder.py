"""The TFDS builder. TFDS wants it in a package folder of its own, under this name.

A record's arrays are tensors, the steps' ones one after the other with their counts; everything
else (actions, observations, exact rewards, metadata) is one JSON text. TFDS holds floats in 32
bits: `rewards` are there for other readers, the exact numbers are in `document`.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from steptool_jax.data import trajectories
from steptool_jax.data.annotated_trajectories import Records, records_of
from steptool_jax.files import parse_json

_ARRAYS = ("tokens", "logprobs", "observation_tokens")


def encode(record: trajectories.AnnotatedTrajectory) -> dict[str, Any]:
  """A record as the builder's features; log-probs nobody recorded are NaN."""
  document = trajectories.to_document(record)
  steps = record.trajectory.steps
  for step in document["steps"]:
    for name in _ARRAYS:
      del step[name]
  del document["prompt_tokens"]

  def joined(name: str, dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(getattr(step, name) for step in steps)])

  return {
    "task_id": record.trajectory.task_id,
    "query": record.query,
    "status": str(record.trajectory.status),
    "prompt_tokens": record.trajectory.prompt_tokens,
    "tokens": joined("tokens", np.int32),
    "token_counts": np.array([len(step.tokens) for step in steps], np.int32),
    "logprobs": joined("logprobs", np.float32),
    "logprobs_known": record.logprobs_known,
    "observation_tokens": joined("observation_tokens", np.int32),
    "observation_token_counts": np.array([len(s.observation_tokens) for s in steps], np.int32),
    "rewards": np.array([step.reward for step in steps], np.float32),
    "document": json.dumps(document, allow_nan=False),
  }


def decode(example: Mapping[str, Any]) -> trajectories.AnnotatedTrajectory:
  """Inverts `encode`; ValueError for a record that it did not make."""
  document = parse_json(example["document"])
  steps = document.get("steps") if isinstance(document, dict) else None
  counts = (example["token_counts"], example["observation_token_counts"])
  lengths = (len(example["tokens"]), len(example["observation_tokens"]))
  if (
    not isinstance(steps, list)
    or not all(isinstance(step, dict) for step in steps)
    or any(len(c) != len(steps) or (c < 0).any() for c in counts)
    or tuple(int(c.sum()) for c in counts) != lengths
    or len(example["logprobs"]) != lengths[0]
  ):
    raise ValueError("its numbers of steps and tokens do not go together")
  document["prompt_tokens"] = example["prompt_tokens"].tolist()
  ends = np.cumsum(example["token_counts"])[:-1]
  observation_ends = np.cumsum(example["observation_token_counts"])[:-1]
  parts = (
    np.split(example["tokens"], ends),
    np.split(example["logprobs"], ends),
    np.split(example["observation_tokens"], observation_ends),
  )
  known = document.get("logprobs_known")
  for step, *arrays in zip(steps, *parts, strict=False):
    step.update(zip(_ARRAYS, (array.tolist() for array in arrays), strict=True))
    if not known:
      step["logprobs"] = None
  return trajectories.from_document(document)


class Builder(tfds.core.GeneratorBasedBuilder):
  """Takes splits={split: annotated trajectories, or their JSON lines}."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, *, splits: Mapping[str, Records], **rest: Any):
    self._records = dict(splits)
    super().__init__(**rest)

  def _info(self) -> tfds.core.DatasetInfo:
    ids = tfds.features.Tensor(shape=(None,), dtype=np.int32)
    floats = tfds.features.Tensor(shape=(None,), dtype=np.float32)
    features = {
      "task_id": tfds.features.Text(),
      "query": tfds.features.Text(),
      "status": tfds.features.Text(),
      "prompt_tokens": ids,
      "tokens": ids,
      "token_counts": ids,
      "logprobs": floats,
      "logprobs_known": tfds.features.Scalar(np.bool_),
      "observation_tokens": ids,
      "observation_token_counts": ids,
      "rewards": floats,
      "document": tfds.features.Text(),
    }
    return self.dataset_info_from_configs(
      description="Tool-use trajectories with a reward for every step.",
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(found) for split, found in self._records.items()}

  def _generate_examples(self, records):
    yield from enumerate(map(encode, records_of(records)))
