"""Compiles every cell of results/compile.md and writes it, with results/compile.json beside it.

    python results/compile.py --workdir=/tmp/compile --parallel=2

Every cell is a --mode=compile of its own; a finished cell is not compiled again, and the files are
written anew after each cell. Needs libtpu (the extra tpu).
"""

import argparse
import concurrent.futures
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = 4  # prepare, update, append, decode
FULL = (
  "lora.rank=0",
  "model.param_dtype=float32",
  "train.optimizer.first_moment=bfloat16",
  "rollout.slots=32",
)
LONG = ("rollout.max_tokens=32768", "train.row_tokens=32768", "rollout.slots=16")
SMALL = ("mesh.data=1", "mesh.fsdp=-1", "model.dtype=bfloat16")
BIG = ("llama3_1_8b", "qwen2_7b", "toolllama2_7b", "qwen3_8b")


def rows(number: int) -> str:
  return f"train.micro_rows={number}"


def context(tokens: int) -> tuple[str, ...]:
  lengths = f"rollout.max_tokens={tokens}", f"train.row_tokens={tokens}"
  return *lengths, "rollout.slots=4", "model.remat=full"


# (config, topology, what, fields): three topologies of every config, long rows, scaling, context.
CELLS = (
  *((name, "v5e:4x4", "full", FULL) for name in BIG),
  *((name, "v5e:2x2", "LoRA", (rows(4), "rollout.slots=16")) for name in BIG),
  *(
    ("smollm2_135m", topology, "LoRA", (*SMALL, rows(chips), "rollout.slots=32"))
    for topology, chips in (("v5e:2x2", 4), ("v5e:4x4", 16), ("v6e:2x4", 8))
  ),
  *((name, "v6e:2x4", "LoRA", (rows(8),)) for name in BIG),
  ("llama3_1_8b", "v5e:4x4", "LoRA, 32k", (*LONG, rows(8), "mesh.fsdp=8", "mesh.tensor=2")),
  ("llama3_1_8b", "v6e:4x4", "full, 32k", (*FULL, *LONG)),
  # Twice the chips with twice the batch and slots; and one slice with longer and longer rows.
  *(
    (
      "smollm2_135m",
      size,
      "scaling",
      (*SMALL, rows(n), f"rollout.tasks={8 * n}", f"rollout.slots={8 * n}"),
    )
    for size, n in (("v5e:1x1", 1), ("v5e:2x4", 8), ("v5e:4x8", 32), ("v5e:8x8", 64))
  ),
  *(
    ("smollm2_135m", "v5e:2x2", f"LoRA, {n}k", (*SMALL, rows(4), *context(1024 * n)))
    for n in (1, 4, 8, 16, 32)
  ),
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--parallel", type=int, default=1)
  args = parser.parse_args()

  def run(cell: tuple) -> None:
    home = args.workdir / folder(cell)
    if len(reports(home)) < PROGRAMS:
      home.mkdir(parents=True, exist_ok=True)
      with (home / "log.txt").open("w") as log:
        subprocess.run(command(cell, home), cwd=ROOT, stdout=log, stderr=log, check=False)

  with concurrent.futures.ThreadPoolExecutor(args.parallel) as pool:
    for _ in pool.map(run, CELLS):
      write(args.workdir)


def reports(home: pathlib.Path) -> dict:
  """What the mode has written so far; it exits with an error where a program does not fit too."""
  summary = home / "summary_compile.json"
  return json.loads(summary.read_text())["programs"] if summary.exists() else {}


def folder(cell: tuple) -> str:
  return "_".join(cell[:3]).replace(":", "_").replace(", ", "_")


def command(cell: tuple, home: pathlib.Path) -> list[str]:
  name, topology, _, fields = cell
  return [
    sys.executable,
    "-m",
    "steptool_jax.main",
    "--mode=compile",
    f"--config=configs/{name}.py",
    f"--topology={topology}",
    f"--workdir={home}",
    *(f"--config.{field}" for field in fields),
  ]


def write(workdir: pathlib.Path) -> None:
  """compile.json and compile.md from the cells that are there."""
  sys.path.insert(0, str(ROOT))
  from steptool_jax.run.cost.pricing import table

  found, lines, parts = {}, list(SUMMARY), []
  for cell in CELLS:
    done = reports(workdir / folder(cell))
    if not done:
      parts.append(f"## {', '.join(cell[:3])}\n\nNot compiled yet.\n")
      continue
    found[folder(cell)] = done
    if len(done) == PROGRAMS:
      lines.append(line(cell, done))
    fields = " ".join(f"--config.{field}" for field in cell[3])
    rest = "" if len(done) == PROGRAMS else "\nThe other programs are not compiled yet.\n"
    parts.append(
      f"## {', '.join(cell[:3])}\n\n`{fields or 'as the config is'}`\n\n{table(done)}\n{rest}"
    )
  (ROOT / "results" / "compile.json").write_text(json.dumps(found, indent=1) + "\n")
  (ROOT / "results" / "compile.md").write_text("\n".join([HEAD, *lines, "", *parts]))


def line(cell: tuple, done: dict) -> str:
  """A row of the summary."""
  update, peak = done["update"], max(done.values(), key=lambda r: r["hbm_gib_per_chip"])
  figures = (
    f"{peak['hbm_gib_per_chip']:.2f} of {peak['capacity_gib']:.0f}",
    f"{update['flops'] / 1e12:.1f}",
    f"{update['hbm_bytes'] / 1e9:.0f}",
    f"{sum(update['collective_bytes'].values()) / 1e9:.2f}",
    f"{update['estimated_seconds']:.2f}",
    f"{update['estimated_mfu']:.0%}",
    f"{done['decode']['estimated_seconds']:.2f}",
    f"{max(r['compile_seconds'] for r in done.values()):.0f}",
  )
  return f"| {' | '.join((*cell[:3], *figures))} |"


HEAD = """# Compiled for TPU slices, without the slices

    pip install -e ".[tpu]" && python results/compile.py --workdir=/tmp/compile

Figures are per chip and run of a program: an optimizer step of the largest batch, a decode call
with every slot full. Memory comes from the compiler; `beside` lies in memory without being read
(moments during a rollout). FLOPs, bytes and collectives are counted in the optimised HLO, loop
bodies as often as they run, attention kernels by their blocks. The estimate is the longest of four
terms: products at the datasheet rate (kernels at half of it), HBM, links (one ring, both
directions), and the compiler's own cycles with operations one after the other. MFU counts useful
FLOPs only: nothing recomputed, and no gradient of frozen weights. Nothing here was measured on a
chip.

All cells: the largest peak of the four programs, then the update (an optimizer step), decoding (128
tokens in every slot), and the longest compilation, two cells side by side on two cores. Scaling: 16
rows and 8 slots for every chip, all chips one fsdp axis.

Against what was aimed at. A tenth of memory to spare: every cell. Half of the matrix rate for the
update: full-parameter training on v5e, but for Qwen3-8B's 48 %; not LoRA, where everything is
computed again and frozen weights count no gradient, so that at most 4 of 6 FLOPs are useful, and
products of low rank leave the unit waiting; not SmolLM2, whose products are small. For v6e there is
no schedule term, since its clock is not published: those estimates are optimistic. Three minutes to
compile a program: on v5e all but one (188 s, beside another cell); not the 7B and 8B updates on
v6e (185 to 320 s).
"""
SUMMARY = (
  "| config | slice | what | peak GiB | TFLOP | HBM GB | links GB | estimate s | MFU | decode s "
  "| compile s |",
  "|" + " --- |" * 11,
)

if __name__ == "__main__":
  main()
