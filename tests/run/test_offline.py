"""--mode=train on stored trajectories."""

import collections
import contextlib
import dataclasses
import json
import tracemalloc
import types

import jax
import numpy as np
import oracles
import pytest
import stored
from data import exact_records
from resuming import assert_same_run, saved
from toolbench.official_rows import CALL, FINISH, row

from steptool_jax.data import annotated_trajectories
from steptool_jax.data.trajectories import AnnotatedTrajectory, write_trajectories
from steptool_jax.run import train
from steptool_jax.run.data import offline
from steptool_jax.run.parts import build
from steptool_jax.run.training import behaviour, iteration, phase
from steptool_jax.run.workdir.outputs import read_jsonl
from steptool_jax.toolbench.formats import conversations, training_rows
from steptool_jax.types import Finish, Status, Step, Trajectory

TOKENS = 320


@pytest.fixture(scope="module")
def rows():
  """Ten rows of one to three calls with rewards of their own."""
  out = []
  for n in range(10):
    calls = n % 3 + 1
    rewards = (*((k + 1) / (n + k + 2) for k in range(calls)), n % 2 / 2)
    made = row("chatml_react", rewards, f"Rain {n}?", f"rain {n}", (*[CALL] * calls, FINISH))
    out.append(made)
  return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
  """tokenizer/ and rows.csv."""
  out = tmp_path_factory.mktemp("stored")
  stored.tokenizer(out / "tokenizer", [t for r in rows for t in (*r.prompts, *r.responses)])
  stored.write_rows(out / "rows.csv", rows)
  return out


@pytest.fixture(scope="module")
def offline_config(folder, compiled):
  def make(**changes):
    changes = {"data__path": str(folder / "rows.csv")} | changes
    return stored.make(folder / "tokenizer", compiled, TOKENS, **changes)

  return make


@contextlib.contextmanager
def recording():
  """Every batch that `prepare` makes meanwhile, [B, T] each."""
  found = []
  compile_programs = phase.update.compile_programs

  def with_recorded(learner):
    prepare, update = compile_programs(learner)

    def recorded(*args):
      batch, metrics = prepare(*args)
      found.append(jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), jax.device_get(batch)))
      return batch, metrics

    return recorded, update

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(phase.update, "compile_programs", with_recorded)
    yield found


@pytest.fixture
def prepared():
  with recording() as found:
    yield found


ADAPTIVE = {"checkpoint__every": 2, "loss__kl_adaptive": True}


@pytest.fixture(scope="module")
def whole(offline_config, tmp_path_factory):
  """(summary, workdir, batches) of two passes that nobody stopped."""
  workdir = tmp_path_factory.mktemp("whole")
  with recording() as found:
    return train.run(offline_config(**ADAPTIVE), workdir), workdir, found


def segments(batch):
  """(row, positions) of every trajectory in a batch."""
  for r in range(batch.tokens.shape[0]):
    for segment in range(1, int(batch.segment_ids[r].max()) + 1):
      yield r, np.flatnonzero(batch.segment_ids[r] == segment)


def by_trajectory(batches, field):
  """Tokens of a trajectory -> its values of `field` on action tokens, one array a batch."""
  out = collections.defaultdict(list)
  for batch in batches:
    for r, here in segments(batch):
      mask = batch.action_mask[r, here]
      out[batch.tokens[r, here].tobytes()].append(getattr(batch, field)[r, here][mask])
  return out


def assert_advantages(batches, rows, level, gamma=0.99, lam=0.95):
  """Rewards on tokens and advantages, trajectory by trajectory, against the slow oracles."""
  wanted = collections.Counter(tuple(np.float32(r.rewards).tolist()) for r in rows)
  assert any(np.any(batch.values[batch.action_mask]) for batch in batches), "no value to speak of"
  found = collections.Counter()
  for batch in batches:
    assert not batch.rewards[~batch.step_end].any(), "a reward beside a step's last token"
    for r, here in segments(batch):
      action, end = batch.action_mask[r, here], batch.step_end[r, here]
      values, got = batch.values[r, here], batch.advantages[r, here]
      rewards = batch.rewards[r, here][end]
      found[tuple(rewards.tolist())] += 1
      if level == "released":
        expected = oracles.gae_released(rewards, values, action, end, gamma, lam)
      else:
        steps = batch.step_ids[r, here]
        first = [np.flatnonzero(steps == k)[0] for k in range(len(rewards))]
        per_step = oracles.gae_steps(rewards, values[first], 0.0, gamma, lam)
        expected = np.where(action, per_step[np.maximum(steps, 0)], 0.0)
      np.testing.assert_allclose(got, expected, atol=2e-5)
  return wanted, found


