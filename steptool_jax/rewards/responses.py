"""SuccCalling and Contribution from the texts of tool responses and answers, by rule.

For tools whose results are free text (StableToolBench); where results are structured, rewards/
rules.py is exact. Two rules of contribution: `lcs_contribution` is the released one, nearly a test
of length; `evidence_contribution` asks what the answer, or a later call, could only have from this
response. results/rule_judges.md holds how well each agrees with GPT-4.
"""

import collections
import dataclasses
import json
import re
from typing import Literal

from steptool_jax.rewards import marks
from steptool_jax.types import Finish, Malformed, Step, ToolCall, Trajectory, by_call

Rule = Literal["evidence", "lcs", "news"]


@dataclasses.dataclass(frozen=True)
class Transcript:
  """One trajectory as plain text: what judges and text rules read.

  `steps` are the calls in order, (action text, response text) each; Finish is no step but
  `answer`, "" where there is none (gave up, cut off). `finished`: the last step was Finish.
  `tools`: what the task says of its tools, "" where it is not known.
  """

  query: str
  steps: tuple[tuple[str, str], ...]
  answer: str
  finished: bool = True
  tools: str = ""


def transcript(query: str, trajectory: Trajectory) -> Transcript:
  """The texts of a trajectory: every step but Finish is a call, whatever became of it."""
  last = trajectory.steps[-1].action if trajectory.steps else None
  finished = isinstance(last, Finish)
  calls = by_call(trajectory.steps[: len(trajectory.steps) - finished])
  texts = tuple(
    (_action_text(step), step.observation.text if step.observation else "") for step in calls
  )
  return Transcript(query, texts, last.answer if finished and not last.gave_up else "", finished)


def _action_text(step: Step) -> str:
  action = step.action
  if isinstance(action, ToolCall):
    return f"{action.name} {json.dumps(dict(action.arguments), ensure_ascii=False)}"
  if isinstance(action, Malformed):
    return f"malformed call: {action.reason}"
  # An answer in the middle of a talk, to which the user has replied.
  return f"Finish {json.dumps({'final_answer': action.answer}, ensure_ascii=False)}"


def score(query: str, trajectory: Trajectory, rule: Rule = "evidence") -> Trajectory:
  """The same trajectory with success_calling (0 or 1) and contribution (in [0, 1]) on every call.

  Of a turn with several calls a step has their means.

  Rule "lcs" is the released pair of rules, "evidence" our own, whose contribution is one to a
  solution: it is scaled by `solved`, so that words copied into a wrong answer earn nothing. Both
  know the answer; "news" depends on the calls up to a step alone.
  ValueError for an unknown rule.
  """
  texts = transcript(query, trajectory)
  found = marks_of(texts, rule)
  if rule == "evidence":
    found = [(sc, con * trajectory.solved) for sc, con in found]
  return marks.on_calls(trajectory, found, texts.finished)


def marks_of(texts: Transcript, rule: Rule) -> list[tuple[float, float]]:
  """(SC, Con) of every call by the two rules that belong together; see `score`."""
  responses = [response for _, response in texts.steps]
  if rule == "lcs":
    scs = map(succeeded, responses)
    cons = [lcs_contribution(response, texts.answer) for response in responses]
  elif rule == "evidence":
    scs = map(has_result, responses)
    cons = evidence_contribution(texts)
  elif rule == "news":
    scs = map(has_result, responses)
    cons = news_contribution(texts)
  else:
    raise ValueError(f"rule is {rule!r}: must be 'evidence', 'lcs' or 'news'")
  return [(float(sc), con) for sc, con in zip(scs, cons, strict=True)]


# --- SuccCalling ---------------------------------------------------------------------------------

_OFFICIAL = re.compile(r'\s*\{\s*"error"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"response"\s*:\s*', re.S)
_STATUS_400 = re.compile(r"""status(?:_?code)?\\*["']?\s*[:=]\s*\\*["']?400\b""", re.I)


def split_response(text: str) -> tuple[str, str]:
  """(error, body) of an official {"error", "response"} text, which may be cut off anywhere.

  A text of another form is all body.
  """
  match = _OFFICIAL.match(text)
  if not match:
    return "", text
  body = text[match.end() :].rstrip()
  return match.group(1), body[:-1] if body.endswith("}") else body


_EMPTY = frozenset({"", "{}", "[]", "null", "none", "None"})


def succeeded(response: str) -> bool:
  """The rule that the release meant: no error, no status 400, no word of failure, no plea.

  Its code returns success for every text that starts with an empty error, before these tests.
  """
  error, body = split_response(response)
  plain = body.strip(" \"'").casefold()
  return bool(
    plain not in _EMPTY
    and not error
    and not _STATUS_400.search(body)
    and not plain.startswith("please")
    and not any(word in plain for word in ("wrong", "error", "is empty"))
  )


_FAILURES = re.compile(
  r"""not\ found | no(t)?\ (results?|data|records?|available|valid|exist) | does(\ not|n't)\ exist
  | invalid | unauthori[sz]ed | forbidden | not\ subscribed | is\ (blank|required|missing|empty)
  | missing | must\ be | unable\ to | could\ not | cannot | can't | failed | failure | exception
  | (internal|server|request)\ error | \berror\b | wrong | rate\ limit | too\ many\ requests
  | time[d\ -]*out | bad\ request | service\ unavailable | denied | please\ (provide|try|check)""",
  re.X | re.I,
)
_SHORT, _START = 400, 60  # characters


