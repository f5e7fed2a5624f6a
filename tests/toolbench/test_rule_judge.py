"""The rules; and results/rule_judges.py, which measures the agreement that is printed with them."""

import dataclasses
import json

import numpy as np
import pytest
from toolbench.measuring import measured

from steptool_jax.rewards.responses import Transcript
from steptool_jax.toolbench import rule_judge
from steptool_jax.toolbench.formats import training_rows
from steptool_jax.toolbench.rule_judge import Agreement

QUERY = "Please give me the forecast for Bergamo. Also tell me the population of Lecco."
CALLS = (
  ("forecast {}", json.dumps({"error": "", "response": {"sky": "thunderstorm", "max": 31}})),
  ("census {}", json.dumps({"error": "", "response": {"inhabitants": 48131}})),
)
ANSWER = (
  "The forecast for Bergamo is a thunderstorm at 31 degrees. Lecco has a population of 48131."
)
GOOD = Transcript(QUERY, CALLS, ANSWER)


@pytest.mark.parametrize("name", measured.RULES)
def test_both_rules(name):
  rule = measured.RULES[name]
  assert rule(GOOD) == 1
  for answer in ("", "  ", "Unfortunately, I could not find the forecast or the population."):
    assert rule(dataclasses.replace(GOOD, answer=answer)) == 0
  assert rule(dataclasses.replace(GOOD, answer=ANSWER, finished=False)) == 0


def test_coverage_sees_what_plain_does_not():
  half = "The forecast for Bergamo is a thunderstorm, with 31 degrees at the most." + " " * 60
  broken = (CALLS[0], ("census {}", json.dumps({"error": "Timeout error...", "response": ""})))
  for rest in (
    "I was unable to retrieve the population of Lecco. Please try again later.",
    "The population is not available.",
  ):
    texts = Transcript(QUERY, broken, half + rest)
    assert measured.plain(texts) == 1
    assert rule_judge.coverage(texts) == 0


def test_features_by_hand():
  named = dict(zip(rule_judge.FEATURES, rule_judge.features(GOOD), strict=True))
  assert named["opens"] == named["admissions"] == named["admitted"] == named["failed"] == 0
  # tell is all that the second request has besides: population, lecco.
  assert named["least"] == pytest.approx(2 / 3)
  assert named["covered"] == pytest.approx(4 / 6)  # give, tell are not taken up
  assert named["evidence"] == 1
  worse = Transcript(
    QUERY, (*CALLS, ("x {}", "error")), "Sorry. The forecast is not available. Rain!"
  )
  named = dict(zip(rule_judge.FEATURES, rule_judge.features(worse), strict=True))
  assert (named["opens"], named["admissions"]) == (1, 0.5)
  assert named["admitted"] == pytest.approx(2 / 3)
  assert named["failed"] == pytest.approx(1 / 3)
  assert named["least"] == 0
  # A tool that works once has not failed, whatever came later.
  again = Transcript(QUERY, (("x {}", "fine"), ("x {}", "error")), ANSWER)
  assert rule_judge.features(again)[rule_judge.FEATURES.index("failed")] == 0
  assert rule_judge.probability(worse) == 0  # no word of it is from a result
  assert 0.5 < rule_judge.probability(GOOD) < 1


@pytest.mark.parametrize(
  "changes",
  [
    {"answer": QUERY, "steps": ()},
    {"answer": QUERY, "steps": (("forecast {}", '{"error": "down", "response": ""}'),)},
    {"answer": QUERY},
    {"answer": f"Here is everything you asked for: {QUERY}"},
    {"answer": f"{QUERY} It is answered by census, for the inhabitants.", "tools": "inhabitants"},
    {"answer": f"{QUERY} " + " ".join(response for _, response in CALLS)},
    {"answer": ANSWER, "steps": ()},
    {"answer": ANSWER, "steps": (("forecast {}", '{"error": "no", "response": "thunderstorm"}'),)},
    {"answer": ANSWER, "steps": (('say {"text": "31 thunderstorm 48131"}', CALLS[0][1]),)},
  ],
)
def test_an_answer_that_no_result_has_told_is_not_solved(changes):
  """The query given back, without any call, was Solved for 580 of 580 queries."""
  assert rule_judge.coverage(GOOD) == 1
  assert rule_judge.coverage(dataclasses.replace(GOOD, **changes)) == 0


def test_features_stay_in_range_on_odd_texts():
  for query in ("", "?", "1", "é " * 50):
    for steps in ((), (("", ""),)):
      got = rule_judge.features(Transcript(query, steps, "."))
      assert all(0 <= value <= 1 for value in got)


def test_figures_carry_their_agreement():
  text = rule_judge.beside("62.0 %")
  m = rule_judge.MEASURED
  assert text.startswith("62.0 % (")
  for value in (m.accuracy, m.precision, m.recall, m.kappa):
    assert f"{value:.3f}" in text
  assert f"on {m.count} results" in text


# --- what results/rule_judges.py measures ------------------------------------------


