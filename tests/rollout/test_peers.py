"""Lockstep over several processes, here threads with an engine and an environment of their own."""

import threading
import time

import fakes
import pytest

from steptool_jax.data.trajectories import AnnotatedTrajectory, to_document
from steptool_jax.dialogue import compact
from steptool_jax.dialogue.codec import Codec
from steptool_jax.dialogue.template import get_format
from steptool_jax.policy.room import Room
from steptool_jax.rollout import carrying, chain, tree
from steptool_jax.rollout.carrying import Carry
from steptool_jax.rollout.conversation import Limits
from steptool_jax.rollout.peers import ALONE, together
from steptool_jax.rollout.seats import Seats
from steptool_jax.rollout.setting import Sampling, Setting
from steptool_jax.rollout.strategy import Search
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.runner import ToolRunner, TooManyStuck
from steptool_jax.types import Code, Finish, Observation, Status, Task, ToolCall, ToolSpec

ECHO = ToolSpec("echo", "", {"type": "object", "properties": {"n": {"type": "integer"}}})
LIMITS = Limits(
  max_steps=4, max_step_tokens=40, max_tokens=400, max_invalid=9, max_observation_chars=200
)
JOBS = [
  (Task(f"t{k}", "counter", f"query {k}", (ECHO,), {}), sample)
  for k in range(4)
  for sample in range(2)
]
SLOTS = 3


@pytest.fixture(scope="module")
def chat_format(tmp_path_factory):
  out = tmp_path_factory.mktemp("tokenizer")
  compact.build_tokenizer(['echo {"n":1} answer 7 sum query give_up'] * 50, 300, out)
  return get_format("compact", Codec.load(out))


class Counter:
  """A stateful environment; counts who was asked what."""

  name = "counter"

  def __init__(self):
    self.opened, self.calls, self.closed = [], [], []
    self.refuse = None  # (task id, exception) of an opening

  def open(self, task, sample):
    if self.refuse and task.id == self.refuse[0]:
      raise self.refuse[1]
    self.opened.append((task.id, sample))
    return Session(self, task, sample)


class Session:
  def __init__(self, environment, task, sample):
    self.environment, self.key, self.sum = environment, (task.id, sample), 0

  def call(self, call):
    time.sleep(0.01 * len(self.environment.calls) % 0.03)  # processes answer at different times
    self.environment.calls.append(self.key)
    self.sum += call.arguments["n"]
    return Observation(f"sum {self.sum}", Code.OK, {"sum": self.sum}, changed=True)

  def grade(self, answer):
    return float(answer == str(self.sum)) / 2

  def close(self):
    self.environment.closed.append(self.key)


def policy(text):
  """Echoes as often as the query's number says, then answers with a sum that is right for some."""
  if "function_output" in text:  # a diversity prompt
    return ToolCall("echo", {"n": 2})
  wanted, done = int(text.split("query ")[1][0]), text.count("sum")
  return ToolCall("echo", {"n": 1}) if done < wanted else Finish("2")


class Peers:
  def __init__(self, index, count, barrier, board):
    self.index, self.count, self.barrier, self.board = index, count, barrier, board

  def gather(self, document):
    self.board[self.index] = document
    self.barrier.wait(20)
    found = [self.board[n] for n in range(self.count)]
    self.barrier.wait(20)
    return found


