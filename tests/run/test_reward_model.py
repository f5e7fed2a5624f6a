"""--mode=reward_model, its model in RL, and information gain: on the quickstart's small model."""

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest
import stored
import tiny
from resuming import Crash, records, saved

from steptool_jax.data.trajectories import AnnotatedTrajectory, write_trajectories
from steptool_jax.policy import model as model_lib
from steptool_jax.rewards import information, rules
from steptool_jax.run import reward_model as mode
from steptool_jax.run import train
from steptool_jax.run.data import reward_data
from steptool_jax.run.parts import build, reward_models
from steptool_jax.run.training import iteration, sources
from steptool_jax.run.workdir.outputs import read_jsonl
from steptool_jax.types import Finish, Status, Task, ToolCall, Trajectory

PASSES = {"reward_model__passes": 2, "reward_model__batch": 8, "reward_model__micro_rows": 2}


@pytest.fixture(scope="module")
def settings(compiled):
  def make(**changes):
    base = {
      "compilation_cache": compiled,
      "reward_model__optimizer__learning_rate": 1e-3,
      "reward_model__heldout": 0.25,
    }
    return tiny.make("calls", **(base | PASSES | changes))

  return make


@pytest.fixture(scope="module")
def data(settings, tmp_path_factory):
  """annotated.jsonl: of 16 tasks the demonstration, and one that starts wrong and ends wrong."""
  config = settings()
  environment = build.build_environment(config)
  chat_format = build.build_chat_format(config, tmp_path_factory.mktemp("none"))
  made = []
  for task in environment.tasks("train")[:16]:
    first, *rest = task.demonstration
    wrong = ToolCall(first.name, dict.fromkeys(first.arguments, "nobody"))
    for sample, actions in enumerate(((first, *rest), (wrong, Finish("no idea")))):
      t = stored.recorded(environment, task, actions, chat_format, sample)
      made.append(AnnotatedTrajectory(rules.annotate(task, t), metadata={"annotation": {}}))
  path = tmp_path_factory.mktemp("annotated") / "annotated.jsonl"
  write_trajectories(path, made)
  return path


@pytest.fixture(scope="module")
def trained(settings, data, tmp_path_factory):
  """(summary, workdir) of a run that nobody stopped."""
  workdir = tmp_path_factory.mktemp("trained")
  return mode.run(settings(reward_model__data=str(data)), workdir), workdir


def test_it_learns_and_measures_on_other_tasks(trained):
  """A task on both sides would be recited, and the figures say so with numbers too good."""
  summary, workdir = trained
  assert (summary["tasks"], summary["heldout_tasks"]) == (12, 4)
  assert (summary["trajectories"], summary["heldout_trajectories"]) == (24, 8)
  lines = read_jsonl(workdir / "metrics.jsonl")
  losses = [line["train/loss"] for line in lines if "train/loss" in line]
  assert len(losses) == 6
  assert losses[0] == pytest.approx(3 * np.log(2), abs=1e-5)
  assert losses[-1] < 0.9 * losses[0]
  assert [line["step"] for line in lines if "heldout/solved_auc" in line] == [3, 6]
  assert {"success_calling_auc", "contribution_ece", "outcome_pairs"} <= summary.keys()
  assert json.loads((workdir / "summary.json").read_text())["mode"] == "reward_model"


def test_no_task_is_on_both_sides(settings, data, tmp_path):
  config = settings(reward_model__data=str(data))
  policy = build.build_policy(config, build.build_environment(config), tmp_path)
  split = reward_data.load(config, policy)
  sides = [{t.task_id for t in side} for side in (split.train, split.heldout)]
  assert not sides[0] & sides[1]
  order = [id(t) for step in range(3) for t in split.at(step)]
  assert sorted(order) == sorted(map(id, split.train))


