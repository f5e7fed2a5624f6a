"""--mode=train: SFT warm-up on demonstrations, then RL with step rewards, on rollouts or, with
data.path, on stored trajectories (run/training/offline.py).

run/training/iteration.py is one iteration of RL, top to bottom; here are the phases around it.

Run the same command again to go on: a checkpoint holds the state, and everything random follows
from (seed, iteration), so a resumed run is bit-equal to one that was never stopped.
"""

import dataclasses
import pathlib
import sys
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from absl import logging
from jax.sharding import Mesh
from tqdm import tqdm

from steptool_jax.config import Config
from steptool_jax.evaluation.metrics import by_kind
from steptool_jax.files import read_json
from steptool_jax.learning import algorithms
from steptool_jax.policy import sharding
from steptool_jax.rewards import assembly
from steptool_jax.rollout.chain import Interrupted
from steptool_jax.run import export
from steptool_jax.run.checks import before_training
from steptool_jax.run.data import offline
from steptool_jax.run.evaluating import tries
from steptool_jax.run.hosts import hosts, maintenance
from steptool_jax.run.parts import build, opening, rollouts
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.training import (
  behaviour,
  closing,
  iteration,
  record,
  replay,
  restore,
  setup,
  sources,
)
from steptool_jax.run.training.phase import Phase
from steptool_jax.run.training.progress import Progress, plot, shown, summarise
from steptool_jax.run.training.sft_batches import SftBatches
from steptool_jax.run.workdir import outputs
from steptool_jax.run.workdir.checkpoint import Checkpoints
from steptool_jax.run.workdir.outputs import MetricsWriter
from steptool_jax.run.workdir.sinks import Sinks
from steptool_jax.types import TrainState

# Fields that may change between a start and a resume: they do not change what was learnt so far.
MAY_CHANGE = (
  "evaluation.",
  "record.",
  "checkpoint.",
  "compilation_cache",
  "train.export",
  "bench.",
  "mesh.",
  "hang_after",
  "rollout.slots",
  "rollout.long_slots",
  "rollout.tensor",
  "rollout.leave",
  "rollout.tool_timeout",
  "rollout.tool_workers",
  "rollout.tool_retries",
  "environment.harness_timeout",
  "environment.openenv",  # the same server elsewhere
  "train.iterations",  # may be raised
  "train.micro_rows",  # as a mesh of another size asks for
  "sft.micro_rows",
  "simulator.",
  "judge.endpoint.",
  "serve.",
  "annotate.",
  "reward_model.",
  "rewards.model.watch",
  "rewards.model.apart",
  "report.",
  "study.",
  "check.",
)


_UNPAID = 3  # iterations in a row without any reward, after which a sentence says so


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
  imitates = algorithms.get_algorithm(config.algorithm).rewards == "none"
  field = "sft.optimizer" if imitates else "train.optimizer"
  optimizer = config.sft.optimizer if imitates else config.train.optimizer
  setup.refuse_lost_steps(config, optimizer, field)
  rule = config.environment.name == "toolbench" and config.judge.kind == "rule"
  rule = rule and config.rewards.source != "model"  # which does not pay by the judge's verdict
  if rule and not config.data.path and algorithms.get_algorithm(config.algorithm).rewards != "none":
    raise ValueError(
      "config.judge.kind: 'rule' is for evaluation; a policy that is paid by it learns to please "
      "the rule (results/rule_judges.md) and not to solve queries. Set judge.kind to 'llm', and "
      "judge.endpoint.base_url and model"
    )
  if r.strategy != "chain":
    raise ValueError(
      f"config.rollout.strategy: {r.strategy!r} is for --mode=evaluate; its siblings are sampled "
      "after prompts that a trajectory does not hold, so RL trains on 'chain'"
    )
  if (workdir / "training").exists():
    raise ValueError(f"--workdir: {workdir} holds a run of --mode=reward_model; use another one")
  restore.refuse_other_config(config, workdir, MAY_CHANGE)
  restore.refuse_fewer_iterations(config, workdir)
  # Scores of other tasks could not be compared.
  restore.refuse_other_config(config, workdir, only=("evaluation.selection",))
  c = config.checkpoint
  with (
    opening.Stop().listening() as stop,
    maintenance.watched(stop.request),
    opening.open_parts(config, workdir, stop) as parts,
    Checkpoints(workdir, c.keep, c.keep_best) as checkpoints,
  ):
    before_training.refuse_bad_input(parts)
    try:
      run = Run(parts, checkpoints)
    except Interrupted:
      logging.warning("stopped on request, before anything was learnt")
      # For who starts again what was interrupted (launch/worker.sh).
      path = workdir / "summary_train.json"
      before = hosts.lead(lambda: read_json(path) if path.exists() else {})
      return outputs.write_summary(workdir, "train", before | {"interrupted": True})
    with ThreadPoolExecutor(1, "compile") as executor:
      run.compile_ahead(executor)
      try:
        summary = _train(run)
      finally:
        executor.shutdown(wait=False, cancel_futures=True)
    if not summary["interrupted"]:
      flags = closing.config_flags(sys.argv[1:])
      own = config.environment.name == "custom"
      hosts.say("\n".join(closing.lines(workdir, summary, closing.on_terminal(), flags, own)))
    return summary


