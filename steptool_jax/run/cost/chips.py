"""Datasheet rates of TPU chips, and what an operation, a kernel or a collective costs at them."""

import dataclasses

# A collective is taken to run as one ring, in both directions: no credit for further torus axes.
RING_LINKS = 2
HOP_SECONDS = 1e-6  # from a chip to the next, whatever the size (Google's scaling book)
# The share of the matrix unit's peak that attention kernels reach: exp and masks take their time.
KERNEL_EFFICIENCY = 0.5


@dataclasses.dataclass(frozen=True)
class Chip:
  """Datasheet figures of one device: a chip, or half of one where a chip is two devices.

  flops: bfloat16 FLOP/s. hbm: GiB. usable: the share of it that programs get (libtpu keeps the
  rest, as seen on v5e). bandwidth: HBM bytes/s. link: bytes/s of one interconnect link, one way.
  clock: Hz; 0 = not published, and then the compiler's cycles count nothing.
  """

  flops: float
  hbm: float
  bandwidth: float
  link: float
  clock: float
  usable: float = 15.75 / 16

  def operation(self, flops: float, hbm_bytes: float, cycles: float) -> float:
    """Seconds of one operation: the longest of products, bytes and the compiler's cycles."""
    ran = cycles / self.clock if self.clock else 0.0
    return max(flops / self.flops, hbm_bytes / self.bandwidth, ran)

  def collective(self, moved: float, group: int, twice: bool) -> float:
    """Seconds of a collective that moves so many bytes a chip; twice: as an all-reduce does."""
    hops = group / 2 * (2 if twice else 1)
    return max(moved / (RING_LINKS * self.link), hops * HOP_SECONDS if group > 1 else 0.0)

  def kernel(self, flops: float, hbm_bytes: float, steps: float) -> float:
    """Seconds of a kernel; steps: seconds that its grid takes beside."""
    return max(flops / (KERNEL_EFFICIENCY * self.flops), hbm_bytes / self.bandwidth, steps)


CHIPS = {
  "v4": Chip(275e12, 32, 1228e9, 50e9, 1.05e9),
  "v5e": Chip(197e12, 16, 819e9, 50e9, 1.5e9),
  "v5p": Chip(459e12, 95, 2765e9, 100e9, 1.75e9),
  "v6e": Chip(918e12, 32, 1640e9, 100e9, 0),
  "tpu7x": Chip(1153.5e12, 96, 3690e9, 100e9, 0),  # two devices a chip
}