def test_a_crash_changes_nothing(trained, settings, data, tmp_path, monkeypatch):
  """Bit by bit: optimizer, order of batches and held-out figures follow from (seed, step)."""
  _, whole = trained
  step = mode._Training._step

  def crash(self, bar):
    if self.meta["done"] == 4:
      raise Crash
    step(self, bar)

  config = settings(reward_model__data=str(data))
  with monkeypatch.context() as patch:
    patch.setattr(mode._Training, "_step", crash)
    with pytest.raises(Crash):
      mode.run(config, tmp_path)
  assert saved(tmp_path / "training")[1]["done"] == 3
  mode.run(config, tmp_path)
  mine, theirs = saved(tmp_path / "training")[0], saved(whole / "training")[0]
  assert mine.keys() == theirs.keys()
  for name, array in mine.items():
    np.testing.assert_array_equal(array, theirs[name], err_msg=name)
  assert records(tmp_path) == records(whole)


def test_adapters_alone_learn(settings, data, tmp_path):
  """With lora.rank the trunk stays, and what is saved has the adapters merged."""
  config = settings(reward_model__data=str(data), lora__rank=2, reward_model__passes=1)
  seen = {}
  finish = mode._Training._finish

  def keep(self, interrupted):
    seen["trainable"] = set(self.state.trainable)
    seen["scores"] = self.scores(self.split.heldout)
    seen["heldout"] = self.split.heldout
    return finish(self, interrupted)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mode._Training, "_finish", keep)
    mode.run(config, tmp_path)
  assert seen["trainable"] == {"lora", "reward_heads"}
  for mine, theirs in zip(
    score(tmp_path, settings(), seen["heldout"]), seen["scores"], strict=True
  ):
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


def load(path, config, name="reward_model"):
  path = str(path / name)
  config = tiny.replace(config, rewards__source="model", rewards__model__path=path)
  policy = build.build_policy(config, build.build_environment(config), None)
  mesh = build.build_mesh(config)
  return reward_models.load(config, policy, mesh), mesh


def score(path, config, trajectories):
  found, mesh = load(path, config)
  with jax.set_mesh(mesh):
    return reward_models.score(
      *(found.config, found.variables, found.heads, trajectories),
      row_tokens=config.train.row_tokens,
      micro_rows=2,
      most=8,
      mesh=mesh,
    )


def lines(data, change):
  """The file's lines, each changed."""
  for line in data.read_text().splitlines():
    document = json.loads(line)
    change(document)
    yield json.dumps(document) + "\n"


def first_tasks(data, count):
  kept, names = [], set()
  for line in data.read_text().splitlines():
    names.add(json.loads(line)["task_id"])
    if len(names) <= count:
      kept.append(line + "\n")
  return kept


