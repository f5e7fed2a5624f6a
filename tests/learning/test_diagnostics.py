"""What every row of the table writes into metrics.jsonl; traced only, nothing is compiled."""

import functools

import fakes
import jax
import numpy as np
import pytest

from steptool_jax import config as config_lib
from steptool_jax import validation
from steptool_jax.evaluation import figures, metrics
from steptool_jax.learning import algorithms, batching
from steptool_jax.learning.programs import learners, preparation, update
from steptool_jax.policy import model
from steptool_jax.rewards import orchestra
from steptool_jax.rollout.setting import Stats
from steptool_jax.run.training import progress, setup

ROWS = sorted(algorithms.ALGORITHMS)


@functools.cache
def written(name):
  """Names of the figures of prepare and update."""
  config = config_lib.base_config()
  config.algorithm, config.sft.steps = name, 1
  learner = setup.build_learner(validation.validate(config), fakes.tiny_config(), name)
  rng = np.random.default_rng(0)
  packed = batching.pack([fakes.random_trajectory(rng) for _ in range(4)], 128)
  batch = jax.tree.map(lambda x: x[None], fakes.padded(packed, 2))
  table = None
  if learner.fits is not None:
    table = jax.tree.map(lambda x: x[None], fakes.padded_table(packed, 2))

  def run(batch):
    params = model.init_params(fakes.tiny_config(), jax.random.key(0))
    state = learners.init_state(learner, {"params": params}, {})
    found = {}
    if learner.algorithm.rewards != "none":
      batch, found = preparation.prepare(learner, state, batch, 1, table)
    return found | update.update(learner, state, batch, 1)[1]

  return set(jax.eval_shape(run, batch))


@pytest.mark.parametrize("name", ROWS)
def test_every_algorithm_writes_its_diagnostics(name):
  row, found = algorithms.ALGORITHMS[name], written(name)
  assert {"entropy", "grad_norm", "skipped"} <= found
  if row.rewards != "none":
    assert {"kl", "sampler_gap", "sampler_gap_mean"} <= found
  if row.advantage is not None:
    assert {"advantage_std", "clip_fraction", "old_kl", "policy_loss"} <= found
  if "value_loss" in found or "q_loss" in found:
    assert "explained_variance" in found


def test_the_table_of_figures_has_them_all():
  """A figure without a row has no unit and no definition that a reader could find."""
  others = metrics.rollout_metrics([]) | progress.shares(Stats(seconds=1.0), 0.5, 2.0, 10)
  others |= orchestra.keep([], orchestra.Filters())[1] | progress.Progress().spent()
  assert not set.union(set(others), *map(written, ROWS)) - set(figures.FIGURES)