def processes(count, work):
  """work(peers) in `count` threads: what it returns or raises, in their order."""
  barrier, board, out = threading.Barrier(count), {}, [None] * count

  def one(index):
    try:
      out[index] = work(Peers(index, count, barrier, board))
    except Exception as error:
      out[index] = error

  threads = [threading.Thread(target=one, args=(n,)) for n in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
    assert not thread.is_alive(), "a process waits for others that have gone another way"
  return out


def roll(
  chat_format, environment, peers, strategy=None, time_out=5, max_stuck=16, classes=(), **keywords
):
  slots = sum(number for number, _ in classes) or SLOTS
  eng = fakes.ScriptedEngine(chat_format, policy, slots=slots, size=800)
  eng.classes = classes or eng.classes
  sampling = Sampling(0, 0, 1.0)
  with ToolRunner(timeout_s=time_out, workers=2, max_stuck=max_stuck, retries=0) as runner:
    setting = Setting(eng, None, environment, chat_format, LIMITS, runner, sampling, peers=peers)
    if strategy is not None:
      results, stats = tree.search(setting, JOBS, strategy, **keywords)
      return [r.trajectory for r in results], stats
    return chain.rollout(setting, JOBS, **keywords)


def documents(trajectories):
  found = [to_document(AnnotatedTrajectory(t)) for t in trajectories]
  for document in found:
    for step in document["steps"]:
      if step["observation"] is not None:
        del step["observation"]["seconds"]
  return found


@pytest.mark.parametrize("strategy", [None, Search(max_calls=6, answers=2, answer_back=2)])
def test_three_processes_have_the_trajectories_of_one_and_share_the_tools(chat_format, strategy):
  alone = Counter()
  expected, stats = roll(chat_format, alone, ALONE, strategy)
  environments = [Counter() for _ in range(3)]
  found = processes(3, lambda p: roll(chat_format, environments[p.index], p, strategy))
  for trajectories, theirs in found:
    assert documents(trajectories) == documents(expected)
    assert theirs.sampled_tokens == stats.sampled_tokens
    if strategy is not None:
      assert theirs.replayed_calls == stats.replayed_calls > 0
  assert {t.solved for t in expected} == {0.0, 0.5}
  assert any(t.steps[0].observation is not None for t in expected)
  for shared, whole in (("opened", alone.opened), ("calls", alone.calls)):
    assert sorted(key for e in environments for key in getattr(e, shared)) == sorted(whole)
  assert all(e.opened for e in environments), "every process has slots of its own"
  assert all(sorted(e.closed) == sorted(e.opened) for e in environments)


def test_a_conversation_grows_within_its_process(chat_format):
  """Its session is there: each process has its share of the long slots, too."""
  expected, _ = roll(chat_format, Counter(), ALONE)
  short = min(len(t.prompt_tokens) for t in expected) + 20
  environments = [Counter() for _ in range(2)]
  found = processes(
    2, lambda p: roll(chat_format, environments[p.index], p, classes=((4, short), (2, 800)))
  )
  for trajectories, stats in found:
    assert documents(trajectories) == documents(expected)
    assert stats.outgrown > 2
  assert all(sorted(e.closed) == sorted(e.opened) != [] for e in environments)


def test_an_error_of_one_process_is_an_error_of_all(chat_format, monkeypatch):
  environments = [Counter() for _ in range(3)]
  call = Session.call

  def bad_value(self, given):
    observation = call(self, given)
    if self.environment is environments[1]:
      return Observation("x", Code.OK, {1, 2})  # a set is no JSON data
    return observation

  monkeypatch.setattr(Session, "call", bad_value)
  found = processes(3, lambda p: roll(chat_format, environments[p.index], p))
  assert isinstance(found[1], ValueError)
  for index in (0, 2):
    assert isinstance(found[index], RuntimeError)
    assert str(found[index]).startswith("process 1: ")
    assert "no JSON data" in str(found[index])
  assert all(sorted(e.closed) == sorted(e.opened) for e in environments)


def test_too_many_hung_tools_of_one_process_end_all(chat_format, monkeypatch):
  environments = [Counter() for _ in range(3)]
  call, late = Session.call, threading.Event()

  def hang(self, given):
    if self.environment is environments[1]:
      late.wait(60)
    return call(self, given)

  monkeypatch.setattr(Session, "call", hang)
  found = processes(
    3, lambda p: roll(chat_format, environments[p.index], p, time_out=2, max_stuck=0)
  )
  late.set()
  assert isinstance(found[1], TooManyStuck)
  for index in (0, 2):
    assert isinstance(found[index], InfrastructureError)
    assert str(found[index]).startswith("process 1: TooManyStuck: 1 ")
  assert all(sorted(e.closed) == sorted(e.opened) for e in environments)


def test_all_stop_where_one_is_asked_to(chat_format):
  environments = [Counter() for _ in range(3)]
  asked = []

  def roll_until(p):
    def should_stop():
      asked.append(p.index)
      return p.index == 2 and asked.count(2) == 5

    return roll(chat_format, environments[p.index], p, should_stop=should_stop)

  found = processes(3, roll_until)
  assert [type(error) for error in found] == [chain.Interrupted] * 3
  end = time.monotonic() + 10  # a session that was still being opened is closed when it is open
  while time.monotonic() < end and any(len(e.closed) < len(e.opened) for e in environments):
    time.sleep(0.01)
  assert all(sorted(e.closed) == sorted(e.opened) for e in environments)


@pytest.mark.parametrize("place", ["open", "grade"])
def test_a_conversation_that_cannot_be_opened_or_graded_is_lost_for_all(
  place, chat_format, monkeypatch
):
  environments = [Counter() for _ in range(3)]
  grade = Session.grade

  def bad_grade(self, answer):
    if place == "grade" and self.key[0] == "t2":
      raise KeyError("ghost")
    return grade(self, answer)

  monkeypatch.setattr(Session, "grade", bad_grade)
  if place == "open":
    for environment in environments:
      environment.refuse = ("t2", KeyError("ghost"))
  found = processes(3, lambda p: roll(chat_format, environments[p.index], p))
  for trajectories, stats in found:
    lost = [t.task_id for t in trajectories if t.status is Status.INFRASTRUCTURE_ERROR]
    assert lost == ["t2", "t2"]
    assert [t.task_id for t in trajectories] == [task.id for task, _ in JOBS]
    assert [("t2" in why, "KeyError: 'ghost'" in why) for why in stats.failures] == [
      (True,) * 2
    ] * 2


@pytest.mark.parametrize("place", ["open", "grade", "call"])
def test_whatever_is_slow_in_one_process_the_steps_stay_the_same(place, chat_format, monkeypatch):
  """Lockstep must not depend on when a session opens, answers or is graded."""
  expected, _ = roll(chat_format, Counter(), ALONE)
  environments = [Counter() for _ in range(3)]
  owner, name = (Counter, "open") if place == "open" else (Session, place)
  real, order = getattr(owner, name), iter([0.03, 0.0, 0.01, 0.05] * 100)

  def slow(self, *args):
    environment = self if place == "open" else self.environment
    if environment is not environments[0]:
      time.sleep(next(order))
    return real(self, *args)

  monkeypatch.setattr(owner, name, slow)
  for trajectories, stats in processes(3, lambda p: roll(chat_format, environments[p.index], p)):
    assert documents(trajectories) == documents(expected)
    assert not stats.failures
  assert all(sorted(e.closed) == sorted(e.opened) for e in environments)


def test_infrastructure_stays_infrastructure():
  def work(peers):
    def mine():
      if peers.index == 1:
        raise InfrastructureError("down")
      return peers.index

    return together(peers, mine)

  found = processes(2, work)
  assert [type(error) for error in found] == [InfrastructureError] * 2
  assert str(found[0]) == "process 1: InfrastructureError: down"


def test_few_conversations_use_the_tools_of_all_processes():
  """The lowest slots were taken first: those of the first hosts."""
  seats = Seats(Room(((8, 100),)), 4)
  for _ in range(5):
    seats[seats.free(10)] = None
  assert sorted(map(seats.owner, seats)) == [0, 0, 1, 2, 3]
  assert seats.owner(seats.free(10, 3)) == 3
  seats[seats.free(10, 3)] = None
  assert seats.free(10, 3) is None


def test_a_carried_conversation_goes_on_where_its_session_is(chat_format):
  """Elsewhere its calls are repeated, which tools that answer differently do not stand."""
  environments = [Counter(), Counter()]
  jobs = [(task, 0) for task, _ in JOBS[2::2]]  # they call one to three times

  def work(peers):
    environment = environments[peers.index]
    eng = fakes.ScriptedEngine(chat_format, policy, slots=4, size=800)
    sessions, owners, begun = {}, {}, ()
    with ToolRunner(timeout_s=5, workers=2, retries=0) as runner:
      setting = Setting(
        eng, None, environment, chat_format, LIMITS, runner, Sampling(0, 0, 1.0), peers=peers
      )
      for calls in (1, 0):
        # Another order, in which the lowest slots were another process's.
        order = jobs if calls else jobs[::-1]
        carry = Carry(calls, begun, sessions, owners)
        found, _ = carrying.rollout(setting, order, carry)
        begun = [f.trajectory for f in found] if calls else ()
        if calls:
          assert sorted(owners.values()) == [0, 0, 1]
    return found

  for found in processes(2, work):
    assert [len(t.steps) for t in found] == [4, 3, 2]
  assert len(environments[0].opened + environments[1].opened) == len(jobs), "some were opened again"