CASES = {
  "not annotated": (lambda d: lines(d, lambda x: x["metadata"].clear()), "--mode=annotate"),
  "no label": (lambda d: lines(d, lambda x: x["steps"][0].pop("contribution")), "'contribution'"),
  "one label": (
    lambda d: lines(d, lambda x: [s.update(contribution=0.0) for s in x["steps"]]),
    "contribution is 0 on all .* nothing to learn",
  ),
  "few tasks": (lambda d: first_tasks(d, 3), "3 tasks.*annotate trajectories of more tasks"),
  "small share": (lambda d: first_tasks(d, 5), r"or set reward_model.heldout to 0\.4"),
  "other ids": (
    lambda d: lines(
      d, lambda x: [s.update(tokens=[9, 9], logprobs=[0.0, 0.0]) for s in x["steps"]]
    ),
    "spell the call",
  ),
  "large ids": (
    lambda d: lines(d, lambda x: x.update(prompt_tokens=[99999])),
    "token id 99999, but the model",
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_annotations_that_nothing_can_be_learnt_from(name, settings, data, tmp_path):
  """Before any work, with the reason and what to do; a model of noise would be used otherwise."""
  change, words = CASES[name]
  path = tmp_path / "a.jsonl"
  path.write_text("".join(change(data)))
  config = settings(reward_model__data=str(path))
  policy = build.build_policy(config, build.build_environment(config), tmp_path)
  with pytest.raises(ValueError, match=words):
    reward_data.load(config, policy)


def test_a_model_of_another_tokenizer_or_trunk_is_refused(trained, settings, tmp_path):
  """Its scores would be numbers all the same."""
  _, workdir = trained
  copy = tmp_path / "reward_model"
  shutil.copytree(workdir / "reward_model", copy)
  note = json.loads((copy / "reward_model.json").read_text())
  (copy / "reward_model.json").write_text(json.dumps(note | {"tokenizer": "0", "vocab_size": 7}))
  with pytest.raises(ValueError, match=r"another tokenizer \(7 tokens.*--mode=reward_model"):
    load(tmp_path, settings())
  (copy / "reward_model.json").write_text(json.dumps(note))
  load(tmp_path, settings())
  weights = bytearray((copy / "model.safetensors").read_bytes())
  weights[-1] ^= 1
  (copy / "model.safetensors").write_bytes(weights)
  with pytest.raises(ValueError, match="trained on another trunk"):
    load(tmp_path, settings())
  with pytest.raises(FileNotFoundError, match="did you mean .*reward_model"):
    load(tmp_path.parent, settings(), tmp_path.name)


def test_it_lies_on_the_devices_in_the_compute_dtype(trained, settings):
  """In float32 an 8B model took twice the memory, beside a run that had none left."""
  _, workdir = trained
  found, _ = load(workdir, settings(model__dtype="bfloat16"))
  layers = found.variables["params"]["layers"]
  found = [layers["q"]["kernel"].dtype.name, layers["attn_norm"]["scale"].dtype.name]
  assert found == ["bfloat16", "float32"]


@pytest.fixture
def seen(monkeypatch):
  """(what an iteration's trajectories were scored as, what the policy's variables were)."""
  found, mark = [], sources.mark

  def recording(parts, phase, tasks, trajectories):
    out = mark(parts, phase, tasks, trajectories)
    found.append((parts, phase, tasks, trajectories, jax.device_get(phase.variables()), *out))
    return out

  monkeypatch.setattr(sources, "mark", recording)
  return found


def test_rl_is_paid_by_the_model(trained, settings, seen, tmp_path):
  """SC, Con and IsSolved are the model's; pass rates stay the checker's, with the drift beside."""
  _, workdir = trained
  path = str(workdir / "reward_model")
  config = settings(rewards__source="model", rewards__model__path=path, train__iterations=1)
  train.run(config, tmp_path)
  (_, _, _, true, _, marked, figures) = seen[0]
  wanted = score(workdir, settings(), true)
  for t, scores in zip(marked, wanted, strict=True):
    assert t.solved == pytest.approx(scores[-1, 2], abs=1e-5)
    calls = [k for k, s in enumerate(t.steps) if not isinstance(s.action, Finish)]
    found = [(t.steps[k].success_calling, t.steps[k].contribution) for k in calls]
    np.testing.assert_allclose(found, scores[calls, :2].reshape(-1, 2), atol=1e-5)
  (line,) = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if "train/pass_rate" in r]
  truth = np.mean([t.solved for t in true])
  assert line["train/pass_rate"] == pytest.approx(truth)
  assert line["train/model_outcome"] == pytest.approx(np.mean([t.solved for t in marked]))
  assert line["train/model_drift"] == pytest.approx(figures["model_outcome"] - truth)
  paid = np.mean([0.0 if t.truncated else t.solved for t in marked])
  assert line["train/reward_solved"] == pytest.approx(paid)


def test_a_policy_that_only_pleases_the_model_is_stopped(trained, settings, tmp_path, monkeypatch):
  """The figures alone would be seen when the run is over."""
  _, workdir = trained
  config = settings(
    rewards__source="model",
    rewards__model__path=str(workdir / "reward_model"),
    rewards__model__watch=2,
    train__iterations=4,
  )
  curves = iter([(0.4, 0.6), (0.8, 0.2)])

  def pretend(parts, phase, recorder, data):
    model, truth = next(curves)
    phase.progress.learnt += 1
    phase.progress.train_curve.append((0, truth))
    phase.progress.model_curve.append((0, model))
    return {"pass_rate": truth}

  monkeypatch.setattr(iteration, "run_iteration", pretend)
  with pytest.raises(RuntimeError, match="last 2 iterations.*rose by 0.400.*fell by 0.400"):
    train.run(config, tmp_path)


def test_information_gain_is_that_of_separate_passes(settings, seen, tmp_path):
  """Packed with others and cut into micro-batches: each answer must see its own prefix alone."""
  config = settings(rewards__source="info_gain", train__iterations=1, train__row_tokens=400)
  train.run(config, tmp_path)
  parts, _, tasks, true, variables, marked, _ = seen[0]
  variables = jax.tree.map(jax.numpy.asarray, variables)
  temperature, compared = config.rollout.temperature, 0
  forward = jax.jit(
    lambda ids, inside: model_lib.project_logits(
      parts.policy.model,
      variables,
      model_lib.forward(parts.policy.model, variables, ids, np.arange(400)[None], inside),
    )
  )
  for task, t, found in zip(tasks, true, marked, strict=True):
    gold = information.gold(task, parts.policy.chat_format)
    if gold is None or not t.steps:
      continue
    chances = []
    for question in information.questions(t, gold):
      ids = np.concatenate([question.prompt_tokens, gold.answer])
      row, inside = np.zeros((1, 400), np.int32), np.zeros((1, 400), np.int32)
      row[0, : len(ids)], inside[0, : len(ids)] = ids, 1
      logits = np.asarray(forward(row, inside))[0] / temperature
      at = np.arange(len(question.prompt_tokens) - 1, len(ids) - 1)
      logprobs = jax.nn.log_softmax(logits[at])[np.arange(len(at)), gold.answer]
      chances.append(np.exp(np.mean(logprobs)))
    gains = np.clip(np.diff(chances), 0, 1)
    shown = [k for k, s in enumerate(t.steps) if len(s.observation_tokens)]
    np.testing.assert_allclose([found.steps[k].contribution for k in shown], gains, atol=1e-4)
    compared += len(shown)
  assert compared > 3


def unchecked(source, evaluated, train="none", heldout="none"):
  """Parts of a run on two tasks with these checkers."""
  tasks = {
    split: [Task(split, "custom", "?", (), {"type": kind})]
    for split, kind in (("train", train), ("heldout", heldout))
  }
  config = tiny.replace(tiny.make(), rewards__source=source, evaluation__tasks=evaluated)
  environment = types.SimpleNamespace(tasks=tasks.__getitem__)
  return types.SimpleNamespace(config=config, environment=environment)


def test_what_nobody_knows_pays_nobody_and_is_no_pass_rate():
  """A task without a checker is "solved" by any answer: rules would teach to answer anything."""
  with pytest.raises(ValueError, match="1 training tasks.*use 'model'"):
    sources._refuse_unknown(unchecked("progress", 0))
  with pytest.raises(ValueError, match="evaluation.tasks: 4.*set it to 0"):
    sources._refuse_unknown(unchecked("model", 4))
  sources._refuse_unknown(unchecked("model", 0))
  sources._refuse_unknown(unchecked("progress", 4, "exact", "exact"))


def test_drift_is_of_tasks_that_a_checker_knows():
  tasks = [
    Task(n, "custom", "?", (), {"type": kind}) for n, kind in (("a", "exact"), ("b", "none"))
  ]
  true = [Trajectory(n, 0, np.zeros(1, np.int32), (), Status.ANSWERED, 1.0) for n in "ab"]
  marked = [dataclasses.replace(t, solved=p) for t, p in zip(true, (0.75, 0.25), strict=True)]
  assert sources._drift(tasks, true, marked) == {"model_outcome": 0.75, "model_drift": -0.25}
  assert sources._drift(tasks, true[1:], marked[1:]) == {"model_outcome": 0.25}
