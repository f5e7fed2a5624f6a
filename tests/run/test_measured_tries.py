"""evaluation.samples: what is rolled out, kept and put into the summary."""

import json
import types

import numpy as np
import pytest
import tiny

from steptool_jax.rollout.setting import Stats
from steptool_jax.run.evaluating import tries
from steptool_jax.run.parts import rollouts
from steptool_jax.types import Finish, Status, Step, ToolCall, Trajectory

NOTHING = np.zeros(0, np.int32)
CHANGES = {
  "evaluation__samples": 4,
  "evaluation__sampled_tasks": 2,
  "evaluation__temperature": 0.7,
}


@pytest.fixture
def parts(tmp_path, monkeypatch):
  """Tasks t0, t1, t2; each try calls the tools that the variables say, and solves where they are
  'a b'."""
  found = types.SimpleNamespace(config=tiny.make(**CHANGES), workdir=tmp_path, rolled=[])
  all_tasks = [types.SimpleNamespace(id=f"t{n}") for n in range(3)]
  found.environment = types.SimpleNamespace(
    tasks=lambda split: all_tasks if split == "heldout" else []
  )

  def roll(parts, variables, jobs, version, temperature, label):
    parts.rolled.append(([(task.id, k) for task, k in jobs], version, temperature))
    out = []
    for task, k in jobs:
      names = variables[task.id][k].split()
      actions = [*(ToolCall(name, {}) for name in names), Finish("x")]
      steps = tuple(Step(NOTHING, NOTHING, action) for action in actions)
      solved = float(names == ["a", "b"])
      out.append(Trajectory(task.id, k, NOTHING, steps, Status.ANSWERED, solved))
    return out, Stats()

  monkeypatch.setattr(rollouts, "roll", roll)
  monkeypatch.setattr(rollouts, "judge", lambda parts, tasks, rolled: rolled)
  return found


def test_both_moments_and_what_is_new(parts):
  start = {"t0": ["a", "a", "b", "a b"], "t1": ["a", "b", "b a", ""]}
  end = {"t0": ["a b"] * 4, "t1": ["a b", "a b", "b", "b"]}
  found = tries.measure(parts, start, tries.START)
  # t0: 1 of 4 solved, t1: none.
  assert found == {f"pass_at_{k}_start": pytest.approx(k / 8) for k in (1, 2, 3, 4)}
  found = tries.measure(parts, end, tries.END)
  assert found["pass_at_1_end"] == pytest.approx((1 + 2 / 4) / 2)
  assert found["pass_at_2_end"] == pytest.approx((1 + 5 / 6) / 2)
  assert found["new_sequences"] == 1 / 2, "t1 had never called a and then b"
  jobs = [(task, k) for task in ("t0", "t1") for k in range(4)]
  assert parts.rolled == [(jobs, rollouts.EVALUATION, 0.7)] * 2
  kept = json.loads((parts.workdir / "tries_start.json").read_text())
  assert kept["t1"]["sequences"] == [["a"], ["b"], ["b", "a"], []]


def test_without_a_start_there_is_no_word_on_what_is_new(parts):
  """A run that was begun without evaluation.samples."""
  end = {"t0": ["a b"] * 4, "t1": [""] * 4}
  assert set(tries.measure(parts, end, tries.END)) == {f"pass_at_{k}_end" for k in (1, 2, 3, 4)}


def test_greedy_tries_are_refused():
  with pytest.raises(ValueError, match=r"evaluation\.samples: 4, but at temperature 0 all are"):
    tiny.make(evaluation__samples=4)
  with pytest.raises(ValueError, match=r"evaluation\.samples: 4, but evaluation\.tasks = 0"):
    tiny.make(evaluation__samples=4, evaluation__temperature=1.0, evaluation__tasks=0)
  with pytest.raises(ValueError, match=r"evaluation\.selection: 5, but evaluation\.tasks = 0"):
    tiny.make(evaluation__selection=5, evaluation__tasks=0)
