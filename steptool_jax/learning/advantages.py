"""Generalised advantage estimation over sampled tokens, and whitening over the global batch.

One kernel for all levels (StepTool, arXiv 2410.07745, section 3; Schulman et al. 2016, eq. 16):

    delta_t = r_t + g_t V_t' - V_t          A_t = delta_t + g_t lambda_t A_t'

t' is the next sampled token: observation tokens are skipped and cost no discount.
  step      g = lambda = 1 inside a step, gamma and lambda at a step's last token. At a step's first
            token this telescopes to GAE over steps (G_t^n and A(s_t, a_t) of the paper).
  token     constant gamma and lambda.
  released  what the authors' code computes, for comparison: values are zero on observations, decay
            goes through every position, and r_k is weighted with (number of steps - k - 1).
A trajectory in several segments is one all the same at levels step and token: t' is then the first
sampled token of the next segment. (The positions of level released are those of one segment.)
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

from steptool_jax.learning import segments
from steptool_jax.types import TokenBatch

Level = Literal["step", "token", "released"]
LEVELS = ("step", "token", "released")


def gae(
  batch: TokenBatch,
  rewards_BT: jax.Array,
  values_BT: jax.Array,
  *,
  gamma: float,
  lam: float,
  level: Level = "step",
  broadcast: bool = True,
  step_episodes: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Advantages and returns, float32 [B, T], 0 outside the action mask.

  Args:
    batch: masks and ids; its own values are not read, its rewards at level released only.
    rewards_BT: float32, on sampled tokens (step rewards, KL penalty included if it is a reward).
    values_BT: float32, V of the state that emits targets[t].
    gamma: discount per step (level step) or per token.
    lam: GAE's lambda.
    level: see the module's text.
    broadcast: level step only: one advantage a step, that of its first token, for all its tokens
      (the paper); False gives each token its own baseline inside the step.
    step_episodes: cut the trajectory at step ends, so that each step is an episode of its own (the
      paper's ablation without step-grained optimisation).

  A trajectory with a `bootstrap` position is worth V of it after its end (batching.pack sets one
  for the statuses of config.advantage.bootstrap), any other one 0.
  """
  chex.assert_rank([rewards_BT, values_BT, batch.action_mask], 2)
  chex.assert_equal_shape([rewards_BT, values_BT, batch.action_mask])
  chex.assert_type([rewards_BT, values_BT], jnp.float32)
  action_BT = batch.action_mask.astype(jnp.float32)
  if level == "released":
    advantages_BT = _released_gae(batch, rewards_BT, values_BT * action_BT, gamma, lam)
  else:
    advantages_BT = _gae(batch, rewards_BT, values_BT, gamma, lam, level, step_episodes)
  returns_BT = action_BT * (advantages_BT + values_BT)
  if level == "step" and broadcast:
    start_BT = segments.step_starts(batch)
    advantages_BT = segments.spread(advantages_BT, start_BT, batch.action_mask)
  return action_BT * advantages_BT, returns_BT


def _gae(batch, rewards_BT, values_BT, gamma, lam, level, step_episodes):
  action_BT = batch.action_mask.astype(jnp.float32)
  end_BT = batch.step_end.astype(jnp.float32)
  if level == "step":
    discount_BT = 1.0 + (gamma - 1.0) * end_BT
    trace_BT = 1.0 + (lam - 1.0) * end_BT
  else:
    discount_BT = jnp.full_like(values_BT, gamma)
    trace_BT = jnp.full_like(values_BT, lam)
  if step_episodes:
    discount_BT = discount_BT * (1.0 - end_BT)
  next_values_BT = segments.next_marked(batch, values_BT, batch.action_mask | batch.bootstrap)
  delta_BT = rewards_BT + discount_BT * next_values_BT - values_BT
  # A bootstrap position ends the recurrence: its value already stands for all that follows.
  pass_BT = jnp.where(batch.bootstrap, 0.0, 1.0)
  decay_BT = jnp.where(batch.action_mask, discount_BT * trace_BT, pass_BT)
  return segments.along(batch, decay_BT, action_BT * delta_BT, reverse=True)


def _released_gae(batch, rewards_BT, values_BT, gamma, lam):
  continues_BT = segments.continues(batch.segment_ids)
  ones_BT = jnp.ones_like(values_BT)
  later_BT = segments.next_marked(batch, ones_BT, batch.action_mask)
  last_BT = batch.action_mask & (later_BT == 0.0)
  ids_BT = batch.step_ids.astype(jnp.float32)
  last_ids_BT = segments.linear_recurrence(
    jnp.where(last_BT, 0.0, continues_BT), jnp.where(last_BT, ids_BT, 0.0), reverse=True
  )
  # The weight is on the steps' rewards alone: a KL penalty in rewards_BT keeps its size.
  weight_BT = jnp.where(batch.step_end, last_ids_BT - ids_BT, 1.0)
  rewards_BT = rewards_BT + (weight_BT - 1.0) * batch.rewards
  next_values_BT = continues_BT * segments.shift_left(values_BT, 0.0)
  delta_BT = rewards_BT + gamma * next_values_BT - values_BT
  return segments.linear_recurrence(gamma * lam * continues_BT, delta_BT, reverse=True)


def whiten(x_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
  """(x - mean) / std under the weights, 0 where there is none; call it on the global batch, never
  on a minibatch.

  The weights are those of the loss (losses.action_weights), so that what it sums up has mean 0.
  Under jit the sums run over the global array, so all hosts see one mean and one deviation.
  """
  chex.assert_rank([x_BT, weights_BT], 2)
  chex.assert_type([x_BT, weights_BT], jnp.float32)
  total = weights_BT.sum()
  total = jnp.where(total > 0, total, 1.0)
  mean = (x_BT * weights_BT).sum() / total
  variance = (jnp.square(x_BT - mean) * weights_BT).sum() / total
  return jnp.where(weights_BT > 0, (x_BT - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)
