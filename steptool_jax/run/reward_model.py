"""--mode=reward_model: annotated trajectories -> a step reward model, WORKDIR/reward_model.

Heads for SC, Con and IsSolved on the trunk of model.path (any model with the policy's tokenizer, or
the policy itself: the export of its run), fully fine-tuned or, with lora.rank, by adapters. The
tasks of reward_model.heldout are measured on after each pass and never learnt from. Use the model
in --mode=train with rewards.source=model and rewards.model.path=WORKDIR/reward_model.

Run the same command again to go on: all that is random follows from (seed, step), so a resumed run
is bit-equal to one that was never stopped.
"""

import functools
import pathlib
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from tqdm import tqdm

from steptool_jax.config import Config
from steptool_jax.evaluation import scoring
from steptool_jax.learning import reward_model
from steptool_jax.policy import lora, model, sharding
from steptool_jax.run.data import reward_data
from steptool_jax.run.data.reward_data import Split
from steptool_jax.run.hosts import hang, hosts
from steptool_jax.run.parts import build, opening, reward_models, rollouts
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.training import restore, setup
from steptool_jax.run.workdir import outputs
from steptool_jax.run.workdir.checkpoint import Checkpoints
from steptool_jax.run.workdir.outputs import MetricsWriter
from steptool_jax.run.workdir.sinks import Sinks
from steptool_jax.types import TrainState, Trajectory

