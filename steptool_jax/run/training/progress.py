"""How far a training run is, what it has found, and what it says about that."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from steptool_jax.config import Config
from steptool_jax.learning import steptable
from steptool_jax.learning.algorithms import get_algorithm
from steptool_jax.rewards import assembly
from steptool_jax.rollout.setting import Stats
from steptool_jax.run.data import offline
from steptool_jax.run.parts.opening import Parts
from steptool_jax.run.workdir import outputs
from steptool_jax.types import Trajectory


@dataclasses.dataclass
class Progress:
  """What a checkpoint's meta holds besides the state."""

  phase: str = "sft"  # sft, rl
  # Of the table of steps, which never gets narrower: each width is a compilation.
  table_width: int = steptable.USUAL_WIDTH
  done: int = 0  # iterations of the phase
  redrawn: int = 0  # tasks that RL drew again (rollout.rounds)
  learnt: int = 0  # iterations of RL that had something to learn from
  evaluated: int = 0  # RL iteration of the newest evaluation between start and end
  records: int = 0  # lines of metrics.jsonl
  seconds: float = 0.0
  conversations: int = 0  # rolled out in RL
  llm_calls: int = 0  # of these conversations: the environment steps
  tokens: int = 0  # of trajectories rolled out and trained on in RL
  rl_seconds: float = 0.0
  ahead: int = 0  # trajectories that were sampled for the next iteration (rollout.lag)
  unfinished: int = 0  # conversations that go on in the next iteration (rollout.carry)
  waiting: int = 0  # finished ones that wait for the other samples of their task
  skipped: int = 0  # updates, because something was not finite
  results: dict[str, float] = dataclasses.field(default_factory=dict)
  # pass rate in `results` -> kind of task -> its held-out pass rate, where tasks have kinds
  kinds: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
  train_curve: list[tuple[float, float]] = dataclasses.field(default_factory=list)
  model_curve: list[tuple[float, float]] = dataclasses.field(default_factory=list)
  heldout_curve: list[tuple[float, float]] = dataclasses.field(default_factory=list)

  def count(self, trajectories: Sequence[Trajectory], tokens: int) -> None:
    self.conversations += len(trajectories)
    self.llm_calls += sum(len(t.steps) for t in trajectories)
    self.tokens += tokens

  def spent(self) -> dict[str, float]:
    """What RL has used so far: the axes of learning curves."""
    names = ("conversations", "llm_calls", "tokens", "rl_seconds")
    return {name: getattr(self, name) for name in names}


# What the progress bar shows of an iteration: figure -> format.
_SHOWN = {
  "reward": "reward {:.2f}",
  "pass_rate": "pass {:.0%}",
  "kl": "KL {:.2f}",
  "tokens_per_second": "tok/s {:.0f}",
}


def shown(figures: Mapping[str, float]) -> str:
  """What the progress bar shows of an iteration."""
  return ", ".join(form.format(figures[name]) for name, form in _SHOWN.items() if name in figures)


def shares(stats: Stats, update_seconds: float, seconds: float, tokens: int) -> dict[str, float]:
  """Where an iteration's time went; the update counts as time of the device."""
  device = (stats.device_seconds + update_seconds) / seconds
  tools = stats.tool_wait_seconds / seconds
  return {
    "device_share": device,
    "tool_share": tools,
    "host_share": 1.0 - device - tools,
    "tokens_per_second": tokens / seconds,
    "sampled_tokens_per_second": stats.sampled_tokens / max(stats.seconds, 1e-9),
    "rollout_share": stats.seconds / seconds,
    "update_share": update_seconds / seconds,
    "device_share_of_rollout": stats.device_seconds / max(stats.seconds, 1e-9),
    "tool_wait_share_of_rollout": stats.tool_wait_seconds / max(stats.seconds, 1e-9),
  }


def crowding(stats: Stats, slots: int) -> dict[str, float]:
  """Whether the long ones of so many slots are enough."""
  waited = stats.crowded_seconds / max(stats.seconds * slots, 1e-9)
  return {"outgrown": float(stats.outgrown), "crowded_share": waited}


def plot(config: Config, workdir: pathlib.Path, progress: Progress) -> None:
  """WORKDIR/learning_curve.png: pass rates (%) over conversations; dashed: before RL."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120)
  heldout = f"held-out tasks, {'sampled' if config.evaluation.temperature else 'greedy'}"
  for curve, style, color, width, label in (
    (progress.train_curve, "-", "#9db8d9", 1.2, "training tasks, sampled"),
    (progress.heldout_curve, "o-", "#1f4e8c", 2, heldout),
  ):
    if curve:
      x, y = zip(*curve, strict=True)
      axes.plot(x, [100 * v for v in y], style, color=color, lw=width, label=label)
  for name, label, color in (
    ("pass_rate_base", "start", "#b0b0b0"),
    ("pass_rate_sft", "after SFT", "#d9822b"),
  ):
    if name in progress.results:
      level = 100 * progress.results[name]
      axes.axhline(level, ls="--", color=color, lw=1.2, label=f"{label}: {level:.1f} %")
  title = f"{config.algorithm} on {config.environment.name}, seed {config.seed}"
  axes.set(xlabel="conversations rolled out", ylabel="pass rate (%)", ylim=(0, 100), title=title)
  axes.grid(alpha=0.25)
  axes.legend(loc="lower right", fontsize=8)
  figure.tight_layout()
  figure.savefig(workdir / "learning_curve.png")
  pyplot.close(figure)


def summarise(
  parts: Parts, progress: Progress, data: offline.Data | None, interrupted: bool
) -> dict[str, Any]:
  """Writes WORKDIR/summary_train.json and returns it. data: stored trajectories of the run."""
  config, p = parts.config, progress
  tasks = config.evaluation.tasks
  summary = dict(p.results) | {
    "algorithm": config.algorithm,
    "seed": config.seed,
    "heldout_tasks": tasks and min(tasks, len(parts.environment.tasks("heldout"))),
    "conversations": p.conversations,
    "skipped_updates": p.skipped,
    "seconds": p.seconds,
    "peak_rss_gib": outputs.peak_rss_gib(),
    "tokens_per_second": p.tokens / p.rl_seconds if p.rl_seconds else 0.0,
    "interrupted": interrupted,
  }
  if p.kinds:
    summary["kinds"] = p.kinds
  if data is None and get_algorithm(config.algorithm).rewards == "step":
    summary["step_rewards"] = assembly.described(config.rewards)
  if data is not None:
    phase = "sft" if get_algorithm(config.algorithm).rewards == "none" else "rl"
    summary["iterations"] = p.done if p.phase == phase else 0
    summary["data"] = data.report | {"passes": config.data.passes}
  if parts.services.judging is not None:
    summary["judge"] = parts.services.judging.report()
  return outputs.write_summary(parts.workdir, "train", summary)
