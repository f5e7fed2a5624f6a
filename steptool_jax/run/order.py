"""In which order data are used: a seeded permutation for each pass, without end."""

import functools

import numpy as np


@functools.lru_cache(maxsize=4)
def permutation(size: int, seed: int, number: int) -> np.ndarray:
  """Order of pass `number` over `size` things, int64 [size]."""
  return np.random.default_rng((seed, number)).permutation(size)


class Order:
  """order[i] = the thing at position i of all passes, one behind the other."""

  def __init__(self, size: int, seed: int):
    self._size, self._seed = size, seed

  def __getitem__(self, position: int) -> int:
    number, place = divmod(position, self._size)
    return int(permutation(self._size, self._seed, number)[place])
