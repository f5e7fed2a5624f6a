"""A change of a tool's state is seen without Result(changed=…)."""

import collections
import dataclasses
import random
import sqlite3
import threading

import numpy as np
import pytest

from steptool_jax.simulators.changes import state_digest


@dataclasses.dataclass
class Account:
  balance: int = 0


class Slotted:
  __slots__ = ("n",)

  def __init__(self):
    self.n = 0


def of_table():
  table = {"ann": [1, 2]}
  return [lambda: table], lambda: table["ann"].append(3)


def of_object():
  account = Account()

  def helper():
    return account

  def pay():
    return helper()

  return [pay], lambda: setattr(account, "balance", 1)


def of_method():
  class Bank:
    def __init__(self):
      self.names = {"x"}

    def add(self):
      pass

  bank = Bank()
  return [bank.add], lambda: bank.names.add("y")


def of_slots():
  item = Slotted()
  return [lambda: item], lambda: setattr(item, "n", 1)


def of_array():
  array = np.zeros(3)
  return [lambda: array], lambda: array.__setitem__(0, 1.0)


def of_database():
  db = sqlite3.connect(":memory:")
  db.execute("create table t (a)")
  return [lambda: db], lambda: db.execute("insert into t values (1)")


def of_cycle():
  queue = collections.deque()
  queue.append(queue)
  return [lambda: queue], lambda: queue.append(1)


@pytest.mark.parametrize(
  "make", [of_table, of_object, of_method, of_slots, of_array, of_database, of_cycle]
)
def test_a_change_gives_another_digest_and_a_look_does_not(make):
  functions, change = make()
  before = state_digest(functions)
  assert before is not None
  assert state_digest(functions) == before
  change()
  assert state_digest(functions) != before


SHARED = {"n": 0}


def shared():
  return SHARED


def test_globals_that_a_tool_names_count(monkeypatch):
  before = state_digest([shared])
  monkeypatch.setitem(SHARED, "n", 1)
  assert state_digest([shared]) != before


def test_what_is_no_state_does_not_count():
  rng, lock = random.Random(0), threading.Lock()
  functions = [lambda: (rng, lock, threading)]
  before = state_digest(functions)
  rng.random()
  lock.acquire()
  assert state_digest(functions) == before


def test_a_state_that_is_too_large_is_not_compared():
  many = [[n] for n in range(30_000)]
  assert state_digest([lambda: many]) is None


def test_much_data_is_hashed_and_more_is_not_compared():
  """A search tool over a large array took seconds before and after every call."""
  data = np.zeros(1 << 20)
  texts = ["x" * 5000]
  functions = [lambda: (data, texts)]
  before = state_digest(functions)
  data[-1] = 1
  assert None not in (before, state_digest(functions))
  assert state_digest(functions) != before
  texts[0] = "x" * 4999 + "y"
  assert state_digest(functions) != before
  dates = np.array(["2024-01-01"], "M8[D]")
  assert state_digest([lambda: dates]) is not None
  huge = 10**5000
  assert state_digest([lambda: huge]) is None, "Python does not write it"
  large = np.zeros(1 << 24)
  names = list(range(1_000_000))
  assert state_digest([lambda: large]) is None
  assert state_digest([lambda: names]) is None


def test_a_variable_that_is_not_set_is_no_fault_of_the_tool():
  def make(state):
    if state:
      limit = 3

    def find():
      return limit

    return find

  assert state_digest([make({})]) is None
