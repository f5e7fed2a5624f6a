import threading
import time
from concurrent.futures import wait

import pytest

from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.runner import ToolRunner, TooManyStuck
from steptool_jax.types import Code, Observation, ToolCall

CALL = ToolCall("f", {})
OK = Observation("fine", Code.OK, 1)


class Scripted:
  """A session whose call runs a function of the number of the call."""

  def __init__(self, function):
    self.function, self.count = function, 0
    self.lock = threading.Lock()

  def call(self, call):
    with self.lock:
      index, self.count = self.count, self.count + 1
    return self.function(index)


def test_hung_call_times_out_and_its_worker_is_replaced():
  release = threading.Event()
  hung = Scripted(lambda _: release.wait(20) and OK)
  with ToolRunner(timeout_s=0.1, workers=1) as runner:
    started = time.monotonic()
    first = runner.submit(hung, CALL)
    second = runner.submit(Scripted(lambda _: OK), CALL)  # after it, with one worker
    assert first.result(5).code == Code.TIMEOUT
    assert "0.1 s" in first.result().text
    assert second.result(5).code == Code.OK
    assert time.monotonic() - started < 2
    assert runner.stuck == 1
    release.set()
    deadline = time.monotonic() + 5
    while runner.stuck and time.monotonic() < deadline:
      time.sleep(0.01)
    assert runner.stuck == 0  # a late return gives the leak back
    assert first.result().code == Code.TIMEOUT  # and changes no observation
    assert runner.submit(Scripted(lambda _: OK), CALL).result(5).code == Code.OK


def test_too_many_hung_calls_end_the_run_and_not_the_memory():
  release = threading.Event()
  hung = Scripted(lambda _: release.wait(20) and OK)
  with ToolRunner(timeout_s=0.05, workers=2, max_stuck=2) as runner:
    try:
      futures = [runner.submit(hung, CALL) for _ in range(8)]
      wait(futures, 5)
      outcomes = [f.exception(0) or f.result().code for f in futures]
      assert outcomes[:3] == [Code.TIMEOUT] * 3
      assert isinstance(outcomes[-1], InfrastructureError)
      assert "max_stuck is 2" in str(outcomes[-1])
      with pytest.raises(InfrastructureError, match="hang"):
        runner.submit(hung, CALL)
      assert hung.count <= 4  # the others never started
    finally:
      release.set()


def test_infrastructure_is_retried_with_back_off():
  down = Observation("down", Code.INFRASTRUCTURE)
  session = Scripted(lambda i: OK if i == 2 else down)
  with ToolRunner(retries=2, backoff_s=0.02) as runner:
    started = time.monotonic()
    assert runner.submit(session, CALL).result(5).code == Code.OK
    assert session.count == 3
    assert time.monotonic() - started >= 0.06  # 0.02 + 0.04
  session = Scripted(lambda i: OK if i == 3 else down)
  with ToolRunner(retries=2, backoff_s=0.001) as runner:
    assert runner.submit(session, CALL).result(5).code == Code.INFRASTRUCTURE
    assert session.count == 3


def test_other_failures_are_not_retried():
  session = Scripted(lambda _: Observation("slow down", Code.RATE_LIMIT))
  with ToolRunner(retries=3, backoff_s=0.001) as runner:
    assert runner.submit(session, CALL).result(5).code == Code.RATE_LIMIT
  assert session.count == 1


def test_crashed_session_is_an_infrastructure_error_and_no_empty_observation():
  def crash(_):
    raise ZeroDivisionError("lost the database")

  with ToolRunner(retries=1, backoff_s=0.001) as runner:
    observation = runner.submit(Scripted(crash), CALL).result(5)
    assert observation.code == Code.INFRASTRUCTURE
    assert "lost the database" in observation.text
    assert runner.submit(Scripted(lambda _: OK), CALL).result(5).code == Code.OK


def test_calls_run_at_the_same_time_and_none_is_lost():
  together = threading.Barrier(4, timeout=5)

  def meet(_):
    together.wait()
    return OK

  with ToolRunner(timeout_s=10, workers=4) as runner:
    futures = [runner.submit(Scripted(meet), CALL) for _ in range(4)]
    assert [f.result(10).code for f in futures] == [Code.OK] * 4
  sessions = [
    Scripted(lambda _, n=n: Observation(str(n), Code.OK, changed=bool(n % 2))) for n in range(200)
  ]
  with ToolRunner(workers=3) as runner:
    answers = [runner.submit(s, CALL) for s in sessions]
    assert [f.result(10).text for f in answers] == [str(n) for n in range(200)]


