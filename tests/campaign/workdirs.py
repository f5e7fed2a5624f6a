"""The kinds of file that a run writes into its workdir, or into its caches, and reads again."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil

import exact_records
import numpy as np
import tiny
from files import Kind
from mutations import damage_bytes, damage_json, damage_lines
from openai_server import completion
from run import test_checkpoint as checkpoints

from steptool_jax.data import trajectories
from steptool_jax.run.studies import grid, pages
from steptool_jax.run.training import restore
from steptool_jax.run.workdir import checkpoint, lock, outputs
from steptool_jax.simulators import render
from steptool_jax.simulators.endpoint import Endpoint
from steptool_jax.toolbench.simulators.cache import Cache
from steptool_jax.toolbench.simulators.virtual import VirtualRequest, VirtualResponse
from steptool_jax.validation import to_json

HELD = contextlib.ExitStack()  # locks of living runs


def make(folder: pathlib.Path) -> dict[str, Kind]:
  """name -> Kind, each in a folder of its own."""
  return {**_checkpoints(folder), **_run(folder), **_locks(folder), **_caches(folder)}


def _checkpoints(folder: pathlib.Path) -> dict[str, Kind]:
  """Damage to the newest of two: it, or the one before, is restored with all its bits."""
  import jax

  def place(name):
    checkpoints.write(folder / name, 1, 2)
    return folder / name / "checkpoints/2"

  def whole(directory):
    workdir = directory.parents[1]

    def read():
      state, meta, _ = checkpoint.newest(workdir, checkpoints.abstract_of)
      number = meta["done"]
      assert meta == {"done": number}, meta
      jax.tree.map(np.testing.assert_array_equal, state, checkpoints.state(number))

    return read

  meta, check, arrays, manifest = map(place, ("c-meta", "c-check", "c-arrays", "c-manifest"))
  return {
    "checkpoint's meta": Kind(meta / "meta/metadata", damage_json, whole(meta)),
    "checkpoint's check": Kind(check / "check/metadata", damage_json, whole(check)),
    "checkpoint's arrays": Kind(checkpoints.largest(arrays), damage_bytes, whole(arrays)),
    "checkpoint's manifest": Kind(manifest / "state/manifest.ocdbt", damage_bytes, whole(manifest)),
  }


def _run(folder: pathlib.Path) -> dict[str, Kind]:
  config = tiny.make()

  def place(name):
    out = folder / name
    out.mkdir()
    (out / "config.json").write_text(to_json(config))
    (out / "inputs.json").write_text(json.dumps({"model.tokenizer": "0" * 32}, indent=2))
    lines = [json.dumps({"step": n, "train/reward": 0.5}) for n in range(4)]
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (out / "summary.json").write_text(json.dumps({"mode": "train", "pass_rate_rl": 0.5}))
    record = dataclasses.replace(exact_records.RECORD, metadata={})
    trajectories.write_trajectories(out / "moments/heldout_rl.jsonl", [record])
    return out

  digests, resumed, summary, page = map(place, ("w-inputs", "w-metrics", "w-summary", "w-page"))
  study = folder / "w-study"
  cells = [grid.Planned(f"c{n}", "g", "e", "m", n, {"seed": str(n)}) for n in range(2)]
  grid.write_plan(study, cells)
  cell = grid.folder(study, cells[0].name)
  grid.write_state(cell, grid.read_state(cell))

  def go_on():
    """A resumed run's records and its new one, all readable."""
    writer = outputs.MetricsWriter(resumed, 4, 3)
    writer.write(4, "train", {"reward": 0.25})
    writer.close()
    found = outputs.read_jsonl(resumed / "metrics.jsonl")
    assert len(found) == writer.records, "records that nobody can read"
    assert found[-1] == {"step": 4, "train/reward": 0.25}
    shutil.rmtree(resumed / "tensorboard")

  def summarise():
    outputs.write_summary(summary, "evaluate", {"pass_rate": 0.25})
    written = json.loads((summary / "summary_evaluate.json").read_text())
    pages.write_run(summary, 5)
    return written

  def reported(workdir):
    return lambda: pages.write_run(workdir, 5).trajectories

  def planned():
    found = grid.read_plan(study)
    return None if found is None else [grid.read_state(grid.folder(study, c.name)) for c in found]

  plan = next(path for path in study.iterdir() if path.is_file())
  return {
    "digests of inputs": Kind(
      digests / "inputs.json",
      damage_json,
      lambda: restore.refuse_other_config(config, digests, only=("train.",)),
      str(digests),
    ),
    "metrics.jsonl of a resumed run": Kind(resumed / "metrics.jsonl", damage_lines, go_on),
    "summary.json": Kind(summary / "summary.json", damage_json, summarise),
    "recorded conversations": Kind(page / "moments/heldout_rl.jsonl", damage_lines, reported(page)),
    "plan of a study": Kind(plan, damage_json, planned),
  }


def _locks(folder: pathlib.Path) -> dict[str, Kind]:
  lock.BEAT_S = 0.02  # a process of another machine is waited for

  def place(name, process):
    out = folder / name
    out.mkdir()
    owner = {"host": "h", "machine": lock._machine(), "process": process, "mode": "train"}
    (out / "lock").write_text(json.dumps(owner | {"since": "today", "beat": "000000000000"}))
    return out

  def take(workdir):
    def read():
      with lock.held(workdir, "train"):
        pass

    return read

  ended, living = place("l-ended", 2**22 - 3), place("l-living", os.getpid())
  # By this process, which mends the file at every beat.
  HELD.enter_context(lock.held(living, "train"))
  return {
    "lock of an ended run": Kind(ended / "lock", damage_json, take(ended)),
    "lock of a living run": Kind(
      living / "lock", damage_json, take(living), str(living), "refused"
    ),
  }


def _caches(folder: pathlib.Path) -> dict[str, Kind]:
  """A damaged answer is asked for again, or is not there."""
  (folder / "k-kept").mkdir()
  endpoint = Endpoint("http://127.0.0.1:9", "m", cache_dir=folder / "k-kept")
  good = completion("well")
  endpoint._ask = lambda content: good
  asked = [{"role": "user", "content": "x"}]
  endpoint.chat(asked)
  (kept,) = (folder / "k-kept").rglob("*.json")

  def reply():
    return endpoint.chat(asked).text

  place = folder / "k-recorded/News_Media/ip_lookup_for_News_Media"
  place.mkdir(parents=True)
  entries = {f"{{'a': {n}}}": {"error": "", "response": {"n": n}} for n in range(5)}
  (place / "find.json").write_text(json.dumps(entries))
  request = VirtualRequest("News, Media", "IP Lookup", "find", {"a": 1})

  def recorded():
    cache = Cache(folder / "k-recorded")
    try:
      found = [cache.answer(request), *(answer for _, answer in cache.examples(request))]
      return render.as_json(found, 1000)  # as the model sees them
    finally:
      cache.close()

  def rewritten():
    cache = Cache(None, folder / "k-written")
    try:
      cache.append(request, VirtualResponse("", "seen"))
      found = cache.answer(request)
      assert found is not None, "what was kept is lost"
      return found
    finally:
      cache.close()

  rewritten()
  written = next(path for path in (folder / "k-written").iterdir() if path.is_file())
  return {
    "kept reply": Kind(kept, damage_json, reply),
    "recorded answers": Kind(place / "find.json", damage_json, recorded),
    "written answers": Kind(written, damage_bytes, rewritten, str(written.parent)),
  }