PLAIN = {"advantage__whiten": False, "loss__kl": "none"}


@pytest.mark.parametrize("level", ["step", "released"])
def test_rewards_and_advantages_of_the_level(level, rows, offline_config, prepared, tmp_path):
  train.run(offline_config(advantage__level=level, **PLAIN), tmp_path)
  wanted, found = assert_advantages(prepared, rows, level)
  assert found == collections.Counter({k: 2 * n for k, n in wanted.items()})


def test_a_run_over_stored_rows(whole):
  summary, workdir, _ = whole
  assert json.loads((workdir / "summary.json").read_text()) == summary
  assert (summary["iterations"], summary["conversations"]) == (6, 20)  # 4, 4, 2; twice
  data = summary["data"]
  assert (data["total"], data["kept"], data["recorded_logprobs"], data["passes"]) == (10, 10, 0, 2)
  assert data["left_out"] == {
    **{"too_long": 0, "infrastructure_error": 0, "no_steps": 0, "held_out": 0, "duplicates": 0}
  }
  assert summary["heldout_tasks"] == 0
  assert not any(name.startswith("pass_rate") for name in summary)
  records = read_jsonl(workdir / "metrics.jsonl")
  assert len(records) == 6
  assert all(np.isfinite(list(r.values())).all() for r in records)
  assert records[0]["train/sampler_gap"] < 1e-4
  assert records[-1]["train/sampler_gap"] > 1e-3, "nothing was learnt"
  assert not any("heldout" in name for r in records for name in r)


def test_old_logprobs_are_those_of_the_start_in_every_pass(whole):
  _, _, prepared = whole
  passes = by_trajectory(prepared, "old_logprobs")
  assert [len(found) for found in passes.values()] == [2] * 10
  reference = by_trajectory(prepared, "ref_logprobs")  # the policy before training
  for tokens, (first, second) in passes.items():
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, reference[tokens][0], atol=1e-4)
    assert (first < 0).all()


def test_old_logprobs_of_the_release_move(offline_config, prepared, tmp_path):
  train.run(offline_config(data__behaviour="current"), tmp_path)
  moved = [np.abs(a - b).max() for a, b in by_trajectory(prepared, "old_logprobs").values()]
  assert min(moved) > 1e-3


@pytest.fixture(scope="module")
def recorded(folder, rows, compiled):
  """The rows as our own records, with log-probs that somebody recorded."""
  config = stored.make(folder / "tokenizer", compiled, TOKENS)
  chat_format = build.build_chat_format(config, folder)
  result = conversations.from_step_rows(rows, chat_format, TOKENS, "made")
  rng = np.random.default_rng(0)

  def with_logprobs(record):
    steps = tuple(
      dataclasses.replace(s, logprobs=rng.uniform(-9, -1, len(s.tokens)).astype(np.float32))
      for s in record.trajectory.steps
    )
    trajectory = dataclasses.replace(record.trajectory, steps=steps)
    return dataclasses.replace(record, trajectory=trajectory, logprobs_known=True)

  return [with_logprobs(record) for record in result.records]


def _unknown(record):
  """The record as if nobody had recorded its log-probs."""
  steps = tuple(
    dataclasses.replace(s, logprobs=np.full(len(s.tokens), np.nan, np.float32))
    for s in record.trajectory.steps
  )
  return AnnotatedTrajectory(dataclasses.replace(record.trajectory, steps=steps), False)


def test_recorded_logprobs_stay(recorded, offline_config, prepared, tmp_path):
  path = tmp_path / "t.jsonl"
  write_trajectories(path, [_unknown(recorded[0]), *recorded[1:]])
  config = offline_config(data__path=str(path), data__format="jsonl", data__passes=1)
  summary = train.run(config, tmp_path)
  assert summary["data"]["recorded_logprobs"] == 9
  old = [x for xs in by_trajectory(prepared, "old_logprobs").values() for x in xs]
  wanted = [np.concatenate([s.logprobs for s in r.trajectory.steps]) for r in recorded[1:]]
  exact = [w for w in wanted if any(len(w) == len(o) and (w == o).all() for o in old)]
  assert len(exact) == 9
  assert np.isfinite(np.concatenate(old)).all()


