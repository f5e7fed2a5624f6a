"""Hugging Face directories <-> parameters, tensor by tensor.

Loading puts one device's slice of one layer's tensor after the other into the stacked and sharded
layout; saving brings back a layer's tensor, or a block of a larger one, and merges adapters on the
way. So the host holds a block besides what is on its devices, whatever the model's size.
"""

import errno
import functools
import itertools
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax
from jax.sharding import Mesh, SingleDeviceSharding

from steptool_jax.files import read_json
from steptool_jax.policy import sharding
from steptool_jax.policy.formats import hfconfig
from steptool_jax.policy.formats.tensorfile import (
  Rows,
  TensorFile,
  TensorFiles,
  copy_in_order,
  num_bytes,
  output_directory,
  row_blocks,
  split_shards,
  write_file,
  write_json,
)
from steptool_jax.policy.lora import add_delta
from steptool_jax.policy.model import ModelConfig, abstract_params

VALUE_HEAD_FILE = "value_head.safetensors"  # ours; transformers does not look at it
SHARD_BYTES = 5_000_000_000
CARRIED = (
  "tokenizer.json",
  "tokenizer_config.json",
  "tokenizer.model",
  "tokenizer.tiktoken",
  "spiece.model",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
)
TEMPLATES = "additional_chat_templates"


def load_params(
  directory: str | pathlib.Path,
  config: ModelConfig,
  mesh: Mesh | None = None,
) -> dict[str, Any]:
  """Parameters in config.param_dtype, sharded over `mesh` or on one device.

  The value head is read from our own exports and zero elsewhere. ValueError / FileNotFoundError
  name the file or tensor: missing shard, truncated file, shape mismatch, unknown or missing tensor.
  """
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise FileNotFoundError(f"{directory}: no such model directory")
  files = TensorFiles(directory)
  target = abstract_params(config)
  sources: dict[tuple[str, ...], list[hfconfig.Name]] = {}
  for name in hfconfig.tensor_names(config):
    sources.setdefault(name.path, []).append(name)
  check_tensors(directory, files.shapes, config)
  head = _read_value_head(directory, config)

  def place(path, leaf):
    spot = sharding.path_string(path)
    where = one = SingleDeviceSharding(jax.devices()[0])
    if mesh is not None:
      spec = sharding.spec_for(spot, leaf.shape, mesh)
      where = jax.NamedSharding(mesh, spec)
      one = jax.NamedSharding(mesh, jax.P(*spec[1:]))  # of one layer
    key = tuple(spot.split("/"))
    if key[0] == "value_head":
      return _place(leaf.shape, where, lambda index: np.array(head[key[1]][index]))

    def read(name, index):
      tensor = files.read(name.hub)
      tensor = tensor.T if name.transpose else tensor
      # A copy even where none is needed: a device must not keep the file's pages.
      return copy_in_order(tensor[index], leaf.dtype)

    def load(names, shape, where):
      """A tensor, or the experts of a layer stacked: a device reads its own."""
      if names[0].expert is None:
        return _place(shape, where, lambda index: read(names[0], index))
      return _place(
        shape, where, lambda index: np.stack([read(n, index[1:]) for n in names[index[0]]])
      )

    names = sources[key]
    if names[0].layer is None:
      return load(names, leaf.shape, where)
    stack = _zeros(leaf.shape, leaf.dtype, where)()
    for layer, group in itertools.groupby(names, lambda name: name.layer):
      stack = _set_layer(stack, load(list(group), leaf.shape[1:], one), layer)
    return stack

  return jax.tree_util.tree_map_with_path(place, target)


def _place(
  shape: tuple[int, ...],
  where: jax.sharding.Sharding,
  read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
  """Does what jax.make_array_from_callback does, which holds the slices of all devices at once."""
  arrays = []
  places = where.addressable_devices_indices_map(shape).items()
  for _, copies in itertools.groupby(sorted(places, key=_index_string), key=_index_string):
    devices, indices = zip(*copies, strict=True)
    piece = read(indices[0])
    for device in devices:
      arrays.append(jax.block_until_ready(jax.device_put(piece, device)))
  return jax.make_array_from_single_device_arrays(shape, where, arrays)


def _index_string(place: tuple[jax.Device, tuple[slice, ...]]) -> str:
  return str(place[1])


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: str, where: jax.sharding.Sharding) -> Callable:
  """Made where it lies: jnp.zeros(device=where) makes one device's part and sends it to all."""
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, x: jax.Array, layer: int) -> jax.Array:
  return lax.dynamic_update_index_in_dim(stack, x, layer, 0)