def test_seconds_are_measured():
  def slow(_):
    time.sleep(0.05)
    return OK

  with ToolRunner() as runner:
    assert 0.05 <= runner.submit(Scripted(slow), CALL).result(5).seconds < 2


def test_other_work_has_the_same_time_out():
  release, late = threading.Event(), []
  hanging = lambda: release.wait(20)  # noqa: E731
  with ToolRunner(timeout_s=0.1, max_stuck=1) as runner:
    assert runner.within(lambda: 7, "counting", late.append) == 7
    with pytest.raises(ZeroDivisionError):
      runner.within(lambda: 1 / 0, "counting")
    with pytest.raises(TimeoutError, match="its own"):  # not taken for a hang
      runner.within(lambda: (_ for _ in ()).throw(TimeoutError("its own")), "counting")
    assert (runner.stuck, late) == (0, [])
    started = time.monotonic()
    for _ in range(2):
      with pytest.raises(InfrastructureError, match=r"counting takes longer than 0\.1 s"):
        runner.within(hanging, "counting", late.append)
    assert time.monotonic() - started < 5
    assert runner.stuck == 2
    with pytest.raises(TooManyStuck):
      runner.within(lambda: 7, "counting")
    with pytest.raises(TooManyStuck):
      runner.submit(Scripted(lambda _: OK), CALL)
    release.set()
    deadline = time.monotonic() + 5
    while (runner.stuck or len(late) < 2) and time.monotonic() < deadline:
      time.sleep(0.01)
    assert (runner.stuck, late) == (0, [True, True])


def test_close_cancels_what_waits():
  release = threading.Event()
  runner = ToolRunner(workers=1)
  running = runner.submit(Scripted(lambda _: release.wait(5) and OK), CALL)
  waiting = runner.submit(Scripted(lambda _: OK), CALL)
  while not running.running():
    time.sleep(0.001)
  runner.close()
  assert waiting.cancelled()
  release.set()
  assert running.result(5).code == Code.OK
  with pytest.raises(RuntimeError, match="closed"):
    runner.submit(Scripted(lambda _: OK), CALL)


@pytest.mark.parametrize(
  "bad", [{"timeout_s": 0}, {"workers": 0}, {"max_stuck": -1}, {"retries": -1}, {"backoff_s": -1}]
)
def test_settings_are_checked(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    ToolRunner(**bad)


def test_begin_does_at_most_workers_at_a_time_and_none_after_the_end():
  """512 sessions that open at once would be 512 servers; those that wait are cancelled."""
  release, lock, now, most = threading.Event(), threading.Lock(), [], []

  def work():
    with lock:
      now.append(1)
      most.append(len(now))
    release.wait(20)
    with lock:
      now.pop()
    return 7

  with ToolRunner(timeout_s=20, workers=2) as runner:
    futures = [runner.begin(work, "work") for _ in range(5)]
    deadline = time.monotonic() + 10
    while len(most) < 2 and time.monotonic() < deadline:
      time.sleep(0.001)
    release.set()
    assert [future.result(20) for future in futures] == [7] * 5
    assert max(most) == 2
    release.clear()
    later = [runner.begin(work, "work") for _ in range(3)]
    while len(now) < 2 and time.monotonic() < deadline:
      time.sleep(0.001)
  release.set()
  assert later[2].cancelled()
  assert [future.result(20) for future in later[:2]] == [7, 7]


def test_work_of_several_calls_has_as_many_time_outs():
  """A session that repeats five recorded calls may take five times as long as one call."""
  with ToolRunner(timeout_s=0.05, workers=1) as runner:
    assert runner.begin(lambda: time.sleep(0.1) or 7, "replaying", times=20).result(20) == 7
    with pytest.raises(InfrastructureError, match="replaying takes longer than 0.1 s"):
      runner.begin(lambda: time.sleep(0.5), "replaying", times=2).result(20)


def test_begin_has_the_time_out_of_within():
  release, came = threading.Event(), []
  with ToolRunner(timeout_s=0.05, workers=1) as runner:
    hung = runner.begin(lambda: release.wait(20), "the judge", came.append)
    fails = runner.begin(lambda: 1 / 0, "the judge")
    with pytest.raises(InfrastructureError, match="the judge takes longer than 0.05 s"):
      hung.result(20)
    with pytest.raises(ZeroDivisionError):
      fails.result(20)
    release.set()
