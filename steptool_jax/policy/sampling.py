"""Sampling with the log-prob of the distribution that was really sampled from."""

import jax
import jax.numpy as jnp

from steptool_jax.policy.sharding import platform


def restrict(logits_NV: jax.Array, top_k: int, top_p: float) -> jax.Array:
  """Logits with -inf outside the top k tokens and outside the nucleus of mass top_p.

  Args:
    logits_NV: float32, temperature already applied.
    top_k: 0 keeps all.
    top_p: in (0, 1]; 1 keeps all. The most likely token always stays.
  """
  if top_k:
    kth_N1 = jax.lax.top_k(logits_NV, min(top_k, logits_NV.shape[-1]))[0][:, -1:]
    logits_NV = jnp.where(logits_NV < kth_N1, -jnp.inf, logits_NV)
  if top_p < 1.0:
    sorted_NV = -jnp.sort(-logits_NV, axis=-1)
    probs_NV = jax.nn.softmax(sorted_NV, axis=-1)
    # A token stays while the mass in front of it is below top_p, so the first one always does.
    kept_NV = jnp.cumsum(probs_NV, axis=-1) - probs_NV < top_p
    floor_N1 = jnp.min(jnp.where(kept_NV, sorted_NV, jnp.inf), axis=-1, keepdims=True)
    logits_NV = jnp.where(logits_NV < floor_N1, -jnp.inf, logits_NV)
  return logits_NV


def sample(
  logits_NV: jax.Array,
  keys_N: jax.Array,
  temperature: jax.Array,
  top_k: int = 0,
  top_p: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """Token int32[N] and its log-prob float32[N] under softmax(logits / temperature), restricted.

  temperature 0 is greedy: a point mass, log-prob 0. Each row has its own key, so a row's token does
  not depend on its neighbours.
  """
  greedy = temperature == 0.0
  scaled_NV = logits_NV.astype(jnp.float32) / jnp.where(greedy, 1.0, temperature)
  scaled_NV = restrict(scaled_NV, top_k, top_p)
  vocabulary = logits_NV.shape[-1]

  def make_noise(keys_N):
    return jax.vmap(lambda key: jax.random.gumbel(key, (vocabulary,), jnp.float32))(keys_N)

  if platform() == "cpu":
    # Inside of the search for the maximum, XLA would make noise number by number.
    zeros_NV = jnp.zeros(logits_NV.shape, jnp.float32)
    noise_NV = jax.lax.cond(greedy, lambda _: zeros_NV, make_noise, keys_N)
  else:
    noise_NV = jnp.where(greedy, 0.0, make_noise(keys_N))
  tokens_N = jnp.argmax(scaled_NV + noise_NV, axis=-1)
  chosen_N = jnp.take_along_axis(scaled_NV, tokens_N[:, None], axis=-1)[:, 0]
  logprobs_N = chosen_N - jax.nn.logsumexp(scaled_NV, axis=-1)
  return tokens_N.astype(jnp.int32), jnp.where(greedy, 0.0, logprobs_N)
