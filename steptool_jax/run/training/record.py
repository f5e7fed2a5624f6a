"""Trajectories that a run keeps for --mode=report: chosen moments, bounded, one file a moment.

    WORKDIR/moments/heldout_base.jsonl      before training   (at most record.heldout each)
    WORKDIR/moments/heldout_sft.jsonl       after SFT
    WORKDIR/moments/heldout_rl.jsonl        after RL
    WORKDIR/moments/heldout_greedy.jsonl    at the end, with evaluation.greedy
    WORKDIR/moments/train_000010.jsonl      RL iteration 10   (at most record.train each)

The lines are those of data/trajectories.py; their metadata holds `texts`, the text of every sampled
token, and in training `advantages`, as the update used them (float32, whitened where the run
whitens). A resumed run writes the same files again.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from steptool_jax.config import Config
from steptool_jax.data.trajectories import AnnotatedTrajectory, to_document, write_trajectories
from steptool_jax.dialogue.codec import Codec
from steptool_jax.environments.base import Environment
from steptool_jax.learning import batching
from steptool_jax.rollout.strategy import SearchResult
from steptool_jax.run.hosts import hosts
from steptool_jax.types import Trajectory


@dataclasses.dataclass(frozen=True)
class Recorder:
  """Writes the moments of one run."""

  config: Config
  workdir: pathlib.Path
  codec: Codec
  environment: Environment
  iterations: int  # of RL, in all

  def heldout(self, moment: str, trajectories: Sequence[Trajectory], temperature: float) -> None:
    """Keeps the first record.heldout of an evaluation; moment: base, sft, rl or greedy."""
    kept = trajectories[: self.config.record.heldout]
    if kept:
      self._write(f"heldout_{moment}.jsonl", "heldout", kept, {}, temperature)

  def wants(self, done: int) -> bool:
    """Whether RL iteration `done` (from 0) is kept: every so often, and the last one."""
    r = self.config.record
    return bool(r.train) and (done % r.every == 0 or done == self.iterations - 1)

  def training(
    self,
    done: int,
    trajectories: Sequence[Trajectory],
    packed: batching.Packed,
    advantages_BT: np.ndarray | None,
  ) -> None:
    """Keeps record.train trajectories of an iteration: all samples of tasks spread over it.

    packed: what was learnt from; advantages_BT: float32 on its rows, None where the algorithm has
    none.
    """
    tasks = list(dict.fromkeys(t.task_id for t in trajectories))
    most = self.config.record.train
    count = max(most * len(tasks) // len(trajectories), 1)
    kept = {tasks[i] for i in np.linspace(0, len(tasks) - 1, count).astype(int)}
    chosen = [t for t in trajectories if t.task_id in kept][:most]
    advantages = {}
    if advantages_BT is not None:
      wanted = set(map(id, chosen))
      values_of = batching.unpack(packed, advantages_BT)
      for t, values in zip(packed.trajectories, values_of, strict=True):
        # JSON has no NaN; the update skips such a batch.
        if id(t) in wanted and np.isfinite(values).all():
          advantages[id(t)] = _by_step(t, values)
    temperature = self.config.rollout.temperature
    self._write(f"train_{done:06d}.jsonl", "train", chosen, advantages, temperature)

  def _write(
    self,
    name: str,
    split: str,
    trajectories: Sequence[Trajectory],
    advantages: Mapping[int, list[list[float]]],
    temperature: float,
  ) -> None:
    """advantages: by id() of the trajectory, since stored data may hold two of one name."""
    if not hosts.primary():
      return
    wanted = {t.task_id for t in trajectories}
    queries = {t.id: t.query for t in self.environment.tasks(split) if t.id in wanted}

    def annotated(t: Trajectory) -> AnnotatedTrajectory:
      metadata: dict[str, Any] = {"texts": token_texts(self.codec, t), "temperature": temperature}
      if id(t) in advantages:
        metadata["advantages"] = advantages[id(t)]
      return AnnotatedTrajectory(t, query=queries.get(t.task_id, ""), metadata=metadata)

    write_trajectories(self.workdir / "moments" / name, map(annotated, trajectories))


def token_texts(codec: Codec, trajectory: Trajectory) -> list[list[str]]:
  """Text of every sampled token, step by step; the pieces of a step add up to its text.

  A character that spans several tokens stands with the last of them.
  """
  return [_pieces(codec.decode, step.tokens.tolist()) for step in trajectory.steps]


def search_document(result: SearchResult) -> dict[str, Any]:
  """A whole tree search as JSON data: its calls in order, and the leaf that was chosen."""
  everything = dataclasses.replace(
    result.trajectory, steps=tuple(node.step for node in result.nodes)
  )
  steps = to_document(AnnotatedTrajectory(everything))["steps"]
  nodes = [
    {
      "parent": node.parent,
      "status": str(node.status) if node.status else "",
      "action": step["action"],
      "observation": step["observation"],
    }
    for node, step in zip(result.nodes, steps, strict=True)
  ]
  return {"leaf": result.leaf, "nodes": nodes}


def _pieces(decode: Callable[[Sequence[int]], str], ids: list[int]) -> list[str]:
  pieces = [decode([token]) for token in ids]
  if "".join(pieces) == decode(ids):
    return pieces
  pieces, before = [], ""
  for end in range(1, len(ids) + 1):
    text = decode(ids[:end])
    whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
    pieces.append(text[len(before) :] if whole else "")
    before = text if whole else before
  return pieces


def _by_step(trajectory: Trajectory, values: np.ndarray) -> list[list[float]]:
  ends = np.cumsum([len(step.tokens) for step in trajectory.steps])
  return [part.astype(float).tolist() for part in np.split(values, ends[:-1])]
