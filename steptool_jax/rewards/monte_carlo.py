"""Con from the values of states (Math-Shepherd, Wang et al. 2024, arXiv 2312.08935). Host side.

V_k is the mean outcome of conversations that go on from the state after step k, V_0 that of those
from the prompt alone; the value after the last step is its outcome. value: Con_k = V_k. gain:
Con_k = max(0, V_k - V_{k-1}), so a step from a hopeless state to a hopeful one counts and one that
keeps what there was does not.
"""

import dataclasses
from collections.abc import Sequence

from steptool_jax.types import Trajectory


def contributions(trajectory: Trajectory, values: Sequence[float], gain: bool) -> Trajectory:
  """The same trajectory with Con of every step; values: V_0 … V_{S-1}, one in front of each step.

  ValueError for another number of values.
  """
  after = [*values[1:], trajectory.solved]
  pairs = zip(values, after, trajectory.steps, strict=True)
  found = [max(0.0, then - now) if gain else then for now, then, _ in pairs]
  steps = tuple(
    dataclasses.replace(step, contribution=float(con))
    for step, con in zip(trajectory.steps, found, strict=True)
  )
  return dataclasses.replace(trajectory, steps=steps)
