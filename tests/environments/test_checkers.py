import pytest

from steptool_jax.environments.checkers import number, same_table, same_value


@pytest.mark.parametrize(
  ("answer", "expected"),
  [
    ("karo mine", "karo mine"),
    ("  Karo\n MINE. ", "karo mine"),
    ('"karo mine"', "karo mine"),
    ("ｋａｒｏ", "karo"),
    ("1234", 1234),
    ("1,234.0", 1234),
    ("$1,234", 1234),
    ("-0.5", -0.5),
    ("1e3", 1000),
    ("33.333333", 100 / 3),
  ],
)
def test_right_answers(answer, expected):
  assert same_value(answer, expected)


@pytest.mark.parametrize(
  ("answer", "expected"),
  [
    ("answer: karo", "karo"),
    ("karo or mine", "karo"),
    ("karo mine tafo", "karo"),
    ("kar", "karo"),
    ("", "karo"),
    ("", ""),
    (None, "karo"),
    ("12 13 14", 12),
    ("112", 12),
    ("12,3", 123),
    ("the price is 12", 12),
    ("twelve", 12),
    ("nan", 12),
    ("inf", 12),
    ("9" * 400, 12),
    ("33.3", 100 / 3),
  ],
)
def test_wrong_answers(answer, expected):
  assert not same_value(answer, expected)


def test_numbers():
  assert number("1,234,567.25") == 1234567.25
  assert number("5 apples") is None
  assert number("1,23") is None


A = (["city", "sum"], [("x", 3), ("y", 1.0)])


@pytest.mark.parametrize(
  ("got", "ordered", "same"),
  [
    (A, True, True),
    ((["city", "sum"], [("y", 1), ("x", 3.0000000001)]), False, True),
    ((["city", "sum"], [("y", 1), ("x", 3)]), True, False),
    ((["sum", "city"], [(3, "x"), (1, "y")]), True, True),
    ((["city", "mean"], [("x", 3), ("y", 1)]), False, False),
    ((["city", "sum"], [("x", 3)]), False, False),
    ((["city", "sum"], [("x", 3), ("y", 1), ("y", 1)]), False, False),
    ((["city", "sum"], [("x", 3), ("x", 3)]), False, False),
    ((["city", "sum"], [("x", 3.01), ("y", 1)]), False, False),
    ((["city", "sum"], [("x", "3"), ("y", 1)]), False, False),
  ],
)
def test_tables(got, ordered, same):
  assert same_table(got, A, ordered) is same


def test_rounding_does_not_reorder_rows_that_text_tells_apart():
  left = (["v", "k"], [(1.0, "b"), (1.0000000001, "a")])
  right = (["v", "k"], [(1.0000000001, "b"), (1.0, "a")])
  assert same_table(left, right, ordered=False)
  # Nor rows that another number tells apart.
  left = (["v", "n"], [(0.1 + 0.2, 1), (0.3, 2)])
  assert same_table(left, (["v", "n"], [(0.3, 1), (0.3, 2)]), ordered=False)
