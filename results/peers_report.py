"""The section on groups of peers.md, written from the raw figures of peers.json."""

import pathlib
import statistics
from typing import Any

START, END = "<!-- groups: written by peers.py -->", "<!-- end of groups -->"
# benchmark, run -> (its name in the table, the target of issue 21)
ROWS = {
  ("groups", "apart"): ("GRPO, ours with share_prompts off", None),
  ("groups", "before"): ("GRPO, ours at {before}", 2),
  ("groups", "grpo"): ("GRPO, TRL {trl}", 2),
  ("groups", "tunix"): ("GRPO, tunix {google-tunix}", None),
  ("groups_ppo", "trl"): ("PPO, TRL {trl}", 4),
}
TEXT = """\
## Groups

{tasks} tasks of {samples} samples: {tokens:,} tokens, of which {sampled:,} are sampled and
{repeated:,} are prompts that stand there once more. {steps}. {machine}, {rounds}; how often
ours, with shared prompts, is as fast, median (range):

| | seconds, ours | seconds, peer | tokens/s, ours | tokens/s, peer | ratio | target | |
|---|---|---|---|---|---|---|---|
{rows}

Measured at {commit}. Ours: rows of {shape} ({padding:.0%} padding); apart: {apart}.

What says that the work is the same:

| | mean log-prob, before | after the first repetition | norms of its gradients |
|---|---|---|---|
{checks}

Equal: the weights (below), token ids, the mask of sampled tokens (TRL's `env_mask`), advantages
(deviations from a group's mean over its standard deviation, given to TRL and tunix as they are),
GRPO's loss (a trajectory's mean, then the mean of trajectories), clip .2, no KL, gradients clipped
at norm 1, Adam 1e-5, one optimizer step an epoch over all trajectories, float32, no activation
computed twice. A group is the prompt of a released row, followed by what comes after the prompts
of {samples} rows, not scaled; a reward is a row's last. PPO: the settings of the section on
updates, on the same trajectories.

Not equal:

- TRL's and tunix's GRPO compute old log-probs only if there are several epochs; ours always does,
  with one epoch a forward pass more.
- TRL pads to the longest prompt and the longest answer of the batch, in micro-batches of {samples},
  and so does tunix.
- tunix's GRPO has no mask for observations: it trains on them, so its gradient is another one.
- TRL's rollout function and reward function only hand out what is given. Nothing was patched.
"""


def write(results: dict[str, Any], path: pathlib.Path) -> None:
  """Replaces the section in the file."""
  before, rest = path.read_text().split(START)
  path.write_text(f"{before}{START}\n{section(results)}{END}{rest.split(END)[1]}")


def section(results: dict[str, Any]) -> str:
  """What has been measured, in Markdown."""
  found = [(name, run) for name, run in ROWS if run in results.get(name, {}).get("ratios", {})]
  if not found:
    return "Groups have not been measured.\n"
  one = results[found[0][0]]
  work = one["work"]
  ours = one["repetitions"]["ours"][0]
  apart = one["repetitions"].get("apart", [None])[0]
  steps = "One optimizer step" if one["epochs"] == 1 else f"{one['epochs']} optimizer steps"
  rounds = len(one["repetitions"]["ours"])
  return TEXT.format(
    **work,
    samples=work["trajectories"] // work["tasks"],
    steps=steps,
    machine=results["machine"],
    rounds="one round" if rounds == 1 else f"{rounds} rounds",
    rows="\n".join(_row(results[name], run, *ROWS[name, run]) for name, run in found),
    commit=" and ".join(sorted({results[name]["commit"] for name, _ in found})),
    shape=_shape(ours),
    padding=ours["padding"],
    apart=_shape(apart) if apart else "not measured",
    checks="\n".join(
      _check(results[name], name, run) for name in results for run in _runs(results, name)
    ),
  )


def _runs(results: dict[str, Any], name: str) -> list[str]:
  return [*results[name]["repetitions"]] if name.startswith("groups") else []


def _shape(figures: dict[str, Any]) -> str:
  return "{} x {:,}".format(*figures["rows"])


def _row(found: dict[str, Any], run: str, name: str, target: float | None) -> str:
  own, peer = (found["repetitions"][n] for n in ("ours", run))
  seconds = [statistics.median(r["seconds"] for r in of) for of in (own, peer)]
  rates = [f"{found['work']['tokens'] / s:,.0f}" for s in seconds]
  ratios = found["ratios"][run]
  ratio = found["median_ratio"][run]
  verdict = "" if target is None else "reached" if ratio >= target else "not reached"
  cells = [
    name.format(**peer[0].get("versions", {}), before=found.get("before", "")),
    *(f"{s:.1f}" for s in seconds),
    *rates,
    f"**{ratio:.2f}** ({min(ratios):.2f} to {max(ratios):.2f})",
    "" if target is None else str(target),
    verdict,
  ]
  return f"| {' | '.join(cells)} |"


def _check(found: dict[str, Any], name: str, run: str) -> str:
  first, second = found["first"][run], found["repetitions"][run][0]
  norms = ", ".join(f"{norm:.5f}" for norm in first.get("grad_norm", ())) or "not given"
  # TRL 0.10.1 and tunix report what they computed before the first update only.
  after = f"{second['logprob']:.6f}" if first["logprob"] != second["logprob"] else "not computed"
  kind = "PPO" if name == "groups_ppo" else "GRPO"
  return f"| {kind}, {run} | {first['logprob']:.6f} | {after} | {norms} |"
