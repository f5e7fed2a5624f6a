"""Mesh, table, and 8 fake devices (in a process of their own: the count is fixed at start)."""

import math
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fakes import on_devices, tiny_config
from jax.sharding import PartitionSpec as P

from steptool_jax.learning import vocabulary
from steptool_jax.policy import caches, lora, model, sharding
from steptool_jax.policy.formats import hub


def test_every_parameter_adapter_and_moment_has_a_rule():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  for family, changes in (
    ("llama", {"qkv_bias": True, "output_bias": True, "tie_embeddings": False}),
    ("qwen3", {"qk_norm": True}),
  ):
    config = tiny_config(family=family, **changes)
    targets = lora.TARGETS if not config.tie_embeddings else lora.TARGETS[:7]

    def state(config=config, targets=targets):
      params = model.init_params(config, jax.random.key(0))
      adapters = lora.init_lora(config, lora.Lora(16, 32.0, targets), jax.random.key(1))
      variables = {"params": params, "lora": adapters}
      trainable, frozen = lora.split_variables(variables)
      optimizer = optax.adamw(1e-3)
      return trainable, frozen, optimizer.init(trainable), optimizer.init({"params": params})

    abstract = jax.eval_shape(state)
    specs = sharding.shardings(abstract, mesh)
    assert jax.tree.structure(specs) == jax.tree.structure(abstract)
    assert specs[3][0].mu["params"]["layers"]["down"]["kernel"].spec == P(None, "tensor", "fsdp")
    assert specs[2][0].nu["lora"]["layers"]["q"]["b"].spec == P(None, None, "tensor")
    assert specs[3][0].count.spec == P()


def test_one_device_state_takes_its_shardings():
  config = tiny_config()
  params = model.init_params(config, jax.random.key(0))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  placed = jax.device_put(params, sharding.shardings(params, mesh))
  jax.tree.map(np.testing.assert_array_equal, placed, params)


def test_table_errors_name_the_parameter():
  mesh = jax.sharding.AbstractMesh((1, 2, 4), sharding.AXES)
  with pytest.raises(ValueError, match=r"no sharding rule for params/layers/conv/kernel \(2, 3\)"):
    sharding.spec_for("params/layers/conv/kernel", (2, 3), mesh)
  with pytest.raises(ValueError, match="does not fit the shape"):
    sharding.spec_for("layers/q/kernel", (2, 3), mesh)
  with pytest.raises(
    ValueError,
    match=r"mesh axis tensor: 4 does not divide dimension 6 of layers/q/kernel .* tensor: 1, 2, 3",
  ):
    sharding.spec_for("layers/q/kernel", (2, 4, 6), mesh)
  # A rule fits whole names only.
  with pytest.raises(ValueError, match="no sharding rule for xembed/embedding"):
    sharding.spec_for("xembed/embedding", (8, 8), mesh)


def test_rows_and_cache():
  mesh = jax.sharding.AbstractMesh((2, 2, 2), sharding.AXES)
  assert sharding.batch_sharding(mesh).spec == P(("data", "fsdp"))
  whole = P(None, ("data", "fsdp"), None)
  split = P(None, ("data", "fsdp"), None, "tensor")
  assert sharding.cache_spec((4, 8), mesh) == split
  assert sharding.cache_spec((3, 8), mesh) == whole
  assert sharding.cache_spec((128,), mesh) == whole
  with pytest.raises(ValueError, match=r"slots: 6 is not a multiple .* = 4; valid: 4 or 8"):
    sharding.check_rows("slots", 6, mesh)


@pytest.mark.parametrize(
  ("axes", "words"),
  [
    ((3, 1, 1), "mesh axis data: 3 does not divide 8 devices; valid: -1, 1, 2, 4, 8"),
    ((1, 0, 1), "mesh axis fsdp: 0 does not divide"),
    ((-1, -1, 1), "mesh axes data, fsdp: only one of them can be -1"),
    ((1, 2, 2), "mesh axis fsdp: 2 with .* does not cover 8 devices; valid: 4"),
    ((-1, 4, 4), "mesh axis data: -1 with .* does not cover 8 devices; make one of the others"),
  ],
)
def test_meshes_that_do_not_work(axes, words):
  with pytest.raises(ValueError, match=words):
    sharding.make_mesh(*axes, devices=list(range(8)))


def test_eight_devices_equal_one(tmp_path):
  done = on_devices(8, __file__, str(tmp_path))
  assert "8 devices agree" in done.stdout
  assert "Involuntary full rematerialization" not in done.stderr


