"""Solved or not, by rule: for work offline, where no language model can be asked.

A rule is right on about four of five answers. So `beside` puts its measured agreement with
GPT-4's verdicts next to every figure that it makes; results/rule_judges.md has the whole table:

    python -m steptool_jax.toolbench.rule_judge DATA_FOLDER > results/rule_judges.md
"""

import argparse
import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from steptool_jax.rewards import responses
from steptool_jax.rewards.responses import Transcript
from steptool_jax.toolbench import annotations, passrate
from steptool_jax.toolbench.formats import official, training_rows

Judge = Callable[[Transcript], float]  # 1.0 solved, 0.0 unsolved

# --- judges --------------------------------------------------------------------------------------

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
# Logistic regression on the tuning part (see `is_tuning`); `fit` gives these numbers again.
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


JUDGES: dict[str, Judge] = {"plain": plain, "coverage": coverage}


def as_judge(rule: Judge) -> Callable[..., official.Verdict]:
  """The rule as a passrate.Judge: Unsure at the first look, because a rule reads the calls too."""

  def judge(query: str, answer: str, trajectory: str | None, run: int) -> official.Verdict:
    del run
    if trajectory is None:
      return official.Verdict.UNSURE
    solved = rule(Transcript(query, passrate.calls_of(trajectory), answer)) > 0.5
    return official.Verdict.SOLVED if solved else official.Verdict.UNSOLVED

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
  """Of `count` verdicts with the reference; precision and recall are those of "solved"."""

  accuracy: float
  precision: float
  recall: float
  kappa: float  # Cohen's: 0 = chance, 1 = always agreed
  count: int


def agreement(predicted: Sequence[bool], reference: Sequence[bool]) -> Agreement:
  """ValueError when they differ in length, or are empty."""
  p, r = np.asarray(predicted, bool), np.asarray(reference, bool)
  if p.shape != r.shape or not p.size:
    raise ValueError(f"{p.size} verdicts against {r.size}: need as many, and at least one")
  accuracy = float((p == r).mean())
  chance = float(p.mean() * r.mean() + (1 - p.mean()) * (1 - r.mean()))
  both = int((p & r).sum())
  return Agreement(
    accuracy,
    both / int(p.sum()) if p.any() else 0.0,
    both / int(r.sum()) if r.any() else 0.0,
    (accuracy - chance) / (1 - chance) if chance < 1 else 1.0,
    p.size,
  )


# On queries and runs that the weights were not tuned on; a test measures them again.
MEASURED = {
  "plain": Agreement(0.811, 0.748, 0.977, 0.609, 1140),
  "coverage": Agreement(0.809, 0.785, 0.888, 0.611, 1140),
}


def beside(figure: str, judge: str) -> str:
  """The figure with the measured agreement of the rule judge that made it.

  ValueError for a judge that is not in JUDGES: no figure without its agreement.
  """
  if judge not in MEASURED:
    raise ValueError(f"judge is {judge!r}: must be one of {', '.join(MEASURED)}")
  m = MEASURED[judge]
  return (
    f"{figure} (rule judge '{judge}', against GPT-4 on {m.count} results: accuracy "
    f"{m.accuracy:.3f}, precision {m.precision:.3f}, recall {m.recall:.3f}, kappa {m.kappa:.3f})"
  )


# --- measurement ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
  """A stored trajectory with GPT-4's scores (0, .5, 1), one a judge run."""

  run: str
  query_id: str
  texts: Transcript
  scores: tuple[float, ...]

  @property
  def solved(self) -> bool:
    return sum(self.scores) > len(self.scores) / 2

  @property
  def answered(self) -> bool:
    return self.texts.finished and bool(self.texts.answer.strip())


def read_cases(folder: pathlib.Path | str) -> list[Case]:
  """All results under FOLDER/pass_rate_results/<run>/<subset>.json[.xz]; OSError without any."""
  root = pathlib.Path(folder) / "pass_rate_results"
  files = sorted([*root.glob("*/*.json"), *root.glob("*/*.json.xz")])
  if not files:
    raise FileNotFoundError(f"{root}: no <run>/<subset>.json or .json.xz there")
  return [
    Case(
      file.parent.name,
      query_id,
      annotations.official_transcript(result),
      tuple(verdict.score for verdict in result.verdicts),
    )
    for file in files
    for query_id, result in official.read_results(file).items()
  ]


