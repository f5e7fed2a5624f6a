"""Critics without a gradient: V of the states of a step table, from this batch's own returns.

  group   the mean return-to-go of the task's other samples at the same step
  ridge   returns-to-go regressed on what is known in front of a step, cross-fitted over tasks

No trajectory's own return has a part in its own values, so with lambda = 1 they are baselines: they
change the variance of the policy gradient and not its mean. (Below 1 GAE also reads V of the states
that an action leads to, and what is wrong there is a bias, as with any critic.) `value`, PPO's head
on the trunk, is policy/model.py's; `double`, ArCHer's, is double_critic.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from steptool_jax.config import Config
from steptool_jax.learning.steptable import StepTable

_STEPS = 8  # steps with a number of their own, later ones share one
_INTERCEPT = 1e-3  # its penalty: as good as free
# The hidden state is D features beside a dozen: all of it weighs as much as a tenth of one. (Share
# of variance explained on the quickstart's first 14 iterations, about 370 steps each: .37 without
# it, .39 with this, .36 with 1/4, less than nothing with 9.)
_HIDDEN = 0.09
_HIGHEST = jax.lax.Precision.HIGHEST


def others_mean(table: StepTable, returns_BK: jax.Array) -> jax.Array:
  """Mean return of the task's other samples, float32 [B, K]; 0 without any."""
  begins_BK = (_fitted(table) & (table.step == 0)).astype(jnp.float32)
  # One sum over the devices for both: two that wait for no one another may wait for each other.
  size = table.task.size + 1
  keys_2BK = jnp.stack([table.task, size + table.trajectory])
  pair_BK2 = jnp.stack([begins_BK * returns_BK, begins_BK], axis=-1)
  payload = jnp.broadcast_to(pair_BK2, (2, *pair_BK2.shape)).reshape(-1, 2)
  sums = jax.ops.segment_sum(payload, keys_2BK.reshape(-1), 2 * size)
  (total_BK, own_BK), (count_BK, _) = jnp.moveaxis(sums[keys_2BK], -1, 0)
  mean_BK = (total_BK - own_BK) / jnp.maximum(count_BK - 1.0, 1.0)
  return jnp.where(count_BK > 1, mean_BK, 0.0)


def group(
  table: StepTable, returns_BK: jax.Array, hidden: None, penalty: float, folds: int
) -> jax.Array:
  """V = mean over the task's other samples of their return-to-go at the same step, float32 [B, K].

  RLOO's baseline, step by step. Where none of them got so far it is their mean return, and for a
  sample that is alone (the others broke down) 0.
  """
  del hidden, penalty, folds
  fitted_BK = _fitted(table).astype(jnp.float32)
  total_BK, count_BK = _totals(table.peers, fitted_BK, returns_BK)
  others_BK = count_BK - fitted_BK  # a state in which a trajectory was cut has no return
  same_BK = (total_BK - fitted_BK * returns_BK) / jnp.maximum(others_BK, 1.0)
  return jnp.where(others_BK > 0, same_BK, others_mean(table, returns_BK))


def ridge(
  table: StepTable, returns_BK: jax.Array, hidden_BKD: jax.Array, penalty: float, folds: int
) -> jax.Array:
  """V = x W, W = (X'X + c P)^-1 X'G over the tasks of all other folds; float32 [B, K].

  Args:
    table: the entries; a task's fold is its number modulo `folds`.
    returns_BK: float32, returns-to-go G at step starts.
    hidden_BKD: float32, the policy's hidden states at the entries.
    penalty: c; P is 1 for every feature, less for the intercept.
    folds: parts of the tasks that are predicted from the other parts.

  X'X and X'G are sums over the global batch, under jit over all devices of the mesh.
  """
  chex.assert_rank([returns_BK, hidden_BKD], [2, 3])
  chex.assert_type([returns_BK, hidden_BKD], jnp.float32)
  x_BKP, penalties_P = features(table, returns_BK, hidden_BKD)
  fitted_BK = _fitted(table).astype(jnp.float32)
  fold_BK = table.task % folds

  def moments(weights_BK):
    """(X'X + c P, X'G) of the entries with a weight."""
    weighted_BKP = x_BKP * weights_BK[..., None]
    gram_PP = jnp.einsum("bkp,bkq->pq", weighted_BKP, x_BKP, precision=_HIGHEST)
    moment_P = jnp.einsum("bkp,bk->p", weighted_BKP, returns_BK, precision=_HIGHEST)
    return gram_PP + penalty * jnp.diag(penalties_P), moment_P

  def of_fold(fold):
    gram_PP, moment_P = moments(fitted_BK * (fold_BK != fold))
    weights_P = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram_PP), moment_P)
    values_BK = jnp.einsum("bkp,p->bk", x_BKP, weights_P, precision=_HIGHEST)
    return jnp.where(fold_BK == fold, values_BK, 0.0)

  # One by one: X'X of a large model is as large as one of its kernels.
  return jax.lax.map(of_fold, jnp.arange(folds)).sum(axis=0)


