"""What the host holds while a model goes to 8 devices and comes back (in a process of its own).

tracemalloc counts NumPy's memory and not the devices' (XLA's) nor mapped files; what is on the
devices is counted by jax.live_arrays. results/at_size.py measures the same at 8B.
"""

import pathlib
import sys
import tracemalloc
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from fakes import on_devices, tiny_config

from steptool_jax.policy import lora, model, sharding
from steptool_jax.policy.formats import hub, tensorfile

SHARD = 30_000_000
SMALL = 4_000_000  # what Python itself needs: traces, names, caches


def test_the_host_holds_a_block_and_not_the_model(tmp_path):
  assert "the bounds hold" in on_devices(8, __file__, str(tmp_path)).stdout


def _on_eight_devices(directory: pathlib.Path) -> None:
  assert jax.device_count() == 8
  mesh = sharding.make_mesh(1, 8, 1)
  settings = lora.Lora(4, 8.0)
  config = tiny_config(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=2048,
    num_layers=8,
    head_dim=128,
    tie_embeddings=False,
    param_dtype="bfloat16",
  )
  config = lora.with_lora(config, settings)
  rng = np.random.default_rng(0)

  def random(leaf):
    return jnp.asarray(rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype))

  params = jax.tree.map(random, model.abstract_params(config))
  fresh = jax.eval_shape(lambda: lora.init_lora(config, settings, jax.random.key(1)))
  adapters = jax.tree.map(random, fresh)
  hub.save_params(directory / "source", config, params, max_shard_bytes=SHARD)
  shards = sorted(path.stat().st_size for path in (directory / "source").glob("model-*"))
  assert len(shards) > 2
  layer = sum(x[0].nbytes for x in jax.tree.leaves(params["layers"]))
  kernel = params["layers"]["up"]["kernel"][0].nbytes
  largest_slice = max(x.nbytes for x in jax.tree.leaves(params)) // 8
  whole = sum(x.nbytes for x in jax.tree.leaves(params))
  # The blocks of a file are small next to the embedding, as they are at 8B.
  tensorfile.BLOCK_BYTES = kernel
  expected = jax.device_get(params)
  merged = {**expected, "layers": dict(expected["layers"])}
  for name, adapter in adapters["layers"].items():
    old = expected["layers"][name]["kernel"]
    delta = lora.scale(settings) * (np.asarray(adapter["a"]) @ np.asarray(adapter["b"]))
    merged["layers"][name] = {"kernel": (old.astype(np.float32) + delta).astype(old.dtype)}
  adapters = jax.device_put(adapters, sharding.shardings(adapters, mesh))
  del params

  loaded, host, device = _measured(lambda: hub.load_params(directory / "source", config, mesh))
  # The strict reading: a shard is what one device holds of an array. Then as the issue has it.
  assert host <= largest_slice + SMALL, (host, largest_slice)
  assert host <= 1.3 * shards[-1] + layer
  assert device <= whole + kernel + SMALL, (device, whole, kernel)
  jax.tree.map(np.testing.assert_array_equal, loaded, expected)

  for name, extra, wanted, rtol in (
    ("plain", None, expected, 0),
    ("merged", adapters, merged, 2.0**-7),  # the last of 8 bits, where float32 sums differ
  ):

    def save(out=directory / name, extra=extra):
      hub.save_params(out, config, loaded, max_shard_bytes=SHARD, adapters=extra)

    _, host, device = _measured(save)
    # A block as it comes, and the same turned into the file's order.
    assert host <= 2 * kernel + SMALL, (name, host, kernel)
    assert host <= 1.3 * shards[-1] + layer
    assert device <= kernel + SMALL, (name, device, kernel)
    again = hub.load_params(directory / name, config)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(wanted), strict=True):
      ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
      np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * 1e-3)
  print("the bounds hold")


def _measured(call):
  """(result, largest host bytes, largest device bytes) above what was there.

  Devices are looked at whenever one is fed and whenever a block comes back.
  """
  start, most = _on_devices(), 0

  def watch(function):
    def watched(*args, **kwargs):
      nonlocal most
      out = function(*args, **kwargs)
      most = max(most, _on_devices() - start)
      return out

    return watched

  with (
    mock.patch.object(jax, "device_put", watch(jax.device_put)),
    mock.patch.object(sharding, "to_host", watch(sharding.to_host)),
    mock.patch.object(hub, "_set_layer", watch(hub._set_layer)),
  ):
    tracemalloc.start()
    out = call()
    _, host = tracemalloc.get_traced_memory()
    tracemalloc.stop()
  return out, host, most


def _on_devices() -> int:
  """Arrays over all devices: their parts on one device are listed again as arrays of their own."""
  arrays = [x for x in jax.live_arrays() if not x.is_deleted() and x.sharding.num_devices == 8]
  return sum(x.nbytes for x in arrays)


if __name__ == "__main__":
  _on_eight_devices(pathlib.Path(sys.argv[1]))
