"""Every figure once: its name, unit and definition.

Records of metrics.jsonl are {"step": optimizer rounds so far, "<prefix>/<name>": float}; prefix
sft, train (one RL iteration) or heldout (an evaluation). A figure of ROLLOUTS stands in train and
heldout, one of UPDATES in sft and train, one of ITERATIONS in train. Those of CELLS stand in a
study's table. Trajectories that ended in an infrastructure error are in no figure but their number.
"""

import dataclasses

SHARE = "share"  # in [0, 1]; shown in per cent
NUMBER = ""  # without a unit


@dataclasses.dataclass(frozen=True)
class Figure:
  """unit: SHARE, NUMBER, or what is counted. label: the column's title on the report page."""

  unit: str
  definition: str
  label: str = ""


# The figures of a set of trajectories, which evaluation/metrics.py computes.
ROLLOUTS = {
  "pass_rate": Figure(SHARE, "mean of IsSolved"),
  "reward": Figure(NUMBER, "mean of a trajectory's summed rewards"),
  "success_calling": Figure(SHARE, "mean SC of calls"),
  "contribution": Figure(SHARE, "mean Con of calls"),
  "calls_per_task": Figure("calls", "tool calls of a trajectory", "calls per task"),
  "useless_calls": Figure(
    "calls",
    "of a trajectory, that contributed nothing (Con 0): failed, repeated, beside the goal",
    "useless calls per task",
  ),
  "tokens_per_task": Figure("tokens", "of a trajectory, prompt and observations included"),
  "cost_per_task": Figure("USD", "of a trajectory's calls; 0 without environment.market"),
  "latency_per_task": Figure("seconds", "simulated, of a trajectory's calls"),
  "invalid_call_rate": Figure(
    SHARE,
    "calls that were malformed, of an unknown tool or refused by the tool's schema",
    "invalid calls",
  ),
  "invocation_success": Figure(SHARE, "calls with code OK", "calls answered OK"),
  "repeated_calls": Figure(
    SHARE, "calls with tool and arguments of an earlier one and no change of state in between"
  ),
  "recovery": Figure(
    SHARE,
    "failed calls (not OK) that the trajectory made good: a later call of the same tool was OK; "
    "where the failed one named no tool on offer, the next call was",
  ),
  "solved_after_error": Figure(SHARE, "mean IsSolved of trajectories with any failed call"),
  "diversity": Figure(
    NUMBER,
    "over tasks with several samples, distinct action sequences: 0 where all samples act the same, "
    "1 where no two do",
    "diversity",
  ),
  "answered": Figure(SHARE, "trajectories that ended in an answer"),
  "gave_up": Figure(SHARE, "trajectories that gave up"),
  "truncated": Figure(SHARE, "trajectories that a budget cut"),
  "prompts_without_room": Figure("trajectories", "whose prompt left no room for one step"),
  "infrastructure_errors": Figure("trajectories", "that ended in an infrastructure error"),
}

# reward_<part>: means over trajectories of what the reward is made of (Trajectory.reward_parts).
REWARD_PARTS = {
  "success_calling": "the intermediate steps' SC",
  "contribution": "the intermediate steps' Con",
  "solved": "IsSolved; under Eq. 2 the next four in its place",
  "outcome": "Eq. 2: solved",
  "cost": "Eq. 2: few USD",
  "latency": "Eq. 2: few seconds",
  "preference": "Eq. 2: tools that the user likes or avoids",
  "turns": "what the turns before the last one earned (rewards.turns)",
  "harness": "what a harness or verifier gave",
}
ROLLOUTS |= {f"reward_{part}": Figure(NUMBER, text) for part, text in REWARD_PARTS.items()}

