"""Several processes that do one rollout in lockstep, as the host side sees them.

Every process holds all conversations and makes the same engine calls; the tools, sessions and
checkers of a slot are its owner's alone. What only the owner can know, it tells the others between
two engine calls; so all take the same next step, and an error of one is an error of all.
"""

from collections.abc import Callable
from typing import Any, Protocol

from steptool_jax.simulators.errors import InfrastructureError


class Peers(Protocol):
  """The processes of a run; `index` is this one's."""

  index: int
  count: int

  def gather(self, document: Any) -> list[Any]:
    """JSON data of every process, in their order; all must call it, and wait for each other."""
    ...


class Alone:
  """One process."""

  index, count = 0, 1

  def gather(self, document: Any) -> list[Any]:
    return [document]


ALONE = Alone()


def together(peers: Peers, work: Callable[[], Any]) -> list[Any]:
  """What `work`, different in each process, returns in all of them (JSON data).

  Where it raises in one process, all raise: that one its own error, the others one that names it.
  """
  if peers.count == 1:
    return [work()]
  error, mine = None, {}
  try:
    mine["value"] = work()
  except Exception as caught:
    error = caught
    mine = {"error": f"{type(error).__name__}: {error}"}
    mine["infrastructure"] = isinstance(error, InfrastructureError)
  found = peers.gather(mine)
  if error is not None:
    raise error
  for index, theirs in enumerate(found):
    if "error" in theirs:
      kind = InfrastructureError if theirs["infrastructure"] else RuntimeError
      raise kind(f"process {index}: {theirs['error']}")
  return [theirs["value"] for theirs in found]