def load(config, folder, held_out=()):
  chat_format = build.build_chat_format(config, folder)
  shape = types.SimpleNamespace(vocab_size=700, max_position_embeddings=config.rollout.max_tokens)
  return offline.load(config, chat_format, shape, held_out)


def ids(trajectory):
  parts = [(step.tokens, step.observation_tokens) for step in trajectory.steps]
  return [array.tolist() for pair in parts for array in pair]


def test_what_cannot_be_trained_on_is_counted_and_nothing_is_cut(
  recorded, offline_config, tmp_path
):
  lengths = [r.trajectory.num_tokens for r in recorded]
  limit = sorted(lengths)[6]
  down = dataclasses.replace(recorded[0].trajectory, status=Status.INFRASTRUCTURE_ERROR)
  empty = dataclasses.replace(recorded[0].trajectory, steps=(), status=Status.TOKEN_BUDGET)
  odd = [AnnotatedTrajectory(down), AnnotatedTrajectory(empty)]
  path = tmp_path / "t.jsonl"
  write_trajectories(path, [*odd, *recorded])
  for more in ({"rollout__max_tokens": limit}, {"train__row_tokens": limit}):
    changes = {"train__row_tokens": TOKENS, "rollout__max_tokens": limit} | more
    data = load(offline_config(data__path=str(path), data__format="jsonl", **changes), tmp_path)
    report = data.report
    long = sum(length > limit for length in lengths)
    assert 0 < long < 10
    assert (report["total"], report["kept"], report["max_tokens"]) == (12, 10 - long, limit)
    other = {"infrastructure_error": 1, "no_steps": 1, "held_out": 0, "duplicates": 0}
    assert report["left_out"] == {"too_long": long, **other}
    assert len(report["left_out_names"]["too_long"]) == long
    fitting = [r.trajectory for r in recorded if r.trajectory.num_tokens <= limit]
    assert [ids(t) for t in data] == [ids(t) for t in fitting]


def test_held_out_tasks_are_not_learnt_from(recorded, offline_config, tmp_path):
  """A run's moments hold them, too; the pass rate was then that of tasks that it had learnt."""
  records = by_task(recorded, 5, lambda n: n % 3 / 2)
  held = records[0].trajectory.task_id
  write_trajectories(tmp_path / "t.jsonl", records)
  changes = {"train__row_tokens": TOKENS, "rollout__max_tokens": TOKENS}
  config = offline_config(data__path=str(tmp_path / "t.jsonl"), data__format="jsonl", **changes)
  data = load(config, tmp_path, {held})
  assert held not in {t.task_id for t in data}
  count = sum(r.trajectory.task_id == held for r in records)
  assert (data.report["kept"], data.report["left_out"]["held_out"]) == (10 - count, count)
  with pytest.raises(ValueError, match="none of the 10.*'held_out': 10"):
    load(config, tmp_path, {r.trajectory.task_id for r in records})


@pytest.mark.parametrize("algorithm", ["steptool", "grpo_step"])
def test_what_stands_twice_in_the_data_is_trained_on_once(
  algorithm, recorded, offline_config, tmp_path
):
  """Two files with one trajectory weighed it twice, silently; another sample is no twin."""
  recorded = by_task(recorded, 4, lambda n: n % 3 / 2)
  again = dataclasses.replace(recorded[3].trajectory, sample=99)
  other = dataclasses.replace(recorded[3], trajectory=again)
  config = {"algorithm": algorithm, "train__row_tokens": TOKENS, "rollout__max_tokens": TOKENS}
  found = []
  for name, records in (("once", [*recorded, other]), ("twice", [*recorded, recorded[2], other])):
    write_trajectories(tmp_path / f"{name}.jsonl", records)
    path = str(tmp_path / f"{name}.jsonl")
    found.append(load(offline_config(data__path=path, data__format="jsonl", **config), tmp_path))
  once, twice = found
  assert (once.report["kept"], once.report["left_out"]["duplicates"]) == (11, 0)
  assert (twice.report["kept"], twice.report["left_out"]["duplicates"]) == (11, 1)
  twin = recorded[2].trajectory
  (named,) = twice.report["left_out_names"]["duplicates"]
  assert named.startswith(f"{twin.task_id}, sample {twin.sample} ")
  assert [ids(t) for t in twice.batch(0)] == [ids(t) for t in once.batch(0)]
  assert twice.most == once.most


