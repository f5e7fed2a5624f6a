"""Rates of the optimizers over a run."""

import numpy as np
import pytest

from steptool_jax.config import Optimizer
from steptool_jax.run import learners


@pytest.mark.parametrize(
  ("schedule", "at_6"),
  [("constant", 2.0), ("linear", 1.2), ("cosine", 1.2)],  # half way from 2 down to 0.2 * 2
)
def test_a_rate_warms_up_and_falls_to_its_floor(schedule, at_6):
  optimizer = Optimizer(learning_rate=2.0, schedule=schedule, floor=0.2, warmup=0.2)
  rates = learners._schedule(optimizer, optimizer.learning_rate, total_steps=10)
  np.testing.assert_allclose([rates(0), rates(1), rates(2)], [1.0, 2.0, 2.0], rtol=1e-6)
  np.testing.assert_allclose(rates(6), at_6, rtol=1e-6)
  end = 2.0 if schedule == "constant" else 0.4
  np.testing.assert_allclose([rates(10), rates(12)], [end, end], rtol=1e-6)
