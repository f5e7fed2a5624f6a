"""Mixtures of experts against a dense oracle: values, gradients, blocks, and over 8 devices."""

import dataclasses
import functools
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import on_devices, tiny_config

from steptool_jax.config import Lora
from steptool_jax.policy import caches, experts, families, lora, model, sharding
from steptool_jax.policy.formats import hub

CONFIG = tiny_config(
  family="qwen3_moe", qk_norm=True, num_experts=8, experts_per_token=3, intermediate_size=12
)


def dense(x, weights, chosen, kernels, gated):
  """Every expert for every token, most of it times zero."""
  hidden = gated(
    jnp.einsum("btd,edf->btef", x, kernels.gate), jnp.einsum("btd,edf->btef", x, kernels.up)
  )
  every = jnp.einsum("btef,efd->bted", hidden, kernels.down)
  share = (jax.nn.one_hot(chosen, len(kernels.gate)) * weights[..., None]).sum(axis=2)
  return jnp.einsum("bted,bte->btd", every, share)


def gated(gate, up):
  return jax.nn.silu(gate) * up


@pytest.mark.parametrize(("pairs", "tokens"), [(8192, 16384), (4, 16384), (5, 6)])
def test_values_and_gradients_equal_the_dense_oracle(pairs, tokens, monkeypatch):
  """Pairs that fall into several blocks, or the last pairs of a block that is not full, were lost
  or counted for a neighbour; an expert that nobody chose had a gradient."""
  monkeypatch.setattr(experts, "PAIRS", pairs)
  monkeypatch.setattr(experts, "TOKENS", tokens)
  keys = jax.random.split(jax.random.key(0), 6)
  x = jax.random.normal(keys[0], (2, 6, 8))
  # Small enough for outputs near 1: of outputs near 100 the sine below makes errors of 1e-4, in
  # which sums of another order differ (processors without AVX-512 have one).
  kernels = experts.Kernels(
    *(0.3 * jax.random.normal(key, (5, 8, 4)) for key in keys[1:3]),
    0.3 * jax.random.normal(keys[3], (5, 4, 8)),
  )
  router = jax.random.normal(keys[4], (8, 5)).at[:, 2].set(0.0)
  weight = jax.random.normal(keys[5], (2, 6, 8))

  def value(how, x, router, kernels):
    weights, chosen = experts.choose(jnp.abs(x), router - 9 * (jnp.arange(5) == 2), 2, False)
    return jnp.sum(weight * jnp.sin(how(x, weights, chosen, kernels, gated)))

  def both(how):
    run = jax.value_and_grad(functools.partial(value, how), argnums=(0, 1, 2))
    return jax.jit(run)(x, router, kernels)

  one, other = both(experts.mix), both(dense)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), one, other)
  assert not np.any(one[1][2].gate[2])  # the one that nobody chose


def test_the_router_by_hand():
  # Logits 0, ln 2, ln 5: probabilities 1/8, 2/8, 5/8; the two largest are 5/8 and 2/8.
  router = jnp.log(jnp.array([[1.0, 2.0, 5.0]]))
  weights, chosen = experts.choose(jnp.ones((1, 1)), router, 2, False)
  assert chosen.tolist() == [[2, 1]]
  np.testing.assert_allclose(weights, [[5 / 8, 2 / 8]], rtol=1e-6)
  weights, _ = experts.choose(jnp.ones((1, 1), jnp.bfloat16), router, 2, True)
  np.testing.assert_allclose(weights, [[5 / 7, 2 / 7]], rtol=1e-6)
  assert weights.dtype == jnp.float32


def test_parts_of_a_row_by_hand():
  assert experts._parts(16, 8192) == 8  # 131,072 tokens, 16,384 at a time
  assert experts._parts(2, 100) == 1
  assert experts._parts(20000, 7) == 1  # no part is small enough


def test_cost_of_the_grouped_kernels_by_hand():
  # 16 rows of 8,192 tokens in 8 parts, 8 experts each: 131,072 pairs, of which each device has its
  # share and works on 8,192 at a time.
  assert experts.blocks(8, 16, 8192, 16) == 1
  assert experts.blocks(8, 16, 8192, 4) == 4
  # One token in each of 64 slots: 512 pairs, 32 a device, which fit into a tile of 128.
  assert experts._block_size(512, 16) == 128
  assert experts.blocks(8, 64, 1, 16) == 1
  shapes = [(8192, 2048), (8, 2048, 768)]
  assert experts.kernel_flops("ragged-dot-none.3", shapes) == 2 * 8192 * 2048 * 768
  assert experts.kernel_flops("ragged-dot-none", [(64, 32), (64, 16)]) == 2 * 64 * 32 * 16
  assert experts.kernel_flops("ragged-dot-metadata", []) == 0
  assert experts.kernel_flops("splash_mha_fwd", shapes) == 0


def test_the_router_stays_float32_in_a_bfloat16_model(tmp_path):
  """In bfloat16 the k-th and the next expert often tie: rollout and training chose differently."""
  config = dataclasses.replace(CONFIG, param_dtype="bfloat16")
  params = model.init_params(config, jax.random.key(0))
  assert params["layers"]["router"]["kernel"].dtype == jnp.float32
  assert params["layers"]["expert_up"]["kernel"].dtype == jnp.bfloat16
  hub.save_params(tmp_path / "m", config, params, max_shard_bytes=20_000)
  loaded = hub.load_params(tmp_path / "m", config)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  assert loaded["layers"]["router"]["kernel"].dtype == jnp.float32