def test_official_rows_that_are_too_long_are_named(rows, folder, offline_config, tmp_path):
  long = row("chatml_react", rows[4].rewards, "Rain 4?", "z! " * 400, rows[4].responses)
  path = stored.write_rows(tmp_path / "rows.csv", [*rows[:4], long, *rows[5:]])
  report = load(offline_config(data__path=str(path)), tmp_path).report
  assert (report["total"], report["kept"], report["left_out"]["too_long"]) == (10, 9, 1)
  assert "rows.csv:5 (" in report["left_out_names"]["too_long"][0]


def test_an_outcome_algorithm_sees_the_last_reward_only(rows, folder, offline_config):
  data = load(offline_config(algorithm="ppo"), folder)
  found = [[step.reward for step in t.steps] for t in data]
  assert found == [[0.0] * (len(r.rewards) - 1) + [r.rewards[-1]] for r in rows]
  data = load(offline_config(), folder)
  found = [[step.reward for step in t.steps] for t in data]
  assert found == [list(r.rewards) for r in rows]


@contextlib.contextmanager
def stopped_after(iterations):
  """A run is asked to stop, as by SIGTERM, in its iteration of this number."""
  run_iteration = iteration.run_iteration

  def stopping(parts, learner, recorder, data):
    if learner.progress.done == iterations - 1:
      parts.stop.request()
    return run_iteration(parts, learner, recorder, data)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(iteration, "run_iteration", stopping)
    yield


def test_a_resumed_run_is_bit_equal(whole, offline_config, tmp_path):
  config = offline_config(**ADAPTIVE)
  with stopped_after(3):
    assert train.run(config, tmp_path)["interrupted"] is True
  assert saved(tmp_path)[1]["done"] == 3
  assert train.run(config, tmp_path)["interrupted"] is False
  assert_same_run(tmp_path, whole[1])


def test_other_data_are_refused_at_a_resume(rows, folder, offline_config, tmp_path):
  path = stored.write_rows(tmp_path / "rows.csv", rows)
  config = offline_config(data__path=str(path))
  with stopped_after(1):
    train.run(config, tmp_path)
  other = dataclasses.replace(rows[3], rewards=(0.125, *rows[3].rewards[1:]))
  stored.write_rows(path, [*rows[:3], other, *rows[4:]])
  with pytest.raises(ValueError, match=r"the content of config\.data\.path is not what it was"):
    train.run(config, tmp_path)
  (tmp_path / "inputs.json").unlink()  # as in a workdir of an older version
  with pytest.raises(ValueError, match="are not those that the run in .* began with"):
    train.run(config, tmp_path)
  # Of log-probs that are mapped nobody looked at the check sums: a flipped bit was trained on.
  kept = tmp_path / "behaviour.npz"
  content = bytearray(kept.read_bytes())
  content[content.index(b"'<f4'") + 200] ^= 1
  kept.write_bytes(content)
  with pytest.raises(ValueError, match=r"behaviour\.npz is damaged \(its check sums are wrong"):
    train.run(config, tmp_path)


def test_every_pass_visits_all_once_in_its_own_order():
  nothing = Trajectory("t", 0, np.zeros(1, np.int32), (), Status.ANSWERED)
  made = [AnnotatedTrajectory(dataclasses.replace(nothing, sample=n)) for n in range(10)]
  index = offline.Index(lambda trajectory: trajectory, by_task=False)
  for n, record in enumerate(made):
    index.add(n, record)
  data = index.data(made, size=4, seed=3, report={})
  assert data.batches_per_pass == 3
  orders = [[t.sample for k in range(3) for t in data.batch(3 * p + k)] for p in range(2)]
  assert [len(data.batch(k)) for k in range(3)] == [4, 4, 2]
  assert [sorted(order) for order in orders] == [list(range(10))] * 2
  assert orders[0] != orders[1]


def by_task(recorded, tasks, solved):
  """The records, as samples of `tasks` tasks; solved(n) says how record n ended."""
  return [
    dataclasses.replace(
      r, trajectory=dataclasses.replace(r.trajectory, task_id=f"t{n % tasks}", solved=solved(n))
    )
    for n, r in enumerate(recorded)
  ]


