"""Names and ids of generated worlds: one inventory of syllables, disjoint whole names per split.

A model can spell a held-out name from pieces that it knows, but has never seen that name or id.
"""

import functools
import random
import zlib

from steptool_jax.environments.base import Split

_SYLLABLES = "ba be do du fa fi go ka ki lo lu ma mi na ne pa po ra ri sa so ta ti vo"
SYLLABLES = tuple(_SYLLABLES.split())
# Share of all whole names and ids that only held-out tasks use.
_HELDOUT_SHARE = 0.3


def _is_heldout(text: str) -> bool:
  # crc32, because hash() differs from process to process.
  return zlib.crc32(text.encode()) % 1000 < _HELDOUT_SHARE * 1000


def belongs(text: str, split: Split) -> bool:
  return _is_heldout(text) == (split == "heldout")


@functools.cache
def words(split: Split) -> tuple[str, ...]:
  """All words of two syllables of this split, e.g. "karo"."""
  every = (a + b for a in SYLLABLES for b in SYLLABLES if a != b)
  return tuple(word for word in every if belongs(word, split))


@functools.cache
def ids(prefix: str, split: Split) -> tuple[str, ...]:
  """All ids of this split: the prefix letter and a number from 10 to 199, e.g. "c41"."""
  return tuple(i for i in (f"{prefix}{n}" for n in range(10, 200)) if belongs(i, split))


def full_names(rng: random.Random, split: Split, count: int, tail: str = "") -> list[str]:
  """`count` distinct names of two words, e.g. "karo mine"; `tail` fixes the second word.

  First words are split-disjoint when the tail is fixed, whole names in any case.
  """
  if tail:
    return [f"{word} {tail}" for word in rng.sample(words(split), count)]
  out: dict[str, None] = {}
  while len(out) < count:
    a, b, c, d = rng.choices(SYLLABLES, k=4)
    name = f"{a}{b} {c}{d}"
    if a != b and c != d and belongs(name, split):
      out[name] = None
  return list(out)
