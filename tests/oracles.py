"""Slow NumPy oracles: loops over single trajectories, no packing, no tricks."""

import numpy as np


def softmax(x, axis=-1):
  e = np.exp(x - x.max(axis=axis, keepdims=True))
  return e / e.sum(axis=axis, keepdims=True)


def gae_steps(rewards, values, bootstrap, gamma, lam):
  """Textbook GAE over steps: rewards[S], values[S] at the steps' first tokens, V after the end."""
  advantages, following, next_value = np.zeros(len(rewards)), 0.0, bootstrap
  for k in reversed(range(len(rewards))):
    delta = rewards[k] + gamma * next_value - values[k]
    following = delta + gamma * lam * following
    advantages[k], next_value = following, values[k]
  return advantages


def gae_tokens(rewards, values, step_end, bootstrap, gamma, lam, level):
  """The design's formula over sampled tokens only; arrays [number of sampled tokens]."""
  advantages, following, next_value = np.zeros(len(rewards)), 0.0, bootstrap
  for t in reversed(range(len(rewards))):
    inside = level == "step" and not step_end[t]
    g, trace = (1.0, 1.0) if inside else (gamma, lam)
    delta = rewards[t] + g * next_value - values[t]
    following = delta + g * trace * following
    advantages[t], next_value = following, values[t]
  return advantages


def gae_released(step_rewards, values, action, step_end, gamma, lam):
  """The authors' code on one trajectory: arrays over all positions, observations included."""
  n = len(step_rewards)
  rewards = np.zeros(len(values))
  rewards[np.flatnonzero(step_end)] = [r * (n - i - 1) for i, r in enumerate(step_rewards)]
  values = values * action
  advantages, following = np.zeros(len(values)), 0.0
  for t in reversed(range(len(values))):
    next_value = values[t + 1] if t + 1 < len(values) else 0.0
    following = rewards[t] + gamma * next_value - values[t] + gamma * lam * following
    advantages[t] = following
  return advantages * action


def min_max(values):
  low, high = min(values), max(values)
  return [0.0 if high == low else (v - low) / (high - low) for v in values]


def orchestra(solved, costs, latencies, calls, outcome, cost, latency, tools):
  """Eq. 2 of arXiv 2511.21689 for one group; calls: tool -> number of calls of each trajectory."""
  entries = [
    (outcome, [float(s) for s in solved]),
    (cost, [-c for c in costs]),
    (latency, [-x for x in latencies]),
    *((abs(w), [n if w > 0 else -n for n in calls[t]]) for t, w in tools.items()),
  ]
  total = [0.0] * len(solved)
  for weight, values in entries:
    total = [r + weight * m for r, m in zip(total, min_max(values), strict=True)]
  return [r if s else 0.0 for r, s in zip(total, solved, strict=True)]


def leave_one_out(returns):
  """R_i - mean of the others; 0 for one alone."""
  return [
    r - np.mean([*returns[:i], *returns[i + 1 :]]) if len(returns) > 1 else 0.0
    for i, r in enumerate(returns)
  ]


def standardised(x, weights=None):
  """(x - mean) / (std + 1e-4) of a list, population deviation."""
  x = np.asarray(x, np.float64)
  mean = np.average(x, weights=weights)
  return (x - mean) / (np.sqrt(np.average((x - mean) ** 2, weights=weights)) + 1e-4)


def returns_to_go(rewards, gamma):
  out, following = [], 0.0
  for r in reversed(rewards):
    following = r + gamma * following
    out.append(following)
  return out[::-1]


def episode_advantages(samples, gamma, kind):
  """One number a step, of `samples` = [(task, rewards of the steps, anchors of the steps)].

  kind: reinforce, rloo, grpo, grpo_step, anchor (GiGPO's step-relative part alone).
  """
  out = [np.zeros(len(rewards)) for _, rewards, _ in samples]
  if kind == "reinforce":
    mean = np.mean([sum(rewards) for _, rewards, _ in samples])
    return [a + sum(rewards) - mean for a, (_, rewards, _) in zip(out, samples, strict=True)]
  for task in {task for task, _, _ in samples}:
    members = [i for i, sample in enumerate(samples) if sample[0] == task]
    totals = [sum(samples[i][1]) for i in members]
    later = [returns_to_go(samples[i][1], gamma) for i in members]
    if kind in ("rloo", "grpo"):
      relative = leave_one_out if kind == "rloo" else standardised
      for i, a in zip(members, relative(totals), strict=True):
        out[i] += a
    elif kind == "grpo_step":
      paid = [samples[i][1] for i in members]
      weights = [1 / len(rewards) for rewards in paid for _ in rewards]
      flat = iter(standardised([r for rewards in paid for r in rewards], weights))
      for i in members:
        out[i] = np.array(returns_to_go([next(flat) for _ in out[i]], gamma))
    else:
      places = [(i, k) for i in members for k in range(len(out[i]))]
      for anchor in {samples[i][2][k] for i, k in places}:
        same = [(i, k) for i, k in places if samples[i][2][k] == anchor]
        group = standardised([later[members.index(i)][k] for i, k in same])
        for (i, k), a in zip(same, group, strict=True):
          out[i][k] = a
  return out


def dpo(chosen, rejected, beta):
  """Mean of -log sigmoid over pairs of summed log-ratios, and its gradient for `chosen`."""
  margins = beta * (np.asarray(chosen) - np.asarray(rejected))
  return np.mean(np.log1p(np.exp(-margins))), -beta / (1 + np.exp(margins)) / len(margins)


def archer_targets(rewards, target_v, target_q1, target_q2, bootstrap, gamma):
  """(targets of Q, targets of V), one a step; V after the end is `bootstrap`."""
  following = [*target_v[1:], bootstrap]
  return (
    [r + gamma * v for r, v in zip(rewards, following, strict=True)],
    [min(a, b) for a, b in zip(target_q1, target_q2, strict=True)],
  )
