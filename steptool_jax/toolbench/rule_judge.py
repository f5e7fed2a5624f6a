"""Solved or not, by rule: for work offline, where no language model can be asked.

A rule is right on about four of five answers. So `beside` puts its measured agreement with
GPT-4's verdicts next to every figure that it makes; results/rule_judges.md has the whole table:

    python results/rule_judges.py DATA_FOLDER > results/rule_judges.md
"""

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

from steptool_jax.rewards import responses
from steptool_jax.rewards.responses import Transcript
from steptool_jax.toolbench import passrate
from steptool_jax.toolbench.formats.judged import Verdict

Rule = Callable[[Transcript], float]  # 1.0 solved, 0.0 unsolved

_APOLOGY = re.compile(
  r"sorry|apologi[sz]e|unfortunately|unable to|cannot|can't|could ?n[o']t|failed to", re.I
)
# Words by which an answer owns that a part of what was asked is missing.
_ADMISSION = re.compile(
  r"""sorry | apologi[sz]e | unfortunately | unable\ to | cannot | could\ ?n[o']t | failed\ to
  | (can|was|were|is|are|did|do|does)(\ not|n't)\ (\w+\ )?
    (able|find|found|fetch|retriev|provid|access|availab|obtain|work|valid|support|exist|have
    |contain|return)
  | \bno\ (\w+\ )?(results?|data|information|records?|details)\b | not\ (found|available)
  | unavailable | invalid | unknown | encountered | technical\ (issue|difficult) | try\ again
  | (error|issue)\ (occurred|with|while) | please\ (provide|try|check)
  | you\ can\ (use|visit|check|try|find)""",
  re.X | re.I,
)
_REQUEST = re.compile(
  r"""\? | \b(can|could|would|please|provide|give|fetch|find|retrieve|need|want|like|show|tell|get
  |suggest|recommend|generate|check|verify|include)\b""",
  re.X | re.I,
)
_OPENING = 120  # characters
_PREFIX = 5  # letters by which words are compared: "city" and "cities" are one


def plain(texts: Transcript) -> float:
  """Solved: finished with an answer that does not open with an apology."""
  answer = texts.answer.strip()
  return float(texts.finished and bool(answer) and not _APOLOGY.search(answer[:_OPENING]))


FEATURES = (
  "opens",  # the answer opens with an admission that something is missing
  "admissions",  # how many there are, up to 4, of 4
  "admitted",  # share of sentences with one
  "covered",  # share of the query's words that the answer takes up
  "least",  # the same for the request of the query that is taken up least
  "failed",  # share of the tools tried that never gave a result
  "evidence",  # mean contribution of the calls, rewards/responses.py
)
# Logistic regression on the tuning part; results/rule_judges.py fits these numbers again.
BIAS = 0.13
WEIGHTS = (-0.62, -2.14, -1.0, 1.0, 1.56, -1.0, 0.33)


def probability(texts: Transcript) -> float:
  """How likely GPT-4 is to call this solved; 0 without a final answer."""
  if not texts.finished or not texts.answer.strip():
    return 0.0
  return 1 / (1 + math.exp(-BIAS - float(np.dot(WEIGHTS, features(texts)))))


def coverage(texts: Transcript) -> float:
  """Solved: `probability`, from what the answer admits, covers and rests on, is above one half."""
  return float(probability(texts) > 0.5)


RULES: dict[str, Rule] = {"plain": plain, "coverage": coverage}


def as_judge(rule: Rule) -> passrate.Judge:
  """The rule as a judge: Unsure at the first look, because a rule reads the calls too."""

  def judge(query: str, answer: str, trajectory: str | None, run: int) -> Verdict:
    del run
    if trajectory is None:
      return Verdict.UNSURE
    solved = rule(Transcript(query, passrate.calls_of(trajectory), answer)) > 0.5
    return Verdict.SOLVED if solved else Verdict.UNSOLVED

  return judge


def features(texts: Transcript) -> tuple[float, ...]:
  """FEATURES of a trajectory with an answer, each in [0, 1]."""
  answer = texts.answer
  sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n+", answer) if s.strip()]
  admitted = sum(bool(_ADMISSION.search(sentence)) for sentence in sentences)
  said = _prefixes(answer)
  query = responses.evidence_words(texts.query)
  taken = query & responses.evidence_words(answer)
  requests = [
    _prefixes(part) for part in re.split(r"(?<=[.?!])\s+", texts.query) if _REQUEST.search(part)
  ]
  requests = [words for words in requests if len(words) > 1] or [_prefixes(texts.query)]
  results: dict[str, bool] = {}
  for action, response in texts.steps:
    tool = action.partition(" ")[0]
    results[tool] = results.get(tool, False) or responses.has_result(response)
  contributions = responses.evidence_contribution(texts)
  return (
    float(bool(_ADMISSION.search(answer[:_OPENING]))),
    min(len(_ADMISSION.findall(answer)), 4) / 4,
    admitted / max(1, len(sentences)),
    len(taken) / max(1, len(query)),
    min(len(words & said) / max(1, len(words)) for words in requests),
    1 - sum(results.values()) / len(results) if results else 1.0,
    sum(contributions) / len(contributions) if contributions else 0.0,
  )


def _prefixes(text: str) -> frozenset[str]:
  return frozenset(word[:_PREFIX] for word in responses.evidence_words(text))


# --- agreement -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How `count` verdicts agree with the reference; precision and recall are those of "solved"."""

  accuracy: float
  precision: float
  recall: float
  kappa: float  # Cohen's: 0 = chance, 1 = always agreed
  count: int


# On queries and runs that the weights were not tuned on; a test measures them again.
MEASURED = {
  "plain": Agreement(0.811, 0.748, 0.977, 0.609, 1140),
  "coverage": Agreement(0.809, 0.785, 0.888, 0.611, 1140),
}


def beside(figure: str, judge: str) -> str:
  """The figure with the measured agreement of the rule judge that made it.

  ValueError for a judge that is not in RULES: no figure without its agreement.
  """
  if judge not in MEASURED:
    raise ValueError(f"judge is {judge!r}: must be one of {', '.join(MEASURED)}")
  m = MEASURED[judge]
  return (
    f"{figure} (rule judge '{judge}', against GPT-4 on {m.count} results: accuracy "
    f"{m.accuracy:.3f}, precision {m.precision:.3f}, recall {m.recall:.3f}, kappa {m.kappa:.3f})"
  )
