"""What a run leaves behind; iterations, updates, warm-up, order and keys."""

import collections
import json
import types

import fakes
import faulty_tasks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scripted import bare_phase, scripted

from steptool_jax.learning import batching
from steptool_jax.rollout.chain import Interrupted
from steptool_jax.run import evaluate, train
from steptool_jax.run.data.order import jobs
from steptool_jax.run.parts import build, opening, rollouts
from steptool_jax.run.training import iteration, setup, sft_batches
from steptool_jax.run.workdir import checkpoint
from steptool_jax.run.workdir.outputs import read_jsonl
from steptool_jax.types import Status, TrainState


def test_what_a_run_leaves_behind(tmp_path, compiled):
  summary = train.run(tiny.make(compilation_cache=compiled), tmp_path)
  assert json.loads((tmp_path / "summary.json").read_text()) == summary
  rates = [summary[f"pass_rate_{moment}"] for moment in ("base", "sft", "rl")]
  costs = [summary[name] for name in ("seconds", "peak_rss_gib", "tokens_per_second")]
  assert all(isinstance(number, float) for number in rates + costs)
  assert 0.1 < summary["peak_rss_gib"] < 8
  assert summary["seconds"] > 0.1
  assert summary["tokens_per_second"] > 1
  assert summary["conversations"] == 3 * 4 * 2
  assert (summary["algorithm"], summary["seed"], summary["heldout_tasks"]) == ("steptool", 0, 4)
  assert summary["interrupted"] is False
  assert (tmp_path / "learning_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
  assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
  records = read_jsonl(tmp_path / "metrics.jsonl")
  kinds = [(r["step"], next(k for k in r if k != "step").split("/")[0]) for r in records]
  wanted = "0 heldout, 1 sft, 2 sft, 2 heldout, 3 train, 4 train, 4 heldout, 5 train, 5 heldout"
  assert ", ".join(f"{step} {kind}" for step, kind in kinds) == wanted
  rl = next(r for r in records if "train/kl" in r)
  assert {"train/reward", "train/pass_rate", "train/policy_loss", "train/grad_norm"} <= rl.keys()
  assert rl["train/sampler_gap"] < 1e-3, "log-probs of sampler and trainer agree"


@pytest.mark.parametrize("before", [None, {"mode": "train", "pass_rate_rl": 0.5}])
def test_a_stop_before_anything_is_learnt_is_told(before, tmp_path, monkeypatch):
  """Schedulers that look into the summary took such a run for done, and never began it again."""

  def stopped(*_):
    raise Interrupted

  monkeypatch.setattr(train, "Run", stopped)
  path = tmp_path / "summary_train.json"
  if before:
    path.write_text(json.dumps(before))
  summary = train.run(tiny.make(), tmp_path)
  assert json.loads(path.read_text()) == summary
  assert summary == {"mode": "train"} | (before or {}) | {"interrupted": True}


def test_kinds_of_tasks_have_figures_of_their_own(tmp_path, compiled):
  """Of train, which remembers them when it goes on, and of evaluate."""
  good, held, rich = (record | {"kind": "who"} for record in faulty_tasks.GOOD)
  other = held | {"id": "o", "query": "And Bob's?", "kind": "short"}
  tools = faulty_tasks.TOOLS.replace("untyped(owner)", "untyped(owner: str)")
  config = tiny.make(
    compilation_cache=compiled,
    check__before_training=0,
    rollout__max_tokens=300,
    train__row_tokens=300,
    sft__steps=0,
    train__iterations=1,
    **faulty_tasks.write(tmp_path, [good, held, rich, other], tools),
  )
  kinds = train.run(config, tmp_path / "run")["kinds"]
  assert kinds.keys() == {"pass_rate_base", "pass_rate_sft", "pass_rate_rl"}
  assert all(rates.keys() == {"who", "short"} for rates in kinds.values())
  assert train.run(config, tmp_path / "run")["kinds"] == kinds
  assert evaluate.run(config, tmp_path / "run")["kinds"].keys() == {"who", "short"}


def test_what_nobody_can_grade_is_not_evaluated(tmp_path):
  """Any answer had the verdict 1, and the pass rate was the share of tasks with one."""
  good, held, rich = faulty_tasks.GOOD
  held = held | {"checker": {"type": "none"}}
  tools = faulty_tasks.TOOLS.replace("untyped(owner)", "untyped(owner: str)")
  fields = faulty_tasks.write(tmp_path, [good, held, rich], tools)
  config = tiny.make(rollout__max_tokens=300, train__row_tokens=300, **fields)
  with pytest.raises(ValueError, match=r"evaluation\.tasks: nobody knows whether 1 of"):
    evaluate.run(config, tmp_path / "run")


def test_the_best_checkpoint_is_chosen_by_tasks_that_no_figure_is_of(
  tmp_path, compiled, monkeypatch
):
  """checkpoint.use=best chose by the reported tasks, and mixed evaluations of different size."""
  asked = []

  def figures(parts, variables, tasks, label, temperature):
    asked.append((label, [task.id for task in tasks], temperature))
    return {"pass_rate": 0.5 if "to choose" in label else 0.9}, []

  monkeypatch.setattr(rollouts, "evaluate_policy", figures)
  config = tiny.make(
    compilation_cache=compiled, evaluation__selection=3, evaluation__temperature=1.0
  )
  train.run(config, tmp_path)
  reported = {id for label, ids, _ in asked if "to choose" not in label for id in ids}
  choosing = [ask[1:] for ask in asked if "to choose" in ask[0]]
  assert len(choosing) == 3  # after SFT, in between, at the end; before training there is none
  assert all(ask == choosing[0] and ask[1] == 0 for ask in choosing)
  assert len(choosing[0][0]) == 3
  assert not reported & set(choosing[0][0])
  assert set(checkpoint.read_scores(tmp_path).values()) == {0.5}
  with pytest.raises(ValueError, match=r"different: evaluation\.selection"):
    train.run(tiny.replace(config, evaluation__selection=2), tmp_path)
  with pytest.raises(ValueError, match=r"selection: 8, but of 10 .* the first 4 are reported"):
    train.run(tiny.replace(config, evaluation__selection=8), tmp_path / "other")


# --- one iteration with scripted conversations ---


def test_infrastructure_errors_never_reach_the_update(tmp_path):
  with scripted(tiny.make(), tmp_path, broken={1}) as iterations:
    figures = iterations.run()
  assert figures["infrastructure_errors"] == 4
  assert [(t.sample, t.status) for t in iterations.learnt] == [(0, Status.ANSWERED)] * 4
  assert iterations.phase.progress.tokens == sum(t.num_tokens for t in iterations.learnt)


def test_an_environment_that_fails_for_every_conversation_stops_the_run_with_its_sentence(
  tmp_path, monkeypatch
):
  """Marking them one by one must not hide that nothing works at all."""

  def full(task, sample):
    raise OSError("disk full")

  with scripted(tiny.make(), tmp_path) as iterations:
    monkeypatch.setattr(iterations.parts.environment, "open", full)
    words = r"every conversation failed, the first: task .*: no session .* \(OSError: disk full\)"
    with pytest.raises(RuntimeError, match=words):
      iterations.run()


def test_an_iteration_of_infrastructure_errors_only_ends_the_run(tmp_path):
  with (
    scripted(tiny.make(), tmp_path, broken={0, 1}) as iterations,
    pytest.raises(RuntimeError, match="all ended in infrastructure errors"),
  ):
    iterations.run()
  assert iterations.learnt == []


@pytest.mark.parametrize(
  ("algorithm", "intermediate"),
  [("ppo", False), ("steptool", True), ("steptool_no_step_rewards", False)],
)
def test_which_algorithm_is_paid_for_a_step(algorithm, intermediate, tmp_path):
  with scripted(tiny.make(algorithm=algorithm, rewards__shaping="sum"), tmp_path) as iterations:
    iterations.run()
  batch = batching.pack(iterations.learnt, 320).batch
  first = batch.step_end & (batch.step_ids == 0)
  last = batch.step_end & (batch.step_ids == 1)
  assert first.sum() == last.sum() == 8
  assert (batch.rewards[first] > 0).all() == intermediate
  assert (batch.rewards[first] == 0).all() != intermediate
  np.testing.assert_array_equal(batch.rewards[last], 1.0)
  assert np.count_nonzero(batch.rewards) == (16 if intermediate else 8)


# --- updates that are not finite ---


def test_non_finite_updates_stop_the_run_and_reach_no_checkpoint(tmp_path, compiled, monkeypatch):
  pack = batching.pack_units

  def poisoned(*args, **kwargs):
    packed = pack(*args, **kwargs)
    sampled = packed.batch.behaviour_logprobs.any()  # and not demonstrated
    rewards = np.where(sampled, np.float32(np.nan), packed.batch.rewards)
    return packed._replace(batch=packed.batch._replace(rewards=rewards))

  monkeypatch.setattr(batching, "pack_units", poisoned)
  config = tiny.make(
    compilation_cache=compiled, train__max_skipped=3, loss__kl_adaptive=True, evaluation__every=0
  )
  with pytest.raises(
    RuntimeError, match=r"3 updates in a row were skipped.* not finite: .*policy_loss"
  ):
    train.run(config, tmp_path)
  records = read_jsonl(tmp_path / "metrics.jsonl")
  assert records[-1]["step"] == 3, "two of them in the first iteration, the third in the second"
  assert records[-1]["train/skipped"] == 1.0
  with opening.open_parts(config, tmp_path, opening.Stop()) as parts:
    learner = setup.build_learner(config, parts.policy.model, "steptool")
    abstract = setup.abstract_state(parts.policy, parts.mesh, learner)
    state, meta, _ = checkpoint.newest(tmp_path, lambda meta: abstract)
  assert (meta["phase"], meta["done"]) == ("rl", 1)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
  ("kl", "expected"),
  [(jnp.nan, 0.05), (60.0, 0.05 * 1.01), (0.0, 0.05 * 0.99)],  # 500 of 10,000 trajectories
)
def test_the_kl_coefficient_follows_its_target_and_no_nan(kl, expected):
  learner = bare_phase(tiny.make(loss__kl_adaptive=True))
  learner.state = TrainState(0, {}, {}, {}, (), kl_coef=jnp.float32(0.05))
  learner.adapt_kl(jnp.float32(kl), 500)
  assert learner.state.kl_coef == pytest.approx(expected)