# The figures of an update, which learning/programs computes. Losses are as weighted in the sum; an
# algorithm has some of them.
UPDATES = {
  "loss": Figure(NUMBER, "the sum of the loss's terms"),
  "policy_loss": Figure(NUMBER, "the policy's term"),
  "value_loss": Figure(NUMBER, "the critic's term"),
  "q_loss": Figure(NUMBER, "ArCHer: the term of Q"),
  "v_loss": Figure(NUMBER, "ArCHer: the term of V"),
  "entropy_loss": Figure(NUMBER, "the entropy bonus, negative"),
  "kl_loss": Figure(NUMBER, "the KL penalty where it is in the loss"),
  "value_error": Figure(NUMBER, "the critic's loss without its weight"),
  "q_error": Figure(NUMBER, "ArCHer: Q's loss without its weight"),
  "v_error": Figure(NUMBER, "ArCHer: V's loss without its weight"),
  "pair_margin": Figure(NUMBER, "DPO: margin of the success over the failure"),
  "pair_accuracy": Figure(SHARE, "DPO: pairs with a margin above 0"),
  "entropy": Figure("nats", "per sampled token", "entropy"),
  "clip_fraction": Figure(SHARE, "tokens whose ratio is clipped"),
  "old_kl": Figure("nats", "KL to the old policy"),
  "grad_norm": Figure(NUMBER, "global norm of the gradient, before its clip"),
  "skipped": Figure(SHARE, "updates that were skipped because something was not finite"),
  "kl": Figure("nats", "log(pi / reference) summed over a trajectory, before the update"),
  "kl_coef": Figure(NUMBER, "coefficient of the KL penalty"),
  "advantage_std": Figure(NUMBER, "standard deviation of advantages before whitening"),
  "explained_variance": Figure(NUMBER, "1 - Var(return - V) / Var(return) at step starts"),
  "sampler_gap": Figure("nats", "largest |log-prob of trainer - of sampler| of a sampled token"),
  "sampler_gap_mean": Figure("nats", "mean |log-prob of trainer - of sampler| of sampled tokens"),
  "reused": Figure(SHARE, "rollout.reuse: 1 where the sampler's log-probs were taken"),
  "padding": Figure(SHARE, "padded positions"),
}

_HEADS = {"success_calling": "SC", "contribution": "Con", "solved": "IsSolved"}

# The figures of a whole iteration, which run/train.py and run/training/progress.py compute.
ITERATIONS = {
  "conversations": Figure("conversations", "that RL has sampled so far"),
  "llm_calls": Figure("calls", "of the orchestrator in these conversations"),
  "tokens": Figure("tokens", "rolled out and trained on in RL so far"),
  "rl_seconds": Figure("seconds", "of rollouts and updates so far"),
  "nothing_to_learn": Figure(NUMBER, "1 where the algorithm found no trajectory to learn from"),
  "dropped_malformed": Figure("trajectories", "taken by rewards.filters.malformed"),
  "dropped_unfinished": Figure("trajectories", "taken by rewards.filters.unfinished"),
  "dropped_even": Figure(
    "trajectories", "taken by rewards.filters.min_deviation, or for rollout.rounds"
  ),
  "rounds": Figure(NUMBER, "rollouts of the iteration, where rollout.rounds allows several"),
  "without_contrast": Figure(
    SHARE, "of the tasks drawn: all samples were paid the same, so that others were drawn"
  ),
  "staleness": Figure(NUMBER, "updates since the policy that began a conversation, the mean"),
  "importance": Figure(
    NUMBER, "lag, carry, reuse, kv_cache, http: mean weight of a sampled token, after the cut"
  ),
  "importance_cut": Figure(SHARE, "lag, carry, reuse, kv_cache, http: tokens whose weight was cut"),
  "carried": Figure("conversations", "that go on in the next iteration (rollout.carry)"),
  "outgrown": Figure("conversations", "that went on in a longer slot (rollout.long_slots)"),
  "crowded_share": Figure(SHARE, "of the slots' time in the rollout: in wait for a longer one"),
  "model_outcome": Figure(SHARE, "rewards.source=model: mean IsSolved by the reward model"),
  "model_drift": Figure(NUMBER, "mean IsSolved by the reward model, less the true pass rate"),
  "model_auc": Figure(NUMBER, "of the reward model's IsSolved against the true one"),
  "tokens_per_second": Figure("tokens", "trained on"),
  "sampled_tokens_per_second": Figure("tokens", "sampled, of the rollout's time"),
  "device_share": Figure(SHARE, "of the time: on the device (rollout and update)"),
  "tool_share": Figure(SHARE, "of the time: in wait for tools with nothing to decode"),
  "host_share": Figure(SHARE, "of the time: the rest"),
  "rollout_share": Figure(SHARE, "of the time: rollout"),
  "update_share": Figure(SHARE, "of the time: update"),
  "device_share_of_rollout": Figure(SHARE, "of the rollout's time: on the device"),
  "tool_wait_share_of_rollout": Figure(SHARE, "of the rollout's time: in wait for tools"),
}

