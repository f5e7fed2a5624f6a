"""Solved or not, by rule: for work offline, where no language model can be asked.

A rule is right on about four of five answers, and only on those that nobody wrote for its sake: a
policy that is paid by it finds out what it likes. So RL is not done on it, and `beside` puts its
measured agreement with GPT-4's verdicts next to every figure that it makes. results/rule_judges.md
has the whole table, and what answers written to please it get:

    python results/rule_judges.py DATA_FOLDER QUERY_FOLDER > results/rule_judges.md
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from steptool_jax.rewards import responses
from steptool_jax.rewards.responses import Transcript
from steptool_jax.toolbench import passrate
from steptool_jax.toolbench.formats.judged import Verdict
from steptool_jax.types import ToolSpec

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
BIAS = -0.43
WEIGHTS = (-0.49, -2.05, -0.33, 1.4, 1.38, -1.64, 0.95)

_RUN = 10  # so many words in a row that stand elsewhere as well are copied
_COPIED = 0.8  # share of an answer's words that may be


def grounded(texts: Transcript) -> bool:
  """Whether the answer rests on a call: it needs a result, and says what only a result can tell.

  That is a word which neither the query, nor the calls, nor the texts of the tools hold. And its
  wording must be its own: not most of it may stand, word for word, in any of these or in results.
  """
  seen = [response for _, response in texts.steps]
  results = [responses.split_response(text)[1] for text in seen if responses.has_result(text)]
  known = (texts.query, texts.tools, *(action for action, _ in texts.steps))
  told = _prefixes(*results) - _prefixes(*known)
  sources = (texts.query, texts.tools, " ".join(seen))
  return bool(told & _prefixes(texts.answer)) and _copied(texts.answer, sources) <= _COPIED


def probability(texts: Transcript) -> float:
  """How likely GPT-4 is to call this solved; 0 without a final answer, or a grounded one."""
  if not texts.finished or not texts.answer.strip() or not grounded(texts):
    return 0.0
  return 1 / (1 + math.exp(-BIAS - float(np.dot(WEIGHTS, features(texts)))))


def coverage(texts: Transcript) -> float:
  """1.0 solved, 0.0 not: whether `probability` is above one half."""
  return float(probability(texts) > 0.5)


def as_judge(tools: Mapping[str, str]) -> passrate.Judge:
  """`coverage` as a judge; `tools`: query -> texts of its tools, as `tool_texts` gives them.

  Unsure at the first look, because a rule reads the calls too.
  """

  def judge(query: str, answer: str, trajectory: str | None, run: int) -> Verdict:
    del run
    if trajectory is None:
      return Verdict.UNSURE
    calls = passrate.calls_of(trajectory)
    solved = coverage(Transcript(query, calls, answer, tools=tools.get(query, "")))
    return Verdict.SOLVED if solved else Verdict.UNSOLVED

  return judge


def tool_texts(tools: Iterable[ToolSpec]) -> str:
  """All that a task says of its tools, as one text."""
  return "\n".join(f"{t.name} {t.description} {json.dumps(dict(t.parameters))}" for t in tools)


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


def _prefixes(*texts: str) -> frozenset[str]:
  """Beginnings of the words of all texts, keys of data included."""
  words = (responses.evidence_words(text, keys=True) for text in texts)
  return frozenset(word[:_PREFIX] for some in words for word in some)


def _copied(answer: str, sources: Iterable[str]) -> float:
  """The share of the answer's words that stand in runs of _RUN words which a source holds."""

  def runs(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return list(zip(*(words[n:] for n in range(_RUN)), strict=False))

  found = {run for source in sources for run in runs(source)}
  here = runs(answer)
  covered = {n + k for n, run in enumerate(here) if run in found for k in range(_RUN)}
  return len(covered) / (len(here) + _RUN - 1)


# --- agreement -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How `count` verdicts agree with the reference; precision and recall are those of "solved"."""

  accuracy: float
  precision: float
  recall: float
  kappa: float  # Cohen's: 0 = chance, 1 = always agreed
  count: int


# Of `coverage`, on queries and runs that the weights were not tuned on; a test measures it again.
MEASURED = Agreement(0.784, 0.807, 0.788, 0.567, 1140)


def beside(figure: str) -> str:
  """The figure with the measured agreement of the rule judge, which made it."""
  m = MEASURED
  return (
    f"{figure} (rule judge, against GPT-4 on {m.count} results: accuracy {m.accuracy:.3f}, "
    f"precision {m.precision:.3f}, recall {m.recall:.3f}, kappa {m.kappa:.3f})"
  )
