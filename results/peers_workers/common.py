"""What all workers share: the pipe to peers.py, settings, and the ids of a trajectory."""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

PIPE = os.fdopen(os.dup(1), "w")  # before the libraries print
os.dup2(2, 1)
# Of the release's PPO (KL as a reward, towards the first policy), and of GRPO with no KL.
GAMMA, LAM, VALUE_COEF, KL = 0.99, 0.95, 0.1, 0.3
CLIP, RATE = 0.2, 1e-5


class Clock:
  """Seconds since it was made, and seconds of this process on all cores together."""

  def __init__(self):
    self.started = time.perf_counter(), time.process_time()

  def read(self) -> dict[str, float]:
    seconds, cpu_seconds = self.started
    return {
      "seconds": time.perf_counter() - seconds,
      "cpu_seconds": time.process_time() - cpu_seconds,
    }


def commands() -> Iterator[str]:
  """Lines on stdin, each of which asks for a repetition."""
  PIPE.write("{}\n")  # ready
  PIPE.flush()
  for line in sys.stdin:
    yield line.strip()


def reply(**figures: Any) -> None:
  PIPE.write(json.dumps(figures) + "\n")
  PIPE.flush()


def serve(action: Callable[[int], dict[str, Any]], more: Callable[[], dict]) -> None:
  """action(repetition) -> what it reports besides its seconds; more(): what is found untimed."""
  for repetition, _ in enumerate(commands()):
    clock = Clock()
    report = action(repetition)
    reply(**clock.read(), **report, **more())


def xla_compilations() -> Callable[[], dict]:
  """Number and seconds of XLA compilations since the last call."""
  import jax

  seconds: list[float] = []

  def listen(event: str, duration: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
      seconds.append(duration)

  def since() -> dict:
    report = {"compilations": len(seconds), "compile_seconds": sum(seconds)}
    seconds.clear()
    return report

  jax.monitoring.register_event_duration_secs_listener(listen)
  return since


def versions(*packages: str) -> dict[str, str]:
  return {name: importlib.metadata.version(name) for name in packages}


def responses(trajectory: dict) -> tuple[np.ndarray, np.ndarray]:
  """(ids after the prompt, mask of the sampled ones)."""
  steps = trajectory["steps"]
  ids = [part for s in steps for part in (s["sampled"], s["observed"])]
  mask = [np.full(len(part), k % 2 == 0) for k, part in enumerate(ids)]
  return np.concatenate(ids).astype(np.int64), np.concatenate(mask).astype(np.int64)


def advantages(trajectories: list[dict]) -> list[float]:
  """(R - mean) / deviation over a task's samples, as ours computes them: TRL, and tunix, divide by
  the deviation of a sample of the population."""
  tasks = np.array([t["task"] for t in trajectories])
  rewards = np.array([sum(s["reward"] for s in t["steps"]) for t in trajectories])
  found = np.zeros(len(rewards))
  for task in set(tasks):
    own = rewards[tasks == task]
    found[tasks == task] = (own - own.mean()) / (own.std() + 1e-4)
  return found.tolist()