def test_all_samples_of_a_task_come_in_one_batch(recorded, offline_config, tmp_path):
  path = tmp_path / "t.jsonl"
  write_trajectories(path, by_task(recorded, 4, lambda n: n % 3 / 2))  # 3, 3, 2, 2 samples
  common = {"data__path": str(path), "data__format": "jsonl", "data__batch": 3}
  data = load(offline_config(algorithm="grpo", **common), tmp_path)
  assert (data.batches_per_pass, data.most) == (2, 8)
  for number in range(4):
    found = collections.Counter(t.task_id for t in data.batch(number))
    assert len(found) == (3, 1)[number % 2]
    assert all(count == (3, 3, 2, 2)[int(task[1])] for task, count in found.items())
  assert load(offline_config(**common), tmp_path).most == 3


def test_pairs_of_stored_samples_train(recorded, offline_config, tmp_path):
  path = tmp_path / "t.jsonl"
  write_trajectories(path, by_task(recorded, 4, lambda n: float(n < 4)))
  config = offline_config(
    algorithm="eto", data__path=str(path), data__format="jsonl", data__passes=1, data__batch=2
  )
  assert train.run(config, tmp_path)["iterations"] == 2
  found = read_jsonl(tmp_path / "metrics.jsonl")
  assert all(r["train/grad_norm"] > 0 for r in found)


@pytest.mark.parametrize(
  ("algorithm", "tasks", "solved", "match"),
  [
    ("grpo", 10, 0.5, r"'grpo' compares samples of a task, but no two of the 10.*'reinforce'"),
    ("eto", 5, 1.0, r"'eto' learns from a success and a failure of the same task.*'steptool'"),
    ("rft", 5, 0.0, r"'rft' learns from a solved trajectory, and the 10.*'steptool'"),
  ],
)
def test_data_without_what_an_algorithm_needs_are_refused(
  algorithm, tasks, solved, match, recorded, offline_config, tmp_path
):
  path = tmp_path / "t.jsonl"
  write_trajectories(path, by_task(recorded, tasks, lambda n: solved))
  config = offline_config(algorithm=algorithm, data__path=str(path), data__format="jsonl")
  with pytest.raises(ValueError, match=match):
    load(config, tmp_path)


def test_steptool_on_final_rewards_only_is_refused(rows, folder, offline_config, tmp_path):
  final = [dataclasses.replace(r, rewards=(*[0.0] * len(r.rewards[1:]), 1.0)) for r in rows]
  path = stored.write_rows(tmp_path / "rows.csv", final)
  with pytest.raises(ValueError, match=r"'steptool' learns from step rewards.*'ppo'.*annotate"):
    load(offline_config(data__path=str(path)), tmp_path)
  load(offline_config(data__path=str(path), algorithm="ppo"), tmp_path)


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"data__path": "/absent/*.csv"}, r"config\.data\.path: '/absent/\*\.csv' is no file"),
    ({"rollout__max_tokens": 40, "train__row_tokens": 40}, r"config\.data\.path: none of the 10"),
    ({"data__format": "jsonl"}, r"rows\.csv, line 1"),
    ({"model__chat_format": "hermes"}, r"choose toolllama, chatml_react or llama31"),
  ],
)
def test_bad_input_is_named(changes, match, offline_config, tmp_path):
  with pytest.raises((ValueError, OSError), match=match):
    train.run(offline_config(**changes), tmp_path)
  assert not (tmp_path / "config.json").exists()


def test_bad_settings_are_named(offline_config):
  with pytest.raises(ValueError, match=r"config\.sft\.steps: 2 together with data\.path"):
    offline_config(algorithm="sft", sft__steps=2)
  with pytest.raises(ValueError, match=r"config\.data\.batch: must be above 0"):
    offline_config(data__batch=0)


def test_ids_of_another_tokenizer_are_refused(offline_config, tmp_path):
  ids = np.array([5, 700], np.int32)
  step = Step(ids, np.zeros(2, np.float32), Finish("x"))
  trajectory = Trajectory("t7", 2, ids[:1], (step,), Status.ANSWERED, 1.0)
  path = tmp_path / "t.jsonl"
  write_trajectories(path, [AnnotatedTrajectory(trajectory)])
  with pytest.raises(ValueError, match=r"t\.jsonl, t7, sample 2.*token id 700.*has 700"):
    train.run(offline_config(data__path=str(path), data__format="jsonl"), tmp_path)


