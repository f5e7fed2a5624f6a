"""Hugging Face directories <-> parameters, tensor by tensor.

Loading reads only the slices that a device needs, straight into the stacked and sharded layout;
saving fetches one layer's tensor at a time. The model never lies in memory twice.
"""

import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from steptool_jax.policy import hfconfig, sharding
from steptool_jax.policy.hfconfig import check_same_model, load_config, raw_config_of
from steptool_jax.policy.model import ModelConfig, abstract_params
from steptool_jax.policy.peftfile import load_adapter, save_adapter
from steptool_jax.policy.tensorfile import (
  TensorFile,
  TensorFiles,
  output_directory,
  split_shards,
  write_file,
  write_json,
)

__all__ = [
  "load_adapter",
  "load_config",
  "load_params",
  "raw_config_of",
  "save_adapter",
  "save_params",
]

VALUE_HEAD_FILE = "value_head.safetensors"  # ours; transformers does not look at it
SHARD_BYTES = 5_000_000_000
CARRIED = (
  "generation_config.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "tokenizer.model",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
)


def load_params(
  directory: str | pathlib.Path,
  config: ModelConfig,
  mesh: Mesh | None = None,
  param_dtype: str | None = None,
) -> dict[str, Any]:
  """Parameters in `param_dtype` (default: config's), sharded over `mesh` or on one device.

  The value head is read from our own exports and zero elsewhere. ValueError / FileNotFoundError
  name the file or tensor: missing shard, truncated file, shape mismatch, unknown or missing tensor.
  """
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise FileNotFoundError(f"{directory}: no such model directory")
  param_dtype = param_dtype or config.param_dtype
  files = TensorFiles(directory)
  target = abstract_params(config)
  sources: dict[tuple[str, ...], list[hfconfig.Name]] = {}
  for name in hfconfig.tensor_names(config):
    sources.setdefault(name.path, []).append(name)
  _check_tensors(files, sources, target, config)
  head = _read_value_head(directory, config)

  def place(path, leaf):
    spot = sharding.path_string(path)
    where = SingleDeviceSharding(jax.devices()[0])
    if mesh is not None:
      where = jax.NamedSharding(mesh, sharding.spec_for(spot, leaf.shape, mesh))
    key = tuple(spot.split("/"))
    if key[0] == "value_head":
      return jax.make_array_from_callback(leaf.shape, where, lambda index: head[key[1]][index])
    names = sources[key]

    def read(index):
      if names[0].layer is None:
        return _read(files, names[0], index).astype(param_dtype)
      chosen = names[index[0]]
      return np.stack([_read(files, name, index[1:]).astype(param_dtype) for name in chosen])

    return jax.make_array_from_callback(leaf.shape, where, read)

  return jax.tree_util.tree_map_with_path(place, target)


def _read(files: TensorFiles, name: hfconfig.Name, index: tuple[slice, ...]) -> np.ndarray:
  tensor = files.read(name.hub)
  return tensor.T[index] if name.transpose else tensor[index]


def _check_tensors(files, sources, target, config) -> None:
  """Every tensor there, none unknown, every shape right: before any data is read."""
  expected = {}
  for path, names in sources.items():
    leaf = target
    for key in path:
      leaf = leaf[key]
    for name in names:
      shape = leaf.shape if name.layer is None else leaf.shape[1:]
      expected[name.hub] = tuple(reversed(shape)) if name.transpose else tuple(shape)
  missing = [name for name in expected if name not in files.shapes]
  if missing:
    hint = " (tie_word_embeddings: true?)" if missing == ["lm_head.weight"] else ""
    raise ValueError(f"{files.directory}: missing tensors: {_some(missing)}{hint}")
  unknown = [
    name
    for name in files.shapes
    if name not in expected
    and not name.endswith("rotary_emb.inv_freq")  # old exports store the constant
    and not (name == "lm_head.weight" and config.tie_embeddings)  # a copy of the embedding
  ]
  if unknown:
    raise ValueError(
      f"{files.directory}: unknown tensors for {config.family}: {_some(unknown)}; "
      "config.json describes another model"
    )
  for name, shape in expected.items():
    if files.shapes[name] != shape:
      raise ValueError(
        f"{files.directory}: {name} has shape {files.shapes[name]}, config.json expects {shape}"
      )


