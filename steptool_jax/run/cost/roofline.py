"""Datasheet rates of TPU chips, and what a program's counts cost at these rates."""

import dataclasses

from steptool_jax.run.cost.hlo_counts import Counts

# A collective is taken to run as one ring, in both directions: no credit for further torus axes,
# and none for running at the same time as anything longer.
RING_LINKS = 2
# The share of the matrix unit's peak that attention kernels reach: exp and masks take their time.
KERNEL_EFFICIENCY = 0.5


@dataclasses.dataclass(frozen=True)
class Chip:
  """Datasheet figures of one device: a chip, or half of one where a chip is two devices.

  flops: bfloat16 FLOP/s. hbm: GiB. usable: the share of it that programs get (libtpu keeps the
  rest, as seen on v5e). bandwidth: HBM bytes/s. link: bytes/s of one interconnect link, one way.
  clock: Hz; 0 = not published, and then no schedule term.
  """

  flops: float
  hbm: float
  bandwidth: float
  link: float
  clock: float
  usable: float = 15.75 / 16


CHIPS = {
  "v4": Chip(275e12, 32, 1228e9, 50e9, 1.05e9),
  "v5e": Chip(197e12, 16, 819e9, 50e9, 1.5e9),
  "v5p": Chip(459e12, 95, 2765e9, 100e9, 1.75e9),
  "v6e": Chip(918e12, 32, 1640e9, 100e9, 0),
  "tpu7x": Chip(1153.5e12, 96, 3690e9, 100e9, 0),  # two devices a chip
}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of one run of a program on one chip, by term.

  matrix: products, at the peak rate. hbm: bytes over its bandwidth. interconnect: collective bytes.
  schedule: the compiler's own cycles, operations one after the other, kernels added.
  """

  matrix: float
  hbm: float
  interconnect: float
  schedule: float

  @property
  def seconds(self) -> float:
    """The longest term: all others run meanwhile."""
    return max(dataclasses.astuple(self))

  @property
  def binding(self) -> str:
    terms = dataclasses.asdict(self)
    return max(terms, key=terms.__getitem__)


def estimate(counts: Counts, kernel_flops: float, chip: Chip) -> Estimate:
  """Roofline terms; `kernel_flops` are those of kernels, which `counts` does not see."""
  kernels = kernel_flops / (KERNEL_EFFICIENCY * chip.flops)
  return Estimate(
    matrix=counts.flops / chip.flops + kernels,
    hbm=counts.hbm_bytes / chip.bandwidth,
    interconnect=sum(counts.collectives.values()) / (RING_LINKS * chip.link),
    schedule=counts.cycles / chip.clock + kernels if chip.clock else 0.0,
  )