@pytest.mark.parametrize("part", [{"rollout__top_k": 5}, {"rollout__top_p": 0.9}])
def test_rl_on_a_part_of_the_distribution_is_refused(part, tmp_path):
  """The sampler's log-probs would not be the trainer's, and no ratio would tell."""
  with pytest.raises(ValueError, match=r"config\.rollout\.top_k = \d, top_p"):
    train.run(tiny.make(**part), tmp_path)
  assert not list(tmp_path.iterdir())


def test_one_temperature_for_the_sampler_and_all_log_probs_of_the_update():
  """Ratios and KL compare one distribution with itself; demonstrations have no temperature."""
  config = tiny.make(rollout__temperature=0.6)
  assert setup.build_learner(config, fakes.tiny_config(), "steptool").temperature == 0.6
  assert setup.build_learner(config, fakes.tiny_config(), "sft").temperature == 1.0


def batches_of(config, demonstrate, monkeypatch):
  """What SFT is fed with where `demonstrate` stands for the replay of a demonstration."""
  environment = build.build_environment(config)
  parts = {"config": config, "environment": environment, "limits": None, "runner": None}
  parts = types.SimpleNamespace(**parts, policy=types.SimpleNamespace(chat_format=None))
  monkeypatch.setattr(sft_batches, "replay_actions", demonstrate)
  monkeypatch.setattr(sft_batches, "usable", lambda parts, tasks: tasks)
  return sft_batches.SftBatches(parts)