def has_result(response: str) -> bool:
  """Our rule: no error, not empty, and not just a report that the call failed.

  Unlike `succeeded` it looks for words of failure only where a short response would be nothing
  else, or at a long one's start: long data may hold any word.
  """
  error, body = split_response(response)
  plain = body.strip(" \"'")
  if error or plain in _EMPTY:
    return False
  return not _FAILURES.search(plain if len(plain) <= _SHORT else plain[:_START])


# --- Contribution, released ----------------------------------------------------------------------


def lcs_length(a: str, b: str) -> int:
  """Length of the longest common subsequence (characters, gaps allowed).

  All columns of a row of the usual table at once, as the bits of one integer (Hyyrö 2004): a
  thousand characters against a thousand take a millisecond.
  """
  if len(a) < len(b):
    a, b = b, a
  where: dict[str, int] = collections.defaultdict(int)
  for position, char in enumerate(a):
    where[char] |= 1 << position
  full = (1 << len(a)) - 1
  row = full
  for char in b:
    matches = row & where.get(char, 0)
    row = ((row + matches) | (row - matches)) & full
  return len(a) - row.bit_count()


_LCS_SHARE = 0.3


def lcs_contribution(response: str, answer: str) -> float:
  """1 if the answer holds, in order, this share of the response's characters; else 0."""
  if not response or not answer:
    return 0.0
  return float(lcs_length(response, answer) >= _LCS_SHARE * len(response))


# --- Contribution, by evidence -------------------------------------------------------------------

# Words that any answer holds anyway; a hit among them is no sign that the response was read.
_COMMON = frozenset(
  re.findall(
    r"\w+",
    """a about after all also an and any are as at available based be been but by can could data
    details do following for found from get has have here how i id if in include including info
    information into is it its list may more name no not of on one or other our please provide
    provided request response result results some such than that the their there these they this
    to type url use used using was we were what when which will with would you your https http www
    com org net html true false null none error message status success""",
  )
)
_KEY = re.compile(r"""["'](?:[^"'\\:{}\[\],]{1,60})\\*["']\s*:""")  # "key": of JSON or Python text
_ESCAPE = re.compile(r"\\+u([0-9a-fA-F]{4})")
_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+")


def evidence_words(text: str, keys: bool = False) -> frozenset[str]:
  """The words and numbers of a text that carry information, case-folded; with the keys of data?"""
  plain = _ESCAPE.sub(lambda m: chr(int(m.group(1), 16)), text)
  plain = (
    (plain if keys else _KEY.sub(" ", plain))
    .replace("\\n", " ")
    .replace("\\r", " ")
    .replace("\\t", " ")
  )
  words = (w.replace(",", "") for w in _WORD.findall(plain.casefold()))
  return frozenset(w for w in words if (len(w) > 2 or w.isdigit()) and w not in _COMMON)


# Enough for a full contribution: three informative words, or a third of a short response.
_ENOUGH_WORDS = 3.0
_ENOUGH_SHARE = 1 / 3


def evidence_contribution(texts: Transcript) -> list[float]:
  """How far the answer or a later call rests on each response, in [0, 1]; one value a step.

  Evidence is a word or number of the response that the query, the call itself and earlier results
  do not hold and that stands in the answer, or in the arguments of a later call that got a result.
  Words of up to four letters count half: they meet by chance. A response without a result, or
  whose words nobody uses, contributes nothing; a repeated response earns nothing new.
  """
  results = [has_result(response) for _, response in texts.steps]
  arguments = [evidence_words(action.partition(" ")[2]) for action, _ in texts.steps]
  used = evidence_words(texts.answer)
  uses = []  # from the last step to the first: what is said after it
  for words, result in zip(reversed(arguments), reversed(results), strict=True):
    uses.append(used)
    used = used | words if result else used
  known = evidence_words(texts.query)
  scores = []
  for (_, response), words, result in zip(texts.steps, arguments, results, strict=True):
    use = uses.pop()
    if not result:
      scores.append(0.0)
      continue
    new = evidence_words(split_response(response)[1]) - known - words
    known = known | new
    hits = sum(map(_weight, new & use))
    share = hits / max(1.0, sum(map(_weight, new)))
    scores.append(min(1.0, max(hits / _ENOUGH_WORDS, share / _ENOUGH_SHARE)))
  return scores


def news_contribution(texts: Transcript) -> list[float]:
  """How much each response tells that is new, in [0, 1]: three informative words are enough.

  New is what neither the query nor the call itself nor an earlier result holds. Whether it is of
  use only hindsight knows (`evidence_contribution`).
  """
  known = evidence_words(texts.query)
  scores = []
  for action, response in texts.steps:
    new: frozenset[str] = frozenset()
    if has_result(response):
      words = evidence_words(action.partition(" ")[2])
      new = evidence_words(split_response(response)[1]) - known - words
    known = known | new
    scores.append(min(1.0, sum(map(_weight, new)) / _ENOUGH_WORDS))
  return scores


def _weight(word: str) -> float:
  return 1.0 if len(word) > 4 or (word[0].isdigit() and len(word) > 1) else 0.5
