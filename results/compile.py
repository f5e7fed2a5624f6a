"""Compiles every cell of results/compile.md and writes it, with results/compile.json beside it.

    python results/compile.py --workdir=/tmp/compile --parallel=2

Every cell is a --mode=compile of its own; a finished cell is not compiled again, and the files are
written anew after each cell. What is not compiled yet stands as compile.json has it. --cells=NAME
compiles only cells with NAME in their folder's name. Needs libtpu (the extra tpu).
"""

import argparse
import concurrent.futures
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[1]
LAST = "rewind"  # the last program of a cell that compiles all
ENGINE = ("append", "decode", "fork", "rewind")
FULL = (
  "lora.rank=0",
  "model.param_dtype=float32",
  "train.optimizer.first_moment=bfloat16",
  "rollout.slots=32",
)
LONG = (
  *("rollout.max_tokens=32768", "train.row_tokens=32768", "rollout.slots=16"),
  "train.share_prompts=False",  # whose masks alone would take 11.6 GiB
)
SMALL = ("mesh.data=1", "mesh.fsdp=-1", "model.dtype=bfloat16")
SHORT = "train.row_tokens=1024"  # the config's are as long as its groups of samples
BIG = ("llama3_1_8b", "qwen2_7b", "toolllama2_7b", "qwen3_8b")


def rows(number: int) -> str:
  return f"train.micro_rows={number}"


def context(tokens: int) -> tuple[str, ...]:
  lengths = f"rollout.max_tokens={tokens}", f"train.row_tokens={tokens}"
  return *lengths, "rollout.slots=4", "model.remat=full"


def slots(number: int, tokens: int) -> tuple[str, ...]:
  return f"rollout.slots={number}", f"rollout.max_tokens={tokens}"


