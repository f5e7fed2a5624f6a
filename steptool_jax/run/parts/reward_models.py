"""Step reward models on the devices and on disk.

WORKDIR/reward_model/       a Hugging Face directory of the trunk (adapters merged), and
  reward_heads.safetensors  the three heads
  reward_model.json         digests of trunk and tokenizer, and how good it is
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from steptool_jax.config import Config
from steptool_jax.files import read_json, replacing_folder
from steptool_jax.learning import batching, reward_model
from steptool_jax.policy import model, sharding
from steptool_jax.policy.formats import hfconfig, hub
from steptool_jax.policy.formats.tensorfile import TensorFile, write_file, write_json
from steptool_jax.rewards import model as scores_of
from steptool_jax.run.parts import build
from steptool_jax.run.workdir import inputs
from steptool_jax.types import HEADS, Trajectory

NAME, NOTE, WEIGHTS = "reward_model", "reward_model.json", "reward_heads.safetensors"
_FORMAT = 1


def pack(
  trajectories: Sequence[Trajectory], row_tokens: int, labelled: bool
) -> tuple[reward_model.Labelled, list[tuple[int, np.ndarray]]]:
  """(whole trajectories in rows [R, T], row and columns of the ends of each one's steps).

  With the last observation, which the policy's own batches may leave out: it says how the last
  call went. ValueError for a trajectory longer than a row.
  """
  rows = batching.first_fit_decreasing([t.num_tokens for t in trajectories], row_tokens)
  tokens, positions, segments = (np.zeros((len(rows), row_tokens), np.int32) for _ in range(3))
  shape = (len(rows), row_tokens, len(HEADS)) if labelled else (0,)
  labels, weights = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
  places: dict[int, tuple[int, np.ndarray]] = {}
  for row, members in enumerate(rows):
    start = 0
    for segment, index in enumerate(members, start=1):
      trajectory = trajectories[index]
      here = slice(start, start + trajectory.num_tokens)
      tokens[row, here] = scores_of.ids(trajectory)
      positions[row, here] = np.arange(trajectory.num_tokens)
      segments[row, here] = segment
      places[index] = row, start + scores_of.ends(trajectory)
      if labelled:
        labels[places[index]], weights[places[index]] = scores_of.labels(trajectory)
      start = here.stop
  batch = reward_model.Labelled(tokens, positions, segments)
  if labelled:
    batch = batch._replace(labels=labels, weights=weights)
  return batch, [places[index] for index in range(len(trajectories))]


def to_device(
  batch: reward_model.Labelled, micro_rows: int, capacity: int, mesh: Mesh
) -> tuple[reward_model.Labelled, np.int32]:
  """([capacity, micro_rows, T, ...] on the mesh, how many micro-batches are used)."""
  rows = len(batch.tokens)
  placement = jax.NamedSharding(mesh, jax.P(None, sharding.ROWS))

  def place(x):
    whole = np.zeros((capacity * micro_rows, *x.shape[1:]), x.dtype)
    whole[:rows] = x
    return sharding.place(whole.reshape(capacity, micro_rows, *x.shape[1:]), placement)

  return jax.tree.map(place, batch), np.int32(-(-rows // micro_rows))


def score(
  config: model.ModelConfig,
  variables: dict,
  heads: dict,
  trajectories: Sequence[Trajectory],
  *,
  row_tokens: int,
  micro_rows: int,
  most: int,
  mesh: Mesh,
) -> list[np.ndarray]:
  """float32[S, 3] of each trajectory, in one forward pass over at most `most` of them at a time."""
  program, out = reward_model.compile_scores(config), []
  for start in range(0, len(trajectories), most):
    batch, places = pack(trajectories[start : start + most], row_tokens, labelled=False)
    on_device, count = to_device(batch, micro_rows, -(-most // micro_rows), mesh)
    found = sharding.to_host(program(variables, heads, on_device, count))
    found = found.reshape(-1, *found.shape[2:])
    out += [found[place] for place in places]
  return out


# --- on disk ---------------------------------------------------------------------------------


def save(
  directory: pathlib.Path,
  policy: build.Policy,
  variables: dict,
  heads: Mapping[str, jax.Array],
  note: Mapping[str, Any],
) -> None:
  """Writes the directory; replaces an earlier one, which is kept until the new one is whole."""
  with replacing_folder(directory) as new:
    build.save_policy(new, policy, variables)
    tensors = {name: np.asarray(x, np.float32) for name, x in heads.items()}
    write_file(
      new / WEIGHTS, {n: (x.shape, x.dtype) for n, x in tensors.items()}, tensors.__getitem__
    )
    codec = policy.chat_format.codec
    write_json(
      new / NOTE,
      {
        "format": _FORMAT,
        "heads": list(HEADS),
        "trunk": _trunk(new),
        "tokenizer": codec.digest(),
        "vocab_size": codec.vocab_size,
        "chat_format": policy.chat_format.name,
        **note,
      },
    )


def _trunk(directory: pathlib.Path) -> str:
  """Digest of the trunk's weights and shape."""
  files = [
    p for p in directory.glob("*.safetensors") if p.name not in (WEIGHTS, hub.VALUE_HEAD_FILE)
  ]
  return inputs.digest([*sorted(files), directory / "config.json"])


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModel:
  """A frozen reward model on the mesh."""

  config: model.ModelConfig
  variables: dict
  heads: dict
  note: Mapping[str, Any]


def load(config: Config, policy: build.Policy, mesh: Mesh) -> RewardModel:
  """The model of rewards.model.path, for trajectories of this policy.

  Raises:
    FileNotFoundError, ValueError: it is none, it is damaged, its heads belong to another trunk, it
      reads another tokenizer's ids, or conversations are longer than it can read.
  """
  path, where = pathlib.Path(config.rewards.model.path), "config.rewards.model.path"
  if not (path / NOTE).is_file():
    near = path / NAME
    hint = (
      f"did you mean {near}?" if (near / NOTE).is_file() else "make one with --mode=reward_model"
    )
    raise FileNotFoundError(f"{where}: {path} holds no reward model ({NOTE}); {hint}")
  note = read_json(path / NOTE)
  if note.get("format") != _FORMAT or note.get("heads") != list(HEADS):
    raise ValueError(
      f"{where}: {path / NOTE} is not of format {_FORMAT} with heads {', '.join(HEADS)}; make the "
      "model again with --mode=reward_model"
    )
  codec = policy.chat_format.codec
  if note["tokenizer"] != codec.digest():
    raise ValueError(
      f"{where}: {path} reads another tokenizer ({note['vocab_size']} tokens, the policy's "
      f"{policy.tokenizer} has {codec.vocab_size}): the same ids mean other texts to it; train one "
      f"with --mode=reward_model and model.path = {config.model.path!r}, on trajectories of this "
      "policy"
    )
  if note["trunk"] != _trunk(path):
    raise ValueError(
      f"{where}: the heads in {path} were trained on another trunk than lies there; put its own "
      f"files back (digest {note['trunk']}), or train it again with --mode=reward_model"
    )
  m = config.model
  shape, _ = hfconfig.load_config(path, dtype=m.dtype, param_dtype=m.param_dtype)
  if config.rollout.max_tokens > shape.max_position_embeddings:
    raise ValueError(
      f"config.rollout.max_tokens: {config.rollout.max_tokens}, but the reward model reads "
      f"{shape.max_position_embeddings} tokens; set it to {shape.max_position_embeddings} or less"
    )
  variables = {"params": hub.load_params(path, shape, mesh)}
  # Frozen, its matrices are only ever read in the compute dtype.
  cast = functools.partial(model.in_compute_dtype, shape)
  where = jax.tree.map(lambda x: x.sharding, variables)
  variables = sharding.jit(cast, out_shardings=where)(variables)
  return RewardModel(shape, variables, _heads(path, shape, mesh), note)


def _heads(path: pathlib.Path, shape: model.ModelConfig, mesh: Mesh) -> dict[str, jax.Array]:
  file = TensorFile(path / WEIGHTS)
  wanted = {"kernel": (shape.hidden_size, len(HEADS)), "bias": (len(HEADS),)}
  if file.shapes != wanted:
    raise ValueError(f"{path / WEIGHTS}: holds {file.shapes}, expected {wanted}")
  where = sharding.replicated(mesh)
  return {name: sharding.place(np.array(file.read(name), np.float32), where) for name in wanted}
