import dataclasses
import json
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewards.replays import step, trajectory

from steptool_jax.rewards import responses, scores
from steptool_jax.rewards.responses import Transcript
from steptool_jax.types import (
  Code,
  Finish,
  Malformed,
  Observation,
  Status,
  Task,
  ToolCall,
  ToolCalls,
)

TASK = Task("t", "x", "q", (), {})


def official(body, error=""):
  return json.dumps({"error": error, "response": body})


@pytest.mark.parametrize(
  ("text", "intended", "ours"),
  [
    (official({"name": "Ennio"}), True, True),
    (official({"name": "x"}, error="Timeout error..."), False, False),
    (official({"status": 400}), False, True),  # ours needs words
    (official("{'status': 400, 'a': 1}"), False, True),
    (official({"status": 200, "a": 1}), True, True),
    (official({"id": 400}), True, True),
    (official("Something went wrong"), False, False),
    (official("The list is empty"), False, False),
    (official("Please provide a key"), False, False),
    (official(""), False, False),
    (official([]), False, False),
    (official({"message": "Email or apikey is blank"}), True, False),
    (official({"message": "Not Found"}), True, False),
    (official({"text": "x" * 500 + " errors happen in films"}), False, True),
    ("plain result 12", True, True),
    ("error: no such tool", False, False),
    ('{"error": "", "response": {"a": "cut off her...', True, True),
    ("", False, False),
  ],
)
def test_success_rules(text, intended, ours):
  assert responses.succeeded(text) is intended
  assert responses.has_result(text) is ours


def test_split():
  assert responses.split_response(official("a")) == ("", '"a"')
  assert responses.split_response(official("", 'say "no"')) == (r"say \"no\"", '""')
  assert responses.split_response("plain") == ("", "plain")


def lcs_oracle(a, b):
  row = [0] * (len(b) + 1)
  for x in a:
    old = row[:]
    for j, y in enumerate(b):
      row[j + 1] = old[j] + 1 if x == y else max(row[j], old[j + 1])
  return row[-1]


@given(st.text("abcd", max_size=40), st.text("abcde", max_size=150))
def test_lcs_equals_the_table(a, b):
  assert responses.lcs_length(a, b) == responses.lcs_length(b, a) == lcs_oracle(a, b)


def test_lcs_contribution():
  assert responses.lcs_contribution("abcdefghij", "xaxbxcx") == 1  # 3 of 10
  assert responses.lcs_contribution("abcdefghij", "xaxbx") == 0
  assert responses.lcs_contribution("", "x") == responses.lcs_contribution("x", "") == 0


def test_a_thousand_trajectories_in_seconds():
  rng = random.Random(0)
  text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=1024))
  started = time.process_time()
  for _ in range(100):
    responses.lcs_contribution(text, text[::-1])
  assert (time.process_time() - started) * 30 < 10  # three calls each


def con(query, calls, answer):
  return responses.evidence_contribution(Transcript(query, tuple(calls), answer))


def test_words_in_the_answer_count_and_those_of_the_query_do_not():
  call = 'find {"city": "Bergamo"}'
  rain = official({"city": "Bergamo", "forecast": "thunderstorm", "humidity": 87, "wind": "21.5"})
  assert con("weather in Bergamo", [(call, rain)], "A thunderstorm, humidity 87, wind 21.5") == [1]
  assert con("weather in Bergamo", [(call, rain)], "The weather in Bergamo is fine") == [0]
  assert con("thunderstorm 87 21.5?", [(call, rain)], "A thunderstorm, 87, 21.5") == [0]
  # The keys of data are no evidence, values are.
  assert con("q", [("f {}", official({"humidity": "low", "pressure": "high"}))], "humidity") == [0]


def test_a_share_of_a_short_response_is_enough_and_of_a_long_one_is_not():
  assert con("price?", [("f {}", official({"price": 19.83}))], "It costs 19.83") == [1]
  long = official(" ".join(f"word{chr(97 + i)}{chr(97 + j)}" for i in range(9) for j in range(9)))
  (part,) = con("price?", [("f {}", long)], "wordaa it is")
  assert 0.3 < part < 0.4


def test_failures_contribute_nothing_and_repeats_nothing_new():
  found = official({"id": "tt0468569", "title": "Inception"})
  answer = "Inception is tt0468569"
  assert con("film?", [("f {}", official("thunder", error="Timeout"))], "thunder") == [0]
  assert con("film?", [("f {}", found), ("f {}", found)], answer) == [1, 0]
  # A failed call's text does not take the credit from the call that works.
  failed = official({"id": "tt0468569", "title": "Inception"}, error="Timeout error...")
  assert con("film?", [("f {}", failed), ("f {}", found)], answer) == [0, 1]


def test_use_in_a_later_call_counts_when_that_call_had_a_result():
  first = ("search {}", official({"key": "tt0468569"}))
  good = ('details {"film": "tt0468569"}', official({"year": "2010"}))
  bad = ('details {"film": "tt0468569"}', official("", error="Timeout error..."))
  assert con("film?", [first, good], "It came out in 2010") == [1, 1]
  assert con("film?", [first, bad], "I do not know") == [0, 0]
  # Not the other way round, and no echo of the call's own arguments.
  assert con("film?", [good, first], "nothing") == [0, 0]
  assert con("film?", [('echo {"x": "abcdef"}', official("abcdef"))], "abcdef") == [0]


CALL = ToolCall("f", {"x": "é"})


def made(*steps, status=Status.ANSWERED):
  return trajectory(TASK, steps, 1.0, status)


