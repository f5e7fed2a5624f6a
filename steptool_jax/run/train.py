"""--mode=train: SFT warm-up on demonstrations, then RL with step rewards, on rollouts or, with
data.path, on stored trajectories (run/training/offline.py).

Run the same command again to go on: a checkpoint holds the state, and everything random follows
from (seed, iteration), so a resumed run is bit-equal to one that was never stopped.
"""

import dataclasses
import pathlib
import time
from typing import Any

from absl import logging
from tqdm import tqdm

from steptool_jax.config import Config
from steptool_jax.evaluation.metrics import rollout_metrics
from steptool_jax.learning import algorithms
from steptool_jax.policy import sharding
from steptool_jax.rewards import orchestra
from steptool_jax.rollout.chain import Interrupted
from steptool_jax.rollout.conversation import NonFiniteLogprobs
from steptool_jax.run import export
from steptool_jax.run.hosts import hosts, maintenance
from steptool_jax.run.parts import build, opening, rollouts
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.training import behaviour, offline, progress, record, replay, restore
from steptool_jax.run.training.demonstrations import Demonstrations
from steptool_jax.run.training.order import jobs
from steptool_jax.run.training.phase import Phase
from steptool_jax.run.training.progress import Progress
from steptool_jax.run.workdir import metrics_writer
from steptool_jax.run.workdir.checkpoint import Checkpoints
from steptool_jax.types import Status, TrainState

# Fields that may change between a start and a resume: they do not change what was learnt so far.
MAY_CHANGE = (
  *(
    "evaluation.",
    "record.",
    "checkpoint.",
    "compilation_cache",
    "train.export",
    "bench.",
    "mesh.",
  ),
  *("simulator.", "judge.endpoint.", "serve.", "annotate.", "report.", "study."),
)


