"""In which order data are used: a seeded permutation for each pass, without end."""

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


def jobs(config: Config, tasks: Sequence[Task], done: int) -> list[tuple[Task, int]]:
  """(task, number of the sample) of RL iteration `done`: a permutation per pass over the tasks.

  A task that ends one pass and begins the next gets further sample numbers, and with them other
  keys. ValueError when there is no task.
  """
  if not tasks:
    raise ValueError("environment: there are no training tasks; RL needs at least one")
  count, samples = min(config.rollout.tasks, len(tasks)), config.rollout.samples
  order = Order(len(tasks), config.seed)
  seen: collections.Counter[int] = collections.Counter()
  out = []
  for position in range(done * count, (done + 1) * count):
    index = order[position]
    out += [(tasks[index], samples * seen[index] + k) for k in range(samples)]
    seen[index] += 1
  return out