def test_demonstrations_whose_tools_are_down_are_not_learnt(monkeypatch, caplog):
  """An observation "the simulator is down" must not become something to imitate."""
  statuses = [Status.ANSWERED, Status.INFRASTRUCTURE_ERROR, Status.ANSWERED, Status.STEP_BUDGET]
  drawn = [types.SimpleNamespace(status=status, steps=()) for status in statuses]
  left = iter(drawn)
  source = batches_of(tiny.make(sft__batch=4), lambda *_, runner: next(left), monkeypatch)
  assert source.batch(0) == [drawn[0], drawn[2]]
  source.report()
  assert "2 of 4 demonstrations did not fit, or their tools were down" in caplog.text


def test_mistakes_begin_after_the_clean_steps(monkeypatch):
  def flawless(env, task, actions, *_, runner):
    return types.SimpleNamespace(
      status=Status.ANSWERED, steps=(), flawless=actions == task.demonstration
    )

  config = tiny.make(sft__mistakes=1.0, sft__clean_steps=3, sft__batch=2)
  source = batches_of(config, flawless, monkeypatch)
  drawn = [[t.flawless for t in source.batch(step)] for step in range(5)]
  assert drawn == [[True, True]] * 3 + [[False, False]] * 2


# --- order and keys ---


TASKS = [types.SimpleNamespace(id=f"t{n}") for n in range(40)]


def jobs_at(done, **changes):
  config = tiny.make(**changes)
  count = min(config.rollout.tasks, len(TASKS))
  return jobs(config, TASKS, done * count, count, collections.Counter())


def test_every_task_once_an_epoch_in_a_seeded_order():
  def epoch(first, **changes):
    made = [jobs_at(first + k, **changes) for k in range(10)]
    assert all(len(j) == 8 for j in made)
    assert all([s for _, s in j] == [0, 1] * 4 for j in made)
    return [task.id for j in made for task, sample in j if sample == 0]

  everything = sorted(f"t{n}" for n in range(40))
  assert sorted(epoch(0)) == sorted(epoch(10)) == everything
  assert epoch(0) == epoch(0)
  assert epoch(0) != epoch(10)
  assert epoch(0) != epoch(0, seed=1)


def test_a_task_on_both_sides_of_an_epochs_end_has_other_samples():
  met = 0
  for done in range(20):
    made = [(task.id, s) for task, s in jobs_at(done, rollout__tasks=28)]
    assert len(made) == 56
    assert len(set(made)) == 56, "the same key twice in one iteration"
    met += any(s >= 2 for _, s in made)
  assert met, "no epoch ended in the midst of an iteration"