def _seen_run(case: Case) -> bool:
  return "sft" in case.run or "rft" in case.run


def is_tuning(case: Case) -> bool:
  """SFT and RFT runs, even query ids: weights were tuned there and nowhere else."""
  return _seen_run(case) and int(case.query_id) % 2 == 0


def is_held_out(case: Case) -> bool:
  """ETO and PPO runs, odd query ids: neither the run nor the query was seen in tuning."""
  return not _seen_run(case) and int(case.query_id) % 2 == 1


def fit(cases: Iterable[Case], ridge: float = 1.0) -> tuple[float, tuple[float, ...]]:
  """(bias, weights) of the logistic regression on cases with an answer, by Newton's method."""
  used = [case for case in cases if case.answered]
  x = np.array([(1.0, *features(case.texts)) for case in used])
  y = np.array([sum(case.scores) / len(case.scores) for case in used])
  penalty = ridge * np.diag([0.0] + [1.0] * (x.shape[1] - 1))
  w = np.zeros(x.shape[1])
  for _ in range(20):
    p = 1 / (1 + np.exp(-x @ w))
    w -= np.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]) + penalty, x.T @ (p - y) + penalty @ w)
  return float(w[0]), tuple(map(float, w[1:]))


def measure(judge: Judge, cases: Sequence[Case]) -> Agreement:
  return agreement([judge(c.texts) > 0.5 for c in cases], [c.solved for c in cases])


def ceiling(cases: Sequence[Case]) -> Agreement:
  """One GPT-4 run against the mean of its others."""
  return agreement([c.scores[0] > 0.5 for c in cases], [np.mean(c.scores[1:]) > 0.5 for c in cases])


# --- step rules ----------------------------------------------------------------------------------

_HEADERS = re.compile(
  r"\A(<\|start_header_id\|>function<\|end_header_id\|>\s*|<\|im_start\|>function\n|Function:\n)"
  r"|(<\|eot_id\|>|<\|im_end\|>|\nAssistant:).*\Z",
  re.DOTALL,
)


def row_transcript(row: training_rows.StepRow) -> Transcript:
  """The texts of a step-grained row, out of the chat markup of its model."""
  query = re.search(r"(?:User:|\|>user|\|im_start\|>user)\S*(.*?)Begin!", row.prompts[0], re.DOTALL)
  calls = []
  for response, prompt in zip(row.responses[:-1], row.prompts[1:], strict=True):
    name, _, arguments = _plain(response).partition("Action:")[2].partition("Action Input:")
    calls.append((f"{name.strip()} {arguments.strip()}", _HEADERS.sub("", prompt)))
  last = _plain(row.responses[-1]).partition("Action Input:")[2]
  return Transcript(query[1].strip() if query else "", tuple(calls), official.answer_of(last))


def _plain(response: str) -> str:
  return re.sub(r"(<\|eot_id\|>|<\|im_end\|>|</s>)\s*\Z", "", response)


def step_table(folder: pathlib.Path | str, cases: Sequence[Case]) -> list[tuple[str, ...]]:
  """One row a step rule: against the judge's rewards, and on responses of foreign trajectories."""
  root = pathlib.Path(folder) / "data_train"
  files = sorted(root.glob("*/step_grained_for_ppo_example.csv"))
  if not files:
    raise FileNotFoundError(f"{root}: no <model>/step_grained_for_ppo_example.csv there")
  rows = [row for file in files for row in training_rows.read_step_rows(file)]
  judged = [reward for row in rows for reward in row.rewards[:-1]]
  pairs = list(_foreign_pairs(cases))
  out = []
  for rule in ("lcs", "evidence"):
    marks = [mark for row in rows for mark in responses.marks_of(row_transcript(row), rule)]
    reward = [(sc + con) / 2 for sc, con in marks]
    own = [responses.marks_of(texts, rule)[k][1] >= 0.5 for texts, k, _ in pairs]
    foreign = []
    for texts, k, response in pairs:
      steps = list(texts.steps)
      steps[k] = (steps[k][0], response)
      swapped = dataclasses.replace(texts, steps=tuple(steps))
      foreign.append(responses.marks_of(swapped, rule)[k][1] >= 0.5)
    out.append(
      (
        rule,
        f"{_rank_correlation(judged, [con for _, con in marks]):.2f}",
        f"{_rank_correlation(judged, reward):.2f}",
        f"{np.mean(np.abs(np.subtract(judged, reward))):.3f}",
        str(len(judged)),
        f"{np.mean(own):.1%}",
        f"{np.mean(foreign):.1%}",
        str(len(pairs)),
      )
    )
  return out