# --- array_record ----------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["steptool", "grpo"])
def test_training_from_array_record_is_bit_equal_to_training_from_json_lines(
  algorithm, recorded, offline_config, tmp_path
):
  """A record that random access reads in another place, or less exactly, would change the run."""
  unknown = [_unknown(r) for r in by_task(recorded, 4, lambda n: n % 3 / 2)]
  records = [
    AnnotatedTrajectory(dataclasses.replace(recorded[0].trajectory, steps=())),  # left out
    *(r if n % 3 else u for n, (r, u) in enumerate(zip(recorded, unknown, strict=True))),
  ]
  if algorithm == "grpo":
    records = by_task(records, 4, lambda n: n % 3 / 2)
  write_trajectories(tmp_path / "t.jsonl", records)
  annotated_trajectories.build({"train": records}, tmp_path)
  common = {"algorithm": algorithm, "checkpoint__every": 2}
  a = offline_config(data__path=str(tmp_path / "t.jsonl"), data__format="jsonl", **common)
  b = offline_config(data__path=str(tmp_path), data__format="tfds", **common)
  first, second = train.run(a, tmp_path / "a"), train.run(b, tmp_path / "b")
  assert first["data"] == second["data"]
  assert second["data"]["kept"] == 10
  assert_same_run(tmp_path / "a", tmp_path / "b")
  kept = [(tmp_path / run / "behaviour.npz") for run in "ab"]
  with np.load(kept[0]) as mine, np.load(kept[1]) as theirs:
    assert str(mine["digest"]) == str(theirs["digest"])
    np.testing.assert_array_equal(mine["logprobs"], theirs["logprobs"])


def test_memory_does_not_grow_with_an_array_record(recorded, offline_config, tmp_path):
  """Records that somebody keeps (a list, a cache) would need the room of all of them."""

  def held(count):
    """Bytes that the data of `count` trajectories hold, and the most while they were read."""
    folder = tmp_path / str(count)
    same = recorded[0]
    samples = (dataclasses.replace(same.trajectory, sample=n) for n in range(count))
    records = [dataclasses.replace(same, trajectory=t) for t in samples]
    annotated_trajectories.build({"train": records}, folder)
    config = offline_config(data__path=str(folder), data__format="tfds")
    load(config, folder).batch(0)  # what is made once: imports, caches
    tracemalloc.start()
    try:
      data = load(config, folder)
      for number in range(5):
        data.batch(number)
      assert len(data) == count
      return np.array(tracemalloc.get_traced_memory())
    finally:
      tracemalloc.stop()

  size = sum(array.nbytes for array in offline.token_arrays(recorded[0].trajectory))
  more = (held(600) - held(100)) / 500
  assert (more < 100).all(), more
  assert size > 200, "a trajectory is too small for this to show anything"


def test_an_array_record_folder_that_is_not_there_is_named(offline_config, tmp_path):
  config = offline_config(data__path=str(tmp_path), data__format="tfds")
  with pytest.raises(FileNotFoundError, match=r"config\.data\.path: no dataset in .*build it"):
    load(config, tmp_path)


# --- SFT on stored trajectories --------------------------------------------------------------


