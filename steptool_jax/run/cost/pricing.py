"""Compiles a program for chips that are not here and prices it: memory, FLOPs, bytes, seconds."""

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from steptool_jax.learning import importance
from steptool_jax.policy import experts, sharding
from steptool_jax.run.cost import hlo, hlo_counts, roofline
from steptool_jax.run.cost.chips import Chip

GIB = 2**30
LISTED = 5  # largest buffers that are named


@dataclasses.dataclass(frozen=True)
class Program:
  """One program with its abstract arguments.

  alive: what lies in the chip's memory meanwhile, its arguments among it. trips: bounds of loops
  that an argument decides; expert_blocks: of the one over blocks of a mixture of experts.
  useful_flops: of the whole slice, without anything computed twice. tokens: of the whole slice,
  that one run works on; 0 = not counted. options: static arguments. mesh: that the program is
  traced on, where it is not training's.
  """

  name: str
  function: Callable
  arguments: tuple
  alive: Any
  trips: tuple[int, ...] = ()
  useful_flops: float = 0.0
  expert_blocks: int = 1
  tokens: int = 0
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  mesh: jax.sharding.Mesh | None = None

  def compile(self) -> Any:
    """The compiled program."""
    with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
      return self.function.lower(*self.arguments, **self.options).compile()


def report(program: Program, chip: Chip, devices: int) -> dict[str, Any]:
  """Compiles and prices one program."""
  started = time.monotonic()
  alive = bytes_per_chip(program.alive)
  usable = chip.hbm * chip.usable * GIB
  entry: dict[str, Any] = {
    "capacity_gib": chip.hbm,
    "alive_gib": alive / GIB,
    "largest_arguments": _largest_arguments(program.alive),
  }
  try:
    compiled = program.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    needed = re.search(r"\(([\d.]+)G\) exceeds", str(error))
    temporaries = float(needed[1]) if needed else math.nan
    return entry | {
      "hbm_gib_per_chip": alive / GIB + temporaries,
      "fits": False,
      "reason": str(error).splitlines()[0],
      "compile_seconds": time.monotonic() - started,
    }
  compile_seconds = time.monotonic() - started
  text = compiled.as_text()
  memory = compiled.memory_analysis()
  scoped = {experts.SCOPE: program.expert_blocks, importance.SAMPLE: 1}
  counts = hlo_counts.count(text, chip, program.trips, scoped)
  cost = roofline.estimate(counts, chip)
  # Beside the program's own buffers lies what it does not read: moments during a rollout.
  beside = max(alive - memory.argument_size_in_bytes, 0)
  peak = memory.peak_memory_in_bytes + beside
  return entry | {
    "hbm_gib_per_chip": peak / GIB,
    "fits": peak <= usable,
    "spare": 1 - peak / (chip.hbm * GIB),
    "arguments_gib": memory.argument_size_in_bytes / GIB,
    "temporaries_gib": memory.temp_size_in_bytes / GIB,
    "aliased_gib": memory.alias_size_in_bytes / GIB,
    "beside_gib": beside / GIB,
    "flops": counts.flops + counts.kernel_flops,
    "kernel_flops": counts.kernel_flops,
    "useful_flops": program.useful_flops / devices,
    "hbm_bytes": counts.hbm_bytes + counts.kernel_bytes,
    "collective_bytes": dict(counts.collectives),
    "seconds_by_term": dataclasses.asdict(cost),
    "binding": cost.binding,
    "estimated_seconds": cost.seconds,
    "longest_term_seconds": cost.longest_term,
    "tokens_per_second": program.tokens / cost.seconds,
    "estimated_mfu": program.useful_flops / devices / (cost.seconds * chip.flops),
    "rates": dataclasses.asdict(chip),
    "largest_buffers": hlo.largest_buffers(text, LISTED),
    "compile_seconds": compile_seconds,
  }


def bytes_per_chip(tree: Any) -> float:
  """Bytes of one chip's shards of a tree of ShapeDtypeStructs with shardings."""
  return sum(_shard_bytes(x) for x in jax.tree.leaves(tree))


def _shard_bytes(x: jax.ShapeDtypeStruct) -> int:
  shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
  return math.prod(shape) * np.dtype(x.dtype).itemsize


def _largest_arguments(tree: Any) -> list[str]:
  sizes = [
    (_shard_bytes(x), sharding.path_string(path), x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  ]
  sizes.sort(key=lambda entry: -entry[0])
  return [
    f"{path} {x.dtype}{list(x.shape)}: {size / GIB:.2f} GiB" for size, path, x in sizes[:LISTED]
  ]


# The table's columns: title, and a program's report -> what stands there.
COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
  ("arguments", lambda r: f"{r['arguments_gib']:.2f}"),
  ("temporaries", lambda r: f"{r['temporaries_gib']:.2f}"),
  ("aliased", lambda r: f"{r['aliased_gib']:.2f}"),
  ("beside", lambda r: f"{r['beside_gib']:.2f}"),
  ("peak", lambda r: f"{r['hbm_gib_per_chip']:.2f}"),
  ("of GiB", lambda r: f"{r['capacity_gib']:g}"),
  ("fits", lambda r: "yes" if r["fits"] else "NO"),
  ("TFLOP", lambda r: f"{r['flops'] / 1e12:.2f}"),
  ("HBM GB", lambda r: f"{r['hbm_bytes'] / 1e9:.0f}"),
  ("collective GB", lambda r: _moved(r["collective_bytes"])),
  ("matrix s", lambda r: f"{r['seconds_by_term']['matrix']:.3f}"),
  ("HBM s", lambda r: f"{r['seconds_by_term']['hbm']:.3f}"),
  ("links s", lambda r: f"{r['seconds_by_term']['interconnect']:.3f}"),
  ("schedule s", lambda r: f"{r['seconds_by_term']['schedule']:.3f}"),
  ("binds", lambda r: r["binding"]),
  ("longest s", lambda r: f"{r['longest_term_seconds']:.3f}"),
  ("estimate s", lambda r: f"{r['estimated_seconds']:.3f}"),
  ("tokens/s", lambda r: f"{r['tokens_per_second']:,.0f}" if r.get("tokens_per_second") else ""),
  ("MFU", lambda r: f"{r['estimated_mfu']:.0%}"),
  ("compile s", lambda r: f"{r['compile_seconds']:.0f}"),
)
OF_MISFITS = ("peak", "of GiB", "fits", "compile s")


def table(reports: dict[str, dict[str, Any]]) -> str:
  """One line a program, per chip; of a program that did not compile, what is known."""
  lines = [["program", *(title for title, _ in COLUMNS)], ["---"] * (1 + len(COLUMNS))]
  for name, r in reports.items():
    cells = [cell(r) if "flops" in r or title in OF_MISFITS else "" for title, cell in COLUMNS]
    lines.append([name, *cells])
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _moved(collectives: dict[str, float]) -> str:
  return " ".join(f"{kind} {n / 1e9:.1f}" for kind, n in collectives.items() if n >= 5e7) or "0"
