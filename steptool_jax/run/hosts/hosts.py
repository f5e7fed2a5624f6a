"""The processes of one run, and what they tell each other.

Every process runs the same command and takes the same path. What they exchange goes two ways:
small JSON data in lockstep through collectives of the devices (`gather`), and the word of process 0
through the key-value store of jax.distributed (`lead`), where others may wait for minutes.
joining.py starts them, agreement.py compares them, ending.py says how all of them stop.
"""

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from steptool_jax.rollout.peers import ALONE, Peers
from steptool_jax.run.hosts import hang

_SMALL = 4096  # bytes of the first exchange; longer messages take a second one
_A_DAY_MS = 86_400_000
_LOG_S = 30.0  # seconds between lines of a bar in a log file


class Joined:
  """This process (`index`) among the others; they exchange JSON data by collectives."""

  def __init__(self, index: int, count: int):
    self.index, self.count = index, count

  def gather(self, document: Any) -> list[Any]:
    data = json.dumps([self.index, document]).encode()
    longest, found = self._exchange(data, _SMALL)
    if longest > _SMALL:
      _, found = self._exchange(data, 1 << (longest - 1).bit_length())
    return [document for _, document in sorted(map(json.loads, found), key=lambda pair: pair[0])]

  def _exchange(self, data: bytes, size: int) -> tuple[int, list[bytes]]:
    """(bytes that the longest message needs, messages that fit into `size`)."""
    buffer = np.zeros(size, np.uint8)
    head = np.frombuffer(len(data).to_bytes(8, "little"), np.uint8)
    body = np.frombuffer(data, np.uint8)[: size - 8]
    buffer[:8], buffer[8 : 8 + len(body)] = head, body
    rows = multihost_utils.process_allgather(buffer)
    lengths = [int.from_bytes(row[:8].tobytes(), "little") for row in rows]
    messages = [row[8 : 8 + n].tobytes() for row, n in zip(rows, lengths, strict=True)]
    return max(lengths) + 8, messages


_peers: Peers = ALONE
_numbers = itertools.count()


def peers() -> Peers:
  """The processes of this run."""
  return _peers


def become(peers: Peers) -> None:
  """From now on the processes of this run are these."""
  global _peers
  _peers = peers


def primary() -> bool:
  """Whether this process writes what one process writes: metrics, summary, export."""
  return peers().index == 0


def gather(document: Any) -> list[Any]:
  """JSON data of every process, in their order; all call it."""
  return peers().gather(document)


def lead(work: Callable[[], Any]) -> Any:
  """What `work` returns in process 0 (JSON data), in all; the others wait for it, however long."""
  hang.rest()
  if peers().count == 1:
    return work()
  key = f"steptool_jax/lead/{next(_numbers)}"
  if not primary():
    return json.loads(store().blocking_key_value_get(key, _A_DAY_MS))
  result = work()  # an error reaches the others through the store
  store().key_value_set(key, json.dumps(result))
  return result


def bar(**arguments: Any) -> tqdm:
  """A progress bar, in process 0 alone.

  In a log file it is a line now and then and one at its end; one that a terminal would wipe away
  (leave=False) has none there if it ends within half a minute.
  """
  how: dict[str, Any] = {"mininterval": 0.5}
  if not sys.stderr.isatty():
    how = {"mininterval": _LOG_S, "bar_format": "{l_bar}{bar:20}{r_bar}\n"}
    how["delay"] = 0 if arguments.pop("leave", True) else _LOG_S
  return tqdm(disable=not primary(), **how, **arguments)


def say(text: str) -> None:
  """A line above the progress bar, from process 0 alone."""
  if primary():
    tqdm.write(text)


def store() -> Any:
  """The key-value store of jax.distributed, for which jax has no public name."""
  from jax._src import distributed

  return distributed.global_state.client
