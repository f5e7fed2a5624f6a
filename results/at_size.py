"""Import, export and merged export of an 8B-shaped model: how much memory the host needs.

    python results/at_size.py --workdir=/tmp/at_size --layers=32

Builds a random model with Llama-3.1-8B's shapes (bfloat16, `--layers` of its 32 layers) shard by
shard in WORKDIR, then runs two processes with 8 fake devices and the mesh fsdp=8: one imports and
exports, the other imports, makes rank-16 adapters with non-zero B and exports them merged (and as
PEFT). Samples of the files are compared with the source. Takes 2 x 16 GB of disk and, as the fake
devices lie in the host's memory too, 16 GB of it plus what is measured here; stops before less than
4 GiB are available. Writes results/at_size.json and results/at_size.md.

What is measured, every 5 ms in a thread: RssAnon of /proc/self/status (memory that is this
process's alone: heap, Python, XLA) less the bytes of the arrays on the devices just then
(jax.live_arrays: those laid out over the mesh, and during the import also the finished slices of
one that is not complete). Python, jax and compiled programs are in it. Mapped pages of files
(RssFile: the source's tensors, libraries) are not: they are the page cache's, and the kernel takes
them back without writing. They are reported apart. The peak of VmRSS as the kernel keeps it
(VmHWM), less the arrays at the end, misses no moment; it holds the file pages. The steps run with
MALLOC_MMAP_THRESHOLD_ = 1 MiB: fake devices take their memory from malloc, which would keep what
they free for later (1.0 GiB in an export of 2 layers), and a real device frees nothing of the host.
A step that is done (WORKDIR/<step>.json) is not done again.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

GIB = 2**30
MIN_AVAILABLE = 4 * GIB
SHAPES = {
  "vocab_size": 128256,
  "hidden_size": 4096,
  "intermediate_size": 14336,
  "num_heads": 32,
  "num_kv_heads": 8,
  "head_dim": 128,
  "rope_theta": 500000.0,
  "max_position_embeddings": 131072,
}
FULL_LAYERS, FULL_SHARD = 32, 5_000_000_000
RANK, ALPHA = 16, 32.0
STEPS = ("build", "plain", "compare_plain", "merged", "compare_merged")
HERE = pathlib.Path(__file__).parent


def model_config(layers: int):
  from steptool_jax.policy.model import ModelConfig

  return ModelConfig("llama", num_layers=layers, **SHAPES, param_dtype="bfloat16")


def entries_of(layers: int) -> dict:
  """{name: (shape, dtype)} in file order."""
  import ml_dtypes

  from steptool_jax.policy.formats import hfconfig
  from steptool_jax.policy.model import abstract_params

  params, out = abstract_params(model_config(layers)), {}
  for name in hfconfig.tensor_names(model_config(layers)):
    leaf = params
    for key in name.path:
      leaf = leaf[key]
    shape = leaf.shape if name.layer is None else leaf.shape[1:]
    out[name.hub] = (tuple(reversed(shape)) if name.transpose else shape, ml_dtypes.bfloat16)
  return out


def shard_bytes(layers: int) -> int:
  """5 GB for the full model, in proportion for fewer layers."""
  from steptool_jax.policy.formats.tensorfile import num_bytes

  total = sum(num_bytes(*entry) for entry in entries_of(layers).values())
  whole = sum(num_bytes(*entry) for entry in entries_of(FULL_LAYERS).values())
  return FULL_SHARD * total // whole


def build(workdir: pathlib.Path, layers: int) -> list[int]:
  """The source, with the safetensors package and none of our writers; sizes of its shards."""
  import numpy as np
  from safetensors.numpy import save_file

  from steptool_jax.policy.formats import hfconfig
  from steptool_jax.policy.formats.tensorfile import split_shards

  out = workdir / "source"
  out.mkdir(parents=True)
  rng = np.random.Generator(np.random.SFC64(0))
  groups = list(split_shards(entries_of(layers), shard_bytes(layers)))
  index = {}
  for number, group in enumerate(groups, 1):
    tensors = {}
    for name, (shape, dtype) in group.items():
      # Random sign and mantissa, magnitudes 1/64 to 1/32: every bit pattern is an ordinary number.
      words = rng.integers(0, 2**64, math.prod(shape) // 4, np.uint64)
      bits = words.view(np.uint16) & 0x807F | 121 << 7
      tensors[name] = bits.view(dtype).reshape(shape)
    file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
    save_file(tensors, out / file, metadata={"format": "pt"})
    index.update(dict.fromkeys(group, file))
  text = json.dumps({"metadata": {}, "weight_map": index})
  (out / "model.safetensors.index.json").write_text(text)
  raw = hfconfig.raw_config_of(model_config(layers))
  (out / "config.json").write_text(json.dumps(raw | {"dtype": "bfloat16"}))
  return [path.stat().st_size for path in sorted(out.glob("model-*"))]


class Meter:
  """Peaks of a phase, bytes; see the head of this file."""

  def __init__(self, mesh_size: int):
    self._size, self._lock = mesh_size, threading.Lock()
    self.start()
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def start(self, pieces: bool = False) -> None:
    """`pieces`: arrays on one device count too; they are no views of others during an import."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    with self._lock:
      self._begin, self._peak, self._pieces = time.perf_counter(), {}, pieces
    self._sample()

  def stop(self) -> dict[str, float]:
    self._sample()
    finished = self.device_bytes()
    with self._lock:
      return {
        "seconds": round(time.perf_counter() - self._begin, 1),
        "arrays_on_devices": finished,
        "temporaries_on_devices": self._peak["device"] - finished,
        "beside_devices": self._peak["anon"],
        "beside_devices_with_file_pages": self._peak["all"],
        "kernel_peak_less_arrays": _status()["VmHWM"] - finished,
      }

  def close(self) -> None:
    """A thread inside of jax when the interpreter ends would abort the process."""
    self._ended.set()
    self._thread.join()

  def device_bytes(self) -> int:
    import jax

    total = 0
    for array in jax.live_arrays():
      where = array.sharding
      if not array.is_deleted() and (self._pieces or where.num_devices == self._size):
        one = math.prod(where.shard_shape(array.shape)) * array.dtype.itemsize
        total += one * where.num_devices
    return total

  def _run(self) -> None:
    while not self._ended.wait(0.005):
      self._sample()
      if _available() < MIN_AVAILABLE:
        print("less than 4 GiB are available: stopping", file=sys.stderr, flush=True)
        os._exit(3)

  def _sample(self) -> None:
    status, device = _status(), self.device_bytes()
    now = {
      "anon": status["RssAnon"] - device,
      "all": status["VmRSS"] - device,
      "device": device,
    }
    with self._lock:
      for key, value in now.items():
        self._peak[key] = max(value, self._peak.get(key, 0))