def test_agreement_by_hand():
  got = measured.agreement([1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0])
  # 6 of 8 agree; by chance 3/8 * 3/8 + 5/8 * 5/8 = 34/64.
  kappa = (6 / 8 - 34 / 64) / (1 - 34 / 64)
  expected = (6 / 8, 2 / 3, 2 / 3, kappa, 8)
  assert dataclasses.astuple(got) == pytest.approx(expected)
  lopsided = measured.agreement([1, 1, 1, 1], [1, 0, 0, 1])
  assert (lopsided.precision, lopsided.recall, lopsided.kappa) == (0.5, 1, 0)
  assert measured.agreement([0, 0], [0, 0]) == Agreement(1.0, 0.0, 0.0, 1.0, 2)
  with pytest.raises(ValueError, match="1 verdicts against 2"):
    measured.agreement([1], [1, 0])
  with pytest.raises(ValueError, match="at least one"):
    measured.agreement([], [])


def test_fit_finds_known_weights():
  """Soft labels drawn from a known logistic model give that model back."""
  answers = ["Sorry, nothing.", ANSWER, "Bergamo: 31.", "Not found. Lecco: 48131", "Lecco forecast"]
  texts = [Transcript(QUERY, CALLS[:k], answer) for k in range(3) for answer in answers]
  weights = np.array([-1.0, 0.5, -0.5, 1.0, 0.7, -0.8, 0.4])

  def case(t):
    p = 1 / (1 + np.exp(-(0.3 + weights @ np.array(rule_judge.features(t)))))
    return measured.Case("sft", "2", t, (p,))

  cases = [case(t) for t in texts]
  bias, got = measured.fit(cases, ridge=1e-9)
  for t, c in zip(texts, cases, strict=True):
    p = 1 / (1 + np.exp(-(bias + np.dot(got, rule_judge.features(t)))))
    assert p == pytest.approx(c.scores[0], abs=1e-5)


def test_the_parts_do_not_meet():
  runs = ("toolllama_sft_cot", "baseline-rft_dfs", "baseline-ppo_cot", "baseline-eto_dfs")
  cases = [measured.Case(run, query_id, GOOD, (1.0,)) for run in runs for query_id in ("4", "7")]
  tuning = {(c.run, c.query_id) for c in cases if measured.is_tuning(c)}
  held_out = {(c.run, c.query_id) for c in cases if measured.is_held_out(c)}
  assert tuning == {(run, "4") for run in runs[:2]}
  assert held_out == {(run, "7") for run in runs[2:]}


def test_missing_folder(tmp_path):
  with pytest.raises(OSError, match="pass_rate_results"):
    measured.read_cases(tmp_path, tmp_path)
  with pytest.raises(OSError, match="data_train"):
    measured.step_table(tmp_path, [])


@pytest.fixture(scope="module")
def cases(shared):
  return measured.read_cases(shared / "steptool", shared / "stabletoolbench")


def test_measured_agreement_is_what_is_printed(cases):
  held_out = [case for case in cases if measured.is_held_out(case)]
  got = dataclasses.astuple(measured.measure(rule_judge.coverage, held_out))
  assert got == pytest.approx(dataclasses.astuple(rule_judge.MEASURED), abs=6e-4)


def test_weights_come_from_the_tuning_part(cases):
  bias, weights = measured.fit(measured.fitting(cases))
  assert (bias, *weights) == pytest.approx((rule_judge.BIAS, *rule_judge.WEIGHTS), abs=6e-3)


def test_few_answers_that_are_written_for_the_rule_pass(cases):
  """results/rule_judges.md has all rates; the last adversary is why RL on a rule is refused."""
  some = [case for case in cases if measured.is_held_out(case)][::8]
  rates = {name: measured.pleased(rule_judge.coverage, name, some) for name in measured.ADVERSARIES}
  *refused, gameable = rates.values()
  assert max(refused) < 0.06, rates
  assert gameable > 0.5


def test_evidence_beats_length(shared, cases):
  """Our step rule agrees with the judge where the released one does not, and tells a foreign
  response from the true one.
  """
  lcs, evidence = measured.step_table(shared / "steptool", cases)
  assert float(evidence[1]) > 0.5 > 0.1 > float(lcs[1])
  assert float(evidence[3]) < 0.22 < 0.28 < float(lcs[3])
  rates = [float(row[6].rstrip("%")) for row in (lcs, evidence)]
  assert rates[1] < 20 < 40 < rates[0]


def test_rows_are_read_out_of_their_markup(shared):
  files = sorted(shared.glob("steptool/data_train/*/step_grained_for_ppo_example.csv"))
  assert len(files) == 3
  for file in files:
    for row in training_rows.read_step_rows(file):
      texts = measured.row_transcript(row)
      assert texts.query
      assert texts.query in row.prompts[0]
      assert len(texts.steps) == len(row.rewards) - 1
      for text in (texts.query, texts.answer, *(part for call in texts.steps for part in call)):
        assert "<|" not in text
        assert "Assistant:" not in text
      assert all(response.startswith('{"error"') for _, response in texts.steps)