class Run:
  """What a training run works with, how far it is, and where that is written down."""

  def __init__(self, parts: Parts, checkpoints: Checkpoints):
    """Goes on from the newest whole checkpoint, or starts anew.

    ValueError for input that does not fit; only then is the workdir bound to this config.
    """
    config = parts.config
    self.parts, self.config, self.checkpoints = parts, config, checkpoints
    self.algorithm = algorithms.get_algorithm(config.algorithm)
    started = time.monotonic()
    self.data: offline.Data | None = None  # stored trajectories in the place of rollouts
    self.most = config.rollout.tasks * config.rollout.samples  # conversations of an iteration
    self.iterations = config.train.iterations  # of RL, or of any training on stored data
    if config.data.path:
      policy = parts.policy
      held_out = rollouts.held_out(parts)
      self.data = offline.load(config, policy.chat_format, policy.model, held_out)
      self.most = self.data.most
      self.iterations = config.data.passes * self.data.batches_per_pass
    elif self.algorithm.rewards == "step" and not assembly.described(config.rewards)["safe"]:
      logging.warning(
        "config.rewards: shaping %r with source %r may also pay for calls without use "
        "(results/incentives.md); 'progress' with 'progress' does not",
        config.rewards.shaping,
        config.rewards.source,
      )
    check_rows(config, parts.mesh)
    self.scorer = sources.prepare(parts)
    self.selection = rollouts.selection(parts)
    self.recorder = record.Recorder(
      config, parts.workdir, parts.policy.chat_format.codec, parts.environment, self.iterations
    )
    self.phase = self._restored_phase()
    self.progress = self.phase.progress
    self._next: Phase | None = None  # RL, while SFT goes on
    self._began = started - self.progress.seconds
    # What SFT learns from is chosen before any work; None where it learns from nothing.
    self.sft: SftBatches | None = None
    if self.progress.phase == "sft" and self.progress.done < config.sft.steps:
      self.sft = SftBatches(parts)
    restore.claim(config, parts.workdir)
    sinks = Sinks(config, parts.workdir)
    self.writer = MetricsWriter(parts.workdir, self.progress.records, self.number, sinks)

  def _restored_phase(self) -> Phase:
    def abstract_of(meta: dict[str, Any]) -> TrainState:
      nonlocal phase
      phase = self.new_phase(Progress(**meta))
      return phase.abstract_state()

    phase: Phase | None = None
    found = self.checkpoints.newest(abstract_of)
    if found is None:
      phase = self.new_phase(Progress())
      phase.start(build.initial_variables(self.config, self.parts.policy, self.parts.mesh))
    else:
      phase.state = found.state
      phase.past, phase.ahead, phase.carried = replay.parted(found.replay, phase.progress)
      logging.info("resuming: %s, iteration %d", phase.progress.phase, phase.progress.done)
    return phase

  def compile_ahead(self, executor: Executor) -> None:
    """Compiles what this phase and the next learn with, while rollouts run.

    Not for stored trajectories, where nothing else is to be done meanwhile; on one device only.
    """
    if self.data is not None or self.parts.mesh.size > 1:
      return
    if self.progress.phase == "rl":
      self.phase.compile_ahead(executor)
      return
    if self.sft is not None:
      self.phase.compile_ahead(executor)
    if self.algorithm.rewards != "none":
      self._next = self.new_phase(dataclasses.replace(self.progress, phase="rl", done=0))
      self._next.compile_ahead(executor)

  def enter(self, progress: Progress) -> None:
    """RL begins."""
    self.phase = self._next or self.new_phase(progress)
    self.phase.progress = progress

  def new_phase(self, progress: Progress) -> Phase:
    """What learns in progress.phase; without a state yet."""
    policy, mesh = self.parts.policy, self.parts.mesh
    phase = Phase(self.config, policy, mesh, progress, self.iterations, self.most)
    phase.scorer = self.scorer
    return phase

  @property
  def number(self) -> int:
    """Iterations of both phases so far: the step of a metrics record."""
    return self.progress.done + (self.config.sft.steps if self.progress.phase == "rl" else 0)

  @property
  def checkpoint_number(self) -> int:
    return self.number + (1 if self.progress.phase == "rl" else 0)

  def bar(self, total: int, label: str) -> tqdm:
    return hosts.bar(total=total, initial=self.progress.done, desc=label)

  def check_stop(self) -> None:
    """Raises Interrupted, in all processes at the same point, where one is asked to stop."""
    if any(hosts.gather(self.parts.stop())):
      raise Interrupted

  def save(self) -> None:
    self._clock()
    self.progress.records = self.writer.records
    phase, carried = self.phase, self.phase.carried
    self.progress.ahead = len(phase.ahead)
    self.progress.unfinished = len(carried.unfinished)
    self.progress.waiting = len(carried.waiting)
    kept = replay.to_documents([*phase.past, *phase.ahead, *carried.unfinished, *carried.waiting])
    self.checkpoints.save(
      self.checkpoint_number, self.phase.state, dataclasses.asdict(self.progress), kept
    )

  def summary(self, interrupted: bool) -> dict[str, Any]:
    """Writes summary.json and returns it."""
    self._clock()
    return summarise(self.parts, self.progress, self.data, interrupted)

  def _clock(self) -> None:
    self.progress.seconds = time.monotonic() - self._began


