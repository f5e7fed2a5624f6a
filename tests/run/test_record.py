"""What training keeps for the report."""

import types

import fakes
import numpy as np
import pytest
import tiny

from steptool_jax.data.trajectories import read_trajectories
from steptool_jax.learning import batching
from steptool_jax.run.training import record
from steptool_jax.types import Finish, Status, Step, Trajectory


class Words:
  """A tokenizer of letters; "é" takes two tokens, of which neither alone is text."""

  def decode(self, ids):
    text, ids = "", list(ids)
    while ids:
      token = ids.pop(0)
      if token == 100 and ids[:1] == [101]:
        text, ids = text + "é", ids[1:]
      else:
        text += "\N{REPLACEMENT CHARACTER}" if token in (100, 101) else chr(97 + token)
    return text


def recorder(folder, iterations=30, **changes):
  tasks = {
    split: [types.SimpleNamespace(id=f"t{n}", query=f"{split} {n}") for n in range(6)]
    for split in ("train", "heldout")
  }
  environment = types.SimpleNamespace(tasks=tasks.__getitem__)
  return record.Recorder(tiny.make(**changes), folder, Words(), environment, iterations)


def trajectory(task, sample, *steps, prompt=(1, 2)):
  made = [
    Step(np.array(ids, np.int32), np.full(len(ids), -1, np.float32), Finish("x")) for ids in steps
  ]
  return Trajectory(task, sample, np.array(prompt, np.int32), tuple(made), Status.ANSWERED)


def test_texts_of_tokens_add_up():
  texts = record.token_texts(Words(), trajectory("t", 0, [0, 1], [2, 100, 101, 3]))
  assert texts == [["a", "b"], ["c", "", "é", "d"]]


def test_held_out_trajectories_are_bounded_and_have_queries(tmp_path):
  found = [trajectory(f"t{n}", 0, [n]) for n in range(5)]
  recorder(tmp_path, record__heldout=3).heldout("rl", found, 0.3)
  kept = list(read_trajectories(tmp_path / "moments" / "heldout_rl.jsonl"))
  found = [(r.trajectory.task_id, r.query) for r in kept]
  assert found == [(f"t{n}", f"heldout {n}") for n in range(3)]
  recorder(tmp_path, record__heldout=0).heldout("sft", found, 0.3)
  assert not (tmp_path / "moments" / "heldout_sft.jsonl").exists()


def test_which_iterations_are_kept(tmp_path):
  keeper = recorder(tmp_path, iterations=25, record__every=10)
  assert [n for n in range(25) if keeper.wants(n)] == [0, 10, 20, 24]
  assert not any(recorder(tmp_path, record__train=0).wants(n) for n in range(25))


def test_advantages_find_their_trajectory_wherever_it_was_packed(tmp_path):
  """Whole groups, spread over the iteration; the value at each sampled token is its own."""
  found = [
    trajectory(f"t{n}", k, [n, k], [5] * (1 + n), prompt=(7,) * (1 + n))
    for n in range(6)
    for k in (0, 1)
  ]
  packed = batching.pack(found, 16)
  values = np.where(
    packed.batch.action_mask, 10 * packed.batch.targets + packed.batch.step_ids, np.nan
  )
  keeper = recorder(tmp_path, record__train=4, train__row_tokens=320)
  keeper.training(10, found, packed, values)
  kept = list(read_trajectories(tmp_path / "moments" / "train_000010.jsonl"))
  groups = [(r.trajectory.task_id, r.trajectory.sample) for r in kept]
  assert groups == [("t0", 0), ("t0", 1), ("t5", 0), ("t5", 1)]
  assert kept[2].query == "train 5"
  first, last = [51], [51] * 6
  wanted = [[[0, 0], first], [[0, 10], first], [[50, 0], last], [[50, 10], last]]
  assert [r.metadata["advantages"] for r in kept] == wanted


def test_two_trajectories_of_one_name_keep_their_own(tmp_path):
  """Stored data may hold sample 0 of a task from two runs."""
  found = [trajectory("t0", 0, [1, 2]), trajectory("t0", 0, [3])]
  packed = batching.pack(found, 16)
  values = packed.batch.targets.astype(np.float32)
  recorder(tmp_path).training(0, found, packed, values)
  kept = list(read_trajectories(tmp_path / "moments" / "train_000000.jsonl"))
  assert [r.metadata["advantages"] for r in kept] == [[[1, 2]], [[3]]]


@pytest.mark.parametrize("values", [None, np.nan])
def test_without_advantages(values, tmp_path):
  """Algorithms that have none, and a batch that is not finite: JSON could not hold that."""
  found = [trajectory("t0", 0, [1, 2])]
  packed = batching.pack(found, 16)
  if values is not None:
    values = np.full(packed.batch.tokens.shape, values, np.float32)
  recorder(tmp_path).training(0, found, packed, values)
  (kept,) = read_trajectories(tmp_path / "moments" / "train_000000.jsonl")
  assert "advantages" not in kept.metadata
  assert kept.metadata["texts"] == [["b", "c"]]


def test_random_trajectories_come_back_with_their_advantages(tmp_path):
  rng = np.random.default_rng(0)
  found = [fakes.random_trajectory(rng) for _ in range(20)]
  packed = batching.pack(found, 64)
  values = 2 * packed.batch.behaviour_logprobs
  recorder(tmp_path, record__train=20).training(0, found, packed, values)
  kept = list(read_trajectories(tmp_path / "moments" / "train_000000.jsonl"))
  for r, t in zip(kept, found, strict=True):
    wanted = [(2 * step.logprobs).tolist() for step in t.steps]
    assert r.metadata["advantages"] == wanted