def _on_eight_devices(directory: pathlib.Path) -> None:
  assert jax.device_count() == 8
  adapter = lora.Lora(4, 8.0, targets=lora.TARGETS)
  config = lora.with_lora(tiny_config(vocab_size=64, tie_embeddings=False), adapter)
  params = model.init_params(config, jax.random.key(0))
  adapters = lora.init_lora(config, adapter, jax.random.key(1))
  adapters = jax.tree.map(
    lambda x: x + 0.02 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), adapters
  )
  tokens = jax.random.randint(jax.random.key(2), (4, 12), 0, 64)
  positions = jnp.tile(jnp.arange(12), (4, 1))

  def loss(variables, tokens):
    hidden = model.forward(config, variables, tokens, positions, jnp.ones_like(tokens))
    return jnp.mean(jax.nn.log_softmax(model.project_logits(config, variables, hidden)) ** 2)

  def cached(variables, tokens, cache):
    return model.forward_cached(config, variables, tokens, positions, positions < 9, cache)

  def token(variables, tokens, cache):
    """One token a slot, as decoding feeds them: (logits, cache)."""
    inputs = (tokens[:, :1], positions[:, 9:10], positions[:, 9:10] < 12, cache)
    hidden, cache = model.forward_cached(config, variables, *inputs)
    return model.project_logits(config, variables, hidden), cache

  mask = positions % 3 > 0

  def head(variables, tokens):
    hidden = model.forward(config, variables, tokens, positions, jnp.ones_like(tokens))
    logprobs, entropy = vocabulary.action_logprobs(config, variables, hidden, tokens, mask, 0.7, 5)
    return jnp.mean(logprobs**2 - entropy)

  variables = {"params": params, "lora": adapters}
  cache = model.init_cache(config, 4, 16)
  one = jax.jit(jax.value_and_grad(loss))(variables, tokens)
  one_cached = jax.jit(cached)(variables, tokens, cache)
  one_token = jax.jit(token)(variables, tokens, one_cached[1])
  one_head = jax.jit(jax.value_and_grad(head))(variables, tokens)

  mesh = sharding.make_mesh(2, 2, 2)
  placed = jax.device_put(variables, sharding.shardings(variables, mesh))
  kernel = placed["params"]["layers"]["up"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 16, 24)
  rows = jax.device_put(tokens, sharding.batch_sharding(mesh))
  spot = jax.NamedSharding(mesh, caches.specs(cache, mesh).k)
  with jax.set_mesh(mesh):
    eight = jax.jit(jax.value_and_grad(loss))(placed, rows)
    eight_cached = jax.jit(cached)(placed, rows, jax.device_put(cache, spot))
    decode = jax.jit(token).lower(placed, rows, eight_cached[1]).compile()
    eight_token = decode(placed, rows, eight_cached[1])
    eight_head = jax.jit(jax.value_and_grad(head))(placed, rows)
    program = jax.jit(jax.value_and_grad(head)).lower(placed, rows).compile().as_text()
  # One token a slot: activations travel, and no slice of a weight does.
  moved = re.findall(r"= \w+\[([\d,]+)\][^=]* all-gather", decode.as_text())
  largest = max((math.prod(map(int, shape.split(","))) for shape in moved), default=0)
  assert largest < min(x[0].size for x in jax.tree.leaves(params["layers"]) if x.ndim > 2)
  # Each layer gathers its own slice: nothing that is stacked over layers, and no table, is whole.
  gathered = re.findall(r"= \w+\[([\d,]+)\][^=]* all-gather", program)
  assert gathered
  whole = {",".join(map(str, x.shape)) for x in jax.tree.leaves(params) if x.ndim > 1}
  assert not whole & set(gathered)
  assert eight_cached[1].k.sharding.is_equivalent_to(spot, 5)

  def close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5)

  jax.tree.map(close, eight, one)
  jax.tree.map(close, eight_cached, one_cached)
  jax.tree.map(close, eight_token, one_token)
  jax.tree.map(close, eight_head, one_head)

  # Sharded export, and import straight to the shards.
  hub.save_params(directory / "m", config, placed["params"])
  loaded = hub.load_params(directory / "m", config, mesh)
  assert loaded["layers"]["up"]["kernel"].sharding == kernel.sharding
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  print("8 devices agree")


if __name__ == "__main__":
  _on_eight_devices(pathlib.Path(sys.argv[1]))
