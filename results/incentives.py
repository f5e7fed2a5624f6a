"""What a policy learns to do from each way to pay steps: a tabular tool user, till convergence.

    python results/incentives.py

Writes results/incentives.md. The task takes two calls in order, each of which fails now and
then; beside them the policy may make further calls, all different, which are executed and of no
use, and may answer at any time, rightly only after both calls. Its state is all that a reward of
the past can depend on: how many calls were made, how many of the two succeeded, how many failed.
Marks and rewards are the product's (assembly.pay), advantages GAE over steps with a learnt V,
whitened, as in algorithm steptool.
"""

import dataclasses
import functools
import pathlib

import numpy as np

from steptool_jax.config import Rewards
from steptool_jax.rewards import assembly, shaping
from steptool_jax.types import Code, Finish, Observation, Status, Step, Task, ToolCall, Trajectory

MOST = 8  # LLM calls
NEEDED = 2
GAMMA, LAMBDA = 0.99, 0.95
CALL, USELESS, ANSWER = range(3)  # actions
_GOLD, _FAILED, _SPARE, _END = range(4)  # what became of them

_DEMONSTRATION = (
  ToolCall("find", {"name": "ann"}),
  ToolCall("get", {"id": "c17"}),
  Finish("karo"),
)
TASK = Task(
  "t", "toy", "what does ann have?", (), {"type": "exact", "value": "karo"}, _DEMONSTRATION
)
_RESULTS = ({"id": "c17"}, {"has": "karo"})


def _step(action, observation=None) -> Step:
  return Step(np.zeros(1, np.int32), np.zeros(1, np.float32), action, observation)


def trajectory(kinds: tuple[int, ...], status: Status) -> Trajectory:
  """What became of each step -> the trajectory."""
  steps, done = [], 0
  for k, kind in enumerate(kinds):
    if kind == _END:
      steps.append(_step(Finish("karo" if done == NEEDED else "?")))
    elif kind == _SPARE:
      steps.append(_step(ToolCall("list", {"page": k}), Observation("", Code.OK, f"x{k}")))
    elif kind == _FAILED:
      steps.append(_step(ToolCall("get", {"id": f"c{k}"}), Observation("", Code.NOT_FOUND)))
    else:
      call = _DEMONSTRATION[min(done, NEEDED - 1)]  # once more, when all is done
      steps.append(_step(call, Observation("", Code.OK, _RESULTS[min(done, NEEDED - 1)])))
      done = min(done + 1, NEEDED)
  solved = float(status is Status.ANSWERED and done == NEEDED)
  return Trajectory("t", 0, np.zeros(1, np.int32), tuple(steps), status, solved)


@dataclasses.dataclass(frozen=True)
class Learnt:
  """Means over the last tenth of the training."""

  useless: float  # calls without use in a conversation
  calls: float
  early: float  # share of conversations that answer before both calls are made
  cut: float  # share that spends its calls
  solved: float


