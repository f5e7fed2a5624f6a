"""Environment 'harness' is a rollout like any other: the same trajectories, the same weights."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import shop_agent
import tiny

from steptool_jax.run import train
from steptool_jax.run.parts import build, rollouts
from steptool_jax.types import Status

ROUNDING = 1e-4  # nats, as in parity of float32 models; up to 1.4e-5 were seen between widths
AGENT = str(pathlib.Path(shop_agent.__file__))


def config(tmp_path, harness, **changes):
  tasks = tmp_path / "tasks.jsonl"
  tasks.write_text("\n".join([*shop_agent.lines("train"), *shop_agent.lines("heldout")]))
  if harness:
    changes |= {"environment__name": "harness", "environment__functions": AGENT}
    changes |= {"environment__tasks": str(tasks)}
  return tiny.make("calls", **changes)


def trained(workdir, monkeypatch, compiled, buckets, harness):
  """(the trajectories of one iteration as they are learnt from, the weights after it).

  24 conversations in 8 slots: each slot is used again, and the samples of a task share its prompt.
  """
  paid, reward, build_engine = [], rollouts.reward, build.build_engine
  workdir.mkdir()
  changes = {"rollout__slots": 8, "rollout__tasks": 8, "rollout__samples": 3}
  changes |= {"rollout__max_tokens": 144, "compilation_cache": compiled}
  # An agent does not tell which calls succeeded, which the ridge critic would like to know.
  changes |= {"critic__kind": "value"}
  c = config(workdir, harness, train__iterations=1, train__export=True, **changes)
  with monkeypatch.context() as patch:
    patch.setattr(rollouts, "reward", lambda *a, **k: paid.extend(reward(*a, **k)) or paid)
    engine = lambda *a: dataclasses.replace(build_engine(*a), buckets=buckets)  # noqa: E731
    patch.setattr(build, "build_engine", engine)
    train.run(c, workdir)
  return paid, (workdir / "export" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("buckets", [(), pytest.param((4,), marks=pytest.mark.campaign)])
def test_agents_over_http_train_as_chains_do(tmp_path, compiled, monkeypatch, buckets):
  """What is trained on must be what was sampled, and the same: ids, masks, rewards, their order,
  and so the weights, whoever else talks to the server in the meantime.

  Log-probs are equal to the bit where no program's width depends on timing (Engine.decode); else
  within what the widths round, with the same weights: nothing is trained on these bits.
  """
  chain, weights = trained(tmp_path / "chain", monkeypatch, compiled, (), harness=False)
  assert len({t.status for t in chain}) > 1  # budgets are met, answers given
  agent, theirs = trained(tmp_path / "agent", monkeypatch, compiled, buckets, harness=True)
  assert Status.INFRASTRUCTURE_ERROR not in {t.status for t in agent}
  for one, other in zip(chain, agent, strict=True):
    assert_same(one, other, exactly=not buckets)
  assert theirs == weights


def assert_same(one, other, exactly):
  assert (one.task_id, one.sample, one.status) == (other.task_id, other.sample, other.status)
  assert one.solved == other.solved
  np.testing.assert_array_equal(one.prompt_tokens, other.prompt_tokens)
  assert len(one.steps) == len(other.steps)
  for mine, theirs in zip(one.steps, other.steps, strict=True):
    np.testing.assert_array_equal(mine.tokens, theirs.tokens)
    if exactly:
      assert mine.logprobs.tobytes() == theirs.logprobs.tobytes()
    np.testing.assert_allclose(mine.logprobs, theirs.logprobs, rtol=0, atol=ROUNDING)
    np.testing.assert_array_equal(mine.observation_tokens, theirs.observation_tokens)
    assert (mine.action, mine.reward) == (theirs.action, theirs.reward)
    if mine.observation is not None:
      assert mine.observation.code == theirs.observation.code


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"environment__functions": ""}, "environment.functions"),
    ({"environment__market__prices": True}, "environment.market.prices"),
    ({"environment__faults__timeout": 0.1}, "environment.faults"),
    ({"rollout__strategy": "dfsdt"}, "rollout.strategy"),
    ({"sft__steps": 1}, "sft.steps"),
  ],
)
def test_what_a_harness_cannot_have_is_refused_before_any_work(tmp_path, changes, named):
  """Faults and prices stand around tool calls that this environment never sees."""
  fields = {"environment__functions": AGENT, "environment__tasks": "t", **changes}
  with pytest.raises(ValueError, match=named):
    tiny.make("calls", environment__name="harness", **fields)


def test_a_task_is_whatever_its_agent_reads(tmp_path):
  """A bad line is named with its file before a run begins."""
  from steptool_jax.serving.harness import Harness

  path = tmp_path / "tasks.jsonl"
  path.write_text(json.dumps({"id": "a", "split": "train", "goal": [1]}) + '\n{"query": "x"}')
  with pytest.raises(ValueError, match=r"tasks.jsonl:2: .*'id'"):
    Harness(AGENT, path, 0.2, 1.0)
  path.write_text(json.dumps({"id": "a", "split": "train", "goal": [1]}))
  (task,) = Harness(AGENT, path, 0.2, 1.0).tasks("train")
  assert task.metadata["record"]["goal"] == [1]
  (tmp_path / "plain.py").write_text("def run(task, base_url, api_key): return 1")
  with pytest.raises(ValueError, match="async def run"):
    Harness(str(tmp_path / "plain.py"), path, 0.2, 1.0)
