import dataclasses
import itertools

import numpy as np
import pytest

from steptool_jax.dialogue import compact
from steptool_jax.dialogue.codec import Codec
from steptool_jax.dialogue.template import get_format
from steptool_jax.environments.faults import Faults, FaultyEnvironment
from steptool_jax.environments.nested_api import NestedApi
from steptool_jax.evaluation.metrics import rollout_metrics
from steptool_jax.rewards import rules, shaping
from steptool_jax.rollout.conversation import Limits
from steptool_jax.rollout.replaying import replay_actions
from steptool_jax.types import Code, Observation, Status, ToolCall

LIMITS = Limits(
  max_steps=8, max_step_tokens=64, max_tokens=1024, max_invalid=3, max_observation_chars=500
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
  env = NestedApi(num_train=30, num_heldout=0, tools_per_task=6)
  out = tmp_path_factory.mktemp("tokenizer")
  texts = (text for task in env.tasks("train") for text in compact.task_texts(task))
  compact.build_tokenizer(texts, 400, out)
  return env, get_format("compact", Codec.load(out))


def test_a_demonstration_is_a_solved_trajectory_whose_turns_parse_back(parts):
  env, chat_format = parts
  for task in env.tasks("train"):
    t = replay_actions(env, task, task.demonstration, chat_format, LIMITS)
    assert (t.status, t.solved) == (Status.ANSWERED, 1.0)
    for step, action in zip(t.steps, task.demonstration, strict=True):
      assert step.action == action
      assert chat_format.parse(step.tokens) == action
      assert step.tokens[-1] in chat_format.stop_ids
      assert (step.logprobs == 0).all()


def test_one_that_does_not_fit_ends_in_its_status(parts):
  env, chat_format = parts
  task = max(env.tasks("train"), key=lambda t: len(t.demonstration))
  short = dataclasses.replace(LIMITS, max_steps=2)
  assert replay_actions(env, task, task.demonstration, chat_format, short).status is (
    Status.STEP_BUDGET
  )
  narrow = dataclasses.replace(LIMITS, max_tokens=120)
  t = replay_actions(env, task, task.demonstration, chat_format, narrow)
  assert t.status is Status.TOKEN_BUDGET
  assert t.num_tokens <= 120


def test_a_faulted_call_is_repeated_so_that_nothing_is_known_that_was_not_told(parts):
  env, chat_format = parts
  faulty = FaultyEnvironment(env, Faults(seed=3, transient=0.4))
  limits = dataclasses.replace(LIMITS, max_steps=20)
  met = 0
  for task in env.tasks("train"):
    t = replay_actions(faulty, task, task.demonstration, chat_format, limits)
    assert (t.status, t.solved) == (Status.ANSWERED, 1.0)
    healthy = [s.action for s in t.steps if s.observation is None or s.observation.code is Code.OK]
    assert tuple(healthy) == task.demonstration
    for step, following in itertools.pairwise(t.steps):
      if step.observation.injected:
        met += 1
        assert following.action == step.action
  assert met > 10


def test_one_whose_tools_are_down_is_marked(parts):
  """The trainer leaves it out by its status: peers train on the failure of a tool's host."""
  env, chat_format = parts

  class Down:
    name = env.name

    def open(self, task, sample):
      session = env.open(task, sample)
      session.call = lambda call: Observation("connection refused", Code.INFRASTRUCTURE)
      return session

  task = env.tasks("train")[0]
  t = replay_actions(Down(), task, task.demonstration, chat_format, LIMITS)
  assert t.status is Status.INFRASTRUCTURE_ERROR
  assert len(t.steps) == 1


def test_one_that_does_not_finish_is_refused(parts):
  env, chat_format = parts
  task = env.tasks("train")[0]
  with pytest.raises(ValueError, match=rf"{task.id}.*does not end in Finish"):
    replay_actions(env, task, task.demonstration[:-1], chat_format, LIMITS)


def test_metrics_literals(parts):
  """Three trajectories: solved, unsolved after a failed call, and an infrastructure error."""
  env, chat_format = parts
  task = env.tasks("train")[0]
  good = replay_actions(env, task, task.demonstration, chat_format, LIMITS)
  wrong = (ToolCall("no_such_tool", {}), task.demonstration[-1])
  bad = replay_actions(env, task, wrong, chat_format, LIMITS)
  broken = dataclasses.replace(bad, status=Status.INFRASTRUCTURE_ERROR)
  group = [shaping.shape(rules.annotate(task, t)) for t in (good, bad, broken)]
  calls = len(good.steps) - 1
  figures = rollout_metrics(group)
  assert figures["pass_rate"] == (1.0 + bad.solved) / 2
  assert figures["calls_per_task"] == (calls + 1) / 2
  assert figures["invocation_success"] == pytest.approx(calls / (calls + 1))
  assert figures["invalid_call_rate"] == pytest.approx(1 / (calls + 1))
  assert figures["infrastructure_errors"] == 1.0
  assert figures["reward"] == pytest.approx((2.0 + bad.solved) / 2)
  assert np.isfinite(list(figures.values())).all()
  assert rollout_metrics([])["pass_rate"] == 0.0
