"""What a program costs on a chip: by whole terms, and operation by operation."""

import dataclasses

from steptool_jax.run.cost.chips import KERNEL_EFFICIENCY, RING_LINKS, Chip
from steptool_jax.run.cost.hlo_counts import Counts


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of one run of a program on one chip.

  matrix: products, at the peak rate. hbm: bytes over its bandwidth. interconnect: collective bytes.
  schedule: the compiler's own cycles, operations one after the other, kernels added. These four are
  bounds, each as if the others took no time. operations: each operation as long as its products,
  bytes or cycles ask, kernels by their own prices, collectives that nothing runs beside added;
  collectives in the background where they take longer than all of it.
  """

  matrix: float
  hbm: float
  interconnect: float
  schedule: float
  operations: float

  @property
  def seconds(self) -> float:
    """The estimate."""
    return self.operations

  @property
  def binding(self) -> str:
    """The longest of the bounds."""
    terms = dataclasses.asdict(self)
    del terms["operations"]
    return max(terms, key=terms.__getitem__)

  @property
  def longest_term(self) -> float:
    """The estimate of before: the longest bound."""
    return dataclasses.asdict(self)[self.binding]


def estimate(counts: Counts, chip: Chip) -> Estimate:
  """The estimate of a program by its counts on this chip."""
  kernels = counts.kernel_flops / (KERNEL_EFFICIENCY * chip.flops)
  return Estimate(
    matrix=counts.flops / chip.flops + kernels,
    hbm=(counts.hbm_bytes + counts.kernel_bytes) / chip.bandwidth,
    interconnect=sum(counts.collectives.values()) / (RING_LINKS * chip.link),
    schedule=counts.cycles / chip.clock + kernels if chip.clock else 0.0,
    operations=max(counts.seconds, counts.background),
  )