# What the result depends on; all other fields may differ between a start and a resume.
FIXED = ("seed", "model.", "lora.", "reward_model.", "train.row_tokens")


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains (or goes on training) and returns the summary that it has written.

  ValueError for input that does not fit, named, before any work.
  """
  if any((workdir / name).exists() for name in ("checkpoints", "moments", "behaviour.npz")):
    raise ValueError(f"--workdir: {workdir} holds a run of --mode=train; use another one")
  optimizer = config.reward_model.optimizer
  setup.refuse_lost_steps(config, optimizer, "reward_model.optimizer")
  restore.refuse_other_config(config, workdir, only=FIXED)
  with (
    opening.Stop().listening() as stop,
    opening.open_parts(config, workdir, stop) as parts,
    Checkpoints(workdir / "training", config.checkpoint.keep) as checkpoints,
  ):
    sharding.check_rows("reward_model.micro_rows", config.reward_model.micro_rows, parts.mesh)
    split = reward_data.load(config, parts.policy, rollouts.held_out(parts))
    return _Training(parts, split, checkpoints).run()


class _Training:
  """One run: its state, how far it is, and where that is written down."""

  def __init__(self, parts: Parts, split: Split, checkpoints: Checkpoints):
    """Goes on from the newest whole checkpoint, or starts anew."""
    self.parts, self.split, self.checkpoints = parts, split, checkpoints
    c, self.model = parts.config.reward_model, parts.policy.model
    self.steps = c.passes * split.steps_per_pass
    self.optimizer = setup.build_optimizer(c.optimizer, self.steps)
    self.update = reward_model.compile_update(self.model, self.optimizer)
    self.capacity = -(-c.batch // c.micro_rows)
    started = time.monotonic()

    def abstract_of(meta: dict[str, Any]) -> TrainState:
      if meta["digest"] != split.digest:
        raise ValueError(
          f"config.reward_model.data: the trajectories are not those that the run in "
          f"{parts.workdir} began with; put the old files back, or use another --workdir"
        )
      return _abstract_state(self.model, parts, self.optimizer)

    found = checkpoints.newest(abstract_of)
    if found is None:
      variables = build.initial_variables(parts.config, parts.policy, parts.mesh)
      self.state = _start(self.model, self.optimizer, variables, parts.mesh)
      self.meta = {"done": 0, "records": 0, "skipped": 0, "seconds": 0.0, "figures": {}}
      self.meta["digest"] = split.digest
    else:
      self.state, self.meta = found.state, dict(found.meta)
      logging.info("resuming: step %d of %d", self.meta["done"], self.steps)
    self._began = started - self.meta["seconds"]
    restore.claim(parts.config, parts.workdir)
    sinks = Sinks(parts.config, parts.workdir)
    self.writer = MetricsWriter(parts.workdir, self.meta["records"], self.meta["done"], sinks)

  def run(self) -> dict[str, Any]:
    """Learns to the end, or to where it is asked to stop."""
    done_before = self.meta["done"]
    try:
      with hosts.bar(total=self.steps, initial=done_before, desc="reward model") as bar:
        while self.meta["done"] < self.steps and not self.parts.stop():
          self._step(bar)
          if self.meta["done"] % self.split.steps_per_pass == 0:
            self.meta["figures"] = self._measure()
            self.writer.write(self.meta["done"], "heldout", self.meta["figures"])
            self._save()
      interrupted = self.meta["done"] < self.steps
      if interrupted:
        self._save()
        logging.warning("stopped on request; saved. Run the same command to go on.")
      return self._finish(interrupted)
    finally:
      self.writer.close()

  def _step(self, bar: tqdm) -> None:
    hang.stamp()
    c = self.parts.config
    trajectories = self.split.at(self.meta["done"])
    batch, _ = reward_models.pack(trajectories, c.train.row_tokens, labelled=True)
    on_device, count = reward_models.to_device(
      batch, c.reward_model.micro_rows, self.capacity, self.parts.mesh
    )
    self.state, metrics = self.update(self.state, on_device, count)
    metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
    # Skipped ones in a row: the meta keeps how many, so that a resumed run counts on.
    self.meta["skipped"] = self.meta["skipped"] + 1 if metrics["skipped"] else 0
    if self.meta["skipped"] >= c.train.max_skipped:
      raise RuntimeError(
        f"{self.meta['skipped']} updates in a row were skipped because something was not finite; "
        "lower reward_model.optimizer.learning_rate"
      )
    self.meta["done"] += 1
    self.writer.write(self.meta["done"], "train", metrics)
    bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
    bar.update()

  def _measure(self) -> dict[str, float]:
    """Figures on the tasks that are not learnt from."""
    return scoring.figures(self.split.heldout, self.scores(self.split.heldout))

  def scores(self, trajectories: list[Trajectory]) -> list[np.ndarray]:
    """float32[S, 3] of each, by the present state."""
    c = self.parts.config
    return reward_models.score(
      self.model,
      lora.join_variables(self.state.trainable, self.state.frozen),
      self.state.trainable["reward_heads"],
      trajectories,
      row_tokens=c.train.row_tokens,
      micro_rows=c.reward_model.micro_rows,
      most=c.reward_model.batch,
      mesh=self.parts.mesh,
    )

  def _save(self) -> None:
    self.meta |= {"records": self.writer.records, "seconds": time.monotonic() - self._began}
    self.checkpoints.save(self.meta["done"], self.state, self.meta)

  def _finish(self, interrupted: bool) -> dict[str, Any]:
    summary = {
      **self.meta["figures"],
      **self.split.report,
      "steps": self.meta["done"],
      "seconds": time.monotonic() - self._began,
      "peak_rss_gib": outputs.peak_rss_gib(),
      "interrupted": interrupted,
    }
    if not interrupted:
      hang.rest()  # a large model takes its time
      directory = self.parts.workdir / reward_models.NAME
      reward_models.save(
        directory,
        self.parts.policy,
        lora.join_variables(self.state.trainable, self.state.frozen),
        self.state.trainable["reward_heads"],
        {"data": self.split.digest, "heldout": self.meta["figures"]},
      )
      summary["directory"] = str(directory)
    return outputs.write_summary(self.parts.workdir, "reward_model", summary)


def _start(config: model.ModelConfig, optimizer: Any, variables: dict, mesh: Mesh) -> TrainState:
  trainable, frozen = lora.split_variables(variables, train_values=False)
  make = functools.partial(reward_model.init_state, optimizer, config.hidden_size)
  layout = sharding.shardings(jax.eval_shape(make, trainable, frozen), mesh)
  return jax.jit(make, out_shardings=layout)(trainable, frozen)


def _abstract_state(config: model.ModelConfig, parts: Parts, optimizer: Any) -> TrainState:
  """Shapes and shardings, for a restore."""

  def make():
    key = jax.random.key(0)
    variables = {"params": model.init_params(config, key)}
    if parts.policy.lora is not None:
      variables["lora"] = lora.init_lora(config, parts.policy.lora, key)
    split = lora.split_variables(variables, train_values=False)
    return reward_model.init_state(optimizer, config.hidden_size, *split)

  state = jax.eval_shape(make)
  return sharding.abstract(state, sharding.shardings(state, parts.mesh))