def check_rows(config: Config, mesh: Mesh) -> None:
  """ValueError for micro-batches that the mesh cannot share out."""
  sharding.check_rows("sft.micro_rows", config.sft.micro_rows, mesh)
  sharding.check_rows("train.micro_rows", config.train.micro_rows, mesh)


def _train(run: Run) -> dict[str, Any]:
  """The phases, from wherever the run is; each ends with held-out figures."""
  try:
    if run.progress.phase == "sft":
      if "pass_rate_base" not in run.progress.results:
        _evaluate(run, "pass_rate_base", "before training")
      warm_up(run)
      _evaluate(run, "pass_rate_sft", "after SFT")
      if run.algorithm.rewards != "none":
        _measure_tries(run, tries.START)
        enter_rl(run)
    if run.progress.phase == "rl":
      _reinforce(run)
      _evaluate(run, "pass_rate_rl", "after RL")
      _measure_tries(run, tries.END)
    if run.config.evaluation.greedy and run.config.evaluation.temperature:
      _evaluate(run, "pass_rate_greedy", "at the end, greedily", temperature=0.0)
    if run.config.train.export:
      folded = run.progress.phase == "rl" and run.config.sft.steps > 0
      export.write(run.parts, run.phase.variables(), folded)
    if hosts.primary() and (run.progress.train_curve or run.progress.heldout_curve):
      plot(run.config, run.parts.workdir, run.progress)
    return run.summary(interrupted=False)
  except Interrupted:
    run.save()
    run.checkpoints.wait()
    logging.warning("stopped on request; saved. Run the same command to go on.")
    return run.summary(interrupted=True)
  finally:
    run.writer.close()
    run.phase.close()


