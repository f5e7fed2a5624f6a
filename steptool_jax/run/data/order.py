"""The order in which data are used: a seeded permutation for each pass, without end."""

import collections
import functools
from collections.abc import Sequence

import numpy as np

from steptool_jax.config import Config
from steptool_jax.types import Task


@functools.lru_cache(maxsize=4)
def permutation(size: int, seed: int, number: int) -> np.ndarray:
  """Order of pass `number` over `size` things, int64 [size]."""
  return np.random.default_rng((seed, number)).permutation(size)


class Order:
  """order[i] = the thing at position i of all passes, one after the other."""

  def __init__(self, size: int, seed: int):
    self._size, self._seed = size, seed

  def __getitem__(self, position: int) -> int:
    number, place = divmod(position, self._size)
    return int(permutation(self._size, self._seed, number)[place])


def jobs(
  config: Config,
  tasks: Sequence[Task],
  start: int,
  count: int,
  seen: collections.Counter[int],
) -> list[tuple[Task, int]]:
  """(task, number of the sample) of `count` places of the order: a permutation per pass.

  seen: how often the iteration has drawn each task so far, which is counted on. A task that ends
  one pass and begins the next gets further sample numbers, and with them other keys. ValueError
  when there is no task.
  """
  if not tasks:
    raise ValueError("environment: there are no training tasks; RL needs at least one")
  samples, order = config.rollout.samples, Order(len(tasks), config.seed)
  out = []
  for position in range(start, start + count):
    index = order[position]
    out += [(tasks[index], samples * seen[index] + k) for k in range(samples)]
    seen[index] += 1
  return out