def run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains (or goes on training) and returns the summary that it has written.

  Raises:
    ValueError: input that does not fit, named; RL on samples of a restricted distribution.
  """
  r = config.rollout
  if algorithms.get_algorithm(config.algorithm).rewards != "none" and (r.top_k or r.top_p < 1):
    raise ValueError(
      f"config.rollout.top_k = {r.top_k}, top_p = {r.top_p:g}: RL learns from samples of the whole "
      "distribution, because its log-probs are those of the whole one; train with 0 and 1"
    )
  if r.strategy != "chain":
    raise ValueError(
      f"config.rollout.strategy: {r.strategy!r} is for --mode=evaluate; its siblings are sampled "
      "behind prompts that a trajectory does not hold, so RL trains on 'chain'"
    )
  restore.refuse_other_config(config, workdir, MAY_CHANGE)
  c = config.checkpoint
  with (
    opening.Stop().listening() as stop,
    maintenance.watched(stop.request),
    opening.open_parts(config, workdir, stop) as b,
    Checkpoints(workdir, c.keep, c.keep_best) as checkpoints,
  ):
    return _Trainer(b, checkpoints).run()


class _Trainer:
  """The run's moving parts: phases, progress, clock. What learns is run/training/phase.py's."""

  def __init__(self, parts: Parts, checkpoints: Checkpoints):
    self.parts, self.config, self.checkpoints = parts, parts.config, checkpoints
    self.started = time.monotonic()
    self.progress = Progress()
    self.algorithm = algorithms.get_algorithm(self.config.algorithm)
    self.data: offline.Data | None = None  # stored trajectories in the place of rollouts
    if self.config.data.path:
      self.data = offline.load(self.config, parts.policy.chat_format, parts.policy.model)
    self.conversations, self.iterations = self._sizes()
    self.recorder = record.Recorder(
      self.config,
      parts.workdir,
      parts.policy.chat_format.codec,
      parts.environment,
      self.iterations,
    )

  def _sizes(self) -> tuple[int, int]:
    """(most conversations of an iteration, iterations of RL or of any training on stored data)."""
    if self.data is not None:
      return self.data.most, self.config.data.passes * self.data.batches_per_pass
    r = self.config.rollout
    return r.tasks * r.samples, self.config.train.iterations

  # --- phases ---

  def run(self) -> dict[str, Any]:
    self._enter()
    self.before = self.progress.seconds
    # Only now: a start that fails on its input must not bind the folder to that input.
    restore.claim(self.config, self.parts.workdir)
    self.writer = metrics_writer.MetricsWriter(
      self.parts.workdir, self.progress.records, self._number()
    )
    try:
      if self.progress.phase == "sft":
        if "pass_rate_base" not in self.progress.results:
          self._evaluate("pass_rate_base", "before training")
        self._sft()
        self._evaluate("pass_rate_sft", "after SFT")
        if self.algorithm.rewards != "none":
          self._to_rl()
      if self.progress.phase == "rl":
        self._rl()
        self._evaluate("pass_rate_rl", "after RL")
      if self.config.evaluation.greedy and self.config.evaluation.temperature:
        self._evaluate("pass_rate_greedy", "at the end, greedily", temperature=0.0)
      return self._finish()
    except Interrupted:
      self._save()
      self.checkpoints.wait()
      logging.warning("stopped on request; saved. Run the same command to go on.")
      return self._summary(interrupted=True)
    finally:
      self.writer.close()

  def _enter(self) -> None:
    """State and progress: fresh, or of the newest whole checkpoint."""
    for name, rows in (
      ("sft.micro_rows", self.config.sft.micro_rows),
      ("train.micro_rows", self.config.train.micro_rows),
    ):
      sharding.check_rows(name, rows, self.parts.mesh)

    def abstract_of(meta: dict[str, Any]) -> TrainState:
      self.progress = Progress(**meta)
      self._set_learning()
      return self.learning.abstract_state()

    found = self.checkpoints.newest(abstract_of)
    if found is not None:
      self.learning.state = found.state
      self.learning.past = replay.from_documents(found.replay)
      logging.info("resuming: %s, iteration %d", self.progress.phase, self.progress.done)
      return
    self._set_learning()
    self.learning.start(build.initial_variables(self.config, self.parts.policy, self.parts.mesh))

  def _set_learning(self) -> None:
    """Of the phase that `progress` is in."""
    self.learning = Phase(
      self.config,
      self.parts.policy,
      self.parts.mesh,
      self.recorder,
      self.progress,
      self.iterations,
      self.conversations,
    )

  def _sft(self) -> None:
    stored = self.data if self.algorithm.rewards == "none" else None
    steps = self.config.sft.steps if stored is None else self.iterations
    if not steps:
      return
    source = Demonstrations(self.parts) if stored is None else stored
    size = self.config.sft.batch if stored is None else stored.size
    capacity = -(-size // self.config.sft.micro_rows)
    with self._bar(steps, "SFT") as bar:
      while self.progress.done < steps:
        self._check_stop()
        metrics = self.learning.imitate(source.batch(self.progress.done), capacity)
        self._advance()
        self.writer.write(self._number(), "sft", metrics)
        bar.update()
        bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
        every = self.config.sft.checkpoint_every
        if (every and self.progress.done % every == 0) or self.progress.done == steps:
          self._save()
    if stored is None:
      source.report()

  def _to_rl(self) -> None:
    variables = build.fold_adapters(
      self.config, self.parts.policy, self.parts.mesh, self.learning.variables()
    )
    self.progress.phase, self.progress.done = "rl", 0
    self._set_learning()
    self.learning.start(variables)
    self._save()

  def _rl(self) -> None:
    if self.data is not None:
      self._fill_behaviour()
    with self._bar(self.iterations, self.config.algorithm) as bar:
      while self.progress.done < self.iterations:
        self._evaluate_between()
        self._check_stop()
        started = time.monotonic()
        figures = self._iteration() if self.data is None else self._offline_iteration()
        self.progress.rl_seconds += time.monotonic() - started
        self._advance()
        self.writer.write(self._number(), "train", figures | self.progress.spent())
        bar.update()
        bar.set_postfix_str(progress.shown(figures), refresh=False)
        done = self.progress.done
        if done % self.config.checkpoint.every == 0 or done == self.iterations:
          self._save()
    if self.iterations and not self.progress.learnt and not self.progress.skipped:
      raise RuntimeError(
        f"algorithm {self.config.algorithm!r} learns from {self.algorithm.select.needs}, and none "
        f"of {self.iterations} iterations had one: raise rollout.samples, rollout.tasks or "
        "sft.steps, loosen rewards.filters, or use algorithm 'steptool', which learns from every "
        "trajectory"
      )

  def _evaluate_between(self) -> None:
    """Held-out figures every few iterations; behind the checkpoint, so that a resume makes up for
    an evaluation that was cut off."""
    done, every = self.progress.done, self.config.evaluation.every
    if every and done % every == 0 and done > self.progress.evaluated:
      self._evaluate("", f"iteration {done}", self.config.evaluation.curve_tasks)
      self.progress.evaluated = done

  # --- one RL iteration ---

  def _iteration(self) -> dict[str, float]:
    started = time.monotonic()
    try:
      trajectories, stats = rollouts.collect(
        self.parts,
        self.learning.variables(),
        jobs(self.config, self.parts.environment.tasks("train"), self.progress.done),
        self.progress.done,
        self.config.rollout.temperature,
        "rollout",
      )
    except NonFiniteLogprobs as error:
      self.learning.count_skipped(True, str(error))
      return {"skipped": 1.0}
    figures = rollout_metrics(trajectories)
    usable = [t for t in trajectories if t.steps and t.status is not Status.INFRASTRUCTURE_ERROR]
    if not usable:
      raise RuntimeError(
        "no conversation of this iteration can be trained on: all ended in infrastructure errors "
        "or before the first call; look at the tools and at rollout.max_tokens"
      )
    f = self.config.rewards.filters
    filters = orchestra.Filters(f.min_deviation, f.malformed, f.unfinished)
    kept, dropped = orchestra.keep(usable, filters)
    figures |= dropped
    update_started = time.monotonic()
    figures |= self.learning.learn(kept)
    now = time.monotonic()
    tokens = sum(t.num_tokens for t in kept)
    self.progress.count(trajectories, tokens)
    self.progress.train_curve.append((self.progress.conversations, figures["pass_rate"]))
    return figures | progress.shares(stats, now - update_started, now - started, tokens)

  def _offline_iteration(self) -> dict[str, float]:
    started = time.monotonic()
    trajectories = self.data.batch(self.progress.done)
    figures = rollout_metrics(trajectories) | self.learning.learn(trajectories)
    tokens = sum(t.num_tokens for t in trajectories)
    self.progress.count(trajectories, tokens)
    return figures | {"tokens_per_second": tokens / (time.monotonic() - started)}

  def _fill_behaviour(self) -> None:
    """Old log-probs of the data: of the present policy before its first update, else as kept."""
    if self.progress.done:
      self.data = behaviour.restore(self.data, self.parts.workdir)
      return
    self.data = behaviour.fill(
      self.data, self.config.train.row_tokens, self.learning.logprobs, self.parts.workdir
    )

  # --- book-keeping ---

  def _bar(self, total: int, label: str) -> tqdm:
    return hosts.bar(total=total, initial=self.progress.done, desc=label)

  def _number(self) -> int:
    """Iterations of both phases so far: the step of a metrics record."""
    return self.progress.done + (self.config.sft.steps if self.progress.phase == "rl" else 0)

  def _advance(self) -> None:
    self.progress.done += 1

  def _check_stop(self) -> None:
    if any(hosts.gather(self.parts.stop())):
      raise Interrupted

  def _save(self) -> None:
    self._clock()
    self.progress.records = self.writer.records
    past = replay.to_documents(self.learning.past)
    self.checkpoints.save(
      self._checkpoint_number(), self.learning.state, dataclasses.asdict(self.progress), past
    )

  def _checkpoint_number(self) -> int:
    return self._number() + (1 if self.progress.phase == "rl" else 0)

  def _clock(self) -> float:
    self.progress.seconds = self.before + time.monotonic() - self.started
    return self.progress.seconds

  def _evaluate(
    self, name: str, label: str, num_tasks: int = 0, temperature: float | None = None
  ) -> None:
    """Held-out figures; a name puts the pass rate into the results.

    temperature: None for that of the config; another one's pass rate is no part of the curve.
    """
    e = self.config.evaluation
    if not e.tasks:
      return
    figures, trajectories = rollouts.evaluate_policy(
      self.parts,
      self.learning.variables(),
      num_tasks or e.tasks,
      label,
      e.temperature if temperature is None else temperature,
    )
    if name:
      self.recorder.heldout(name.removeprefix("pass_rate_"), trajectories)
    if temperature is not None:
      self.progress.results[name] = figures["pass_rate"]
      return
    self.writer.write(self._number(), "heldout", figures | self.progress.spent())
    self.checkpoints.score(self._checkpoint_number(), figures["pass_rate"])
    figure = f"{label}: held-out pass rate {figures['pass_rate']:.1%}"
    hosts.say(self.parts.services.beside(figure))
    if name:
      self.progress.results[name] = figures["pass_rate"]
    if self.progress.phase == "rl" or name == "pass_rate_sft":
      self.progress.heldout_curve.append((self.progress.conversations, figures["pass_rate"]))

  def _finish(self) -> dict[str, Any]:
    if self.config.train.export:
      folded = self.progress.phase == "rl" and self.config.sft.steps > 0
      export.write(self.parts, self.learning.variables(), folded)
    if hosts.primary() and (self.progress.train_curve or self.progress.heldout_curve):
      progress.plot(self.config, self.parts.workdir, self.progress)
    return self._summary(interrupted=False)

  def _summary(self, interrupted: bool) -> dict[str, Any]:
    self._clock()
    return progress.summarise(self.parts, self.progress, self.data, interrupted)
