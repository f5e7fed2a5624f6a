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


@pytest.mark.parametrize(
  ("slots", "fixed"), [(1, False), (8, False), (8, True)], ids=["one", "several", "fixed_widths"]
)
def test_an_agent_over_http_trains_as_a_chain_does(tmp_path, compiled, monkeypatch, slots, fixed):
  """What is trained on must be what was sampled, and the same: ids, masks, rewards, their order,
  and so the weights, whoever else talks to the server in the meantime.

  Log-probs are equal to the bit where a program's width does not depend on timing (Engine.decode):
  in one slot, or at a fixed width. Else within what other widths round.
  """
  paid, weights, whole = [], [], rollouts.reward
  monkeypatch.setattr(rollouts, "reward", lambda *a, **k: paid.append(whole(*a, **k)) or paid[-1])
  if fixed:
    build_engine = build.build_engine
    one_width = lambda *a: dataclasses.replace(build_engine(*a), buckets=())  # noqa: E731
    monkeypatch.setattr(build, "build_engine", one_width)
  for harness in (False, True):
    changes = {"rollout__slots": slots, "rollout__max_tokens": 144, "compilation_cache": compiled}
    # An agent does not tell which calls succeeded, which the ridge critic would like to know.
    changes |= {"critic__kind": "value"}
    if slots > 1:  # every slot is used again, and samples of a task share its prompt
      changes |= {"rollout__tasks": 10, "rollout__samples": 3}
    c = config(tmp_path, harness, train__iterations=1, train__export=True, **changes)
    workdir = tmp_path / f"run{harness}"
    workdir.mkdir()
    train.run(c, workdir)
    weights.append((workdir / "export" / "model.safetensors").read_bytes())
  chain, agent = paid
  assert len({t.status for t in chain}) > 1  # budgets are met, answers given
  assert Status.INFRASTRUCTURE_ERROR not in {t.status for t in agent}
  for one, other in zip(chain, agent, strict=True):
    assert (one.task_id, one.sample, one.status) == (other.task_id, other.sample, other.status)
    assert one.solved == other.solved
    np.testing.assert_array_equal(one.prompt_tokens, other.prompt_tokens)
    assert len(one.steps) == len(other.steps)
    for mine, theirs in zip(one.steps, other.steps, strict=True):
      np.testing.assert_array_equal(mine.tokens, theirs.tokens)
      if slots == 1 or fixed:
        assert mine.logprobs.tobytes() == theirs.logprobs.tobytes()
      np.testing.assert_allclose(mine.logprobs, theirs.logprobs, rtol=0, atol=ROUNDING)
      np.testing.assert_array_equal(mine.observation_tokens, theirs.observation_tokens)
      assert (mine.action, mine.reward) == (theirs.action, theirs.reward)
      if mine.observation is not None:
        assert mine.observation.code == theirs.observation.code
  assert weights[0] == weights[1]


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
