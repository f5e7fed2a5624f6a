"""What a compiled program does, counted from its HLO: FLOPs, HBM bytes, collective bytes, seconds.

XLA's own cost analysis counts a loop body once and does not see into kernels. Here a body counts as
often as it runs, a branch as its dearest one, and kernels have prices of their own. What stays in a
chip's scratch memory (memory spaces above 0) is no HBM traffic.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from steptool_jax.policy import experts, splash
from steptool_jax.policy.kernels import cached, writing
from steptool_jax.run.cost import hlo
from steptool_jax.run.cost.chips import Chip
from steptool_jax.run.cost.hlo import Instruction

COLLECTIVE = re.compile(
  "(all-gather|all-reduce|reduce-scatter|(ragged-)?all-to-all|collective-permute)(-start)?"
)
SLICES = ("dynamic-slice", "slice", "gather")
NO_CYCLES = 2**63 - 1  # what the compiler writes where it has no estimate
FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")


@dataclasses.dataclass
class Counts:
  """Per chip and run of the program."""

  flops: float = 0.0
  hbm_bytes: float = 0.0
  cycles: float = 0.0  # the compiler's own estimate, summed over fusions; 0 where it gives none
  kernel_flops: float = 0.0
  kernel_bytes: float = 0.0
  # Operations one after the other, each at its own price, and collectives that nothing overlaps.
  seconds: float = 0.0
  background: float = 0.0  # seconds of collectives beside which other operations run
  collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def add(self, other: "Counts", times: float) -> None:
    for field in dataclasses.fields(self):
      if field.name != "collectives":
        more = getattr(self, field.name) + times * getattr(other, field.name)
        setattr(self, field.name, more)
    for kind, amount in other.collectives.items():
      self.collectives[kind] += times * amount


def count(
  text: str,
  chip: Chip,
  dynamic_trips: Sequence[int] = (),
  scoped_trips: Mapping[str, int] | None = None,
) -> Counts:
  """Counts of a program's HLO text.

  Args:
    text: compiled.as_text().
    chip: whose rates the seconds are at.
    dynamic_trips: how often loops run whose bound is an argument, by their depth among such loops.
    scoped_trips: the same of loops in a jax.named_scope, by its name; these have no depth.

  Raises:
    ValueError: a loop bound is neither in the program nor in dynamic_trips.
  """
  return _Counter(hlo.parse(text), chip, dynamic_trips, scoped_trips or {}).total()


class _Counter:
  def __init__(self, module, chip, dynamic_trips, scoped_trips):
    self.computations, self.entry = module
    self.chip = chip
    self.trips, self.scoped = tuple(dynamic_trips), scoped_trips
    self.named = {name: _by_name(body) for name, body in self.computations.items()}
    self.inlined: dict[str, dict[str, Instruction]] = {}

  def total(self) -> Counts:
    return self._sequence(self.entry, 0, frozenset())

  def _sequence(self, name: str, depth: int, begun: AbstractSet[str]) -> Counts:
    """A computation whose instructions run one after the other.

    begun: channels of collectives that run on in the background when it begins.
    """
    counts, seen = Counts(), set(begun)
    for ins in self.computations[name]:
      if ins.opcode == "while":
        trips = self._trip_count(ins, name)
        if trips is None:
          trips = next(
            (n for scope, n in self.scoped.items() if f"/{scope}/" in ins.attributes), None
          )
        if trips is None:
          if depth >= len(self.trips):
            raise ValueError(f"HLO: loop {ins.name} has no known bound at depth {depth}")
          body = self._sequence(ins.attribute("body"), depth + 1, seen)
          counts.add(body, self.trips[depth])
        else:
          counts.add(self._sequence(ins.attribute("body"), depth, seen), trips)
      elif ins.opcode == "conditional":
        branches = [self._sequence(branch, depth, seen) for branch in hlo.branches(ins)]
        counts.add(max(branches, key=lambda c: (c.seconds, c.flops, c.hbm_bytes)), 1)
      elif ins.opcode == "call":
        counts.add(self._sequence(ins.attribute("to_apply"), depth, seen), 1)
      else:
        self._single(ins, name, counts, seen)
    return counts

  def _single(self, ins: Instruction, home: str, counts: Counts, seen: set) -> None:
    called = ins.attribute("calls")
    inner = self._inlined(called) if called else {}
    if ins.attribute("custom_call_target") == '"tpu_custom_call"':
      self._kernel(ins, home, counts)
      return
    flops, moved = 0.0, self._traffic(ins, home, inner, seen)
    for each in (ins, *inner.values()):
      named, where = (self.named[home], home) if each is ins else (inner, each.home or called)
      flops += _flops(each, named)
      self._collective(each, named, where, ins, counts, seen)
    found = re.search(r'"estimated_cycles":"(\d+)"', ins.attributes)
    cycles = int(found[1]) % NO_CYCLES if found else 0
    counts.flops += flops
    counts.hbm_bytes += moved
    counts.cycles += cycles
    counts.seconds += self.chip.operation(flops, moved, cycles)

  def _kernel(self, ins: Instruction, home: str, counts: Counts) -> None:
    """A Pallas kernel, which XLA does not see into."""
    reads = [a for x in ins.operands for a in self.named[home][x].arrays]
    numbers = [a for a in reads if a.dtype[0] in "bf"]
    floats = [a for a in numbers if len(a.dims) > 2]
    steps, flops = 0.0, experts.kernel_flops(ins.name, [a.dims for a in numbers])
    if floats and not flops:
      flops = splash.kernel_flops(ins.name, floats[0].dims)
    moved = _hbm(ins.arrays) + _hbm(reads)
    if ins.name.startswith((cached.DECODE, cached.ATTEND, writing.WRITE)):
      whole = [a for a in reads if len(a.dims) > 2]  # int8 among them
      sizes = tuple(a.bytes / math.prod(a.dims) for a in whole)
      flops, moved, steps = cached.cost(ins.name, tuple(a.dims for a in whole), sizes)
    counts.kernel_flops += flops
    counts.kernel_bytes += moved
    counts.seconds += self.chip.kernel(flops, moved, steps)

  def _collective(
    self,
    ins: Instruction,
    named: dict[str, Instruction],
    home: str,
    outside: Instruction,
    counts: Counts,
    seen: set,
  ) -> None:
    """Counts one that begins here; `outside`: the instruction, or the fusion that it is in."""
    found = COLLECTIVE.fullmatch(ins.opcode)
    if not found or _began_earlier(ins, seen):
      return
    kind = found[1]
    seen.add(ins.attribute("channel_id"))
    size = hlo.group_size(ins)
    moved = sum(a.bytes for x in ins.operands for a in named[x].arrays)
    scattered = home.startswith("all-reduce-scatter")
    if kind == "all-gather":
      moved *= size - 1
    elif kind != "collective-permute":
      if scattered:
        kind = "reduce-scatter"
      moved *= (2 if kind == "all-reduce" else 1) * (size - 1) / size
    counts.collectives[kind] += moved
    seconds = self.chip.collective(moved, size, kind == "all-reduce")
    # Alone, or as a fusion of nothing else, everything waits for it; else it runs beside a product.
    alone = ins is outside or (home == outside.attribute("calls") and scattered)
    if alone and not ins.opcode.endswith("-start"):
      counts.seconds += seconds
    else:
      counts.background += seconds

  def _inlined(self, name: str) -> dict[str, Instruction]:
    """A fused computation with the fusions in it written out, prefixed with their fusion's name."""
    if name not in self.inlined:
      body: list[Instruction] = []
      for ins in self.computations[name]:
        called = ins.attribute("calls")
        body += self._written_out(ins, called) if called else [ins]
      self.inlined[name] = _by_name(body)
    return self.inlined[name]

  def _written_out(self, fusion: Instruction, called: str) -> list[Instruction]:
    names, kept = {}, []
    for i in self._inlined(called).values():
      if i.opcode == "parameter":
        names[i.name] = fusion.operands[int(i.attributes)]
      else:
        names[i.name] = fusion.name if i.root else f"{fusion.name}/{i.name}"
        kept.append(i)
    return [
      dataclasses.replace(
        i,
        name=names[i.name],
        operands=tuple(names[x] for x in i.operands),
        root=i.root and fusion.root,
        home=i.home or called,
      )
      for i in kept
    ]

  # --- HBM traffic ---

  def _traffic(
    self, ins: Instruction, home: str, inner: dict[str, Instruction], seen: AbstractSet[str]
  ) -> float:
    target = (ins.attribute("custom_call_target") or "").strip('"')
    if hlo.FREE.fullmatch(ins.opcode) or target in FREE_TARGETS:
      return 0.0
    operands = [self.named[home][x] for x in ins.operands if x in self.named[home]]
    if ins.opcode.endswith("-start"):  # (operands, results, contexts) in one tuple
      return _hbm(ins.arrays)
    if ins.opcode == "fusion":
      return self._fusion_traffic(ins, operands, inner, seen)
    if ins.opcode in SLICES:
      return 2 * _hbm(ins.arrays)
    if ins.opcode == "dynamic-update-slice":
      return 2 * _hbm(operands[1].arrays)
    return _hbm(ins.arrays) + sum(_hbm(x.arrays) for x in operands)

  def _fusion_traffic(self, ins, operands, named, seen) -> float:
    """Parameters that are only sliced count as their slices; what is updated in place, as the
    update; what is passed through, or moved by a collective that was counted before, not at all."""
    total, updated = 0.0, set()
    root = _root(named)
    producers = [named[x] for x in root.operands] if root.opcode == "tuple" else [root]
    for array, producer in zip(ins.arrays, producers, strict=False):
      source = _source_of(producer, named)
      if producer.opcode == "parameter" or _began_earlier(source, seen):
        continue
      if source.opcode == "dynamic-update-slice":
        total += 2 * sum(a.bytes for a in named[source.operands[1]].arrays if array.space == 0)
        updated.add(_source_of(named[source.operands[0]], named).name)
      else:
        total += _hbm([array])
    for parameter in (i for i in named.values() if i.opcode == "parameter"):
      number = int(parameter.attributes)
      if number >= len(operands) or parameter.name in updated:
        continue
      outside = operands[number].arrays
      users = [i for i in named.values() if parameter.name in i.operands and i.opcode != "tuple"]
      if all(_began_earlier(i, seen) for i in users):
        continue
      if all(i.opcode in SLICES and i.operands[0] == parameter.name for i in users):
        total += sum(a.bytes for i in users for a in i.arrays if outside[0].space == 0)
      else:
        total += _hbm(outside)
    return total

  # --- loops ---

  def _trip_count(self, ins: Instruction, home: str) -> int | None:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', ins.attributes)
    if known:
      return int(known[1])
    condition = self.named[ins.attribute("condition")]
    test = _root(condition)
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
      return None
    counter, bound = (condition[x] for x in test.operands)
    if counter.opcode != "get-tuple-element" or bound.opcode != "constant":
      return None
    index, start = int(counter.attribute("index")), 0
    arguments = self.named[home][ins.operands[0]]
    if arguments.opcode == "tuple":
      first = _source_of(self.named[home][arguments.operands[index]], self.named[home])
      start = int(first.attributes) if first.opcode == "constant" else 0
    return -(-(int(bound.attributes) - start) // self._step(ins, index))

  def _step(self, ins: Instruction, index: int) -> int:
    """How far a loop's counter goes in one turn; 1 where that is not a plain sum."""
    body = self.named[ins.attribute("body")]
    value, step = body[_root(body).operands[index]], 0
    while value.opcode in ("add", "copy"):
      constants = [body[x] for x in value.operands if body[x].opcode == "constant"]
      others = [body[x] for x in value.operands if body[x].opcode != "constant"]
      if len(others) != 1:
        return max(step, 1)
      step += sum(int(c.attributes) for c in constants)
      value = others[0]
    return max(step, 1)


def _by_name(body: Sequence[Instruction]) -> dict[str, Instruction]:
  return {i.name: i for i in body}


def _root(named: dict[str, Instruction]) -> Instruction:
  return next(i for i in named.values() if i.root)


def _hbm(arrays: Sequence[hlo.Array]) -> float:
  return sum(a.bytes for a in arrays if a.space == 0)


def _flops(ins: Instruction, named: dict[str, Instruction]) -> float:
  if ins.opcode == "dot":
    left = named[ins.operands[0]].arrays[0].dims
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", ins.attributes)[1]
    size = math.prod(left[int(d)] for d in contracted.split(",") if d)
    return 2.0 * math.prod(ins.arrays[0].dims) * size
  if ins.opcode == "convolution":
    left, right = (named[x].arrays[0].dims for x in ins.operands[:2])
    return convolution_flops(left, right, ins.arrays[0].dims, ins.attributes)
  return 0.0


def _began_earlier(ins: Instruction, seen: AbstractSet[str]) -> bool:
  """Whether this is a part of a collective that began earlier.

  A fused asynchronous collective is written once in each fusion that it overlaps with.
  """
  channel = ins.attribute("channel_id")
  return channel is not None and channel in seen and bool(COLLECTIVE.fullmatch(ins.opcode))


def _source_of(ins: Instruction, named: dict) -> Instruction:
  while ins.opcode in ("bitcast", "copy", "convert", "reshape") and ins.operands[0] in named:
    ins = named[ins.operands[0]]
  return ins


def convolution_flops(
  left: Sequence[int], right: Sequence[int], out: Sequence[int], attributes: str
) -> float:
  """Multiply-adds of a convolution, twice; products with padding are not counted.

  A TPU runs its matrix products as convolutions and hides batch dimensions in the window.
  """
  labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", attributes)
  left_at, right_at, out_at = labels[1], labels[2], labels[3]
  groups = int((re.search(r"feature_group_count=(\d+)", attributes) or [0, 1])[1])
  batches = int((re.search(r"batch_group_count=(\d+)", attributes) or [0, 1])[1])
  window = (re.search(r"window=\{([^}]*)\}", attributes) or [0, ""])[1]
  fields = dict(pair.split("=") for pair in window.split())
  spatial = sorted(c for c in out_at if c.isdigit())

  def numbers(name, default):
    values = fields[name].split("x") if name in fields else [default] * len(spatial)
    return [tuple(int(x) for x in str(v).split("_")) for v in values]

  total = 2.0 * left[left_at.index("b")] // batches
  total *= left[left_at.index("f")] // groups * out[out_at.index("f")]
  parts = zip(
    spatial,
    numbers("stride", 1),
    numbers("pad", "0_0"),
    numbers("lhs_dilate", 1),
    numbers("rhs_dilate", 1),
    strict=True,
  )
  for label, (stride,), (low, *_), (spread,), (gap,) in parts:
    size = left[left_at.index(label)]
    positions = [
      o * stride - low + w * gap
      for o in range(out[out_at.index(label)])
      for w in range(right[right_at.index(label)])
    ]
    total *= sum(0 <= p <= (size - 1) * spread and p % spread == 0 for p in positions)
  return total
