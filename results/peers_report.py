"""The section on groups of peers.md, written from the raw figures of peers.json."""

import pathlib
import statistics
from collections.abc import Iterable
from typing import Any

START, END = "<!-- groups: written by peers.py -->", "<!-- end of groups -->"
BENCHMARKS = {"groups": "GRPO", "groups_ppo": "PPO", "answers": "GRPO, answers alone"}
# run -> (its name in the table, what was aimed at)
RUNS = {
  "apart": ("ours, share_prompts off", {}),
  "before": ("ours at {before}", {"groups": 2, "answers": 2}),
  "grpo": ("TRL {trl}", {"groups": 2, "answers": 2}),
  "tunix": ("tunix {google-tunix}", {}),
  "trl": ("TRL {trl}", {"groups_ppo": 4}),
}
TEXT = """\
## Groups

Updates of tasks of {samples} samples each; {steps}. {machine}, {rounds}; how often
ours, with shared prompts, is as fast, median (range):

| | seconds, ours | seconds, peer | tokens/s, ours | tokens/s, peer | ratio | target | |
|---|---|---|---|---|---|---|---|
{rows}

Measured at {commit}. What there is to do:

| | tasks | tokens | of these sampled | prompts that stand there again | ours: rows | ours apart |
|---|---|---|---|---|---|---|
{work}

A group is the prompt of a released row, followed by what comes after the prompts of {samples} rows,
not scaled; a reward is a row's last. Sharing its prompts can save no more than what stands there
again; observations are each sample's own. Answers alone: the prompt is all of a row that was not
sampled (689 of a mean row's 936 tokens), and what was sampled follows at once.

What says that the work is the same:

| | mean log-prob, before | after the first repetition | norms of its gradients |
|---|---|---|---|
{checks}

Equal: the weights (below), token ids, the mask of sampled tokens (TRL's `env_mask`), advantages
(deviations from a group's mean over its standard deviation, given to TRL and tunix as they are),
GRPO's loss (a trajectory's mean, then the mean of trajectories), clip .2, no KL, gradients clipped
at norm 1, Adam 1e-5, one optimizer step an epoch over all trajectories, float32, no activation
computed twice. PPO: the settings of updates (below) but for the number of epochs.

Not equal:

- TRL's and tunix's GRPO compute old log-probs only if there are several epochs; ours always does,
  with one epoch a forward pass more.
- TRL pads to the longest prompt and the longest answer of the batch, in micro-batches of {samples},
  and so does tunix. Ours, shared or apart, has rows of the size that leaves the least padding.
- tunix's GRPO has no mask for observations: it trains on them, so its gradient is another one.
- TRL's rollout function and reward function only hand out what is given. Nothing was patched.
"""


def write(results: dict[str, Any], path: pathlib.Path) -> None:
  """Replaces the section in the file."""
  before, rest = path.read_text().split(START)
  path.write_text(f"{before}{START}\n{section(results)}{END}{rest.split(END)[1]}")


def section(results: dict[str, Any]) -> str:
  """What has been measured, in Markdown."""
  measured = {name: results[name] for name in BENCHMARKS if name in results}
  if not measured:
    return "Groups have not been measured.\n"
  one = next(iter(measured.values()))
  rounds = len(one["repetitions"]["ours"])
  epochs = one["epochs"]
  return TEXT.format(
    samples=one["work"]["trajectories"] // one["work"]["tasks"],
    steps="one optimizer step" if epochs == 1 else f"{epochs} optimizer steps",
    machine=results["machine"],
    rounds="one round" if rounds == 1 else f"{rounds} rounds",
    commit=" and ".join(sorted({found["commit"] for found in measured.values()})),
    rows=_lines(
      _ratio(name, found, run) for name, found in measured.items() for run in found["ratios"]
    ),
    work=_lines(_work(name, found) for name, found in measured.items()),
    checks=_lines(
      _check(name, found, run) for name, found in measured.items() for run in found["repetitions"]
    ),
  )


def _lines(rows: Iterable[list[Any]]) -> str:
  return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def _ratio(name: str, found: dict[str, Any], run: str) -> list[str]:
  own, peer = found["repetitions"]["ours"], found["repetitions"][run]
  seconds = [statistics.median(r["seconds"] for r in of) for of in (own, peer)]
  title, targets = RUNS[run]
  title = title.format(**peer[0].get("versions", {}), before=found.get("before", ""))
  ratios, ratio, target = found["ratios"][run], found["median_ratio"][run], targets.get(name)
  return [
    f"{BENCHMARKS[name]}: {title}",
    *(f"{s:.1f}" for s in seconds),
    *(f"{found['work']['tokens'] / s:,.0f}" for s in seconds),
    f"**{ratio:.2f}** ({min(ratios):.2f} to {max(ratios):.2f})",
    *(("", "") if target is None else (target, "reached" if ratio >= target else "not reached")),
  ]


def _work(name: str, found: dict[str, Any]) -> list[str]:
  work, own = found["work"], found["repetitions"]
  shapes = []
  for run in ("ours", "apart"):
    rows = own[run][0] if run in own else None
    shapes.append("{} x {:,}".format(*rows["rows"]) if rows else "not measured")
  return [BENCHMARKS[name], work["tasks"], *(f"{work[k]:,}" for k in _COUNTS), *shapes]


_COUNTS = ("tokens", "sampled", "repeated")


def _check(name: str, found: dict[str, Any], run: str) -> list[str]:
  first, second = found["first"][run], found["repetitions"][run][0]
  norms = ", ".join(f"{norm:.5f}" for norm in first.get("grad_norm", ())) or "not given"
  # TRL 0.10.1 and tunix report what they computed before the first update, and no more.
  after = f"{second['logprob']:.6f}" if first["logprob"] != second["logprob"] else "not computed"
  return [f"{BENCHMARKS[name]}: {run}", f"{first['logprob']:.6f}", after, norms]