# (config, topology, what, fields[, only these programs]): three topologies of every config, long
# rows, scaling, context.
CELLS = (
  *((name, "v5e:4x4", "full", FULL) for name in BIG),
  # Without shared key-value heads (Llama 2) a conversation takes four times the cache.
  *(
    (name, "v5e:2x2", "LoRA", (rows(4), f"rollout.slots={8 if name == 'toolllama2_7b' else 16}"))
    for name in BIG
  ),
  *(
    (
      "smollm2_135m",
      topology,
      "LoRA",
      (*SMALL, SHORT, rows(chips), "rollout.tasks=8", "rollout.slots=32"),
    )
    for topology, chips in (("v5e:2x2", 4), ("v5e:4x4", 16), ("v6e:2x4", 8))
  ),
  *((name, "v6e:2x4", "LoRA", (rows(8),)) for name in BIG),
  ("qwen3_30b_a3b", "v5e:4x4", "LoRA", ()),
  ("llama3_1_8b", "v5e:4x4", "LoRA, 32k", (*LONG, rows(8), "mesh.fsdp=8", "mesh.tensor=2")),
  ("llama3_1_8b", "v6e:4x4", "full, 32k", (*FULL, *LONG)),
  # Twice the chips with twice the batch and slots; and one slice with longer and longer rows.
  *(
    (
      "smollm2_135m",
      size,
      "scaling",
      (*SMALL, SHORT, rows(n), f"rollout.tasks={8 * n}", f"rollout.slots={8 * n}"),
    )
    for size, n in (("v5e:1x1", 1), ("v5e:2x4", 8), ("v5e:4x8", 32), ("v5e:8x8", 64))
  ),
  *(
    (
      "smollm2_135m",
      "v5e:2x2",
      f"LoRA, {n}k",
      (*SMALL, rows(4), "rollout.tasks=8", *context(1024 * n)),
    )
    for n in (1, 4, 8, 16, 32)
  ),
  # Rollouts of other sizes: the update is that of the cells above.
  ("llama3_1_8b", "v5e:4x4", "full, 128 x 2k", (*FULL[:3], *slots(128, 2048)), ENGINE),
  ("llama3_1_8b", "v5e:2x2", "LoRA, 64 x 2k", (rows(4), *slots(64, 2048)), ENGINE),
  (
    "llama3_1_8b",
    "v5e:4x4",
    "full, 112 x 2k and 16 x 8k",
    (*FULL[:3], *slots(112, 8192), "rollout.slot_tokens=2048", "rollout.long_slots=16"),
    (*ENGINE, *(f"{name}_long" for name in ENGINE), "move"),
  ),
  (
    "llama3_1_8b",
    "v5e:4x4",
    "full, int8 cache",
    (*FULL, "rollout.kv_cache=int8"),
    ("decode", "fork"),
  ),
  # What others have published. JetStream: Llama-2-7B on 8 chips. MaxText: Llama-3.1-8B, rows of 8k.
  ("toolllama2_7b", "v5e:2x4", "as JetStream", (rows(8), *slots(64, 2048)), ("decode",)),
  (
    "llama3_1_8b",
    "v6e:4x4",
    "as MaxText",
    (*FULL, rows(16), "train.share_prompts=False"),
    ("update",),
  ),
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--parallel", type=int, default=1)
  parser.add_argument("--cells", default="")
  args = parser.parse_args()

  def run(cell: tuple) -> None:
    home = args.workdir / folder(cell)
    if args.cells in folder(cell) and not complete(cell, reports(home)):
      home.mkdir(parents=True, exist_ok=True)
      with (home / "log.txt").open("w") as log:
        subprocess.run(command(cell, home), cwd=ROOT, stdout=log, stderr=log, check=False)

  with concurrent.futures.ThreadPoolExecutor(args.parallel) as pool:
    for _ in pool.map(run, CELLS):
      write(args.workdir)


def complete(cell: tuple, done: dict) -> bool:
  return all(name in done for name in (cell[4] if len(cell) > 4 else (LAST,)))


def reports(home: pathlib.Path) -> dict:
  """What the mode has written so far; it exits with an error where a program does not fit too."""
  summary = home / "summary_compile.json"
  return json.loads(summary.read_text())["programs"] if summary.exists() else {}


def folder(cell: tuple) -> str:
  return "_".join(cell[:3]).replace(":", "_").replace(", ", "_")


def command(cell: tuple, home: pathlib.Path) -> list[str]:
  name, topology, _, fields, *only = cell
  return [
    sys.executable,
    "-m",
    "steptool_jax.main",
    "--mode=compile",
    f"--config=configs/{name}.py",
    f"--topology={topology}",
    f"--workdir={home}",
    *(f"--config.{field}" for field in fields),
    *(f"--programs={','.join(names)}" for names in only),
  ]


def write(workdir: pathlib.Path) -> None:
  """compile.json and compile.md from the cells that are there."""
  sys.path.insert(0, str(ROOT))
  from steptool_jax.run.cost.pricing import table

  kept = ROOT / "results" / "compile.json"
  before = json.loads(kept.read_text()) if kept.exists() else {}
  found, lines, parts = {}, list(SUMMARY), []
  for cell in CELLS:
    done = reports(workdir / folder(cell)) or before.get(folder(cell), {})
    if done:
      found[folder(cell)] = done
    if not done:
      parts.append(f"## {', '.join(cell[:3])}\n\nNot compiled yet.\n")
      continue
    if complete(cell, done):
      lines.append(line(cell, done))
    fields = " ".join(f"--config.{field}" for field in cell[3])
    rest = "" if complete(cell, done) else "\nThe other programs are not compiled yet.\n"
    head = f"## {', '.join(cell[:3])}\n\n`{fields or 'as the config is'}`"
    parts.append(f"{head}\n\n{table(done)}\n{rest}")
  checked = ["| | published | estimate |", "| --- | --- | --- |"]
  for name, what, published, ours in PUBLISHED:
    done = next((r for cell, r in found.items() if cell.endswith(name)), None)
    checked.append(f"| {what} | {published} | {ours(done) if done else 'not compiled yet'} |")
  kept.write_text(json.dumps(found, indent=1) + "\n")
  (ROOT / "results" / "compile.md").write_text("\n".join([HEAD, *checked, "", *lines, "", *parts]))


def line(cell: tuple, done: dict) -> str:
  """A row of the summary; a cell of the engine alone has no update, one of an update no decode."""
  peak = max(done.values(), key=lambda r: r["hbm_gib_per_chip"])
  figures = [f"{peak['hbm_gib_per_chip']:.2f} of {peak['capacity_gib']:.0f}"]
  figures += _cells(
    done.get("update"),
    lambda u: f"{u['flops'] / 1e12:.1f}",
    lambda u: f"{u['hbm_bytes'] / 1e9:.0f}",
    lambda u: f"{sum(u['collective_bytes'].values()) / 1e9:.2f}",
    lambda u: f"{u['estimated_seconds']:.2f}",
    lambda u: f"{u['longest_term_seconds']:.2f}",
    lambda u: f"{u['estimated_mfu']:.0%}",
  )
  figures += _cells(
    done.get("decode"),
    lambda d: f"{d['estimated_seconds']:.2f}",
    lambda d: f"{d['longest_term_seconds']:.2f}",
    lambda d: f"{d['tokens_per_second']:,.0f}" if "tokens_per_second" in d else "",
  )
  figures.append(f"{max(r['compile_seconds'] for r in done.values()):.0f}")
  return f"| {' | '.join((*cell[:3], *figures))} |"


def _cells(report: dict | None, *columns: Callable[[dict], str]) -> list[str]:
  return [column(report) if report else "" for column in columns]


HEAD = """# Compiled for TPU slices, without the slices

    pip install -e ".[tpu]" && python results/compile.py --workdir=/tmp/compile

Figures are per chip and run of a program: an optimizer step of the largest batch, a decode call
with every slot full. Memory comes from the compiler; `beside` lies in memory without being read
(moments during a rollout). FLOPs, bytes and collectives are counted in the optimised HLO, loop
bodies as often as they run, kernels by their blocks. The estimate goes operation by operation: each
takes the longest of its products at the datasheet rate, its HBM bytes and the compiler's cycles; a
kernel the longest of its products at half of the rate, its bytes and 0.35 us for each step of its
grid; a collective that nothing runs beside is added (one ring, both directions, 1 us a hop), and
those in the background count where they take longer than all else. `longest` is the estimate of
before: the longest of four terms over the whole program, each as if the others took no time. MFU
counts useful FLOPs only: nothing recomputed, and no gradient of frozen weights. Nothing here was
measured on a chip.

All cells: the largest peak of all programs, then the update (an optimizer step: the estimate and
the one of before), decoding (a call; tokens a second of the whole slice), and the longest
compilation. Scaling: 16 rows and 8 slots for every chip, all chips one fsdp axis; 64 chips take 1.3
times as long as one, by what is gathered and summed while nothing else runs (the estimate of before
saw none of that). A row of 32k tokens with shared prompts has 11.6 GiB of masks on a chip.

Against what was aimed at. A tenth of memory to spare: every cell, fork and rewind among its
programs (Llama 2, whose heads share no keys, with 8 slots on four chips: 16 do not fit).
Llama-3.1-8B on v5e:4x4 decodes 128 conversations of 2k at 14,500 tokens/s (8.8 ms a step; 9,000
were asked for, 4,470 before) and 32 of 8k at 8.1 ms a step (12 were asked for, about 25 before; 7.0
with rollout.kv_cache=int8, whose cache takes 1.03 GiB a chip and not 2.00). 112 slots of 2k and 16
of 8k (rollout.long_slots) take 10.4 GiB; one step of both kinds 8.3 and 6.7 ms. A fork takes 30 MiB
beside the cache, where all slots at once took 21.5 GiB. The update reaches 46 % and not 50:
collectives that nothing runs beside are counted now. (That update was compiled with its gradients
scattered by hand; libtpu made the same 60 GB of all-reduces of it as of the plain one, so the trial
is not in the code.) For v6e the compiler's cycles count nothing, since its clock is not published:
those estimates are optimistic. LoRA on v5e:2x2 decodes 64 conversations of 2k at 4,300 tokens/s
(3,000 were asked for).

Qwen3-30B-A3B, a mixture of experts, fits with LoRA and half of the memory to spare. Its experts lie
over all chips in rollouts, too: over the four key-value heads alone they would take 14 GiB of each.
Its seconds and FLOPs are bounds from above: of a grouped product every block of rows is counted
once for each of a chip's 8 experts, while at run time a row meets those that it chose; how much the
compiled loop skips would only be seen on a chip.

Against what others have measured, each with batches and lengths of their own. Decoding (64
conversations of 2k) is estimated a quarter above JetStream's 383 tokens/s a chip. The update for
v6e (rows of 8k, one a chip at a time, everything recomputed) is estimated at 35 % MFU where MaxText
measured 45.5 % with its own program; the longest term alone would say 63 %. So the measured figure
lies between the two, and the one by operation, in which operations never overlap, is the careful
one.
"""
# (cell, what, published and by whom, ours of its program's report and the chips).
PUBLISHED = (
  (
    "as JetStream",
    "Llama-2-7B, decode, v5e, tokens/s a chip",
    "383 (JetStream, measured)",
    lambda done: f"{done['decode']['tokens_per_second'] / 8:,.0f}",
  ),
  (
    "as MaxText",
    "Llama-3.1-8B, update, v6e, MFU",
    "45.5 % (MaxText, measured)",
    lambda done: f"{100 * done['update']['estimated_mfu']:.1f} %",
  ),
)
SUMMARY = (
  "| config | slice | what | peak GiB | TFLOP | HBM GB | links GB | estimate s | before s | MFU "
  "| decode s | before s | decode tokens/s | compile s |",
  "|" + " --- |" * 14,
)

if __name__ == "__main__":
  main()
