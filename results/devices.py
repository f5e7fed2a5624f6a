"""Step time on 1 to 8 fake devices: what laying the update out over a mesh costs.

    python results/devices.py

The same update (one optimizer step of --mode=bench's batch, steptool, float32) on the same cores
with 1, 2, 4 and 8 fake CPU devices, each mesh in a process of its own. The work is the same, so a
ratio of 1 would be a layout that costs nothing; memory and links of a real slice are not in it
(results/compile.md has those). Writes results/devices.md.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
MESHES = ((1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (8, 1), (1, 8))  # data, fsdp
REPEATS = 3


def measure(data: int, fsdp: int) -> list[float]:
  """Seconds of each repetition; compilation is not in them."""
  import time

  import jax
  import numpy as np

  from configs import quickstart
  from steptool_jax.learning import steptable
  from steptool_jax.learning.programs import update
  from steptool_jax.policy import model, sharding
  from steptool_jax.run import bench
  from steptool_jax.run.training import setup
  from steptool_jax.validation import validate

  config = validate(quickstart.get_config())
  mesh = sharding.make_mesh(data, fsdp)
  learner = setup.build_learner(config, bench.ARCHITECTURE, "steptool")
  with jax.set_mesh(mesh):
    variables = {"params": model.init_params(bench.ARCHITECTURE, jax.random.key(0))}
    state = setup.start_phase(config, mesh, learner, variables)
    prepare, step = update.compile_programs(learner)
    packed = bench.make_batch()
    batch, table = (
      setup.to_device(part, 8, 1, mesh) for part in (packed.batch, steptable.build(packed))
    )
    prepared, _ = prepare(state, batch, np.int32(1), table)
    seconds = []
    for _ in range(2 + REPEATS):  # the second may compile for the layout of the first's result
      started = time.perf_counter()
      state, metrics = step(state, prepared, np.int32(1))
      jax.block_until_ready((state, metrics))
      seconds.append(time.perf_counter() - started)
  return seconds[2:]


def apart(data: int, fsdp: int) -> list[float]:
  """`measure` in a process with data x fsdp fake devices."""
  count = data * fsdp
  # XLA's inner pool has a thread a core, and a collective may wait on one for the other devices.
  env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PJRT_NPROC": str(4 * count)}
  env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
  command = [sys.executable, __file__, str(data), str(fsdp)]
  done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
  raw: dict[tuple[int, int], list[float]] = {}
  for mesh in MESHES:
    raw[mesh] = apart(*mesh)
    print(mesh, [round(s, 2) for s in raw[mesh]], flush=True)
  alone = statistics.median(raw[1, 1])
  lines = [
    f"| {d * f} | {d} | {f} | {statistics.median(s):.2f} | {statistics.median(s) / alone:.2f} | "
    f"{min(s):.2f} to {max(s):.2f} |"
    for (d, f), s in raw.items()
  ]
  (ROOT / "results" / "devices.md").write_text(HEAD + "\n".join(lines) + "\n")


HEAD = f"""# Step time on 1 to 8 fake devices

    python results/devices.py

One optimizer step of `--mode=bench`'s batch (8 rows of 512 tokens, 29.9M parameters, float32) on
two CPU cores that act as 1 to 8 devices. The work is the same throughout, so 1.00 would be a layout
that costs nothing; there are no links and no memories of their own here (`compile.md` counts those
for real slices). Medians of {REPEATS}.

| devices | data | fsdp | seconds | over one device | range |
|---|---|---|---|---|---|
"""

if __name__ == "__main__":
  if len(sys.argv) > 1:
    print(json.dumps(measure(*map(int, sys.argv[1:]))))
  else:
    main()