def check_tensors(
  where: str | pathlib.Path, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig
) -> None:
  """Every tensor there, none unknown, every shape right: before any data is read.

  shapes: Hugging Face name -> shape; ValueError that begins with `where` and names a tensor.
  """
  target = abstract_params(config)
  expected = {
    name.hub: _shape_in_file(_find(target, name.path), name)
    for name in hfconfig.tensor_names(config)
  }
  missing = [name for name in expected if name not in shapes]
  if missing:
    hint = " (tie_word_embeddings: true?)" if missing == ["lm_head.weight"] else ""
    raise ValueError(f"{where}: missing tensors: {_some(missing)}{hint}")
  unknown = [
    name
    for name in shapes
    if name not in expected
    and not name.endswith("rotary_emb.inv_freq")  # old exports store the constant
    and not (name == "lm_head.weight" and config.tie_embeddings)  # a copy of the embedding
  ]
  if unknown:
    raise ValueError(
      f"{where}: unknown tensors for {config.family}: {_some(unknown)}; "
      "its configuration describes another model"
    )
  for name, shape in expected.items():
    if shapes[name] != shape:
      raise ValueError(f"{where}: {name} has shape {shapes[name]}, config.json expects {shape}")


def _shape_in_file(array: Any, name: hfconfig.Name) -> tuple[int, ...]:
  shape = array.shape[name.stacked :]
  return tuple(reversed(shape)) if name.transpose else tuple(shape)


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
  adapters: Mapping[str, Any] | None = None,
  model: str | pathlib.Path | None = None,
  stop_id: int | None = None,
) -> None:
  """Writes a directory that transformers opens; all or nothing.

  `raw_config`: the config.json the model came with (default: made from `config`). `source`: a
  directory whose tokenizer is carried over, and the generation config of `model`, or else of
  `source`. `stop_id`: what ends a trained turn, which both configs name then: base models end texts
  with another token. `adapters`: merged into what is written, as lora.merge_lora does, with
  config.lora_scale. Tensors keep the dtype of `params`; the
  value head goes into a file of its own. ValueError when `raw_config` is of another model,
  FileExistsError when `directory` holds anything, OSError when the disk is too small. Process 0
  writes; all processes call it.
  """
  if adapters is not None and config.lora_scale is None:
    raise ValueError("lora_scale: None, but there are adapters; use lora.with_lora(config, lora)")
  raw = dict(hfconfig.raw_config_of(config) if raw_config is None else raw_config)
  hfconfig.check_same_model(config, raw)
  dtype = str(params["embed"]["embedding"].dtype)
  raw.pop("torch_dtype", None)
  raw["dtype"] = dtype
  raw = _stopping(raw, stop_id)
  names = {name.hub: name for name in hfconfig.tensor_names(config)}

  entries = {}
  for name, spot in names.items():
    array = _find(params, spot.path)
    entries[name] = (_shape_in_file(array, spot), array.dtype)

  def fetch(name):
    spot = names[name]
    adapter = None
    if adapters is not None and spot.path[-1] == "kernel":  # a bias has none
      adapter = _find(adapters, spot.path[:-1])
    return _Tensor(_find(params, spot.path), adapter, config.lora_scale, spot)

  if jax.process_index():  # takes part in bringing the tensors together, and writes nothing
    for name, (shape, dtype) in entries.items():
      for rows in row_blocks(shape, dtype):
        fetch(name)[rows]
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
    generation = _generation(source, model) or {"_from_model_config": True, **ids}
    write_json(out / "generation_config.json", _stopping(generation, stop_id))
    if source is not None:
      carry_files(pathlib.Path(source), out)


