import dataclasses
import json
import types

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from steptool_jax.learning import batching
from steptool_jax.policy.engine import Decoded
from steptool_jax.run import train
from steptool_jax.run.parts import build, opening, rollouts, services
from steptool_jax.run.training import demonstrations, phase, setup
from steptool_jax.run.training.order import jobs
from steptool_jax.run.workdir import checkpoint
from steptool_jax.run.workdir.metrics_writer import read_jsonl
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.types import Code, Finish, Observation, Status, ToolCall, TrainState


def test_what_a_run_leaves_behind(tmp_path, compiled):
  summary = train.run(tiny.make(compilation_cache=compiled), tmp_path)
  assert json.loads((tmp_path / "summary.json").read_text()) == summary
  numbers = (
    *("pass_rate_base", "pass_rate_sft", "pass_rate_rl"),
    *("seconds", "peak_rss_gib", "tokens_per_second"),
  )
  assert all(isinstance(summary[name], float) for name in numbers)
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
  assert kinds == [
    *((0, "heldout"), (1, "sft"), (2, "sft"), (2, "heldout")),
    *((3, "train"), (4, "train"), (4, "heldout"), (5, "train"), (5, "heldout")),
  ]
  rl = next(r for r in records if "train/kl" in r)
  assert {"train/reward", "train/pass_rate", "train/policy_loss", "train/grad_norm"} <= rl.keys()
  assert rl["train/sampler_gap"] < 1e-3, "log-probs of sampler and trainer agree"


# --- one iteration with scripted conversations ---


class Script:
  """An engine whose slots say the given turns, one after the other."""

  def __init__(self, slots, turns):
    self.slots, self.turns, self.said = slots, turns, np.zeros(slots, int)

  def init(self):
    return None

  def append(self, variables, state, pieces):
    return state

  def rewind(self, state, lengths):
    for slot, length in lengths.items():
      if length == 0:
        self.said[slot] = 0
    return state

  def fork(self, state, sources):
    return state

  def decode(self, variables, state, limits, seeds, stop_ids, temperature):
    tokens = np.zeros((self.slots, max(map(len, self.turns))), np.int32)
    count = np.zeros(self.slots, int)
    for slot in limits:
      ids = self.turns[self.said[slot]]
      tokens[slot, : len(ids)], count[slot] = ids, len(ids)
      self.said[slot] += 1
    return state, Decoded(tokens, np.full(tokens.shape, -1.0, np.float32), count, count > 0)


class Session:
  def __init__(self, broken):
    self.broken = broken

  def call(self, call):
    if self.broken:
      raise InfrastructureError("the simulator is down")
    return Observation('{"id": 1}', Code.OK, value={"id": 1})

  def grade(self, answer):
    return 1.0

  def close(self):
    pass


class Half:
  """Every sample of `broken` ends in an infrastructure error."""

  def __init__(self, environment, broken):
    self.name, self.tasks, self.broken = environment.name, environment.tasks, broken

  def open(self, task, sample):
    return Session(sample in self.broken)


def scripted(config, folder, broken):
  """A trainer whose conversations are scripted; `learnt` collects what reaches the update."""
  config = tiny.replace(config, rollout__max_steps=3, rollout__tool_retries=0)
  environment = build.build_environment(config)
  policy = build.build_policy(config, environment, folder)
  call = ToolCall(environment.tasks("train")[0].tools[0].name, {})
  turns = [policy.chat_format.render_action(a) for a in (call, Finish("1"))]
  trainer = object.__new__(train._Trainer)
  trainer.recorder = types.SimpleNamespace(wants=lambda done: False)
  trainer.data = None
  trainer.config, trainer.progress = config, train.Progress()
  trainer.learnt = []

  def learn(trajectories):
    trainer.learnt += trajectories
    return {}

  trainer.learning = types.SimpleNamespace(learn=learn, variables=lambda: {})
  runner = build.build_runner(config)
  trainer.parts = opening.Parts(
    config=config,
    workdir=folder,
    mesh=None,
    environment=Half(environment, broken),
    services=services.NO_SERVICES,
    policy=policy,
    engine=Script(config.rollout.slots, turns),
    limits=build.build_limits(config),
    runner=runner,
    stop=opening.Stop(),
  )
  return trainer, runner


def test_infrastructure_errors_never_reach_the_update(tmp_path):
  trainer, runner = scripted(tiny.make(), tmp_path, broken={1})
  with runner:
    figures = trainer._iteration()
  assert figures["infrastructure_errors"] == 4
  assert [(t.sample, t.status) for t in trainer.learnt] == [(0, Status.ANSWERED)] * 4
  assert trainer.progress.tokens == sum(t.num_tokens for t in trainer.learnt)


def test_an_iteration_of_infrastructure_errors_only_ends_the_run(tmp_path):
  trainer, runner = scripted(tiny.make(), tmp_path, broken={0, 1})
  with runner, pytest.raises(RuntimeError, match="all ended in infrastructure errors"):
    trainer._iteration()
  assert trainer.learnt == []


@pytest.mark.parametrize(
  ("algorithm", "intermediate"),
  [("ppo", False), ("steptool", True), ("steptool_no_step_rewards", False)],
)
def test_which_algorithm_is_paid_for_a_step(algorithm, intermediate, tmp_path):
  trainer, runner = scripted(tiny.make(algorithm=algorithm), tmp_path, broken=())
  with runner:
    trainer._iteration()
  batch = batching.pack(trainer.learnt, 320).batch
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


