import pytest

from steptool_jax.environments.checkers import contains_all, number, same_table, same_value


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
    ("\N{MINUS SIGN}0.5", -0.5),
    ("1e3", 1000),
    ("33.333333", 100 / 3),
    (".5", 0.5),
    ("-$5", -5),
    ("-$5", "-$5"),
    ("0.3", 0.1 + 0.2),
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
    ("0", 5e-7),
    ("0.0010009", 0.001),
    ("-$5", 5),
    ("-$-5", 5),
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


@pytest.mark.parametrize(
  ("answer", "values", "right"),
  [
    ("They paid 1,234 in all.", [1234], True),
    ("It costs $12.50.", [12.5], True),
    ("12.5", ["12.50"], True),
    ("the sum is 5 and the mean is 2.5", [5, 2.5], True),
    ("\N{MINUS SIGN}5", [-5], True),
    ("-5", [5], False),
    ("5,000", [5], False),
    ("512", [12], False),
    ("3-5", [5], False),
    ("2024-05-03", [3], False),
    ("Karo Mine, founded in 1990", ["karo mine"], True),
    ("karo minerals", ["karo mine"], False),
    ("1, 2, 3, 4, 5, 6", [5], False),  # a list of all candidates is a guess
    ("one of karo, mine, tafo, buro or lima", ["karo"], False),
    ("karo and mine", ["karo", "mine"], True),
    ("答えは東京と大阪です", ["東京", "大阪"], True),  # scripts without spaces
    ("合計は123円です", [123], True),
    ("合計は1234円です", [123], False),
    ("ราคา 50 บาท", [50], True),
    ("it costs .75 now", [0.75], True),
    ("v1.75", [0.75], False),
    ("南アメリカ", ["アメリカ"], True),
    ("トマトソース", ["マト"], False),
    ("合計は三十です", ["三"], False),
    ("๑๒.๓.๔", ["๑"], False),
    ("of 3 to 9 candidates 7 have it: 5, with 2 left", [5], False),
  ],
)
def test_contains_all(answer, values, right):
  """It refused 1234 for "1,234", and passed "-5" for 5, "5,000" for 5 and lists of guesses."""
  assert contains_all(answer, values) is right


def test_numbers_of_the_query_are_no_guesses():
  assert contains_all("of 3 and 9 and 7 orders 5", [5], "Which of the 3, 7, 9 orders?")