def _status() -> dict[str, int]:
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return {
    key: int(value.split()[0]) * 1024
    for key, _, value in (line.partition(":") for line in lines)
    if key.startswith(("VmHWM", "VmRSS", "Rss"))
  }


def _available() -> int:
  lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def run_step(workdir: pathlib.Path, layers: int, merged: bool) -> dict:
  """Imports, then exports, in a process with 8 devices; returns the figures of both."""
  import jax
  import jax.numpy as jnp

  from steptool_jax.policy import lora, sharding
  from steptool_jax.policy.formats import hfconfig, hub, peftfile

  mesh = sharding.make_mesh(data=1, fsdp=8)
  settings = lora.Lora(RANK, ALPHA)
  config, raw = hfconfig.load_config(workdir / "source", param_dtype="bfloat16")
  jax.block_until_ready(jnp.zeros(8, device=sharding.batch_sharding(mesh)))
  meter = Meter(mesh.size)
  figures = {"before": meter.stop()}

  meter.start(pieces=True)
  params = jax.block_until_ready(hub.load_params(workdir / "source", config, mesh))
  figures["import"] = meter.stop()
  adapters = None
  if merged:
    config = lora.with_lora(config, settings)

    def make():
      fresh = lora.init_lora(config, settings, jax.random.key(1))
      keys = jax.random.split(jax.random.key(2), len(fresh["layers"]))
      for key, part in zip(keys, fresh["layers"].values(), strict=True):
        part["b"] = 0.05 * jax.random.normal(key, part["b"].shape)
      return fresh

    where = sharding.shardings(jax.eval_shape(make), mesh)
    adapters = jax.block_until_ready(jax.jit(make, out_shardings=where)())

  out = workdir / ("merged" if merged else "export")
  meter.start()
  hub.save_params(out, config, params, raw, max_shard_bytes=shard_bytes(layers), adapters=adapters)
  if merged:
    peftfile.save_adapter(out / "adapter", config, adapters, settings)
  figures["merged export" if merged else "export"] = meter.stop()
  meter.close()
  return figures


