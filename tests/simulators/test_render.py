import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steptool_jax.simulators.render import as_json, clean_text, plain, render


def shown(value, limit=200):
  return render(as_json(value, limit), limit)


class Loud:
  def __str__(self):
    raise RuntimeError("no")


@pytest.mark.parametrize(
  ("value", "text"),
  [
    ("plain text", "plain text"),
    ({"a": 1, "b": [1.5, None, True]}, '{"a":1,"b":[1.5,null,true]}'),
    (float("nan"), "nan"),
    ([float("inf"), -0.5], '["inf",-0.5]'),
    (b"\x00\xff\x01", "<binary, 3 bytes>"),
    ({"raw": bytearray(5)}, '{"raw":"<binary, 5 bytes>"}'),
    (np.float32(0.5), "0.5"),
    (np.int64(7), "7"),
    (np.bool_(True), "true"),
    (np.arange(3), "[0,1,2]"),
    ({1: "one", None: 2}, '{"1":"one","None":2}'),
    ({"b", "a"}, '["a","b"]'),
    ((1, 2), "[1,2]"),
    (3 + 4j, "(3+4j)"),
    (Loud(), "<Loud>"),
    ("a\x1b[31m\x00b\nc", "a\ufffd[31m\ufffdb\nc"),
    ("lone \ud800 surrogate", "lone \ufffd surrogate"),
  ],
)
def test_literals(value, text):
  assert shown(value) == text


def test_integer_that_python_refuses_to_print():
  assert shown(10**5000) == "<integer of 16610 bits>"


def test_ten_megabytes_of_text_are_cut():
  text = shown("x" * 10_000_000, limit=50)
  assert text == "x" * 47 + "..."


@pytest.mark.parametrize(
  "value",
  [
    list(range(10_000_000)),
    {i: i for i in range(1_000_000)},
    b"\x00" * 10_000_000,
    np.zeros(10_000_000),
    [["x" * 1000] * 1000] * 100,
  ],
  ids=["list", "dict", "bytes", "array", "nested"],
)
def test_huge_data_is_bounded_as_text_and_as_value(value):
  copy = as_json(value, 100)
  assert len(render(copy, 100)) <= 100
  assert len(json.dumps(copy)) < 30_000


def test_cycles_and_depth():
  cyclic: dict = {"name": "a"}
  cyclic["self"] = [cyclic]
  assert shown(cyclic) == '{"name":"a","self":["<cycle>"]}'
  shared = [1]
  assert shown([shared, shared]) == "[[1],[1]]"  # twice is no cycle
  deep: list = []
  for _ in range(100_000):
    deep = [deep]
  assert "<too deep>" in shown(deep)


def test_value_is_a_copy():
  live = {"rows": [1]}
  copy = as_json(live, 100)
  live["rows"].append(2)
  assert copy == {"rows": [1]}


@settings(max_examples=50, deadline=None)
@given(
  st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
  ),
  st.integers(8, 60),
)
def test_any_value_is_bounded_printable_and_encodable(value, limit):
  text = shown(value, limit)
  assert len(text) <= limit
  assert all(c.isprintable() or c in "\n\t" for c in text)
  text.encode("utf-8")


@given(st.text(), st.integers(3, 20))
def test_clean_text_keeps_short_printable_text(text, limit):
  cleaned = clean_text(text, limit)
  if len(text) <= limit and text.isprintable():
    assert cleaned == text
  assert len(cleaned) == min(len(text), limit)


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ('{"mean": NaN, "most": 1e999}', {"mean": "NaN", "most": "inf"}),
    ("[1, {}]", [1, {}]),
    ("no JSON", "no JSON"),
    ("[" * 100_000, "[" * 100_000),
  ],
)
def test_what_a_text_says_is_plain_json(text, value):
  """NaN in an observation ended evaluations when they were written down."""
  assert plain(text) == value
  assert "NaN" not in json.dumps(plain("[" * 200 + "NaN" + "]" * 200), allow_nan=False)