def features(
  table: StepTable, returns_BK: jax.Array, hidden_BKD: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(x [B, K, P], their penalties [P]), float32: what is known in front of a step.

  An intercept; the step's number; calls that succeeded and failed so far, and whether the last one
  did; the mean return of the task's other samples (0 without any), a slope for each step; and the
  hidden state, every dimension with mean 0 and deviation 1 over the batch.
  """
  there_BK = (table.position >= 0).astype(jnp.float32)
  step_BKS = jax.nn.one_hot(jnp.minimum(table.step, _STEPS), _STEPS + 1, dtype=jnp.float32)
  calls_BK3 = jnp.stack([table.succeeded, table.failed, table.last_failed], axis=-1)
  group_BKS = step_BKS * others_mean(table, returns_BK)[..., None]
  size = hidden_BKD.shape[-1]
  weights_BK1, count = there_BK[..., None], jnp.maximum(there_BK.sum(), 1.0)
  centred_BKD = hidden_BKD - (hidden_BKD * weights_BK1).sum((0, 1)) / count
  variance_D = (jnp.square(centred_BKD) * weights_BK1).sum((0, 1)) / count
  scaled_BKD = centred_BKD * jax.lax.rsqrt(variance_D + 1e-6) * (_HIDDEN / size) ** 0.5
  few_BKP = jnp.concatenate([jnp.ones_like(step_BKS[..., :1]), step_BKS, calls_BK3, group_BKS], -1)
  x_BKP = jnp.concatenate([few_BKP, scaled_BKD], axis=-1) * weights_BK1
  penalties_P = jnp.ones(x_BKP.shape[-1], jnp.float32).at[0].set(_INTERCEPT)
  return x_BKP, penalties_P


@dataclasses.dataclass(frozen=True)
class Critic:
  """fit: V of a step table, as `ridge`; None: a head that is trained with the policy.
  hidden: whether `fit` reads hidden states."""

  fit: Callable[..., jax.Array] | None
  hidden: bool = False


CRITICS: dict[str, Critic] = {
  "value": Critic(None),
  "group": Critic(group),
  "ridge": Critic(ridge, hidden=True),
}
# What an algorithm without GAE has in its row: nothing to fit.
_NONE = Critic(None)


def get_critic(kind: str) -> Critic:
  """Row of the table; for "none" and "double" one without a fit."""
  return CRITICS.get(kind, _NONE)


def recorded(config: Config) -> Literal["", "values", "hidden"]:
  """What the engine records of each step, so that the critic needs no forward pass (types.Step).

  config: `algorithms.resolve`d; without rollout.reuse nothing is recorded.
  """
  kind = config.critic.kind
  if not config.rollout.reuse:
    return ""
  if kind == "value":
    return "values"
  return "hidden" if get_critic(kind).hidden else ""


def _fitted(table: StepTable) -> jax.Array:
  """bool [B, K], the entries that have a return-to-go."""
  return (table.position >= 0) & ~table.final


def _totals(ids_BK, weights_BK, x_BK):
  """(sum of x, sum of weights) over all entries of the same number, at each of them."""
  ids, most = ids_BK.reshape(-1), ids_BK.size + 1

  def total(y_BK):
    return jax.ops.segment_sum((weights_BK * y_BK).reshape(-1), ids, most)[ids_BK]

  return total(x_BK), total(jnp.ones_like(x_BK))
