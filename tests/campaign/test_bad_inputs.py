"""720 damaged files of every kind that a user can bring or a run writes and reads, by fixed seeds.

    python -m pytest -m campaign tests/campaign            # prints its counts
    STEPTOOL_CAMPAIGN=20 python -m pytest -m campaign …    # twenty times as many

Each is refused with ValueError or OSError that names the file, or read with sound figures: no
traceback of another kind, no hang, no NaN or infinity taken as a figure.
"""

import collections
import os
import random

import figures
import files
import judging
import pytest
import workdirs

pytestmark = pytest.mark.campaign
EACH = 20 * int(os.environ.get("STEPTOOL_CAMPAIGN", "1"))
NAMES = (
  *("config.json of a model", "safetensors", "index of shards", "tokenizer.json"),
  *("tokenizer_config.json", "gguf", "tasks.jsonl", "tools module", "config.json of a workdir"),
  *("metrics.jsonl", "scores.json", "offline jsonl", "tfds records", "tfds description"),
  *("behaviour.npz", "official rows", "official dialogues", "official annotations"),
  *("official results", "converted answers", "official queries", "tool descriptions"),
  *("checkpoint's meta", "checkpoint's check", "checkpoint's arrays", "checkpoint's manifest"),
  *("digests of inputs", "metrics.jsonl of a resumed run", "summary.json", "plan of a study"),
  *("recorded conversations", "lock of an ended run", "lock of a living run", "kept reply"),
  *("recorded answers", "written answers"),
)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
  folder = tmp_path_factory.mktemp("campaign")
  made = files.make(folder) | workdirs.make(folder)
  assert made.keys() == set(NAMES)
  yield made
  workdirs.HELD.close()


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files(kinds, name, capsys):
  kind = kinds[name]
  named = kind.names or kind.path.name
  good = kind.path.read_bytes()
  assert judging.outcome(kind.read, named) == kind.whole, "the file as it was"
  counts, bad = collections.Counter(), []
  for seed in range(EACH):
    rng = random.Random(f"{name}/{seed}")
    if kind.binary:
      damaged = kind.damage(good, rng)
    else:
      damaged = kind.damage(good.decode(), rng).encode("utf-8", "surrogateescape")
    kind.path.write_bytes(damaged)
    found = judging.outcome(kind.read, named)
    counts[found if found in ("refused", "accepted") else "bad"] += 1
    if found not in ("refused", "accepted"):
      bad.append(f"{name}, seed {seed}: {found}")
  kind.path.write_bytes(good)
  figures.add(f"damaged files, {name}", EACH, counts)
  with capsys.disabled():
    print(f"\n{name}: {EACH} damaged, {dict(counts)}")
  assert not bad, "\n".join(bad)