def _find(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
  """None where the path leads nowhere: a module without an adapter."""
  for key in path:
    if key not in tree:
      return None
    tree = tree[key]
  return tree


class _Tensor:
  """A tensor as the file has it; tensor[start:stop] brings these rows to the host."""

  def __init__(self, array: jax.Array, adapter: Any, scale: float | None, spot: hfconfig.Name):
    self._array, self._adapter, self._scale, self._spot = array, adapter, scale, spot

  def __getitem__(self, rows: slice) -> np.ndarray:
    spot, size = self._spot, rows.stop - rows.start
    axis = 1 if spot.transpose else 0
    place = tuple(n for n in (spot.layer, spot.expert) if n is not None)
    part = _cut(self._array, self._adapter, self._scale, place, rows.start, axis, size)
    return sharding.to_host(part).T if spot.transpose else sharding.to_host(part)


# Jitted with layer and start as arguments: array[layer] would compile once for every layer.
@functools.partial(jax.jit, static_argnames=("axis", "size"))
def _cut(array, adapter, scale, place, start, axis, size):
  """[size] of `array` (of its layer and expert) along `axis`, with its adapter merged."""

  def of_layer(x):
    return functools.reduce(sharding.layer_of, place, x)

  def cut(x):
    return lax.dynamic_slice_in_dim(of_layer(x), start, size, axis)

  if adapter is None or "a" not in adapter:
    return cut(array)
  return add_delta(cut(array), {"a": of_layer(adapter["a"]), "b": cut(adapter["b"])}, scale)


def write_shards(
  out: pathlib.Path,
  entries: Mapping[str, tuple[tuple[int, ...], Any]],
  fetch: Callable[[str], Rows],
  max_shard_bytes: int = SHARD_BYTES,
) -> None:
  """{name: (shape, dtype)} into model.safetensors, or into shards; with an index in both cases.

  Where there is none, vLLM takes every safetensors file for the model's, the value head's as well.

  OSError before anything is written when the disk has no room for all.
  """
  if max_shard_bytes < 1:
    raise ValueError(f"max_shard_bytes: {max_shard_bytes} must be positive")
  needed, free = sum(num_bytes(*entry) for entry in entries.values()), shutil.disk_usage(out).free
  if needed > free:
    raise OSError(
      errno.ENOSPC,
      f"{out.parent}: the weights need {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
      "make room, or choose another directory",
    )
  shards = list(split_shards(entries, max_shard_bytes))
  weight_map, total = {}, 0
  for number, shard in enumerate(shards, 1):
    part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
    file = f"model{part}.safetensors"
    write_file(out / file, shard, fetch)
    weight_map.update(dict.fromkeys(shard, file))
    total += (out / file).stat().st_size
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  write_json(out / "model.safetensors.index.json", index)


def carry_files(source: pathlib.Path, out: pathlib.Path) -> None:
  """Copies tokenizer and chat templates, those that are there."""
  if not source.is_dir():
    raise FileNotFoundError(f"{source}: no such directory to take the tokenizer from")
  for name in CARRIED:
    if (source / name).is_file():
      shutil.copyfile(source / name, out / name)
  if (source / TEMPLATES).is_dir():
    shutil.copytree(source / TEMPLATES, out / TEMPLATES)


def _generation(*places: str | pathlib.Path | None) -> dict[str, Any]:
  """The last generation config that is there; of a broken one a warning, since weights matter."""
  found: dict[str, Any] = {}
  for place in places:
    path = pathlib.Path(place or "") / "generation_config.json"
    if place is not None and path.is_file():
      try:
        found = read_json(path)
      except ValueError as error:
        logging.warning("not carried over: %s", error)
  return found


def _stopping(config: Mapping[str, Any], stop_id: int | None) -> dict[str, Any]:
  """The config with one more end of a text, where it lacks it."""
  named = config.get("eos_token_id")
  ends = named if isinstance(named, list) else [] if named is None else [named]
  if stop_id is None or stop_id in ends:
    return dict(config)
  return {**config, "eos_token_id": [*ends, stop_id] if ends else stop_id}
