"""The scheduler over a real engine and a tiny random model; tools that fail, hang and flood."""

import dataclasses
import threading
import time

import fakes
import jax
import numpy as np
import pytest

from steptool_jax.policy import engine, length_classes, model
from steptool_jax.policy.room import Room
from steptool_jax.rollout import chain
from steptool_jax.rollout.conversation import Limits
from steptool_jax.rollout.setting import Sampling, Setting, step_seed
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.runner import ToolRunner
from steptool_jax.types import Code, Observation, Status, Task, ToolSpec

ECHO = ToolSpec("echo", "", {"type": "object", "properties": {}})
LIMITS = Limits(
  max_steps=4, max_step_tokens=12, max_tokens=160, max_invalid=9, max_observation_chars=200
)


class Script:
  """An environment whose sessions answer from a function; counts what is open."""

  name = "script"

  def __init__(self, answer):
    self.answer, self.open_sessions, self.lock = answer, 0, threading.Lock()

  def open(self, task, sample):
    environment = self
    with self.lock:
      self.open_sessions += 1

    class Session:
      def call(self, call):
        return environment.answer(call)

      def grade(self, answer):
        return float(answer == "7")

      def close(self):
        with environment.lock:
          environment.open_sessions -= 1

    return Session()


@pytest.fixture(scope="module")
def chat_format(tmp_path_factory):
  return fakes.echo_format(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def policy(chat_format):
  config = fakes.tiny_config(vocab_size=chat_format.codec.vocab_size)
  eng = engine.make_engine(config, slots=3, size=160, chunk=5)
  params = model.init_params(config, jax.random.key(0))
  return eng, {"params": params}


def scripted(chat_format, *actions):
  """The n-th turn of every conversation is actions[n]."""
  return fakes.ScriptedEngine(
    chat_format, lambda text: actions[text.count("<|result|>")], size=160, chunk=4
  )


def run(eng, variables, environment, chat_format, jobs, runner=None, limits=LIMITS, **kwargs):
  runner = runner or ToolRunner(timeout_s=5, workers=4, retries=0)
  with runner:
    sampling = kwargs.pop("sampling", Sampling(0, 0, 1.0))
    setting = Setting(eng, variables, environment, chat_format, limits, runner, sampling)
    return chain.rollout(setting, jobs, **kwargs)


def task(name="t", query="say seven"):
  return Task(name, "script", query, (ECHO,), {})


def call():
  from steptool_jax.types import ToolCall

  return ToolCall("echo", {})


def answer(text="7"):
  from steptool_jax.types import Finish

  return Finish(text)


def ok(_):
  return Observation("seven", Code.OK, "seven")


def test_ids_are_the_engines_and_sessions_are_closed(chat_format):
  eng = scripted(chat_format, call(), answer())
  environment = Script(ok)
  (trajectory,), stats = run(eng, None, environment, chat_format, [(task(), 0)])
  assert trajectory.status is Status.ANSWERED
  assert trajectory.solved == 1.0
  parts = [p for s in trajectory.steps for p in (s.tokens, s.observation_tokens)]
  assert np.concatenate([trajectory.prompt_tokens, *parts]).tolist() == eng.seen[0]
  assert environment.open_sessions == 0
  assert stats.sampled_tokens == sum(len(s.tokens) for s in trajectory.steps)


def test_continuous_batching_keeps_the_order_and_shares_prefills(chat_format):
  eng = scripted(chat_format, call(), answer())
  jobs = [(task(f"t{i}", f"query {i}"), s) for i in range(3) for s in range(2)]
  trajectories, stats = run(eng, None, Script(ok), chat_format, jobs)
  assert [(t.task_id, t.sample) for t in trajectories] == [(j.id, s) for j, s in jobs]
  assert stats.shared_prefills == 3


def test_a_fork_from_a_slot_that_has_gone_on_gets_the_prompt_only(chat_format):
  class Uneven(Script):
    """The tools of task `short` are down, so that its slot is free while the other one goes on."""

    def open(self, task, sample):
      session = super().open(task, sample)
      if task.id == "short":
        session.call = lambda call: Observation("down", Code.INFRASTRUCTURE)
      return session

  eng = scripted(chat_format, call(), call(), answer())
  jobs = [(task("short", "another query"), 0), (task(), 0), (task(), 1)]
  trajectories, stats = run(eng, None, Uneven(ok), chat_format, jobs)
  assert stats.shared_prefills == 1
  assert [t.solved for t in trajectories] == [0.0, 1.0, 1.0]
  for slot, t in ((1, trajectories[1]), (0, trajectories[2])):
    parts = [p for s in t.steps for p in (s.tokens, s.observation_tokens)]
    assert np.concatenate([t.prompt_tokens, *parts]).tolist() == eng.seen[slot]


@pytest.mark.parametrize(
  ("answers", "status"),
  [
    (lambda c: Observation("x", Code.INFRASTRUCTURE), Status.INFRASTRUCTURE_ERROR),
    (lambda c: 1 / 0, Status.INFRASTRUCTURE_ERROR),  # the simulator itself is broken
    (lambda c: Observation("boom", Code.TOOL_ERROR), Status.ANSWERED),
    (lambda c: Observation("x" * 10_000_000, Code.OK), Status.ANSWERED),
  ],
)
def test_broken_tools_never_stop_a_rollout(chat_format, answers, status):
  limits = dataclasses.replace(LIMITS, max_observation_chars=20)
  eng = scripted(chat_format, call(), answer())
  (trajectory,), _ = run(eng, None, Script(answers), chat_format, [(task(), 0)], limits=limits)
  assert trajectory.status is status
  assert trajectory.solved == float(status is Status.ANSWERED)


class Checked(Script):
  """A script whose checker fails with an exception, for sample 1 only."""

  def __init__(self, error):
    super().__init__(ok)
    self.error = error

  def open(self, task, sample):
    session = super().open(task, sample)
    whole = session.grade

    def grade(answer):
      if sample == 1:
        raise self.error
      return whole(answer)

    session.grade = grade
    return session


@pytest.mark.parametrize(
  "error", [InfrastructureError("the judge is down"), RuntimeError("checker f returned 3")]
)
def test_a_checker_that_fails_marks_its_trajectory_and_stops_no_other(error, chat_format):
  """Not scored 0, not trained on, and nothing else is lost: one odd answer ended the whole run."""
  environment = Checked(error)
  eng = scripted(chat_format, call(), answer())
  jobs = [(task(), sample) for sample in range(3)]
  trajectories, stats = run(eng, None, environment, chat_format, jobs)
  (why,) = stats.failures
  assert f"the answer cannot be graded ({type(error).__name__}: {error})" in why
  assert [t.status for t in trajectories] == [
    Status.ANSWERED,
    Status.INFRASTRUCTURE_ERROR,
    Status.ANSWERED,
  ]
  assert [t.solved for t in trajectories] == [1.0, 0.0, 1.0]
  assert environment.open_sessions == 0


def test_a_session_that_opens_at_a_later_attempt_loses_nothing(chat_format):
  """A transient error in make_tools() ended the whole run; so did one that stays."""

  class Flaky(Script):
    fails = 2

    def open(self, task, sample):
      if sample == 1 and self.fails:
        self.fails -= 1
        raise OSError("too many open files")
      return super().open(task, sample)

  jobs = [(task(), sample) for sample in range(3)]
  for fails, status in ((2, Status.ANSWERED), (3, Status.INFRASTRUCTURE_ERROR)):
    environment, runner = Flaky(ok), ToolRunner(retries=2, backoff_s=0.001)
    environment.fails = fails
    eng = scripted(chat_format, call(), answer())
    trajectories, stats = run(eng, None, environment, chat_format, jobs, runner)
    assert [t.status for t in trajectories] == [Status.ANSWERED, status, Status.ANSWERED]
    assert environment.open_sessions == 0
  (why,) = stats.failures
  assert "no session can be opened (OSError: too many open files)" in why


def test_a_hanging_tool_is_left_behind_while_others_go_on(chat_format):
  release = threading.Event()

  def hang(_):
    release.wait(30)
    return ok(_)

  eng = scripted(chat_format, call(), answer())
  started = time.monotonic()
  try:
    runner = ToolRunner(timeout_s=0.2, workers=1, retries=0)
    trajectories, _ = run(
      eng, None, Script(hang), chat_format, [(task(), s) for s in range(3)], runner
    )
  finally:
    release.set()
  assert time.monotonic() - started < 10
  assert all(t.steps[0].observation.code is Code.TIMEOUT for t in trajectories)


def hang_at(session, method, release):
  """`session.method` answers only when `release` is set."""
  real = getattr(session, method)
  setattr(session, method, lambda *args: (release.wait(30), real(*args))[1])


@pytest.mark.parametrize("method", ["open", "grade"])
def test_an_environment_that_hangs_loses_one_conversation_in_time(method, chat_format):
  release = threading.Event()

  class Hanging(Script):
    def open(self, task, sample):
      if method == "open" and sample == 1:
        release.wait(30)
      session = super().open(task, sample)
      if method == "open" and sample == 1:
        came_late.set()
      if method == "grade" and sample == 1:
        hang_at(session, "grade", release)
      return session

  environment, came_late = Hanging(ok), threading.Event()
  eng = scripted(chat_format, call(), answer())
  started, seen = time.monotonic(), []
  try:
    runner = ToolRunner(timeout_s=0.3, workers=2, retries=0)
    jobs = [(task(), sample) for sample in range(4)]
    trajectories, _ = run(eng, None, environment, chat_format, jobs, runner, on_done=seen.append)
  finally:
    release.set()
  assert time.monotonic() - started < 10
  lost = Status.INFRASTRUCTURE_ERROR
  assert [t.status for t in trajectories] == [*([Status.ANSWERED, lost] + [Status.ANSWERED] * 2)]
  assert [t.sample for t in trajectories] == [0, 1, 2, 3]
  assert trajectories[1].solved == 0
  assert len(seen) == 4
  assert method == "grade" or came_late.wait(5)
  deadline = time.monotonic() + 5
  while environment.open_sessions and time.monotonic() < deadline:
    time.sleep(0.01)
  assert environment.open_sessions == 0  # a session that opened too late is closed too


def test_should_stop_interrupts_and_closes(chat_format):
  environment = Script(ok)
  eng = scripted(chat_format, call(), answer())
  opened = []

  def should_stop():
    deadline = time.monotonic() + 5
    while opened and environment.open_sessions < 2 and time.monotonic() < deadline:
      time.sleep(0.001)
    opened.append(environment.open_sessions)
    return len(opened) == 2

  with pytest.raises(chain.Interrupted):
    run(
      eng, None, environment, chat_format, [(task(), s) for s in range(2)], should_stop=should_stop
    )
  assert opened == [0, 2]
  # One that counts as open may still be on its way to its Future, and is closed when it is there.
  until(lambda: environment.open_sessions == 0)


def test_a_slow_tool_does_not_keep_a_rollout_from_stopping(chat_format):
  """Alone, a process waited for it without a look at anything: a stop was heard minutes later."""
  release, asked = threading.Event(), []

  def slow(_):
    release.wait(30)
    return ok(_)

  def should_stop():
    asked.append(time.monotonic())
    return len(asked) > 3

  eng = scripted(chat_format, call(), answer())
  started = time.monotonic()
  try:
    with pytest.raises(chain.Interrupted), ToolRunner(timeout_s=60, workers=2) as runner:
      run(*(eng, None, Script(slow), chat_format, [(task(), 0)]), runner, should_stop=should_stop)
    assert time.monotonic() - started < 20
  finally:
    release.set()


def until(condition):
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline, "it stands still"
    time.sleep(0.001)


@pytest.mark.parametrize("place", ["open", "grade"])
def test_a_slow_session_stops_nobody(place, chat_format):
  """Opening and grading went one by one in the main loop: .5 s each, 256 s for 512 conversations.

  Those of sample 0 end only when the others have come to where they wait for these: 18 turns in
  all, 12 of them without a session for sample 0.
  """
  actions, turns = [call(), call(), answer()], {"open": 12, "grade": 18}[place]
  jobs = [(task(f"t{i}", f"query {i}"), s) for i in range(3) for s in range(2)]

  class Slow(Script):
    def open(self, task, sample):
      session = super().open(task, sample)
      if place == "open" and sample == 0:
        until(lambda: len(eng.turns) >= turns)
      grade = session.grade

      def slow(given):
        if place == "grade" and sample == 0:
          until(lambda: len(eng.turns) >= turns)
        return grade(given)

      session.grade = slow
      return session

  found = []
  for environment in (Script(ok), Slow(ok)):
    eng = fakes.ScriptedEngine(
      chat_format, lambda text: actions[text.count("<|result|>")], slots=4, size=160, chunk=4
    )
    runner = ToolRunner(timeout_s=30, workers=4, retries=0)
    trajectories, stats = run(eng, None, environment, chat_format, jobs, runner)
    assert not stats.failures
    assert environment.open_sessions == 0
    found.append([(t.task_id, t.sample, t.status, t.solved, len(t.steps)) for t in trajectories])
  assert found[0] == found[1]
  assert [t[:2] for t in found[0]] == [(j.id, s) for j, s in jobs]


def test_a_call_waits_for_its_session_and_nothing_else_does(chat_format):
  """The prompt and the first turn are there before the session is; its call comes after it."""
  seen = []

  class Slow(Script):
    def open(self, task, sample):
      until(lambda: eng.turns)
      seen.append("open")
      return super().open(task, sample)

  def told(given):
    seen.append("call")
    return ok(given)

  eng = scripted(chat_format, call(), answer())
  (trajectory,), _ = run(eng, None, Slow(told), chat_format, [(task(), 0)])
  assert trajectory.status is Status.ANSWERED
  assert seen == ["open", "call"]


def test_what_is_done_meanwhile_is_done_while_nothing_can_be_decoded(chat_format):
  """An update in front of slots that could go on would only make them wait."""
  seen = []

  class Noting(fakes.ScriptedEngine):
    def decode(self, variables, *args):
      seen.append(variables)
      return super().decode(variables, *args)

  actions = [call(), answer()]
  eng = Noting(chat_format, lambda text: actions[text.count("<|result|>")], size=160, chunk=2)
  given = iter(["after one"])
  run(
    *(eng, "at first", Script(ok), chat_format, [(task(), 0)]),
    idle=lambda: seen.append("idle") or next(given, None),
  )
  first = seen.index("idle")
  assert first > 1, "the first turn takes several calls, all of them before the tool's"
  assert set(seen[:first]) == {"at first"}
  assert next(what for what in seen[first:] if what != "idle") == "after one"


def test_a_session_that_opens_after_the_end_is_closed(chat_format):
  """A run that is stopped while sessions open would leave their servers behind."""
  release, begun, opened = threading.Event(), threading.Event(), []

  class Slow(Script):
    def open(self, task, sample):
      begun.set()
      release.wait(20)
      session = super().open(task, sample)
      opened.append(session)
      return session

  environment, asked = Slow(ok), []
  eng = scripted(chat_format, call(), answer())
  runner = ToolRunner(timeout_s=20, workers=1, retries=0)

  def second_time():
    asked.append(0)
    return len(asked) == 2 and begun.wait(20)

  with pytest.raises(chain.Interrupted):
    run(
      *(eng, None, environment, chat_format, [(task(), s) for s in range(2)], runner),
      should_stop=second_time,
    )
  release.set()
  until(lambda: opened and not environment.open_sessions)


def test_a_prompt_that_does_not_fit_ends_alone(chat_format):
  eng = scripted(chat_format, call(), answer())
  jobs = [(task("long", "word " * 400), 0), (task(), 0)]
  long, short = run(eng, None, Script(ok), chat_format, jobs)[0]
  assert (long.status, long.steps) == (Status.TOKEN_BUDGET, ())
  assert short.status is Status.ANSWERED


def test_a_trajectory_depends_on_its_own_keys_only(chat_format, policy):
  """Alone, beside others, in another order: the same ids and log-probs (real engine)."""
  eng, variables = policy
  jobs = [(task(f"t{i}", f"query {i}"), s) for i in range(3) for s in range(2)]

  def ids(jobs, **kwargs):
    trajectories, _ = run(eng, variables, Script(ok), chat_format, jobs, **kwargs)
    return {(t.task_id, t.sample): [s.tokens.tolist() for s in t.steps] for t in trajectories}

  together = ids(jobs)
  assert len({str(v) for v in together.values()}) == 6
  assert ids(jobs[::-1]) == together
  assert ids(jobs[2:3])[("t1", 0)] == together[("t1", 0)]
  assert ids(jobs, sampling=Sampling(0, 1, 1.0)) != together
  assert ids(jobs, sampling=Sampling(1, 0, 1.0)) != together


def test_leaving_early_and_buckets_change_no_token(chat_format, policy):
  """The same keys give the same conversations, however the loop cuts its calls (real engine)."""
  eng, variables = policy
  config = fakes.tiny_config(vocab_size=chat_format.codec.vocab_size)
  jobs = [(task(f"t{i}", f"query {i}"), s) for i in range(4) for s in range(3)]
  plain = dataclasses.replace(eng, buckets=())
  early = engine.make_engine(config, slots=8, size=160, chunk=5, leave=0.5)
  assert early.buckets == (1, 2, 4)
  found = []
  for one in (plain, early):
    trajectories, _ = run(one, variables, Script(ok), chat_format, jobs)
    found.append([[s.tokens.tolist() for s in t.steps] for t in trajectories])
  assert found[0] == found[1]


def test_every_step_of_every_conversation_has_its_own_key():
  """What a retry of the same step is sampled with, in any process."""
  base = (Sampling(0, 0, 1.0), "t", 0, 0)
  others = [
    (Sampling(1, 0, 1.0), "t", 0, 0),
    (Sampling(0, 1, 1.0), "t", 0, 0),
    (base[0], "u", 0, 0),
    (base[0], "t", 1, 0),
    (base[0], "t", 0, 1),
  ]
  seeds = [tuple(step_seed(*key).tolist()) for key in (base, *others)]
  assert len(set(seeds)) == 6
  assert seeds[0] == (480973878, 200400714)


def test_sampler_logprobs_are_the_trainers(chat_format, policy):
  eng, variables = policy
  jobs = [(task("a"), s) for s in range(3)]
  config = fakes.tiny_config(vocab_size=chat_format.codec.vocab_size)
  for t in run(eng, variables, Script(ok), chat_format, jobs)[0]:
    parts = [p for s in t.steps for p in (s.tokens, s.observation_tokens)]
    ids = np.concatenate([t.prompt_tokens, *parts])[None]
    hidden = model.forward(config, variables, ids, np.arange(ids.shape[1])[None], np.ones_like(ids))
    logp = np.asarray(jax.nn.log_softmax(model.project_logits(config, variables, hidden)))[0]
    at = len(t.prompt_tokens)
    for step in t.steps:
      where = np.arange(at, at + len(step.tokens)) - 1
      np.testing.assert_allclose(step.logprobs, logp[where, step.tokens], atol=2e-5)
      at += len(step.tokens) + len(step.observation_tokens)


def test_what_outgrows_its_slot_waits_for_a_longer_one_and_says_the_same(policy, chat_format):
  """Seven conversations in two slots that end within a turn, and a single long one."""
  eng, variables = policy
  jobs = [(task(f"t{n // 2}", f"query {n // 2}"), n % 2) for n in range(7)]
  jobs.append((task("long", "say seven " * 6), 0))  # whose prompt needs the long slot
  short = len(chat_format.prompt(None, (ECHO,), "query 0")) + 9
  assert short < len(chat_format.prompt(None, (ECHO,), jobs[-1][0].query)) < LIMITS.max_tokens

  def of_size(slots, size):
    return engine.make_engine(eng.config, slots, size, chunk=5)

  sized = length_classes.of_sizes(of_size, ((2, short), (1, 160)))
  expected, alike = run(eng, variables, Script(ok), chat_format, jobs)
  environment = Script(ok)
  trajectories, stats = run(sized, variables, environment, chat_format, jobs)
  assert alike.outgrown == 0
  assert stats.outgrown >= 7
  assert stats.shared_prefills > 0
  assert environment.open_sessions == 0
  assert_say_the_same(trajectories, expected)
  # A sample whose prompt stands in the long slot alone: nothing is copied back from there.
  jobs = [(task("t0", "query 0"), n) for n in range(3)]
  sized = dataclasses.replace(sized, engines=(of_size(1, short), of_size(1, 160)))
  trajectories, _ = run(sized, variables, Script(ok), chat_format, jobs)
  assert_say_the_same(trajectories, run(eng, variables, Script(ok), chat_format, jobs)[0])


def assert_say_the_same(trajectories, expected):
  for one, other in zip(trajectories, expected, strict=True):
    assert (one.status, len(one.steps)) == (other.status, len(other.steps))
    for step, same in zip(one.steps, other.steps, strict=True):
      assert step.tokens.tolist() == same.tokens.tolist()
      assert step.observation_tokens.tolist() == same.observation_tokens.tolist()
      np.testing.assert_allclose(step.logprobs, same.logprobs, atol=2e-5)


def test_slots_by_class_by_hand():
  room = Room(((4, 100), (2, 300)))
  assert [room.tokens(slot) for slot in range(6)] == [100] * 4 + [300] * 2
  assert [room.owner(slot, 2) for slot in range(6)] == [0, 0, 1, 1, 0, 1]
  assert [list(room.fitting(n)) for n in (1, 100, 101, 999)] == [
    [0, 1, 2, 3],
    [0, 1, 2, 3],
    [4, 5],
    [4, 5],
  ]
  assert [room.outgrown(0, n) for n in (99, 100)] == [False, True]
  assert not room.outgrown(5, 300)  # there is nothing larger