def _some(names: list[str]) -> str:
  return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _read_value_head(directory: pathlib.Path, config: ModelConfig) -> dict[str, np.ndarray]:
  path = directory / VALUE_HEAD_FILE
  size = config.hidden_size
  if not path.is_file():
    return {"kernel": np.zeros((size, 1), np.float32), "bias": np.zeros(1, np.float32)}
  file = TensorFile(path)
  expected = {"value_head.weight": (1, size), "value_head.bias": (1,)}
  if file.shapes != expected:
    raise ValueError(f"{path}: holds {file.shapes}, expected {expected}")
  return {
    "kernel": np.asarray(file.read("value_head.weight"), np.float32).T,
    "bias": np.asarray(file.read("value_head.bias"), np.float32),
  }


def save_params(
  directory: str | pathlib.Path,
  config: ModelConfig,
  params: Mapping[str, Any],
  raw_config: Mapping[str, Any] | None = None,
  source: str | pathlib.Path | None = None,
  max_shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a directory that transformers opens; all or nothing.

  `raw_config`: the config.json the model came with (default: made from `config`). `source`: a
  directory whose tokenizer and generation config are carried over. Tensors keep the dtype of
  `params`; the value head goes into a file of its own. ValueError when `raw_config` is of another
  model, FileExistsError when `directory` holds anything. Process 0 writes; all processes call it.
  """
  raw = dict(raw_config_of(config) if raw_config is None else raw_config)
  check_same_model(config, raw)
  dtype = str(params["embed"]["embedding"].dtype)
  raw.pop("torch_dtype", None)
  raw["dtype"] = dtype
  names = {name.hub: name for name in hfconfig.tensor_names(config)}

  def leaf(name):
    value = params
    for key in names[name].path:
      value = value[key]
    return value

  entries = {}
  for name, spot in names.items():
    array = leaf(name)
    shape = array.shape if spot.layer is None else array.shape[1:]
    entries[name] = (tuple(reversed(shape)) if spot.transpose else tuple(shape), array.dtype)

  def fetch(name):
    spot, array = names[name], leaf(name)
    tensor = sharding.to_host(array if spot.layer is None else array[spot.layer])
    return tensor.T if spot.transpose else tensor

  if jax.process_index():  # takes part in bringing the tensors together, and writes nothing
    for name in entries:
      fetch(name)
    return
  with output_directory(directory) as out:
    write_shards(out, entries, fetch, max_shard_bytes)
    head = {
      "value_head.weight": np.asarray(params["value_head"]["kernel"], np.float32).T,
      "value_head.bias": np.asarray(params["value_head"]["bias"], np.float32),
    }
    sizes = {name: (tensor.shape, tensor.dtype) for name, tensor in head.items()}
    write_file(out / VALUE_HEAD_FILE, sizes, head.__getitem__)
    write_json(out / "config.json", raw)
    ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in raw}
    write_json(out / "generation_config.json", {"_from_model_config": True, **ids})
    if source is not None:
      carry_files(pathlib.Path(source), out)


def write_shards(
  out: pathlib.Path,
  entries: Mapping[str, tuple[tuple[int, ...], Any]],
  fetch: Callable[[str], np.ndarray],
  max_shard_bytes: int = SHARD_BYTES,
) -> None:
  """{name: (shape, dtype)} into model.safetensors, or into shards with an index."""
  if max_shard_bytes < 1:
    raise ValueError(f"max_shard_bytes: {max_shard_bytes} must be positive")
  shards = list(split_shards(entries, max_shard_bytes))
  if len(shards) == 1:
    write_file(out / "model.safetensors", entries, fetch)
    return
  weight_map, total = {}, 0
  for number, shard in enumerate(shards, 1):
    file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    write_file(out / file, shard, fetch)
    weight_map.update(dict.fromkeys(shard, file))
    total += (out / file).stat().st_size
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  write_json(out / "model.safetensors.index.json", index)


def carry_files(source: pathlib.Path, out: pathlib.Path) -> None:
  """Copies tokenizer, chat template and generation config, those that are there."""
  if not source.is_dir():
    raise FileNotFoundError(f"{source}: no such directory to take the tokenizer from")
  for name in CARRIED:
    if (source / name).is_file():
      shutil.copyfile(source / name, out / name)
