"""Kills (SIGKILL) at random moments, by fixed seeds: training, checkpoints, export, report.

After every kill the same command goes on. In the end the weights and all of the optimizer's state,
metrics, results, recorded conversations and exported files are, bit by bit, those of a run that
nobody killed. What depends on the clock is left out, and the sampler's log-probs, whose last bits
do (tests/run/resuming.py says why).
"""

import collections
import contextlib
import itertools
import json
import random
import shutil

import figures
import pytest
import resuming
import tiny
from forks import Forks, alive, kill_at

pytestmark = pytest.mark.campaign
RUN = (
  *("--config.sft.steps=4", "--config.sft.checkpoint_every=1", "--config.train.iterations=4"),
  *("--config.checkpoint.every=1", "--config.checkpoint.keep=2", "--config.loss.kl_adaptive=True"),
  *("--config.train.export=True", "--config.record.train=4"),
  *("--config.record.every=1", "--config.evaluation.selection=2"),
)
# Its conversations of an iteration are sampled before the update of the one before it.
LAG = (
  *("--config.rollout.lag=1", "--config.sft.steps=2", "--config.train.iterations=6"),
  *("--config.checkpoint.every=1", "--config.record.train=4", "--config.record.every=1"),
)
# Its conversations of three LLM calls go on for three iterations.
CARRY = (
  *("--config.rollout.carry=1", "--config.train.iterations=6", "--config.checkpoint.every=1"),
  *("--config.record.train=4", "--config.record.every=1"),
)
STORED = ("--config.algorithm=ppo", "--config.data.passes=3", "--config.sft.steps=0")
CLOCKS = ("seconds", "peak_rss_gib", "tokens_per_second")
# What a kill waits for, and seconds of the random delay after it, at most.
WORK, WRITE = (("start", 2.0), ("work", 0.5), ("checkpoint", 0.05)), ("work", 0.05)
MOMENTS = {
  "train": (*WORK, WRITE, ("checkpoint", 0.05), ("export", 0.1)),
  "lag": (*WORK, WRITE),
  "carry": (*WORK, WRITE),
  "stored": WORK,
  "export": (("start", 2.0), ("export", 0.1)),
  "report": (("start", 0.5), ("page", 0.004)),
}
KILLS = {"train": 22, "lag": 10, "carry": 10, "stored": 8, "export": 8, "report": 8}
LEFT = {"checkpoint": "checkpoints/*tmp*", "export": "*export.new*", "page": ".report.html.*"}


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
  compiled = tmp_path_factory.mktemp("compiled")
  found = Forks(tiny.environment() | {"JAX_COMPILATION_CACHE_DIR": str(compiled)})
  yield found
  found.close()


@pytest.fixture(scope="module")
def whole(forks, tmp_path_factory):
  """(workdir, words) by kind of command, each run once to its end."""
  folder = tmp_path_factory.mktemp("whole")
  cache = f"--config.compilation_cache={folder / 'compiled'}"
  usual, calls = (f"--config={tiny.ROOT}/tests/run/tiny.py{arg}" for arg in ("", ":calls"))
  data = f"--config.data.path={folder}/train/moments/train_*.jsonl"
  commands = {
    "train": (folder / "train", [usual, cache, *RUN]),
    "lag": (folder / "lag", [usual, cache, *LAG]),
    "carry": (folder / "carry", [calls, cache, *CARRY]),
    "stored": (folder / "stored", [usual, cache, *STORED, data]),
    "export": (folder / "train", [usual, cache, *RUN, "--mode=export"]),
    "report": (folder / "train", [usual, cache, *RUN, "--mode=report"]),
  }
  for workdir, words in commands.values():
    ended(forks, workdir, words)
  return commands


def command(workdir, words):
  return [*words, f"--workdir={workdir}"]


