"""Trajectories of tasks with several samples, for algorithms that compare them."""

import fakes
import numpy as np

from steptool_jax.learning import batching
from steptool_jax.types import TRUNCATED, Finish, Status, Step, Trajectory

ENDS = (Status.ANSWERED, Status.GAVE_UP, Status.STEP_BUDGET, Status.TOKEN_BUDGET)


def sample(task, rewards, lengths=None, anchors=None, solved=0.0, status=Status.ANSWERED, seed=0):
  """One trajectory; anchors: what is observed before step 1, 2, … (equal numbers, equal texts)."""
  rng = np.random.default_rng((seed, len(rewards), *(lengths or ())))
  lengths = lengths or [2] * len(rewards)
  anchors = anchors or range(1, len(rewards))
  steps = []
  for k, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
    last = k == len(rewards) - 1
    observed = [] if last and status not in TRUNCATED else [7] if last else [10 + anchors[k], 3]
    steps.append(
      Step(
        tokens=rng.integers(0, 61, length).astype(np.int32),
        logprobs=np.full(length, -1.0, np.float32),
        action=Finish("x"),
        observation_tokens=np.array(observed, np.int32),
        reward=reward,
      )
    )
  return Trajectory(f"t{task}", seed, np.array([5, task], np.int32), tuple(steps), status, solved)


def random_samples(seed, tasks=3, most=4):
  """(trajectories, [(task, rewards, anchors)]): 1 to `most` samples a task, shuffled."""
  rng = np.random.default_rng(seed)
  made = []
  for task in range(tasks):
    for _ in range(rng.integers(1, most + 1)):
      steps = int(rng.integers(1, 5))
      # Few values, so that there are ties and groups without any difference.
      rewards = rng.choice([0.0, 0.1, 0.7, 1.0], steps).tolist()
      anchors = rng.integers(1, 3, steps - 1).tolist()
      lengths = rng.integers(1, 5, steps).tolist()
      made.append((task, rewards, anchors, lengths))
  made = [made[i] for i in rng.permutation(len(made))]
  trajectories = [
    sample(task, rewards, lengths, anchors, seed=n, status=ENDS[rng.integers(4)])
    for n, (task, rewards, anchors, lengths) in enumerate(made)
  ]
  return trajectories, [(task, rewards, ("prompt", *anchors)) for task, rewards, anchors, _ in made]


def found(batch, values_BT, trajectories):
  """values_BT on the sampled tokens of each trajectory: a list of arrays, in order."""
  places = {}
  for row in range(batch.tokens.shape[0]):
    for segment in range(1, batch.segment_ids[row].max() + 1):
      at = np.flatnonzero((batch.segment_ids[row] == segment) & (batch.step_ids[row] >= 0))
      places.setdefault(batch.targets[row, at].tobytes(), []).append((row, at))
  out = []
  for trajectory in trajectories:
    tokens = np.concatenate([step.tokens for step in trajectory.steps])
    row, at = places[tokens.tobytes()].pop(0)
    out.append(np.asarray(values_BT)[row, at])
  return out


def pack(trajectories, row_tokens=40, rows=12, bootstrap=()):
  """One shape for all examples: one compilation."""
  return fakes.padded(batching.pack(trajectories, row_tokens, bootstrap), rows)