def test_sft_imitates_the_last_turn_of_official_dialogues(folder, compiled, tmp_path, monkeypatch):
  turns = [("system", "s"), ("user", "\nRain?\nBegin!\n"), ("assistant", CALL)]
  more = [*turns, ("function", "wet"), ("assistant", FINISH)]
  instances = [
    {"id": "t", "conversations": [{"from": role, "value": text} for role, text in dialogue]}
    for dialogue in (turns, more, [*more[:-1], ("assistant", "x " * TOKENS)])
  ]
  path = tmp_path / "sft.json"
  path.write_text(json.dumps({"9": {"cnt": 3, "instances": instances}}))
  packed = []
  pack = phase.batching.pack
  monkeypatch.setattr(
    phase.batching, "pack", lambda *a, **k: packed.append(pack(*a, **k)) or packed[-1]
  )
  config = stored.make(
    folder / "tokenizer",
    compiled,
    TOKENS,
    algorithm="sft",
    data__path=str(path),
    data__format="dialogues",
    data__passes=6,
    data__batch=2,
  )
  summary = train.run(config, tmp_path / "run")
  assert (summary["data"]["total"], summary["data"]["kept"]) == (3, 2)
  assert summary["data"]["left_out_names"]["too_long"][0].startswith(f"{path}:3 (")
  assert summary["iterations"] == 6
  codec = build.build_chat_format(config, tmp_path / "run").codec
  for batch, *_ in packed:
    learnt = [
      codec.decode(batch.targets[r, here][batch.action_mask[r, here]])
      for r, here in segments(batch)
    ]
    assert sorted(learnt) == sorted([f"{CALL}<|im_end|>", f"{FINISH}<|im_end|>"])
  losses = [record["sft/loss"] for record in read_jsonl(tmp_path / "run/metrics.jsonl")]
  assert len(losses) == 6
  assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"data__format": "dialogues"}, "'dialogues' hold no rewards.*algorithm sft"),
    ({"algorithm": "sft", "sft__steps": 3}, "data.passes and data.batch decide.*set it to 0"),
    ({"algorithm": "sft", "data__path": ""}, "or name stored ones with data.path"),
  ],
)
def test_sft_and_stored_data_that_do_not_go_together(changes, match, offline_config):
  with pytest.raises(ValueError, match=match):
    offline_config(**changes)


# --- the released sample rows ----------------------------------------------------------------


def test_the_released_rows_train_for_two_passes(shared, prepared, compiled, tmp_path):
  pattern = str(shared / "steptool/data_train/*/step_grained_for_ppo_example.csv")
  paths = offline.files(pattern, "data.path")
  rows = [r for path in paths for r in training_rows.read_step_rows(path)]
  assert len(rows) == 30
  texts = [t for r in rows for t in (*r.prompts, *r.responses)]
  tokenizer = stored.tokenizer(tmp_path / "tokenizer", texts, vocab_size=3000)
  config = stored.make(
    tokenizer,
    compiled,
    1664,
    model__architecture__vocab_size=3000,
    model__architecture__num_layers=1,
    model__architecture__num_heads=2,
    data__path=pattern,
    data__batch=8,
    train__optimizer__learning_rate=1e-3,
    **PLAIN,
  )
  summary = train.run(config, tmp_path)
  assert (summary["data"]["total"], summary["data"]["kept"]) == (30, 30)
  assert (summary["iterations"], summary["conversations"]) == (8, 60)
  wanted, found = assert_advantages(prepared, rows, "step")
  assert found == collections.Counter({k: 2 * n for k, n in wanted.items()})
  assert all(np.isfinite(list(r.values())).all() for r in read_jsonl(tmp_path / "metrics.jsonl"))


def test_old_log_probs_are_filled_in_calls_of_so_many_rows(tmp_path):
  """A few a call, as `data.batch` says, left most rows of a large mesh empty."""
  records = [exact_records.unknown(exact_records.RECORD)] * 10
  index, calls = offline.Index(lambda t: t, by_task=False), []
  for n, record in enumerate(records):
    index.add(n, record)
  data = index.data(records, 2, 0, {})

  def logprobs(batch):
    calls.append(len(batch.tokens))
    return np.full(batch.tokens.shape, -0.5, np.float32)

  tokens = len(records[0].trajectory.prompt_tokens) + sum(
    len(step.tokens) + len(step.observation_tokens) for step in records[0].trajectory.steps
  )
  filled = behaviour.fill(data, tokens, 6, logprobs, tmp_path)
  assert (len(calls), np.unique(filled.logprobs).tolist()) == (2, [-0.5])


def test_log_probs_of_another_temperature_are_computed_anew():
  """Those of greedy conversations are 0: as PPO's denominator they stopped what it learns."""
  record = exact_records.RECORD
  steps = tuple(
    dataclasses.replace(s, logprobs=np.zeros_like(s.logprobs)) for s in record.trajectory.steps
  )
  greedy = dataclasses.replace(record.trajectory, steps=steps)
  index = offline.Index(lambda t: t, False, temperature=0.7)
  for metadata, trajectory in (
    ({}, record.trajectory),
    ({"temperature": 0.7}, record.trajectory),
    ({"temperature": 1.0}, record.trajectory),
    ({}, greedy),
  ):
    index.add(0, dataclasses.replace(record, metadata=metadata, trajectory=trajectory))
  assert list(index.recorded) == [True, True, False, False]
