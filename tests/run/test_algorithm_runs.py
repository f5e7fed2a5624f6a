"""Every row of the table through --mode=train, and what only some rows do."""

import dataclasses

import numpy as np
import pytest
import tiny
from resuming import crash_and_go_on, saved

from steptool_jax.learning import algorithms
from steptool_jax.run import train
from steptool_jax.run.parts import rollouts
from steptool_jax.run.workdir.outputs import read_jsonl

SHORT = {
  "sft__steps": 0,
  "train__iterations": 2,
  "rollout__max_steps": 2,
  "rollout__max_step_tokens": 12,
  "evaluation__tasks": 0,
  "evaluation__every": 0,
  "archer__replay": 12,
  "archer__batch": 4,
}


@pytest.fixture
def some_solved(monkeypatch):
  """Random weights solve nothing: every first sample is called solved, and paid."""
  reward = rollouts.reward

  def paid(*args, **options):
    return [with_outcome(t, float(t.sample == 0)) for t in reward(*args, **options)]

  monkeypatch.setattr(rollouts, "reward", paid)


def with_outcome(trajectory, solved):
  steps = list(trajectory.steps)
  if steps:
    steps[-1] = dataclasses.replace(steps[-1], reward=steps[-1].reward + solved)
  return dataclasses.replace(trajectory, steps=tuple(steps), solved=solved)


def make(algorithm, compiled, **changes):
  return tiny.make(**(SHORT | {"algorithm": algorithm, "compilation_cache": compiled} | changes))


@pytest.mark.parametrize("name", sorted(algorithms.ALGORITHMS))
def test_every_algorithm_trains(name, some_solved, tmp_path, compiled):
  # Demonstrations are longer than what these rollouts may be.
  demonstrated = {"sft__steps": 2, "rollout__max_steps": 4, "rollout__max_step_tokens": 40}
  train.run(make(name, compiled, **(demonstrated if name == "sft" else {})), tmp_path)
  records = read_jsonl(tmp_path / "metrics.jsonl")
  assert len(records) == 2
  for record in records:
    assert np.isfinite(list(record.values())).all()
    norms = [value for key, value in record.items() if key.endswith("/grad_norm")]
    assert norms[0] > 0, "nothing was learnt"
  arrays, meta = saved(tmp_path)
  assert meta["learnt"] == (0 if name == "sft" else 2)
  heads = [path for path in arrays if "value_head" in path and "opt_state" in path]
  assert bool(heads) == (algorithms.get_algorithm(name).critic == "value")


def test_a_toy_algorithm_takes_one_row(some_solved, tmp_path, compiled, monkeypatch):
  """REINFORCE without any baseline."""

  def advantage(batch, rewards_BT, values, config):
    return {"advantages": algorithms.groups.step_returns(batch, rewards_BT, config.advantage.gamma)}

  row = algorithms.Algorithm("step", algorithms._policy_loss, advantage)
  monkeypatch.setitem(algorithms.ALGORITHMS, "toy", row)
  train.run(make("toy", compiled, train__iterations=1), tmp_path)
  (record,) = read_jsonl(tmp_path / "metrics.jsonl")
  assert record["train/grad_norm"] > 0


def test_archer_resumes_bit_equal_with_its_replay(some_solved, tmp_path, compiled):
  config = make("archer", compiled, train__iterations=4, checkpoint__every=2)
  meta, arrays = crash_and_go_on(config, tmp_path, 3)
  assert meta["done"] == 2
  assert any("target" in path and np.any(array) for path, array in arrays.items())


def test_iterations_without_a_pair_are_skipped_and_a_run_without_any_is_an_error(
  tmp_path, compiled, monkeypatch
):
  reward, calls = rollouts.reward, []

  def second_only(*args, **options):
    calls.append(1)
    solved = float(len(calls) == 2)
    return [with_outcome(t, solved * (t.sample == 0)) for t in reward(*args, **options)]

  monkeypatch.setattr(rollouts, "reward", second_only)
  train.run(make("eto", compiled), tmp_path / "one")
  records = read_jsonl(tmp_path / "one" / "metrics.jsonl")
  assert [r["train/nothing_to_learn"] for r in records] == [1.0, 0.0]
  assert "train/grad_norm" not in records[0]

  message = r"'eto' learns from a success and a failure of the same task.*rollout.samples"
  with pytest.raises(RuntimeError, match=message):
    train.run(make("eto", compiled, train__iterations=1), tmp_path / "none")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"algorithm": "grpo", "rollout__samples": 1}, r"samples: 1.*'grpo'.*'reinforce'"),
    ({"algorithm": "rloo", "rollout__samples": 1}, r"samples: 1.*'rloo'.*'reinforce'"),
    ({"algorithm": "gigpo", "rollout__samples": 1}, r"samples: 1.*'reinforce'"),
    ({"algorithm": "grpo_step", "rollout__samples": 1}, r"samples: 1.*'steptool'"),
    ({"algorithm": "eto", "rollout__samples": 1}, r"samples: 1.*'rft'"),
    ({"algorithm": "eto", "train__micro_rows": 3}, r"micro_rows: 3.*pairs of rows; use 4"),
    ({"algorithm": "eto", "loss__kl": "reward"}, r"loss\.kl: 'reward'.*leave it empty"),
    ({"algorithm": "grpo", "advantage__level": "step"}, r"advantage\.level: 'step'.*no GAE"),
    ({"algorithm": "archer", "archer__replay": 50}, r"archer\.replay: keeps 50.*96"),
    ({"algorithm": "archer", "archer__tau": 0.0}, r"archer\.tau: must be above 0"),
    ({"dpo__beta": 0.0}, r"dpo\.beta: must be above 0"),
  ],
)
def test_combinations_without_sense_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    tiny.make(**changes)
