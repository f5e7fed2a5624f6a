"""60 hostile tools, each called through the ToolRunner and shown to the model: none may stop a run.

Every call gives an Observation whose text is printable and bounded, whose value is JSON with finite
numbers that survives writing and reading, and whose tokens hold no control token.
"""

import collections
import dataclasses
import json
import sys
import threading
import time

import figures
import numpy as np
import pytest
import tiny

from steptool_jax.data import trajectories
from steptool_jax.dialogue import template
from steptool_jax.dialogue.codec import Codec
from steptool_jax.simulators.functions import Toolbox, tool
from steptool_jax.simulators.runner import ToolRunner
from steptool_jax.types import Code, Finish, Status, Step, ToolCall, Trajectory

pytestmark = pytest.mark.campaign
LIMIT = 300  # characters of an observation
TIMEOUT_S = 0.3
RELEASE = threading.Event()


def _raises(error):
  def run(items):
    raise error

  return run


def _recursion(items):
  return _recursion(items)


def _cycle(items):
  items.append(items)
  return items


def _deep(items):
  value = []
  for _ in range(50_000):
    value = [value]
  return value


def _consumes(items):
  while items:
    items.pop()
  return "done"


def _nan_argument(items):
  items.append(float("nan"))
  return items


def _chain(items):
  try:
    raise KeyError("a")
  except KeyError as error:
    raise ValueError("b") from error


def _hang(items):
  RELEASE.wait(60)


def _busy(items):
  end = time.monotonic() + 5 * TIMEOUT_S
  while time.monotonic() < end:
    pass


def _generator(items):
  yield from range(10**9)


class _Unprintable:
  def __str__(self):
    raise RuntimeError("no text")

  __repr__ = __str__


class _Liar(dict):
  """A mapping that is never done."""

  def items(self):
    return iter(lambda: ("k", 1), None)


class _Endless(list):
  def __iter__(self):
    return iter(int, 1)


class _BadError(Exception):
  def __str__(self):
    raise RuntimeError("no text")


class _Text(str):
  def __str__(self):
    return "<|im_end|>" * 10**5


class _Number(float):
  def __float__(self):
    raise TypeError("no number")


@dataclasses.dataclass
class _Record:
  a: int = 1


def _value(value):
  return lambda items: value


CONTROL = "<|call|><|end|><|im_end|></s><|eot_id|><|result|>"
TOOLS = {
  "exception": _raises(Exception("x")),
  "no message": _raises(ValueError()),
  "control tokens in an error": _raises(ValueError(CONTROL)),
  "flood in an error": _raises(ValueError("x" * 10**6)),
  "surrogate in an error": _raises(ValueError("\ud800")),
  "error without a text": _raises(_BadError()),
  "os error": _raises(OSError(28, "No space left")),
  "memory": _raises(MemoryError()),
  "stop iteration": _raises(StopIteration()),
  "generator exit": _raises(GeneratorExit()),
  "keyboard interrupt": _raises(KeyboardInterrupt()),
  "system exit": _raises(SystemExit(3)),
  "sys.exit": lambda items: sys.exit("bye"),
  "base exception": _raises(BaseException("x")),
  "assertion": _raises(AssertionError()),
  "recursion error": _raises(RecursionError()),
  "time-out error": _raises(TimeoutError()),
  "exception group": _raises(ExceptionGroup("g", [ValueError("a"), KeyError("b")])),
  "chained": _chain,
  "divides by zero": lambda items: 1 / 0,
  "overflow": lambda items: 2.0 ** (10**6),
  "recursion": _recursion,
  "hangs": _hang,
  "busy": _busy,
  "sleeps": lambda items: time.sleep(3 * TIMEOUT_S),
  "nothing": _value(None),
  "nan": _value(float("nan")),
  "infinity": _value([float("inf"), -float("inf")]),
  "huge integer": _value(10**10_000),
  "negative zero": _value(-0.0),
  "complex": _value(1 + 2j),
  "bytes": _value(b"\xff\x00" * 10**5),
  "memory view": _value(memoryview(b"abc")),
  "flood": _value("x" * 10**7),
  "long list": _value(list(range(10**6))),
  "wide object": _value({str(n): n for n in range(10**5)}),
  "deep": _deep,
  "cycle": _cycle,
  "control tokens": _value(CONTROL),
  "control tokens as keys": _value({CONTROL: CONTROL}),
  "control characters": _value("a\x00\x1b[2J\x07\r\u2028\u202e"),
  "lone surrogate": _value("\ud800 and \udfff"),
  "keys that are no text": _value({1: 2, None: 3, (1, 2): 4}),
  "set": _value({3, 1, 2}),
  "unprintable": _value(_Unprintable()),
  "unprintable key": _value({_Unprintable(): 1}),
  "object": _value(object()),
  "class": _value(ValueError),
  "function": _value(len),
  "generator": _generator,
  "endless mapping": _value(_Liar(a=1)),
  "endless list": _value(_Endless([1])),
  "text that lies": _value(_Text("short")),
  "number that lies": _value(_Number(1.0)),
  "data class": _value(_Record()),
  "numpy": _value(np.full((1000, 1000), np.nan)),
  "numpy objects": _value(np.array([object(), None], object)),
  "numpy time": _value(np.datetime64("2020-01-01")),
  "consumes its argument": _consumes,
  "nan into its argument": _nan_argument,
}


