"""Figures of a set of trajectories, and the table of everything that metrics.jsonl holds.

Records are {"step": optimizer rounds so far, "<prefix>/<name>": float}; prefix sft, train (one RL
iteration) or heldout (an evaluation). R: from rollouts (this module), so in train and heldout; U:
from the update (learning/update.py), in sft and train; I: of an iteration (run/train.py), in train.

    pass_rate               R  mean of IsSolved
    reward                  R  mean of a trajectory's summed rewards
    reward_<part>           R  what of it comes from success_calling, contribution and solved; under
                               Eq. 2 from outcome, cost, latency and preference in place of solved
    success_calling         R  mean SC of calls
    contribution            R  mean Con of calls
    calls_per_task          R  tool calls of a trajectory
    tokens_per_task         R  its tokens, prompt and observations included
    cost_per_task           R  USD of its calls; 0 without environment.market
    latency_per_task        R  simulated seconds of its calls
    invalid_call_rate       R  share of calls that were malformed, of an unknown tool or refused by
                               the tool's schema
    invocation_success      R  share of calls with code OK
    repeated_calls          R  share of calls with tool and arguments of an earlier one and no
                               change of state in between
    recovery                R  share of failed calls (not OK) that the trajectory made good: a later
                               call of the same tool was OK; where the failed one named no tool on
                               offer, the next call was
    solved_after_error      R  mean IsSolved of trajectories with a failed call
    diversity               R  over tasks with several samples, distinct action sequences: 0 where
                               all samples act the same, 1 where no two do
    answered, gave_up, truncated   R  shares of trajectories by how they ended
    infrastructure_errors   R  their number; they are left out of all other figures
    loss, policy_loss, value_loss, q_loss, v_loss, entropy_loss, kl_loss   U  the loss's terms, as
                               weighted in it; of those that the algorithm has
    value_error, q_error, v_error   U  a critic's loss without its weight
    pair_margin, pair_accuracy      U  DPO: margin of the success over the failure, share above 0
    entropy                 U  nats per sampled token
    clip_fraction           U  share of tokens whose ratio is clipped; old_kl: KL to the old policy
    grad_norm               U  global norm of the gradient, before its clip
    skipped                 U  share of updates that were skipped because something was not finite
    kl                      U  log(pi / reference) summed over a trajectory, before the update
    kl_coef                 U  coefficient of the KL penalty
    advantage_std           U  before whitening
    explained_variance      U  1 - Var(return - V) / Var(return) at step starts
    sampler_gap             U  largest |log-prob of trainer - of sampler| of a sampled token
    padding                 U  share of padded positions
    nothing_to_learn        I  1 where no trajectory was left for the algorithm to learn from
    dropped_malformed, dropped_unfinished, dropped_even   I  trajectories that rewards.filters took
    tokens_per_second       I  trained on; sampled_tokens_per_second: of the rollout
    device_share, tool_share, host_share   I  of the time: on the device (rollout and update), in
                               wait for tools with nothing to decode, the rest
    rollout_share, update_share   I  of the time
    device_share_of_rollout, tool_wait_share_of_rollout   I  the same of the rollout alone
"""

import json
from collections.abc import Sequence

import numpy as np

from steptool_jax.rollout.conversation import INVALID
from steptool_jax.types import Action, Code, Finish, Status, Step, ToolCall, Trajectory


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
  """The figures R of the table above; 0 where there is nothing to take a mean of."""
  healthy = [t for t in trajectories if t.status is not Status.INFRASTRUCTURE_ERROR]
  steps = [step for t in healthy for step in t.steps]
  codes = [step.observation.code for step in steps if step.observation is not None]
  calls = [step for step in steps if isinstance(step.action, ToolCall)]
  parts = dict.fromkeys(name for t in healthy for name in t.reward_parts)
  failed = [t for t in healthy if any(_failed(step) for step in t.steps)]
  return {
    "pass_rate": _mean([t.solved for t in healthy]),
    "reward": _mean([sum(s.reward for s in t.steps) for t in healthy]),
    **{f"reward_{p}": _mean([t.reward_parts.get(p, 0.0) for t in healthy]) for p in parts},
    "success_calling": _mean([s.success_calling for s in calls]),
    "contribution": _mean([s.contribution for s in calls]),
    "calls_per_task": _mean(
      [sum(isinstance(s.action, ToolCall) for s in t.steps) for t in healthy]
    ),
    "tokens_per_task": _mean([t.num_tokens for t in healthy]),
    "cost_per_task": _mean([t.cost for t in healthy]),
    "latency_per_task": _mean([t.latency for t in healthy]),
    "invalid_call_rate": _mean([code in INVALID for code in codes]),
    "invocation_success": _mean([code is Code.OK for code in codes]),
    "repeated_calls": _mean([repeat for t in healthy for repeat in _repeats(t)]),
    "recovery": _mean([good for t in healthy for good in _recoveries(t)]),
    "solved_after_error": _mean([t.solved for t in failed]),
    "diversity": _diversity(healthy),
    "answered": _mean([t.status is Status.ANSWERED for t in healthy]),
    "gave_up": _mean([t.status is Status.GAVE_UP for t in healthy]),
    "truncated": _mean([t.truncated for t in healthy]),
    "infrastructure_errors": float(len(trajectories) - len(healthy)),
  }


def _failed(step: Step) -> bool:
  return step.observation is not None and step.observation.code is not Code.OK


def _repeats(trajectory: Trajectory) -> list[bool]:
  """For each call, whether an earlier one was the same and nothing has changed since."""
  out, done = [], set()
  for step in trajectory.steps:
    if isinstance(step.action, ToolCall):
      key = action_key(step.action)
      out.append(key in done)
      if step.observation is not None and step.observation.changed:
        done.clear()
      done.add(key)
  return out


def _recoveries(trajectory: Trajectory) -> list[bool]:
  """For each failed call, whether the trajectory made it good."""
  called = [step for step in trajectory.steps if step.observation is not None]
  out = []
  for k, step in enumerate(called):
    if not _failed(step):
      continue
    later = called[k + 1 :]
    if isinstance(step.action, ToolCall) and step.observation.code is not Code.UNKNOWN_TOOL:
      later = [
        s for s in later if isinstance(s.action, ToolCall) and s.action.name == step.action.name
      ]
      out.append(not all(_failed(s) for s in later))
    else:
      out.append(bool(later) and not _failed(later[0]))
  return out


def _diversity(trajectories: Sequence[Trajectory]) -> float:
  """(distinct sequences - 1) / (samples - 1), the mean over tasks with several samples."""
  groups: dict[str, list[str]] = {}
  for t in trajectories:
    sequence = " ".join(action_key(step.action) for step in t.steps)
    groups.setdefault(t.task_id, []).append(sequence)
  several = [g for g in groups.values() if len(g) > 1]
  return _mean([(len(set(g)) - 1) / (len(g) - 1) for g in several])


def action_key(action: Action) -> str:
  """An action as text; its thoughts and the order of its arguments do not matter."""
  if isinstance(action, ToolCall):
    # default: arguments that the schema refused may be anything.
    return json.dumps([action.name, action.arguments], sort_keys=True, default=str)
  if isinstance(action, Finish):
    return json.dumps({"answer": action.answer, "gave_up": action.gave_up})
  return "malformed"


def _mean(values: Sequence[float]) -> float:
  return float(np.mean(values)) if len(values) else 0.0
