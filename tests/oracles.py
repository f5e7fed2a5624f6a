"""Slow NumPy oracles: loops over single trajectories, no packing, no tricks."""

import numpy as np


def softmax(x, axis=-1):
  e = np.exp(x - x.max(axis=axis, keepdims=True))
  return e / e.sum(axis=axis, keepdims=True)


def gae_steps(rewards, values, bootstrap, gamma, lam):
  """Textbook GAE over steps: rewards[S], values[S] at the steps' first tokens, V behind the end."""
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
