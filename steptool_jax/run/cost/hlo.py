"""A compiled program's optimised HLO, read from its text: computations, instructions, arrays."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
BYTES |= {f"{kind}{bits}": bits // 8 for kind in "su" for bits in (8, 16, 32, 64)}
# Opcodes that move nothing: they name, pack or wait for something that is counted elsewhere.
FREE = re.compile(
  "parameter|constant|tuple|get-tuple-element|bitcast|partition-id|after-all|while|conditional|call|"
  "opt-barrier|replica-id|iota|.*-done"
)


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape; space 0 is HBM (or the host's memory), others are on the core."""

  dtype: str
  dims: tuple[int, ...]
  space: int

  @property
  def bytes(self) -> float:
    return math.prod(self.dims) * BYTES.get(self.dtype, 1)


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  root: bool
  home: str = ""  # the computation that it was written in, where it stands in another

  @functools.cached_property
  def arrays(self) -> tuple[Array, ...]:
    return tuple(_arrays(self.shape))

  def attribute(self, name: str) -> str | None:
    """The attribute's value; a computation is named as in `parse`. None where it is not there."""
    found = re.search(rf"\b{name}=%?([^,\s]+)", self.attributes)
    return found and found[1]


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """({computation: its instructions}, name of the entry computation)."""
  computations: dict[str, list[Instruction]] = {}
  entry, body = "", None
  for line in text.splitlines():
    head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if head and not line.startswith(" "):
      body = computations.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif body is not None and " = " in line:
      body.append(_instruction(line))
  return computations, entry


def _instruction(line: str) -> Instruction:
  left, right = line.strip().split(" = ", 1)
  end = _closing(right) if right.startswith("(") else right.index(" ")
  shape, rest = right[:end], right[end:].lstrip()
  opcode, rest = rest.split("(", 1)
  end = _closing("(" + rest) - 1
  operands = re.findall(r"%([\w.\-]+)", rest[: end - 1])
  name = left.removeprefix("ROOT ").removeprefix("%")
  # Constants keep their value, for loop bounds, and parameters their number.
  literal = opcode in ("constant", "parameter")
  attributes = rest[: end - 1] if literal else rest[end:]
  return Instruction(name, shape, opcode, tuple(operands), attributes, left.startswith("ROOT "))


def _closing(text: str) -> int:
  """Index after the parenthesis that closes the one at 0."""
  depth = 0
  for index, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return index + 1
  raise ValueError(f"HLO: no closing parenthesis in {text[:80]!r}")


def _arrays(shape: str) -> Iterator[Array]:
  for dtype, dims, layout in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", shape):
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(d) for d in dims.split(",") if d)
    yield Array(dtype, sizes, int(space[1]) if space else 0)


def largest_buffers(text: str, number: int) -> list[str]:
  """The largest arrays that a program makes in HBM, each with the operation that it is from."""
  computations, _ = parse(text)
  fused = {i.attribute("calls") for body in computations.values() for i in body}
  found: dict[str, float] = {}
  for name, body in computations.items():
    for ins in body if name not in fused else ():
      if FREE.fullmatch(ins.opcode):
        continue
      origin = re.search(r'op_name="([^"]*)"', ins.attributes)
      for array in ins.arrays:
        if array.space == 0:
          shape = f"{array.dtype}[{','.join(map(str, array.dims))}]"
          label = f"{shape} of {origin[1] if origin else ins.opcode}"
          found[label] = array.bytes
  largest = sorted(found.items(), key=lambda entry: -entry[1])[:number]
  return [f"{label}: {size / 2**30:.2f} GiB" for label, size in largest]


def branches(ins: Instruction) -> list[str]:
  listed = re.search(r"branch_computations=\{([^}]*)\}", ins.attributes)
  if listed:
    return [name.strip().strip("%") for name in listed[1].split(",")]
  return [ins.attribute(f"{name}_computation") for name in ("true", "false")]


def group_size(ins: Instruction) -> int:
  """Devices of a replica group, in any of the three notations."""
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", ins.attributes)
  if mesh:
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", mesh[2]))
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=", ins.attributes)
  if iota:
    return int(iota[1].split(",")[-1])
  explicit = re.search(r"replica_groups=\{\{([\d,]*)\}", ins.attributes)
  return len(explicit[1].split(",")) if explicit else 1