# The figures of a reward model against annotations of tasks that its training did not see, which
# evaluation/scoring.py computes; prefix heldout, of --mode=reward_model. The losses, prefix train,
# are of learning/reward_model.py.
REWARD_MODEL = {
  **{
    f"{h}_auc": Figure(NUMBER, f"{w}: the chance that a positive scores higher than a negative")
    for h, w in _HEADS.items()
  },
  **{f"{h}_ece": Figure(NUMBER, f"{w}: calibration error over 10 bins") for h, w in _HEADS.items()},
  **{f"{h}_loss": Figure("nats", f"{w}: binary cross-entropy") for h, w in _HEADS.items()},
  "outcome_pairs": Figure(
    SHARE, "two samples of a task with different IsSolved: the better one scores higher"
  ),
  "first_error_f1": Figure(
    NUMBER, "first call with SC below .5: harmonic mean of accuracy with and without such a call"
  ),
  "first_unhelpful_f1": Figure(NUMBER, "the same of the first call with Con below .5"),
}

# The figures of a study's cell, which evaluation/comparison.py and behaviour.py compute from its
# summary and its last held-out trajectories. calls_per_task, useless_calls, invalid_call_rate,
# invocation_success (of the last evaluation) and diversity (of the last iteration) are those of
# ROLLOUTS; entropy, of the last iteration, is that of UPDATES.
CELLS = {
  "start": Figure(SHARE, "pass rate before RL", "start"),
  "final": Figure(SHARE, "pass rate after RL", "final"),
  "greedy": Figure(SHARE, "pass rate at the end, decoded greedily", "greedy"),
  "area": Figure(SHARE, "mean height of the learning curve up to the budget of all", "area"),
  "train_area": Figure(
    SHARE, "mean height of the curve of training rollouts up to the budget of all", "training area"
  ),
  "pass_at_1_start": Figure(
    SHARE,
    "tasks solved in one try before RL, of evaluation.samples (Chen et al. 2021, eq. 1); "
    "pass_at_2 to pass_at_16 alike",
    "pass@1, start",
  ),
  "pass_at_1_end": Figure(SHARE, "the same after RL", "pass@1, end"),
  "pass_at_16_start": Figure(SHARE, "tasks solved in one of 16 tries before RL", "pass@16, start"),
  "pass_at_16_end": Figure(SHARE, "the same after RL", "pass@16, end"),
  "new_sequences": Figure(
    SHARE,
    "of the tasks solved after RL: by sequences of tools none of which was among the tries before",
    "solved in a new way",
  ),
  "recovered_from_fault": Figure(
    SHARE,
    "errors of the fault injector after which the same tool answered OK",
    "injected errors recovered",
  ),
  "solved_after_fault": Figure(
    SHARE,
    "mean IsSolved of trajectories with an error of the fault injector",
    "solved after an injected error",
  ),
  "repeated_after_ok": Figure(
    SHARE,
    "calls that had been answered OK before, with the same arguments and no change of state since; "
    "other than in repeated_calls a retry after an error does not count",
    "calls repeated after OK",
  ),
  "llm_calls_per_solved": Figure(
    "calls", "LLM calls of all, a solved task", "LLM calls per solved task"
  ),
  "tokens_per_solved": Figure("tokens", "sampled of all, a solved task", "tokens per solved task"),
  "cost_per_solved": Figure("USD", "of all calls, a solved task", "USD per solved task"),
  "latency_per_solved": Figure(
    "seconds", "simulated, of all calls, a solved task", "tool seconds per solved task"
  ),
  "seconds": Figure("seconds", "of a cell's run", "seconds of a cell"),
}

FIGURES = ROLLOUTS | UPDATES | ITERATIONS | REWARD_MODEL | CELLS