def test_more_tasks_than_there_are_and_none():
  assert len(jobs_at(0, rollout__tasks=99)) == 80
  with pytest.raises(ValueError, match="no training tasks"):
    jobs(tiny.make(), [], 0, 0, collections.Counter())


def test_the_same_task_gives_new_samples_in_every_iteration(tmp_path, compiled):
  config = tiny.make(compilation_cache=compiled, rollout__max_steps=1)
  with opening.open_parts(config, tmp_path, opening.Stop()) as parts:
    variables = build.initial_variables(config, parts.policy, parts.mesh)
    task = parts.environment.tasks("train")[0]

    def ids(version, jobs):
      found, _ = rollouts.roll(parts, variables, jobs, version, 1.0, "test")
      return [t.steps[0].tokens.tolist() for t in found]

    both = [(task, 0), (task, 1)]
    first, again, second = ids(0, both), ids(0, both), ids(1, both)
    assert first == again
    assert len({tuple(x) for x in first + second}) == 4
    assert ids(0, [(parts.environment.tasks("train")[1], 0), (task, 1)])[1] == first[1]


@pytest.mark.parametrize(("rows", "sizes"), [(7, [3, 2, 2]), (2, [1, 1]), (8, [3, 3, 2])])
def test_every_row_once_an_epoch(rows, sizes):
  batch = batching.empty_batch(8, 5)
  used = (np.arange(8) < rows)[:, None] & np.ones(5, bool)
  batch = batch._replace(
    tokens=np.repeat(np.arange(8, dtype=np.int32), 5).reshape(8, 5),
    segment_ids=used.astype(np.int32),
    action_mask=used,
    step_end=used,
    bootstrap=used,
  )
  filled = {name: np.zeros((8, 5), np.float32) for name in batch._fields[-5:]}
  device = jax.tree.map(lambda x: jnp.asarray(x).reshape(4, 2, 5), batch._replace(**filled))

  def dealt(epoch):
    order = []
    for mini, count in setup.minibatches(device, rows, 3, 1, (0, 0, epoch)):
      flat = jax.tree.map(lambda x: np.asarray(x).reshape(-1, 5), mini)
      assert flat.tokens.shape == (4, 5)
      assert flat.segment_ids[:count].all()
      for name in ("segment_ids", "action_mask", "step_end", "bootstrap"):
        assert not getattr(flat, name)[count:].any(), name
      order.append(flat.tokens[:count, 0].tolist())
    return order

  first = dealt(0)
  assert [len(part) for part in first] == sizes
  assert sorted(row for part in first for row in part) == list(range(rows))
  assert dealt(0) == first
  if rows > 2:
    assert dealt(1) != first


def test_rows_of_a_pair_stay_together():
  tokens = np.repeat(np.arange(8, dtype=np.int32), 5).reshape(4, 2, 5)
  batch = jax.tree.map(
    lambda x: jnp.asarray(x).reshape(4, 2, 5), batching.empty_batch(8, 5)._replace(tokens=tokens)
  )
  found = []
  for mini, count in setup.minibatches(batch, 6, 2, 2, (0, 0, 0)):
    rows = np.asarray(mini.tokens)[..., 0].reshape(-1, 2)[: count // 2]
    assert (rows[:, 0] % 2 == 0).all()
    np.testing.assert_array_equal(rows[:, 1], rows[:, 0] + 1)
    found += rows[:, 0].tolist()
  assert sorted(found) == [0, 2, 4]


def test_epochs_and_minibatches_make_optimizer_steps(monkeypatch):
  """Each epoch deals the rows out anew, and every part of them is one update."""
  config = tiny.make(train__minibatches=2, train__epochs=3)
  learner, calls = bare_phase(config), []
  learner.state = TrainState(0, {}, {}, {}, (), kl_coef=jnp.float32(0.0))
  learner.pack = lambda trajectories: batching.Packed(batching.empty_batch(4, 5), (), ())
  learner.prepare = lambda batch: (batch, {"kl": jnp.float32(0)})
  learner.update = lambda batch, rows: calls.append(batch) or {"skipped": 0.0}
  monkeypatch.setattr(
    setup, "minibatches", lambda *args: [((args[-1][-1], k), 1) for k in range(2)]
  )
  rolled = [fakes.random_trajectory(np.random.default_rng(0))]
  data = types.SimpleNamespace(batch=lambda done: rolled)
  recorder = types.SimpleNamespace(wants=lambda done: False)
  iteration.run_iteration(types.SimpleNamespace(config=config), learner, recorder, data)
  assert calls == [(e, k) for e in range(3) for k in range(2)]