def learning_from(monkeypatch, batch, **changes):
  """What learns from `batch`, whatever was rolled out."""
  recorder = types.SimpleNamespace(wants=lambda done: False)
  policy = types.SimpleNamespace(model=fakes.tiny_config())
  found = phase.Phase(
    tiny.make(**changes), policy, None, recorder, train.Progress(phase="rl"), 1, 8
  )
  monkeypatch.setattr(setup, "to_device", lambda batch, *rest: batch)
  monkeypatch.setattr(setup, "pack", lambda *args: (batching.Packed(batch, (), ()), []))
  return found


@pytest.mark.parametrize(
  ("kl", "expected"),
  [(jnp.nan, 0.05), (60.0, 0.05 * 1.01), (0.0, 0.05 * 0.99)],  # 500 of 10,000 trajectories
)
def test_the_kl_coefficient_follows_its_target_and_no_nan(kl, expected, monkeypatch):
  batch = batching.empty_batch(4, 320)
  learns = learning_from(monkeypatch, batch, loss__kl_adaptive=True, train__minibatches=1)
  learns.state = TrainState(0, {}, {}, {}, (), kl_coef=jnp.float32(0.05))
  metrics = {"kl": jnp.float32(kl)}
  learns.programs = (lambda state, batch, count: (batch, metrics), None)
  learns.update = lambda batch, rows: {"skipped": 1.0}
  assert learns.learn([None] * 500)["kl_coef"] == pytest.approx(expected)


@pytest.mark.parametrize("part", [{"rollout__top_k": 5}, {"rollout__top_p": 0.9}])
def test_rl_on_a_part_of_the_distribution_is_refused(part, tmp_path):
  """The sampler's log-probs would not be the trainer's, and no ratio would tell."""
  with pytest.raises(ValueError, match=r"config\.rollout\.top_k = \d, top_p"):
    train.run(tiny.make(**part), tmp_path)
  assert not list(tmp_path.iterdir())


def test_one_temperature_for_the_sampler_and_all_log_probs_of_the_update():
  """Peers' defect 2, where the parts are put together; demonstrations have none."""
  config = tiny.make(rollout__temperature=0.6)
  assert setup.build_learner(config, fakes.tiny_config(), "steptool").temperature == 0.6
  assert setup.build_learner(config, fakes.tiny_config(), "sft").temperature == 1.0


def test_demonstrations_whose_tools_are_down_are_not_learnt(monkeypatch):
  """Peers' defect 14, in SFT."""
  statuses = [Status.ANSWERED, Status.INFRASTRUCTURE_ERROR, Status.ANSWERED, Status.STEP_BUDGET]
  drawn = [types.SimpleNamespace(status=status) for status in statuses]
  source = object.__new__(demonstrations.Demonstrations)
  source._tasks, source._sft = [None], types.SimpleNamespace(batch=4)
  source._bench = types.SimpleNamespace(config=types.SimpleNamespace(seed=0))
  source._dropped = source._seen = 0
  monkeypatch.setattr(source, "_draw", lambda index, position: drawn[position])
  assert source.batch(0) == [drawn[0], drawn[2]]
  assert (source._dropped, source._seen) == (2, 4)


def test_mistakes_begin_behind_the_clean_steps(monkeypatch):
  config = tiny.make(sft__mistakes=1.0, sft__clean_steps=3, sft__batch=2)
  environment = build.build_environment(config)
  parts = {"config": config, "environment": environment, "limits": None}
  parts = types.SimpleNamespace(**parts, policy=types.SimpleNamespace(chat_format=None))
  source = demonstrations.Demonstrations(parts)

  def flawless(env, task, actions, *_):
    return types.SimpleNamespace(status=Status.ANSWERED, flawless=actions == task.demonstration)

  monkeypatch.setattr(demonstrations, "demonstrate", flawless)
  drawn = [[t.flawless for t in source.batch(step)] for step in range(5)]
  assert drawn == [[True, True]] * 3 + [[False, False]] * 2


# --- order and keys ---


TASKS = [types.SimpleNamespace(id=f"t{n}") for n in range(40)]


def jobs_at(done, **changes):
  return jobs(tiny.make(**changes), TASKS, done)


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
    jobs(tiny.make(), [], 0)


def test_the_same_task_gives_new_samples_in_every_iteration(tmp_path, compiled):
  config = tiny.make(compilation_cache=compiled, rollout__max_steps=1)
  with opening.open_parts(config, tmp_path, opening.Stop()) as parts:
    variables = build.initial_variables(config, parts.policy, parts.mesh)
    task = parts.environment.tasks("train")[0]

    def ids(version, jobs):
      found, _ = rollouts.collect(parts, variables, jobs, version, 1.0, "test")
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
  packed = dataclasses.make_dataclass("Packed", ["tokens", "segment_ids"])
  batch = packed(np.zeros((4, 5)), np.zeros((4, 5)))
  learns = learning_from(monkeypatch, batch, train__minibatches=2, train__epochs=3)
  calls = []
  learns.state = types.SimpleNamespace(kl_coef=jnp.float32(0.0))
  learns.programs = (lambda state, batch, count: (batch, {"kl": jnp.float32(0)}), None)
  monkeypatch.setattr(
    setup, "minibatches", lambda *args: [((args[-1][-1], k), 1) for k in range(2)]
  )
  learns.update = lambda batch, rows: calls.append(batch) or {"skipped": 0.0}
  learns.learn([])
  assert calls == [(e, k) for e in range(3) for k in range(2)]
