"""ArCHer's double critic (Zhou et al. 2024, arXiv 2402.19446): Q1, Q2 and V of whole utterances.

Linear heads on the policy's trunk, as PPO's value head: what makes the critic of 7B parameters a
matter of three vectors. Q_i(s, a) reads the state after the utterance's last token, V(s) the state
that emits its first. The targets of both come from a slow copy of the heads (Polyak averages):

    Q_i -> r + gamma V_target(s')        V -> min(Q1_target, Q2_target)(s, a), a of the policy
    A(s, a) = min(Q1, Q2)(s, a) - V(s)   one advantage for all tokens of an utterance

Q learns from past trajectories too (replay), since r and s' do not depend on who chose a. V is an
expectation over the present policy's utterances and learns from those of this iteration alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from steptool_jax.learning import advantages, losses, segments
from steptool_jax.types import TokenBatch

HEADS = ("q1", "q2", "v")
_SCALE = 0.001  # of the first weights: values near 0, and two Q that differ


class Utterances(NamedTuple):
  """float32 [B, T], each at the first token of its step; elsewhere without meaning."""

  q1: jax.Array
  q2: jax.Array
  v: jax.Array

  @property
  def q(self) -> jax.Array:
    """The smaller Q: the one that overestimates less."""
    return jnp.minimum(self.q1, self.q2)


def init_critic(size: int, key: jax.Array) -> dict[str, dict[str, jax.Array]]:
  """{q1, q2, v: {kernel [D, 1], bias [1]}} float32, for hidden states of `size` = D."""
  return {
    name: {
      "kernel": _SCALE * jax.random.normal(key, (size, 1), jnp.float32),
      "bias": jnp.zeros(1, jnp.float32),
    }
    for name, key in zip(HEADS, jax.random.split(key, len(HEADS)), strict=True)
  }


def project(critic: dict, hidden_BTD: jax.Array, batch: TokenBatch) -> Utterances:
  """Q1, Q2 and V of every step; the batch is packed with whole actions."""
  kernels_DH = jnp.concatenate([critic[name]["kernel"] for name in HEADS], axis=1)
  biases_H = jnp.concatenate([critic[name]["bias"] for name in HEADS])
  hidden_BTD = hidden_BTD.astype(jnp.float32)
  all_BTH = jnp.matmul(hidden_BTD, kernels_DH, precision="highest") + biases_H
  q1_BT, q2_BT, v_BT = jnp.moveaxis(all_BTH, -1, 0)

  def after_the_step(q_BT):
    inside_BT = (batch.step_ids >= 0) & ~batch.step_end
    at_end_BT = segments.shift_left(q_BT, 0.0)
    return segments.spread(at_end_BT, batch.step_end, inside_BT | batch.step_end, reverse=True)

  return Utterances(after_the_step(q1_BT), after_the_step(q2_BT), v_BT)


def starts(batch: TokenBatch) -> jax.Array:
  """bool [B, T], the first token of every step, replayed ones included."""
  return segments.step_starts(batch._replace(action_mask=batch.step_ids >= 0))


def targets(
  batch: TokenBatch, rewards_BT: jax.Array, target: Utterances, gamma: float
) -> tuple[jax.Array, jax.Array]:
  """What Q and V are fitted to, float32 [B, T], at the steps' first tokens."""
  everything = batch._replace(action_mask=batch.step_ids >= 0)
  # GAE over steps with lambda 0 is one step of temporal difference.
  _, returns_BT = advantages.gae(everything, rewards_BT, target.v, gamma=gamma, lam=0.0)
  return returns_BT, target.q


def utterance_advantages(batch: TokenBatch, online: Utterances) -> jax.Array:
  """min(Q1, Q2)(s, a) - V(s) on all tokens of the present policy's steps, 0 elsewhere."""
  spread_BT = segments.spread(online.q - online.v, starts(batch), batch.step_ids >= 0)
  return jnp.where(batch.action_mask, spread_BT, 0.0)


def q_loss(critic: Utterances, batch: TokenBatch) -> losses.SumAndDenominator:
  """0.5 ((Q1 - target)^2 + (Q2 - target)^2) at every step."""
  error_BT = jnp.square(critic.q1 - batch.returns) + jnp.square(critic.q2 - batch.returns)
  return losses.weighted(0.5 * error_BT, starts(batch).astype(jnp.float32))


def v_loss(critic: Utterances, batch: TokenBatch) -> losses.SumAndDenominator:
  """0.5 (V - min target Q)^2 at the present policy's steps."""
  mask_BT = (starts(batch) & batch.action_mask).astype(jnp.float32)
  return losses.weighted(0.5 * jnp.square(critic.v - batch.value_targets), mask_BT)


def polyak(target: dict, online: dict, tau: float) -> dict:
  """tau online + (1 - tau) target."""
  return jax.tree.map(lambda slow, fast: slow + tau * (fast - slow), target, online)