def ended(forks, workdir, words):
  log = workdir.parent / f"{workdir.name}.log"
  forks.start(log, command(workdir, words))
  status, text = forks.wait(), log.read_text(errors="replace")
  assert status == 0, text[-3000:]
  assert "Traceback" not in text, text[-3000:]


def event(moment, workdir, records):
  """What tells that the moment has come; "work": that so many more records are written."""
  seen, left = [], records

  def more() -> bool:
    nonlocal seen, left
    with contextlib.suppress(OSError):
      now = (workdir / "metrics.jsonl").read_bytes().splitlines()
      left -= max(0, len(now) - len(seen)) if seen else 0
      seen = now
    return left <= 0

  if moment == "start":
    return lambda: True
  return more if moment == "work" else lambda: any(workdir.glob(LEFT[moment]))


def hit(workdir) -> str:
  """What the kill cut off, by what it has left."""
  left = [name for name, pattern in LEFT.items() if any(workdir.glob(pattern))]
  if left:
    return left[0]
  try:
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
  except (OSError, IndexError, ValueError):
    return "start"
  return "sft" if any(key.startswith("sft") for key in last) else "rl"


@pytest.mark.parametrize("kind", KILLS)
@pytest.mark.timeout(600)
def test_kills(kind, forks, whole, tmp_path, capsys):
  """Half-written state that is taken for whole, work that is lost or done twice."""
  reference, words = whole[kind]
  hits, runs, moments = collections.Counter(), itertools.count(), itertools.cycle(MOMENTS[kind])
  while hits.total() < KILLS[kind]:
    number = next(runs)
    assert number < 4 * KILLS[kind], f"the kills come too late: {hits}"
    workdir = tmp_path / f"{kind}{number}" / reference.name  # a page says the name
    workdir.parent.mkdir()
    if kind in ("export", "report"):
      shutil.copytree(reference, workdir)
      if kind == "export":
        shutil.rmtree(workdir / "export")
      else:
        (workdir / "report.html").unlink()
    rng = random.Random(f"{kind}/{number}")
    for _ in range(rng.randint(2, 6)):
      moment, most = next(moments)
      log = tmp_path / "killed.log"
      process = forks.start(log, command(workdir, words))
      killed = kill_at(process, rng.uniform(0, most), event(moment, workdir, rng.randint(1, 3)))
      status = forks.wait()
      assert "Traceback" not in log.read_text(errors="replace"), log.read_text()[-3000:]
      if not killed:
        assert status == 0, log.read_text()[-3000:]
        break
      assert not alive(process)
      hits[hit(workdir)] += 1
    ended(forks, workdir, words)
    assert_equal(kind, workdir, reference)
    shutil.rmtree(workdir)
  figures.add(f"kills, {kind}", hits.total(), dict(hits))
  with capsys.disabled():
    print(f"\n{kind}: {hits.total()} kills, {dict(hits)}, {next(runs)} runs, all bit-equal")


def assert_equal(kind, workdir, reference):
  if kind == "report":
    assert (workdir / "report.html").read_bytes() == (reference / "report.html").read_bytes()
    return
  assert files(workdir / "export") == files(reference / "export")
  resuming.assert_same_run(workdir, reference)
  assert results(workdir) == results(reference)
  assert conversations(workdir) == conversations(reference)
  assert not [p for pattern in LEFT.values() for p in workdir.glob(pattern)], "left behind"


def files(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def results(workdir):
  found = json.loads((workdir / "summary_train.json").read_text())
  return {key: value for key, value in found.items() if key not in CLOCKS}


def conversations(workdir):
  """{file: its trajectories without the sampler's log-probs and how long calls took}."""

  def timeless(line):
    found = json.loads(line)
    for step in found["steps"]:
      del step["logprobs"]
      if step.get("observation"):
        del step["observation"]["seconds"]
    return found

  return {
    path.name: [timeless(line) for line in path.read_text().splitlines()]
    for path in sorted((workdir / "moments").glob("*.jsonl"))
  }