def train(
  options: Rewards,
  chance: float = 0.7,
  *,
  outcome_only: bool = False,
  iterations: int = 300,
  batch: int = 256,
  rate: float = 8.0,
  seed: int = 0,
) -> Learnt:
  """The figures of a policy that is trained with these rewards.

  chance: that a call that is needed succeeds.
  """

  @functools.cache
  def paid(code: int) -> np.ndarray:
    kinds = tuple(code // 5**k % 5 - 1 for k in range(MOST) if code >= 5**k)
    status = Status.ANSWERED if kinds[-1] == _END else Status.STEP_BUDGET
    (result,) = assembly.pay(
      [TASK],
      [trajectory(kinds, status)],
      options,
      outcome_only=outcome_only,
      gamma=GAMMA,
    )
    rewards = np.array([step.reward for step in result.steps])
    return np.pad(rewards, (0, MOST - len(rewards)))

  rng = np.random.default_rng(seed)
  table = (MOST + 1, NEEDED + 1, MOST + 1)  # calls made, of those needed, failed
  logits, values = np.zeros((np.prod(table), 3)), np.zeros(np.prod(table))
  log = []
  for _ in range(iterations):
    policy = np.exp(logits - logits.max(-1, keepdims=True))
    policy /= policy.sum(-1, keepdims=True)
    done, failed, alive = np.zeros(batch, int), np.zeros(batch, int), np.ones(batch, bool)
    states, actions = np.zeros((2, MOST, batch), int)
    kinds = np.full((MOST, batch), -1)
    for k in range(MOST):
      states[k] = np.ravel_multi_index((np.full(batch, k), done, failed), table)
      actions[k] = (policy[states[k]].cumsum(-1) < rng.random((batch, 1))).sum(-1).clip(max=2)
      fails = (rng.random(batch) >= chance) & (done < NEEDED)
      kind = np.choose(actions[k], [np.where(fails, _FAILED, _GOLD), _SPARE, _END])
      kinds[k, alive] = kind[alive]
      failed += alive & ((kind == _FAILED) | ((kind == _GOLD) & (done == NEEDED)))
      done += alive & (kind == _GOLD) & (done < NEEDED)
      alive &= kind != _END
    cut, taken = alive, kinds >= 0
    codes, where = np.unique(5 ** np.arange(MOST) @ (kinds + 1), return_inverse=True)
    rewards = np.array([paid(code) for code in codes.tolist()])[where].T
    next_value, following = np.zeros((2, batch))  # a spent budget is worth 0
    gains = np.zeros((MOST, batch))
    for k in reversed(range(MOST)):
      here = values[states[k]]
      delta = rewards[k] + GAMMA * next_value - here
      following = np.where(taken[k], delta + GAMMA * LAMBDA * following, following)
      next_value = np.where(taken[k], here, next_value)
      gains[k] = following
    at, chosen, gain = states[taken], actions[taken], gains[taken]
    count = np.bincount(at, minlength=len(values))
    error = np.bincount(at, gain, minlength=len(values)) / np.maximum(count, 1)  # returns - V
    values += np.minimum(0.5, count / 32) * error  # V follows closely where many pass
    whitened = (gain - gain.mean()) / (gain.std() + 1e-8)
    score = whitened[:, None] * (np.eye(3)[chosen] - policy[at])
    for action in range(3):
      step = np.bincount(at, score[:, action], minlength=len(values))
      logits[:, action] += rate / batch * step
    right = ~cut & (done == NEEDED)
    spare = (kinds == _SPARE).sum(0)
    calls = taken.sum(0) - ~cut
    log.append([x.mean() for x in (spare, calls, ~cut & ~right, cut, right)])
  return Learnt(*np.mean(log[-iterations // 10 :], axis=0).tolist())


WORLDS = (0.7, 0.4, 0.15)  # the chance that a call that is needed succeeds
_HEAD = """# What a policy learns to do from each way to pay steps

Written by `python results/incentives.py`: a tabular tool user, trained to convergence on rewards of
the product (what the script says), mean of three seeds. A task takes two calls, of which each
succeeds with the chance above the columns; a conversation has at most eight LLM calls. Useless:
further calls a conversation, executed and without use. Wrong: conversations that answer before both
calls succeeded. Cut: conversations that spend all their calls. "Outcome only" is what a policy does
that is paid for nothing but right answers; where a task is mostly hopeless (.15) it is
indifferent, and so are useless calls.

"""
_TAIL = """
- `progress` (the default) makes as few useless calls as the outcome alone, or fewer, and solves as
  much. It is the only row that keeps trying where tasks are mostly hopeless.
- `potential` has the optimum of the outcome alone (Ng et al. 1999), which is what it shows.
- `prefix_mean` is a function of the past, and yet no safe reward: after a failed call the mean is
  low, and every call that is merely executed lifts it. Where calls fail often, that pays more than
  trying on, up to a policy that makes one useless call and then answers anything.
- `failed_cost` makes no useless calls, and where calls fail often it makes none at all.
- `sum` and `episode_mean` pay for calls without use at any chance; `episode_mean` also reads the
  future, as does the source `hindsight`: whether a step contributed is known at the end only.
- `hindsight` did no harm with `progress` and `potential` here. But what a step earned then changes
  with what comes later, so that a right answer is paid to the steps before it and not to itself;
  training on rollouts refuses it without `rewards.unsafe=True`.
"""
_ROWS = (
  ("outcome only", {}, {"outcome_only": True}),
  *((f"`{name}`", {"shaping": name}, {}) for name in shaping.SHAPINGS),
  *(
    (f"`{name}`, `source=hindsight`", {"shaping": name, "source": "hindsight"}, {})
    for name in ("prefix_mean", "progress", "potential", "episode_mean")
  ),
)


def main() -> None:
  figures = ("useless", "early", "cut", "solved")
  heads = [f"{title} {w:g}" for w in WORLDS for title in ("useless", "wrong", "cut", "solved")]
  lines = ["| | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
  for title, options, rest in _ROWS:
    cells = []
    for chance in WORLDS:
      seeds = [train(Rewards(**options), chance, seed=seed, **rest) for seed in range(3)]
      means = [float(np.mean([getattr(s, name) for s in seeds])) for name in figures]
      cells += [f"{means[0]:.2f}", *(f"{100 * m:.0f} %" for m in means[1:])]
    lines.append(f"| {title} | " + " | ".join(cells) + " |")
    print(lines[-1], flush=True)
  page = _HEAD + "\n".join(lines) + "\n" + _TAIL
  pathlib.Path(__file__).with_suffix(".md").write_text(page)


if __name__ == "__main__":
  main()