def warm_up(run: Run) -> None:
  """SFT, on demonstrations; of an algorithm that only imitates, on stored trajectories."""
  config = run.config
  stored = run.data if run.algorithm.rewards == "none" else None
  steps = config.sft.steps if stored is None else run.iterations
  if not steps:
    return
  source = run.sft if stored is None else stored
  if source is None:  # SFT was done when the run went on
    return
  size = config.sft.batch if stored is None else stored.size
  capacity = -(-size // config.sft.micro_rows)
  with run.bar(steps, "SFT") as bar:
    while run.progress.done < steps:
      run.check_stop()
      metrics = run.phase.imitate(source.batch(run.progress.done), capacity)
      run.progress.done += 1
      run.writer.write(run.number, "sft", metrics)
      bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
      bar.update()
      every = config.sft.checkpoint_every
      if (every and run.progress.done % every == 0) or run.progress.done == steps:
        run.save()
  if stored is None:
    source.report()


def enter_rl(run: Run) -> None:
  """RL starts from the policy after SFT, with adapters of its own."""
  parts = run.parts
  variables = build.fold_adapters(run.config, parts.policy, parts.mesh, run.phase.variables())
  run.progress.phase, run.progress.done = "rl", 0
  run.enter(run.progress)
  run.phase.start(variables)
  run.save()


def _reinforce(run: Run) -> None:
  """RL: an iteration, its record, a checkpoint every few of them."""
  if run.data is not None:
    _fill_behaviour(run)
  unpaid = 0  # iterations in a row
  with run.bar(run.iterations, run.config.algorithm) as bar:
    while run.progress.done < run.iterations:
      _evaluate_between(run)
      run.check_stop()
      started = time.monotonic()
      figures = iteration.run_iteration(run.parts, run.phase, run.recorder, run.data)
      run.progress.rl_seconds += time.monotonic() - started
      run.progress.done += 1
      run.writer.write(run.number, "train", figures | run.progress.spent())
      bar.set_postfix_str(shown(figures), refresh=False)
      bar.update()
      unpaid = unpaid + 1 if figures.get("reward") == 0 else 0
      if unpaid == _UNPAID:
        hosts.say(f"{unpaid} iterations in a row have earned nothing{closing.NOTHING_EARNED}")
      done = run.progress.done
      if done % run.config.checkpoint.every == 0 or done == run.iterations:
        run.save()
      sources.refuse_hacking(run.config, run.progress)
  if run.iterations and not run.progress.learnt and not run.progress.skipped:
    raise RuntimeError(
      f"algorithm {run.config.algorithm!r} learns from {run.algorithm.select.needs}, and none "
      f"of {run.iterations} iterations had one: raise rollout.samples, rollout.tasks or "
      "sft.steps, loosen rewards.filters, or use algorithm 'steptool', which learns from every "
      "trajectory"
    )


def _fill_behaviour(run: Run) -> None:
  """Old log-probs of the data: of the present policy before its first update, else as kept."""
  if run.progress.done:
    run.data = behaviour.restore(run.data, run.parts.workdir)
  else:
    run.data = behaviour.fill(
      run.data,
      run.config.train.row_tokens,
      run.config.train.micro_rows,
      run.phase.logprobs,
      run.parts.workdir,
    )


def _evaluate_between(run: Run) -> None:
  """Held-out figures every few iterations; after the checkpoint, so that a resume makes up for
  an evaluation that was cut off."""
  done, every = run.progress.done, run.config.evaluation.every
  if every and done % every == 0 and done > run.progress.evaluated:
    _evaluate(run, "", f"iteration {done}", run.config.evaluation.curve_tasks)
    run.progress.evaluated = done


def _measure_tries(run: Run, moment: str) -> None:
  """pass@k and new sequences into the results, where evaluation.samples asks for them."""
  if run.config.evaluation.samples > 1:
    run.progress.results |= tries.measure(run.parts, run.phase.variables(), moment)


def _evaluate(
  run: Run, name: str, label: str, num_tasks: int = 0, temperature: float | None = None
) -> None:
  """Held-out figures; a name puts the pass rate into the results.

  temperature: None for that of the config; another one's pass rate is no part of the curve.
  """
  e = run.config.evaluation
  if not e.tasks:
    return
  variables = run.phase.variables()
  tasks = run.parts.environment.tasks("heldout")[: num_tasks or e.tasks]
  drawn_at = e.temperature if temperature is None else temperature
  figures, trajectories = rollouts.evaluate_policy(run.parts, variables, tasks, label, drawn_at)
  pass_rate = figures["pass_rate"]
  if name:
    run.recorder.heldout(name.removeprefix("pass_rate_"), trajectories, drawn_at)
  if temperature is None:
    run.writer.write(run.number, "heldout", figures | run.progress.spent())
    if run.selection and run.checkpoints.holds(run.checkpoint_number):
      chosen, _ = rollouts.evaluate_policy(
        run.parts, variables, run.selection, f"{label}, to choose the best", 0.0
      )
      run.checkpoints.score(run.checkpoint_number, chosen["pass_rate"])
    hosts.say(run.parts.services.beside(f"{label}: held-out pass rate {pass_rate:.1%}"))
    if name == "pass_rate_sft" and figures.get("invalid_call_rate") == 1:
      hosts.say(f"{label}: no call was valid{closing.NOTHING_EARNED}")
    if name and (kinds := by_kind(tasks, trajectories)):
      run.progress.kinds[name] = kinds
      if name == "pass_rate_sft" and (unsolved := closing.unsolved(kinds)):
        hosts.say(f"{label}: {unsolved}")
    if run.progress.phase == "rl" or name == "pass_rate_sft":
      run.progress.heldout_curve.append((run.progress.conversations, pass_rate))
  if name:
    run.progress.results[name] = pass_rate