def test_transcript():
  seen = Observation(official("Paris"), Code.OK)
  full = made(step(CALL, seen), step(Malformed("no JSON")), step(Finish("Paris")))
  assert responses.transcript("q", full) == Transcript(
    "q", (('f {"x": "é"}', seen.text), ("malformed call: no JSON", "")), "Paris"
  )
  gave_up = made(step(CALL, seen), step(Finish("x", gave_up=True)), status=Status.GAVE_UP)
  assert responses.transcript("q", gave_up).answer == ""
  cut = made(step(CALL, seen), status=Status.STEP_BUDGET)
  assert (len(responses.transcript("q", cut).steps), responses.transcript("q", cut).finished) == (
    1,
    False,
  )


def test_answers_in_the_middle_of_a_talk_are_read():
  """The word Finish stood in their place, and what they rested on had helped nothing."""
  seen = Observation(official("Montmartre, Louvre, Sorbonne"), Code.OK)
  said = Observation("And twice that?", Code.OK)
  full = made(step(CALL, seen), step(Finish("Montmartre, Louvre"), said), step(Finish("24")))
  texts = responses.transcript("q", full)
  assert texts.steps[1] == ('Finish {"final_answer": "Montmartre, Louvre"}', "And twice that?")
  assert responses.score("q", full, "evidence").steps[0].contribution > 0


def test_score_puts_marks_on_calls_only():
  seen = Observation(official("Montmartre, Louvre, Sorbonne"), Code.OK)
  bad = Observation(official("", error="Timeout error..."), Code.TIMEOUT)
  full = made(step(CALL, bad), step(CALL, seen), step(Finish("Montmartre, Louvre, Sorbonne")))
  for rule in ("evidence", "lcs"):
    marks = [(s.success_calling, s.contribution) for s in responses.score("q", full, rule).steps]
    assert marks == [(0, 0), (1, 1), (0, 0)], rule
  with pytest.raises(ValueError, match="rule is 'x'"):
    responses.score("q", full, "x")


def side_by_side(*texts):
  """A turn with a call for each of these results."""
  parts = tuple(Observation(official(text), Code.OK) for text in texts)
  calls = tuple(ToolCall("f", {"x": text[:1]}) for text in texts)
  return step(ToolCalls(calls), Observation("both", Code.OK, parts=parts))


def test_a_turn_with_several_calls_has_the_means_of_its_own():
  """Marks were put on steps one by one: a failed call had those of a call before it."""
  bad = Observation(official("", error="Timeout error..."), Code.TIMEOUT)
  turn = side_by_side("monday cloudy windy", "tuesday sunny")
  for rest in ([step(CALL, bad), step(Finish("x"))], [step(Finish("x"))], [step(CALL, bad)]):
    whole = made(turn, turn, *rest)
    found = responses.score("q", whole, "news").steps
    marks = [(s.success_calling, s.contribution) for s in found]
    assert marks == [(1, pytest.approx(5 / 6)), (1, 0), *[(0, 0)] * len(rest)]


def test_a_judges_scores_of_several_calls_in_a_turn():
  whole = made(side_by_side("monday", "tuesday"), step(CALL, Observation("x", Code.OK)))
  judged = scores.StepScores((1.0, 0.0, 1.0), (0.2, 0.4, 1.0), 0.0)
  for rest in ((), (step(Finish("x")),)):
    found = scores.apply(judged, dataclasses.replace(whole, steps=(*whole.steps, *rest))).steps
    marks = [(s.success_calling, pytest.approx(s.contribution)) for s in found]
    assert marks == [(0.5, 0.3), (1.0, 1.0), *[(0.0, 0.0)] * len(rest)]


@pytest.mark.parametrize("solved", [0.0, 0.5])
def test_words_copied_into_a_wrong_answer_earn_no_contribution(solved):
  """They were paid in full: a policy that copies results without solving anything earned r > 0."""
  seen = Observation(official("Montmartre, Louvre, Sorbonne"), Code.OK)
  full = trajectory(TASK, (step(CALL, seen), step(Finish("Montmartre, Louvre"))), solved)
  (call, _) = responses.score("q", full).steps
  assert (call.success_calling, call.contribution) == (1, solved)


# --- news ---


def test_news_by_hand():
  """Ten words: three informative ones are a full contribution, short ones count half."""
  texts = Transcript(
    "weather of Oslo",
    (
      ('now {"place": "Oslo"}', official({"wind": "northwest", "sky": "rain"})),  # 1 + .5
      ('now {"place": "Oslo"}', official({"wind": "northwest", "sky": "rain"})),  # nothing new
      ('week {"place": "Oslo"}', official("Monday cloudy, Tuesday sunny, Wednesday storm")),
      ('week {"place": "Bergen"}', official("", error="Timeout error...")),
    ),
    "It rains.",
  )
  assert responses.marks_of(texts, "news") == [(1, 0.5), (1, 0), (1, 1), (0, 0)]


@given(st.integers(0, 3), st.text(max_size=20))
def test_news_does_not_change_when_later_steps_or_the_answer_do(cut, answer):
  """The rule "evidence" knows the answer: what a call earned changes with what comes later."""
  calls = (
    ("a {}", "northwest storm"),
    ("b {}", "monday cloudy"),
    ("c {}", "storm sunny"),
  )
  whole = responses.marks_of(Transcript("q", calls, "storm"), "news")
  part = responses.marks_of(Transcript("q", (*calls[:cut], ("d {}", "x")), answer), "news")
  assert part[:cut] == whole[:cut]
