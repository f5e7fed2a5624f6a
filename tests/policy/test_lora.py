"""Adapters: merge, off, split; PEFT directories."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import tiny_config
from safetensors.numpy import load_file

from steptool_jax.policy import lora, model
from steptool_jax.policy.formats import hub, peftfile

CONFIG = tiny_config(tie_embeddings=False)
LORA = lora.Lora(rank=3, alpha=12.0, targets=lora.TARGETS)
TOKENS = jax.random.randint(jax.random.key(9), (2, 10), 0, CONFIG.vocab_size)


@functools.partial(jax.jit, static_argnums=0)
def logits(config, variables):
  positions = jnp.tile(jnp.arange(10), (2, 1))
  hidden = model.forward(config, variables, TOKENS, positions, jnp.ones_like(TOKENS))
  return model.project_logits(config, variables, hidden)


@pytest.fixture(scope="module")
def params():
  return model.init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def adapters():
  fresh = lora.init_lora(CONFIG, LORA, jax.random.key(1))
  rng = np.random.default_rng(2)
  return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), fresh)


def test_fresh_adapters_change_nothing_and_every_b_has_a_gradient(params):
  config = lora.with_lora(CONFIG, LORA)
  fresh = lora.init_lora(CONFIG, LORA, jax.random.key(1))
  base = logits(CONFIG, {"params": params})
  np.testing.assert_array_equal(logits(config, {"params": params, "lora": fresh}), base)
  grads = jax.grad(
    lambda adapters: jnp.sum(logits(config, {"params": params, "lora": adapters}) ** 2)
  )(fresh)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    is_b = path[-1].key == "b"
    assert bool(np.any(grad)) == is_b, path


def test_merged_equals_unmerged_and_off_equals_base(params, adapters):
  variables = {"params": params, "lora": adapters}
  with_adapters = logits(lora.with_lora(CONFIG, LORA), variables)
  base = logits(CONFIG, {"params": params})
  merged = lora.merge_lora(params, adapters, LORA)
  np.testing.assert_allclose(logits(CONFIG, {"params": merged}), with_adapters, atol=2e-4)
  assert np.abs(with_adapters - base).max() > 0.1
  off = logits(lora.with_lora(CONFIG, LORA), lora.adapters_off(variables))
  np.testing.assert_array_equal(off, base)


def test_merged_on_the_way_out_equals_merged_and_written(params, adapters, tmp_path):
  merged = lora.merge_lora(params, adapters, LORA)
  config = lora.with_lora(CONFIG, LORA)
  hub.save_params(tmp_path / "m", config, params, adapters=adapters)
  loaded = hub.load_params(tmp_path / "m", CONFIG)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), loaded, merged)


def test_biases_beside_adapters_are_written_as_they_are(tmp_path):
  """A bias was taken for a kernel with an adapter: no Qwen2 trained with LoRA could be exported."""
  plain = tiny_config(family="qwen2", qkv_bias=True, tie_embeddings=False)
  fresh = model.init_params(plain, jax.random.key(0))
  rng = np.random.default_rng(3)
  params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), fresh)
  adapters = lora.init_lora(plain, LORA, jax.random.key(1))
  adapters = jax.tree.map(lambda x: x + 0.1, adapters)
  hub.save_params(tmp_path / "m", lora.with_lora(plain, LORA), params, adapters=adapters)
  loaded = hub.load_params(tmp_path / "m", plain)
  merged = lora.merge_lora(params, adapters, LORA)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), loaded, merged)


def test_one_projection_by_hand():
  # scale = 6 / 2 = 3: kernel 0 + 3 * [[1], [2]] [[10, 20]] for rank 1 + a zero row.
  config = lora.Lora(rank=2, alpha=6.0, targets=("q",))
  params = {"layers": {"q": {"kernel": jnp.zeros((1, 2, 2))}}}
  adapter = {
    "a": jnp.array([[[1.0, 5.0], [2.0, 6.0]]]),
    "b": jnp.array([[[10.0, 20.0], [0.0, 0.0]]]),
  }
  merged = lora.merge_lora(params, {"layers": {"q": adapter}}, config)
  np.testing.assert_allclose(merged["layers"]["q"]["kernel"], [[[30, 60], [60, 120]]])


def test_cached_forward_uses_adapters(params, adapters):
  config, variables = lora.with_lora(CONFIG, LORA), {"params": params, "lora": adapters}
  positions = jnp.tile(jnp.arange(10), (2, 1))
  cache = model.init_cache(config, 2, 10)
  hidden, _ = jax.jit(model.forward_cached, static_argnums=0)(
    config, variables, TOKENS, positions, jnp.ones_like(TOKENS, bool), cache
  )
  np.testing.assert_allclose(
    model.project_logits(config, variables, hidden), logits(config, variables), atol=1e-4
  )


def test_split_and_join(params, adapters):
  full = {"params": params}
  trainable, frozen = lora.split_variables(full)
  assert frozen == {}
  assert jax.tree.structure(lora.join_variables(trainable, frozen)) == jax.tree.structure(full)
  variables = {"params": params, "lora": adapters}
  trainable, frozen = lora.split_variables(variables)
  assert set(trainable) == {"lora", "value_head"}
  assert "value_head" not in frozen["params"]
  joined = lora.join_variables(trainable, frozen)
  jax.tree.map(np.testing.assert_array_equal, joined, variables)
  assert "value_head" in params  # the input is left alone


def test_bad_lora_settings(params, adapters):
  with pytest.raises(ValueError, match="'lm_head' needs untied"):
    lora.init_lora(tiny_config(), LORA, jax.random.key(0))
  with pytest.raises(ValueError, match=r"lora_scale: None.*with_lora"):
    logits(CONFIG, {"params": params, "lora": adapters})


def test_an_adapter_directory_holds_every_layer_in_pefts_layout(tmp_path, adapters):
  """PEFT itself is seldom installed: names, orientation and settings, without it."""
  peftfile.save_adapter(tmp_path / "a", CONFIG, adapters, LORA, base_model="base")
  tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
  assert len(tensors) == 2 * (7 * CONFIG.num_layers + 1)
  for layer, target, module in ((0, "q", "self_attn.q_proj"), (1, "down", "mlp.down_proj")):
    for ours, theirs in (("a", "lora_A"), ("b", "lora_B")):
      name = f"base_model.model.model.layers.{layer}.{module}.{theirs}.weight"
      np.testing.assert_array_equal(tensors[name], adapters["layers"][target][ours][layer].T)
  head = tensors["base_model.model.lm_head.lora_B.weight"]
  np.testing.assert_array_equal(head, adapters["lm_head"]["b"].T)
  raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
  assert (raw["r"], raw["lora_alpha"], raw["base_model_name_or_path"]) == (3, 12.0, "base")
  assert {"q_proj", "down_proj", "lm_head"} < set(raw["target_modules"])
  with pytest.raises(FileExistsError, match="not empty"):
    peftfile.save_adapter(tmp_path / "a", CONFIG, adapters, LORA)


def test_peft_opens_it(tmp_path, params, adapters):
  torch = pytest.importorskip("torch", reason="the oracle is PEFT on torch")
  peft = pytest.importorskip("peft", reason="the oracle is PEFT")
  transformers = pytest.importorskip("transformers")
  hub.save_params(tmp_path / "base", CONFIG, params)
  peftfile.save_adapter(tmp_path / "a", CONFIG, adapters, LORA, str(tmp_path / "base"))
  base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
  theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "a")).eval()
  with torch.no_grad():
    expected = theirs(torch.tensor(np.asarray(TOKENS), dtype=torch.long)).logits.numpy()
  variables = {"params": params, "lora": adapters}
  np.testing.assert_allclose(logits(lora.with_lora(CONFIG, LORA), variables), expected, atol=1e-4)


def test_merge_keeps_the_stored_dtype(adapters):
  config = dataclasses.replace(CONFIG, param_dtype="bfloat16")
  params = model.init_params(config, jax.random.key(0))
  merged = lora.merge_lora(params, adapters, LORA)
  assert merged["layers"]["q"]["kernel"].dtype == jnp.bfloat16
  assert np.any(merged["layers"]["q"]["kernel"] != params["layers"]["q"]["kernel"])