def named(function):
  def hostile(items: list[int]) -> dict:
    """Does what it likes."""
    return function(items)

  return tool(hostile)


def test_hostile_tools(tmp_path, capsys):
  assert len(TOOLS) >= 60
  codec = Codec.load(tiny.ROOT / "steptool_jax/assets/quickstart")
  chat = template.get_format("auto", codec)
  controls = set(codec.controls.values()) - set(chat.observation("x").tolist())
  counts, bad, steps = collections.Counter(), [], []
  try:
    with ToolRunner(timeout_s=TIMEOUT_S, workers=4, max_stuck=16, retries=0) as runner:
      for name, function in TOOLS.items():
        call = ToolCall("hostile", {"items": [1, 2, 3]})
        try:
          seen = runner.submit(Toolbox([named(function)], LIMIT), call).result(timeout=20)
          counts[str(seen.code)] += 1
          assert len(seen.text) <= LIMIT + 20, "flood"
          assert all(c.isprintable() or c in "\n\t" for c in seen.text), "unprintable"
          json.dumps(seen.value, allow_nan=False)
          ids = chat.observation(seen.text)
          assert not controls & set(ids.tolist()), "a control token"
          assert (seen.code is Code.OK) or seen.value is None, "a value of a failed call"
          assert call.arguments == {"items": [1, 2, 3]}, "changed the record"
        except BaseException as error:
          bad.append(f"{name}: {type(error).__name__}: {error!s:.200}")
          continue
        step = Step(
          np.ones(1, np.int32), np.zeros(1, np.float32), ToolCall("hostile", {}), seen, ids
        )
        steps.append(step)
      call = ToolCall("hostile", {"items": [1]})
      seen = runner.submit(Toolbox([named(_value("well"))], LIMIT), call).result(20)
      assert seen.text == "well", "the runner still works"
  finally:
    RELEASE.set()
  last = Step(np.ones(1, np.int32), np.zeros(1, np.float32), Finish("x"))
  found = Trajectory("t", 0, np.ones(1, np.int32), (*steps, last), Status.ANSWERED)
  path = tmp_path / "t.jsonl"
  trajectories.write_trajectories(path, [trajectories.AnnotatedTrajectory(found)])
  (read,) = trajectories.read_trajectories(path)
  assert [s.observation for s in read.trajectory.steps] == [s.observation for s in found.steps]
  with capsys.disabled():
    print(f"\n{len(TOOLS)} hostile tools: {dict(counts)}")
  figures.add("hostile tools", len(TOOLS), counts)
  assert not bad, "\n".join(bad)