def test_adapters_of_attention_only():
  with pytest.raises(ValueError, match=r"lora.targets: gate, up, down are experts in qwen3_moe"):
    lora.with_lora(CONFIG, Lora(4))
  assert lora.with_lora(CONFIG, Lora(4, targets=("q", "o"))).lora_scale == 4.0


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"num_experts": 0}, "num_experts: 0, but qwen3_moe is a mixture"),
    ({"experts_per_token": 9}, "experts_per_token: 9 must be of 1 to num_experts = 8"),
    ({"family": "qwen3"}, "num_experts: 8, but qwen3 has none"),
  ],
)
def test_bad_configs(change, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(CONFIG, **change)


def test_flops_count_the_chosen_experts():
  dense_part = families.useful_flops(dataclasses.replace(CONFIG, experts_per_token=1))
  # Two more of 3 * 32 * 12 multiply-adds in each of 2 layers.
  assert families.useful_flops(CONFIG) - dense_part == 2 * 2 * 2 * 3 * 32 * 12


def test_eight_devices_equal_one(tmp_path):
  """Experts over fsdp, their width over tensor, rows over data and fsdp; rows that do not divide,
  as with few slots; and a model with sliding windows."""
  assert "8 devices agree" in on_devices(8, __file__, str(tmp_path)).stdout


def _on_eight_devices(directory: pathlib.Path) -> None:
  assert jax.device_count() == 8
  adapter = Lora(4, 8.0, targets=("q", "o"))
  config = lora.with_lora(dataclasses.replace(CONFIG, vocab_size=64, num_layers=1), adapter)
  params = model.init_params(config, jax.random.key(0))
  adapters = lora.init_lora(config, adapter, jax.random.key(1))
  variables = {"params": params, "lora": adapters}
  tokens = jax.random.randint(jax.random.key(2), (4, 12), 0, 64)
  positions = jnp.tile(jnp.arange(12), (4, 1))

  def loss(variables, tokens, config=config):
    at = positions[: len(tokens)]
    hidden = model.forward(config, variables, tokens, at, jnp.ones_like(tokens))
    return jnp.mean(jax.nn.log_softmax(model.project_logits(config, variables, hidden)) ** 2)

  def decoded(variables, tokens, cache):
    inputs = (tokens[:, :1], positions[:, :1], positions[:, :1] < 9, cache)
    return model.forward_cached(config, variables, *inputs)[0]

  gemma = tiny_config(
    family="gemma3_text",
    vocab_size=64,
    qk_norm=True,
    sliding_window=3,
    sliding_layers=(True, False),
    rope_local_theta=100.0,
  )
  near = {"params": model.init_params(gemma, jax.random.key(3))}
  windowed = functools.partial(jax.value_and_grad(loss), config=gemma)
  expected_windowed = jax.jit(windowed)(near, tokens)

  cache = model.init_cache(config, 4, 16)
  expected = jax.jit(jax.value_and_grad(loss))(variables, tokens)
  expected_odd = jax.jit(loss)(variables, tokens[:3])
  expected_token = jax.jit(decoded)(variables, tokens, cache)

  mesh = sharding.make_mesh(2, 2, 2)
  placed = jax.device_put(variables, sharding.shardings(variables, mesh))
  kernel = placed["params"]["layers"]["expert_up"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (1, 4, 32, 6)
  rows = jax.device_put(tokens, sharding.batch_sharding(mesh))
  spot = jax.NamedSharding(mesh, caches.specs(cache, mesh).k)
  with jax.set_mesh(mesh):
    experts.TOKENS, experts.PAIRS = 24, 16  # a row in parts, and a part in blocks
    got = jax.jit(jax.value_and_grad(loss))(placed, rows)
    got_windowed = jax.jit(windowed)(jax.device_put(near, sharding.shardings(near, mesh)), rows)
    odd = jax.jit(loss)(placed, tokens[:3])
    decode = jax.jit(decoded).lower(placed, rows, jax.device_put(cache, spot)).compile()
    token = decode(placed, rows, jax.device_put(cache, spot))
  # Tokens travel and no expert does.
  moved = re.findall(r"= \w+\[([\d,]+)\][^=]* all-gather", decode.as_text())
  assert moved
  assert not any(shape.endswith(("32,12", "12,32", "32,6", "6,32")) for shape in moved)

  def close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5)

  jax.tree.map(close, (got, odd, token), (expected, expected_odd, expected_token))
  jax.tree.map(close, got_windowed, expected_windowed)
  assert np.any(got[1]["params"]["layers"]["router"]["kernel"])
  hub.save_params(directory / "m", config, placed["params"])
  loaded = hub.load_params(directory / "m", config, mesh)
  assert loaded["layers"]["expert_up"]["kernel"].sharding == kernel.sharding
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  print("8 devices agree")


if __name__ == "__main__":
  _on_eight_devices(pathlib.Path(sys.argv[1]))