def _foreign_pairs(cases: Sequence[Case], count: int = 1000):
  """(transcript, step, the response of about that length from another query), from solved cases."""
  steps = [
    (case, k) for case in cases if min(case.scores) == 1 for k in range(len(case.texts.steps))
  ]
  steps.sort(key=lambda pair: len(pair[0].texts.steps[pair[1]][1]))
  rng = np.random.default_rng(0)
  for index in rng.permutation(len(steps) - 1)[:count]:
    (case, k), (other, j) = steps[index], steps[index + 1]
    if case.texts.query != other.texts.query:
      yield case.texts, k, other.texts.steps[j][1]


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
  def ranks(values: Sequence[float]) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

  return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


# --- the report ----------------------------------------------------------------------------------


def report(folder: pathlib.Path | str) -> str:
  """results/rule_judges.md, from the data folder."""
  cases = read_cases(folder)
  lines = [
    "# Rule judges against GPT-4",
    "",
    "Made by `python -m steptool_jax.toolbench.rule_judge DATA_FOLDER`; reference: the stored",
    "verdicts of three GPT-4 runs, solved where their mean is above one half. The weights of",
    "`coverage` were tuned on even query ids of the SFT and RFT runs. `one GPT-4 run` is the first",
    "run against the mean of the other two. Precision and recall are those of 'solved'; the last",
    "two columns are the share that the judge and GPT-4 call solved.",
    "",
    "| results | judge | n | accuracy | precision | recall | kappa | judge's rate | GPT-4's rate |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  parts: dict[str, Callable[[Case], bool]] = {
    "tuning": is_tuning,
    "unseen runs, unseen queries": is_held_out,
    "unseen runs": lambda case: not _seen_run(case),
    "unseen runs and queries, answered only": lambda case: is_held_out(case) and case.answered,
  }
  for part, chosen in parts.items():
    some = [case for case in cases if chosen(case)]
    rate = np.mean([case.solved for case in some])
    measured = {name: measure(judge, some) for name, judge in JUDGES.items()}
    rates = {name: np.mean([judge(c.texts) for c in some]) for name, judge in JUDGES.items()}
    measured["one GPT-4 run"] = ceiling(some)
    rates["one GPT-4 run"] = np.mean([case.scores[0] > 0.5 for case in some])
    for name, m in measured.items():
      lines.append(
        f"| {part} | {name} | {m.count} | {m.accuracy:.3f} | {m.precision:.3f} | {m.recall:.3f} "
        f"| {m.kappa:.3f} | {rates[name]:.3f} | {rate:.3f} |"
      )
  bias, weights = fit([case for case in cases if is_tuning(case)])
  named = ", ".join(f"{name} {w:.2f}" for name, w in zip(FEATURES, weights, strict=True))
  lines += [
    "",
    f"Weights, fitted again: bias {bias:.2f}, {named}.",
    "",
    "# Step rules against the judge's step scores",
    "",
    "Rank correlation of Con, and of r = (SC + Con) / 2, with the rewards of the step-grained rows",
    "(intermediate steps; mean of three judge runs), and their mean absolute difference; then how",
    "often Con >= .5 for the true response of a solved trajectory, and for one of about the same",
    "length from another query in its place (lower is better).",
    "",
    "| rule | Con | r | difference of r | steps | true | foreign | pairs |",
    "|---|---|---|---|---|---|---|---|",
  ]
  lines += [f"| {' | '.join(row)} |" for row in step_table(folder, cases)]
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description="Agreement of the rule judges with GPT-4.")
  parser.add_argument("data_folder", help="holds pass_rate_results/ and data_train/")
  print(report(parser.parse_args().data_folder), end="")
