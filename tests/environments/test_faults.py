import collections

import pytest

from steptool_jax.environments.faults import Faults, FaultyEnvironment
from steptool_jax.simulators.runner import ToolRunner
from steptool_jax.types import Code, Observation, Task, ToolCall, ToolSpec

CALL = ToolCall("f", {})
ALL = Faults(seed=3, rate_limit=0.1, timeout=0.1, transient=0.1, not_found=0.2)


class Counting:
  """Environment and session in one: counts what really ran."""

  name = "counting"

  def __init__(self):
    self.ran, self.closed = 0, False

  def tasks(self, split):
    return [split]

  def open(self, task, sample):
    return self

  def call(self, call):
    self.ran += 1
    return Observation("fine", Code.OK, self.ran)

  def grade(self, answer):
    return 0.5

  def close(self):
    self.closed = True


def task(name="t", tools=()):
  return Task(name, "counting", "q", tuple(ToolSpec(t, "", {}) for t in tools), {})


def observations(faults, count=400, sample=0, name="t", tools=()):
  inner = Counting()
  session = FaultyEnvironment(inner, faults).open(task(name, tools), sample)
  return [session.call(CALL) for _ in range(count)], inner


def test_same_seed_task_and_sample_repeat_and_others_differ():
  def kinds(**changes):
    faults = Faults(**({"seed": 3, "rate_limit": 0.2, "not_found": 0.2} | changes.pop("f", {})))
    return [(o.code, o.text) for o in observations(faults, 60, tools=("find_x",), **changes)[0]]

  assert kinds() == kinds()
  assert kinds() != kinds(sample=1)
  assert kinds() != kinds(name="u")
  assert kinds() != kinds(f={"seed": 4})


def test_rates_codes_and_that_a_faulted_call_is_not_executed():
  # No limit on consecutive ones here, so that the rates are the plain ones.
  faults = Faults(0.1, 0.1, 0.1, 0.2, max_consecutive=1000, seed=3)
  seen, inner = observations(faults, 2000)
  counts = collections.Counter(o.code for o in seen)
  for code, rate in [
    (Code.RATE_LIMIT, 0.1),
    (Code.TIMEOUT, 0.1),
    (Code.UNAVAILABLE, 0.1),
    (Code.NOT_FOUND, 0.2),
    (Code.OK, 0.5),
  ]:
    assert abs(counts[code] / 2000 - rate) < 0.03
  assert inner.ran == counts[Code.OK]
  assert all(o.injected == (o.code != Code.OK) for o in seen)
  assert all(o.value is None for o in seen if o.injected)


def test_trying_again_always_gets_through():
  certain = Faults(transient=1.0, max_consecutive=2)
  seen, inner = observations(certain, 9)
  assert [o.code == Code.OK for o in seen] == [False, False, True] * 3
  assert inner.ran == 3


@pytest.mark.parametrize("failure", ["observation", "exception"])
def test_a_retry_after_an_infrastructure_failure_takes_no_draw_of_later_calls(failure):
  """Peers: a tool server that hiccups must not change what the run injects."""

  class Flaky(Counting):
    def __init__(self):
      super().__init__()
      self.hiccups = 0

    def call(self, call):
      if self.hiccups < self.ran:  # every second attempt fails
        self.hiccups += 1
        if failure == "exception":
          raise OSError("gone")
        return Observation("down", Code.INFRASTRUCTURE)
      return super().call(call)

  faults = Faults(0.2, 0.1, 0.1, 0.1, seed=3)
  inner = Flaky()
  session = FaultyEnvironment(inner, faults).open(task(), 0)
  with ToolRunner(workers=1, retries=1, backoff_s=0) as runner:
    flaky = [runner.submit(session, CALL).result(5) for _ in range(60)]
  steady, counting = observations(faults, 60)
  assert [(o.code, o.text) for o in flaky] == [(o.code, o.text) for o in steady]
  assert inner.ran == counting.ran
  assert inner.hiccups > 20


def test_not_found_names_a_way_out():
  seen, _ = observations(Faults(not_found=1.0), 60, tools=("find_x", "get_x"))
  texts = {o.text for o in seen if o.injected}
  assert texts == {
    "error: not found, find_x gives ids, then try again",
    "error: not found yet, try again",
  }
  seen, _ = observations(Faults(not_found=1.0), 20)
  assert {o.text for o in seen if o.injected} == {"error: not found yet, try again"}


def test_grade_and_close_pass_through_and_zero_changes_nothing():
  inner = Counting()
  session = FaultyEnvironment(inner, ALL).open(task(), 0)
  assert session.grade("x") == 0.5
  session.close()
  assert inner.closed
  assert FaultyEnvironment(inner, Faults()).open(task(), 0) is inner
  assert FaultyEnvironment(inner, ALL).tasks("train") == ["train"]


def test_probabilities_that_add_up_to_more_than_one_are_refused():
  with pytest.raises(ValueError, match=r"add up to 1\.2"):
    FaultyEnvironment(Counting(), Faults(timeout=0.6, not_found=0.6))
