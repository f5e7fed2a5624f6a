"""The vocabulary's log-probs and their gradient against the plain ones, and their memory."""

import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steptool_jax.learning import vocabulary
from steptool_jax.policy import lora, model

TEMPERATURE = 0.7


def plain(config, variables, hidden_BTD, targets_BT, mask_BT):
  """All logits at once, differentiated by JAX."""
  logits = model.project_logits(config, variables, hidden_BTD) / TEMPERATURE
  logprobs = jax.nn.log_softmax(logits)
  chosen = jnp.take_along_axis(logprobs, targets_BT[..., None], axis=-1)[..., 0]
  entropy = -(jnp.exp(logprobs) * logprobs).sum(axis=-1)
  return jnp.where(mask_BT, chosen, 0.0), jnp.where(mask_BT, entropy, 0.0)


def inputs(config, full, rows=3, length=11):
  keys = jax.random.split(jax.random.key(0), 4)
  hidden = jax.random.normal(keys[0], (rows, length, config.hidden_size))
  targets = jax.random.randint(keys[1], (rows, length), 0, config.vocab_size)
  mask = jax.random.bernoulli(keys[2], 0.4, (rows, length))
  # full: the last chunk is used, and reaches beyond the row. Else a row is padding only, and the
  # last chunks are skipped.
  mask = mask.at[0].set(True) if full else mask.at[-1].set(False)
  weights = jax.random.normal(keys[3], (2, rows, length))
  return hidden, targets, mask, weights


def value_and_gradients(function, variables, hidden, targets, mask, weights):
  def total(variables, hidden):
    logprobs, entropy = function(variables, hidden, targets, mask)
    return (weights[0] * jnp.sin(logprobs) + weights[1] * entropy).sum()

  return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(variables, hidden)


@pytest.mark.parametrize(("chunk", "full"), [(4, True), (4, False), (512, False)])
@pytest.mark.parametrize("head", ["tied", "untied", "adapter"])
def test_equals_the_plain_one_with_gradients(head, chunk, full, monkeypatch):
  monkeypatch.setattr(vocabulary, "MAX_BLOCK", 24)
  monkeypatch.setattr(vocabulary, "MIN_BLOCK", 4)
  config = fakes.tiny_config(vocab_size=48, tie_embeddings=head == "tied")
  variables = {"params": model.init_params(config, jax.random.key(1))}
  if head == "adapter":
    adapters = lora.Lora(4, 8.0, targets=("lm_head",))
    config = lora.with_lora(config, adapters)
    variables["lora"] = lora.init_lora(config, adapters, jax.random.key(2))
    b = variables["lora"]["lm_head"]["b"]
    variables["lora"]["lm_head"]["b"] = jax.random.normal(jax.random.key(3), b.shape)
  static = {"temperature": TEMPERATURE, "chunk": chunk}
  ours = functools.partial(vocabulary.action_logprobs, config, **static)
  arrays = inputs(config, full)

  def close(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)

  got = value_and_gradients(ours, variables, *arrays)
  jax.tree.map(
    close, got, value_and_gradients(functools.partial(plain, config), variables, *arrays)
  )
  jax.tree.map(close, ours(variables, *arrays[:3]), plain(config, variables, *arrays[:3]))


def test_logits_of_all_tokens_never_exist():
  """Temporaries of values and gradients together are far below one [B, T, V]."""
  config = fakes.tiny_config(vocab_size=32768, hidden_size=32, tie_embeddings=False)
  rows, length, chunk = 2, 512, 16
  params = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))

  def total(params, hidden, targets, mask):
    logprobs, entropy = vocabulary.action_logprobs(
      config, {"params": params}, hidden, targets, mask, 1.0, chunk
    )
    return (logprobs + entropy).sum()

  shape = functools.partial(jax.ShapeDtypeStruct, (rows, length))
  compiled = (
    jax.jit(jax.grad(total, argnums=(0, 1)))
    .lower(
      {"lm_head": params["lm_head"]},
      jax.ShapeDtypeStruct((rows, length, 32), jnp.float32),
      shape(jnp.int32),
      shape(bool),
    )
    .compile()
  )
  everything = rows * length * config.vocab_size * 4
  assert compiled.memory_analysis().temp_size_in_bytes < everything / 4


@pytest.mark.parametrize(("size", "blocks"), [(512, 1), (32000, 2), (128256, 8), (151937, 1)])
def test_blocks_divide_the_vocabulary(size, blocks):
  config = fakes.tiny_config(vocab_size=size, tie_embeddings=False)
  static = vocabulary._Static(config, 1.0, 128, None)
  kernel = jax.ShapeDtypeStruct((32, size), jnp.float32)
  assert vocabulary._blocks(static, {"kernel": kernel})[0] == blocks