def compare(workdir: pathlib.Path, layers: int, merged: bool) -> dict:
  """A sample of tensors: equal bits, or for merged ones the sum in NumPy, rounded."""
  import numpy as np

  from steptool_jax.policy.formats.tensorfile import TensorFiles

  source = TensorFiles(workdir / "source")
  out = workdir / ("merged" if merged else "export")
  exported = TensorFiles(out)
  assert exported.shapes == source.shapes
  adapter = TensorFiles(out / "adapter", "adapter_model") if merged else None
  chosen = [f".{layer}." for layer in sorted({0, layers // 2, layers - 1})]
  equal, near, worst = 0, 0, 0.0
  for name in source.shapes:
    if ".layers." in name and not any(part in name for part in chosen):
      continue
    ours, theirs = exported.read(name), source.read(name)
    if adapter is not None and "_proj" in name:
      module = f"base_model.model.{name.removesuffix('.weight')}"
      delta = adapter.read(f"{module}.lora_B.weight") @ adapter.read(f"{module}.lora_A.weight")
      exact = theirs.astype(np.float32) + np.float32(ALPHA / RANK) * delta
      # bfloat16 keeps 8 bits: half of the last one, plus what float32 sums differ by.
      error = np.abs(ours.astype(np.float32) - exact)
      assert np.all(error <= 2.0**-8 * np.abs(exact) + 1e-6), name
      assert np.mean(ours.view(np.uint16) != theirs.view(np.uint16)) > 0.5, f"{name}: not merged"
      worst, near = max(worst, float(error.max())), near + 1
    else:
      np.testing.assert_array_equal(ours.view(np.uint16), theirs.view(np.uint16), err_msg=name)
      equal += 1
  shutil.rmtree(out)  # there is no room for all three
  return {"bit_equal_tensors": equal, "merged_tensors": near, "largest_difference": worst}


def child(workdir: pathlib.Path, layers: int, step: str) -> dict:
  """What the step writes; a step that is done is not done again."""
  done = workdir / f"{step}.json"
  if not done.exists():
    flags = "--xla_force_host_platform_device_count=8"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PJRT_NPROC": "32"}
    env["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    command = [sys.executable, __file__, f"--workdir={workdir}", f"--layers={layers}"]
    subprocess.run([*command, f"--step={step}"], env=env, check=True)
  return json.loads(done.read_text())


def report(summary: dict) -> str:
  compared, merged = summary["compared"]["plain"], summary["compared"]["merged"]

  def gib(size):
    return f"{size / GIB:.2f}"

  lines = [
    "# Import and export at size",
    "",
    f"    {summary['command']}",
    "",
    f"A random model with Llama-3.1-8B's shapes, {summary['layers']} of its 32 layers, bfloat16:",
    f"{gib(summary['bytes'])} GiB in {len(summary['source_shards'])} shards, the largest of "
    f"{gib(summary['largest_shard'])} GiB; a layer has {gib(summary['layer'])} GiB.",
    "8 fake devices, fsdp=8. Bound: 1.3 x the largest shard + one layer = "
    f"**{gib(summary['bound'])} GiB** of host memory",
    "beside what is on the devices. (Would a shard be the largest slice of an array on one device:",
    f"{gib(summary['device_bound'])} GiB.) All in GiB:",
    "",
    "| step | s | arrays on devices | temporaries there | host beside them | of the bound "
    "| with file pages | kernel's peak RSS less the arrays |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for step, x in summary["steps"].items():
    lines.append(
      f"| {step} | {x['seconds']:.0f} | {gib(x['arrays_on_devices'])} | "
      f"{gib(x['temporaries_on_devices'])} | **{gib(x['beside_devices'])}** | "
      f"{x['beside_devices'] / summary['bound']:.0%} | "
      f"{gib(x['beside_devices_with_file_pages'])} | {gib(x['kernel_peak_less_arrays'])} |"
    )
  lines += [
    "",
    "`before` is the process with jax and its devices and without a model: the other rows hold it",
    "too. How it is measured, and why mapped pages of files are a column of their own: the head of",
    "`results/at_size.py`.",
    "",
    f"{compared['bit_equal_tensors']} tensors of the export were compared with the source: equal "
    "bit for bit. Of the merged",
    f"export {merged['merged_tensors']} were compared with W + 2 B A in NumPy (largest difference "
    f"{merged['largest_difference']:.1e}, which is",
    f"bfloat16's rounding), and the {merged['bit_equal_tensors']} without an adapter are equal.",
  ]
  return "\n".join(lines) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--layers", type=int, default=FULL_LAYERS)
  parser.add_argument("--out", type=pathlib.Path, default=HERE / "at_size.json")
  parser.add_argument("--step", choices=STEPS)
  args = parser.parse_args()
  if args.step:
    if args.step == "build":
      figures = build(args.workdir, args.layers)
    elif args.step.startswith("compare"):
      figures = compare(args.workdir, args.layers, args.step == "compare_merged")
    else:
      figures = run_step(args.workdir, args.layers, args.step == "merged")
    (args.workdir / f"{args.step}.json").write_text(json.dumps(figures))
    return

  shards = child(args.workdir, args.layers, "build")
  steps, compared = {}, {}
  for step in ("plain", "merged"):
    for key, value in child(args.workdir, args.layers, step).items():
      steps[f"{key}, second process" if key in steps else key] = value
    compared[step] = child(args.workdir, args.layers, f"compare_{step}")

  from steptool_jax.policy.formats.tensorfile import num_bytes

  entries = entries_of(args.layers)
  layer = sum(num_bytes(*entry) for name, entry in entries.items() if ".layers.0." in name)
  gate = args.layers * num_bytes(*entries["model.layers.0.mlp.gate_proj.weight"])
  device_shard = max(gate, num_bytes(*entries["lm_head.weight"])) // 8
  summary = {
    "command": f"python results/at_size.py --workdir=/tmp/at_size --layers={args.layers}",
    "layers": args.layers,
    "bytes": sum(num_bytes(*entry) for entry in entries.values()),
    "source_shards": shards,
    "largest_shard": max(shards),
    "layer": layer,
    "bound": int(1.3 * max(shards)) + layer,
    "largest_device_slice": device_shard,
    "device_bound": int(1.3 * device_shard) + layer,
    "steps": steps,
    "compared": compared,
  }
  shutil.rmtree(args.workdir / "source")
  for step in STEPS:
    (args.workdir / f"{step}.json").unlink()
  args.out.write_text(json.dumps(summary, indent=2) + "\n")
  args.out.with_suffix(".md").write_text(report(summary))
  print(report(summary))


if __name__ == "__main__":
  main()
