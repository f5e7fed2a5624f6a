"""Small real things for tests: a tiny model, random trajectories."""

import numpy as np

from steptool_jax.policy import model
from steptool_jax.types import Finish, Status, Step, Trajectory

VOCAB = 61


def tiny_config(**changes) -> model.ModelConfig:
  fields = {
    "family": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "tie_embeddings": True,
    "max_position_embeddings": 128,
  }
  return model.ModelConfig(**(fields | changes))


def random_trajectory(rng, max_steps=4, status=None, prompt=5) -> Trajectory:
  """Random ids, log-probs and fractional rewards; observations behind all steps but a final one."""
  if status is None:
    status = rng.choice([Status.ANSWERED, Status.STEP_BUDGET])
  count = int(rng.integers(1, max_steps + 1))
  steps = []
  for k in range(count):
    last = k == count - 1 and status == Status.ANSWERED
    length = int(rng.integers(1, 6))
    steps.append(
      Step(
        tokens=rng.integers(0, VOCAB, length).astype(np.int32),
        logprobs=rng.normal(-1, 0.3, length).astype(np.float32),
        action=Finish("x"),
        observation_tokens=rng.integers(0, VOCAB, 0 if last else int(rng.integers(1, 5))).astype(
          np.int32
        ),
        reward=float(rng.uniform(0, 1)),
      )
    )
  prompt_tokens = rng.integers(0, VOCAB, prompt + int(rng.integers(0, 4))).astype(np.int32)
  return Trajectory(f"t{rng.integers(1 << 30)}", 0, prompt_tokens, tuple(steps), Status(status))
