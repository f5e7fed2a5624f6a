"""What the step reward model is taught and what becomes of what it says. Host side.

Three heads read the state after every step, when its observation has been shown: SC (did the call
work), Con (did it help) and, after the last step, IsSolved. So a score is a function of the past
alone, where the annotation that it was learnt from may have known the future: the model's Con is
the chance that the step will turn out to help, judged from what is known by then.
"""

import dataclasses

import numpy as np

from steptool_jax.types import HEADS, Finish, Status, Trajectory

SC, CON, SOLVED = range(len(HEADS))


def ends(trajectory: Trajectory) -> np.ndarray:
  """int64[S]: where, in the trajectory's ids, the last token of step k stands that was shown.

  That is its observation's last one, or the last sampled one where nothing was observed.
  """
  lengths = [len(s.tokens) + len(s.observation_tokens) for s in trajectory.steps]
  return len(trajectory.prompt_tokens) - 1 + np.cumsum(lengths, dtype=np.int64)


def ids(trajectory: Trajectory) -> np.ndarray:
  """int32[num_tokens], everything that was shown and sampled, in order."""
  if len(trajectory.parts) > 1:
    raise ValueError(
      f"trajectory of task {trajectory.task_id!r} has {len(trajectory.parts)} segments, since its "
      "history was changed; a reward model reads one growing conversation: leave those out"
    )
  parts = [part for s in trajectory.steps for part in (s.tokens, s.observation_tokens)]
  return np.concatenate([trajectory.prompt_tokens, *parts]).astype(np.int32)


def labels(trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray]:
  """(labels float32[S, 3], bool[S, 3] which of them there are), in the order of HEADS.

  SC and Con belong to calls (Finish has none), IsSolved to the last step, which alone earns it.
  """
  steps = trajectory.steps
  values = [(s.success_calling, s.contribution, trajectory.solved) for s in steps]
  last = len(steps) - 1
  calls = [not isinstance(s.action, Finish) for s in steps]
  there = [(call, call, k == last) for k, call in enumerate(calls)]
  shape = (len(steps), len(HEADS))
  return np.array(values, np.float32).reshape(shape), np.array(there, bool).reshape(shape)


def apply(trajectory: Trajectory, scores: np.ndarray) -> Trajectory:
  """The same trajectory with scores float32[S, 3] in [0, 1] as SC, Con and IsSolved.

  Those that `labels` has none of are 0, but an answer to which the user has replied is no failed
  call: its SC is 1, as by rules. What an infrastructure error ended, or has no steps, stays.
  """
  if trajectory.status is Status.INFRASTRUCTURE_ERROR or not trajectory.steps:
    return trajectory
  given = np.where(labels(trajectory)[1], scores, 0.0)
  replied = [isinstance(s.action, Finish) and s.observation is not None for s in trajectory.steps]
  given[replied, SC] = 1.0
  steps = tuple(
    dataclasses.replace(s, success_calling=float(given[k, SC]), contribution=float(given[k, CON]))
    for k, s in enumerate(trajectory.steps)
  )
  return dataclasses.replace(trajectory, steps=steps, solved=float(given[-1, SOLVED]))
