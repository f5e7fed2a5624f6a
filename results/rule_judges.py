"""Measures the rule judges against GPT-4's stored verdicts, and the step rules against its scores.

    python results/rule_judges.py DATA_FOLDER QUERY_FOLDER > results/rule_judges.md

DATA_FOLDER holds pass_rate_results/ and data_train/ of StepTool's release, QUERY_FOLDER
solvable_queries/ of StableToolBench, which say what was known of the tools.
"""

import argparse
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from steptool_jax.rewards import responses
from steptool_jax.rewards.responses import Transcript
from steptool_jax.toolbench.environment import ToolBench
from steptool_jax.toolbench.formats import judged, training_rows
from steptool_jax.toolbench.rule_judge import (
  FEATURES,
  Agreement,
  coverage,
  features,
  grounded,
  tool_texts,
)

Rule = Callable[[Transcript], float]  # 1.0 solved, 0.0 unsolved

_APOLOGY = re.compile(
  r"sorry|apologi[sz]e|unfortunately|unable to|cannot|can't|could ?n[o']t|failed to", re.I
)


def plain(texts: Transcript) -> float:
  """For comparison. Solved: finished with an answer that does not open with an apology."""
  answer = texts.answer.strip()
  return float(texts.finished and bool(answer) and not _APOLOGY.search(answer[:120]))


RULES: dict[str, Rule] = {"plain": plain, "coverage": coverage}


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


def read_cases(folder: pathlib.Path | str, queries: pathlib.Path | str) -> list[Case]:
  """All results under FOLDER/pass_rate_results/<run>/<subset>.json[.xz]; OSError without any."""
  root = pathlib.Path(folder) / "pass_rate_results"
  files = sorted([*root.glob("*/*.json"), *root.glob("*/*.json.xz")])
  if not files:
    raise FileNotFoundError(f"{root}: no <run>/<subset>.json or .json.xz there")
  subsets = sorted(p.stem for p in pathlib.Path(queries).glob("**/test_instruction/*.json"))
  tasks = ToolBench(queries, None, subsets).tasks("heldout")
  tools = {task.query: tool_texts(task.tools) for task in tasks}
  return [
    Case(
      file.parent.name,
      query_id,
      dataclasses.replace(result.transcript, tools=tools[result.query]),
      tuple(verdict.score for verdict in result.verdicts),
    )
    for file in files
    for query_id, result in judged.read_results(file).items()
  ]


def _seen_run(case: Case) -> bool:
  return "sft" in case.run or "rft" in case.run


def is_tuning(case: Case) -> bool:
  """SFT and RFT runs, even query ids: weights were tuned there and nowhere else."""
  return _seen_run(case) and int(case.query_id) % 2 == 0


def is_held_out(case: Case) -> bool:
  """ETO and PPO runs, odd query ids: neither the run nor the query was seen in tuning."""
  return not _seen_run(case) and int(case.query_id) % 2 == 1


def fitting(cases: Iterable[Case]) -> list[Case]:
  """Those that the weights are tuned on: of the tuning part what no gate has refused."""
  return [c for c in cases if is_tuning(c) and c.answered and grounded(c.texts)]


def fit(cases: Iterable[Case], ridge: float = 1.0) -> tuple[float, tuple[float, ...]]:
  """(bias, weights) of the logistic regression, by Newton's method."""
  used = list(cases)
  x = np.array([(1.0, *features(case.texts)) for case in used])
  y = np.array([sum(case.scores) / len(case.scores) for case in used])
  penalty = ridge * np.diag([0.0] + [1.0] * (x.shape[1] - 1))
  w = np.zeros(x.shape[1])
  for _ in range(20):
    p = 1 / (1 + np.exp(-x @ w))
    w -= np.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]) + penalty, x.T @ (p - y) + penalty @ w)
  return float(w[0]), tuple(map(float, w[1:]))


def measure(judge: Rule, cases: Sequence[Case]) -> Agreement:
  return agreement([judge(c.texts) > 0.5 for c in cases], [c.solved for c in cases])


def ceiling(cases: Sequence[Case]) -> Agreement:
  """One GPT-4 run against the mean of its others."""
  return agreement([c.scores[0] > 0.5 for c in cases], [np.mean(c.scores[1:]) > 0.5 for c in cases])


# --- answers that are written for the rule's sake ------------------------------------------------


def _words_of_results(texts: Transcript) -> str:
  words = re.findall(r"\w+", " ".join(response for _, response in texts.steps))
  return ", ".join(dict.fromkeys(words))


# Name -> (calls, answer) in the place of those of a stored trajectory.
ADVERSARIES: dict[str, Callable[[Transcript], tuple[tuple, str]]] = {
  "the query, without a call": lambda t: ((), t.query),
  "the query, after a failed call": lambda t: (
    (("f {}", '{"error": "API not working error...", "response": ""}'),),
    t.query,
  ),
  "the query, after the real calls": lambda t: (t.steps, t.query),
  "'Here is everything you asked for: ' and the query": lambda t: (
    t.steps,
    f"Here is everything you asked for: {t.query}",
  ),
  "a refusal in nice words, with the query": lambda t: (
    t.steps,
    f"Thank you for this wonderful question! {t.query} I wish you every success with it.",
  ),
  "the texts of the tools": lambda t: (t.steps, t.tools),
  "the query and the texts of the tools": lambda t: (t.steps, f"{t.query} {t.tools}"),
  "all results, word for word": lambda t: (t.steps, " ".join(r for _, r in t.steps)),
  "the query and all results, word for word": lambda t: (
    t.steps,
    " ".join((t.query, *(r for _, r in t.steps))),
  ),
  "the query and all words of the results, once each": lambda t: (
    t.steps,
    f"{t.query} {_words_of_results(t)}",
  ),
}


def pleased(rule: Rule, name: str, cases: Iterable[Case]) -> float:
  """The share of these trajectories that pass with the adversary's answer."""
  made = [(case.texts, *ADVERSARIES[name](case.texts)) for case in cases]
  return float(np.mean([rule(Transcript(t.query, s, a, tools=t.tools)) for t, s, a in made]))


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
  return Transcript(query[1].strip() if query else "", tuple(calls), judged.answer_of(last))


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


def _foreign_pairs(
  cases: Sequence[Case], count: int = 1000
) -> Iterator[tuple[Transcript, int, str]]:
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


def report(data_folder: pathlib.Path | str, query_folder: pathlib.Path | str) -> str:
  """results/rule_judges.md, from the data."""
  cases = read_cases(data_folder, query_folder)
  lines = [
    "# Rule judges against GPT-4",
    "",
    "Made by `python results/rule_judges.py DATA_FOLDER QUERY_FOLDER`; reference: the stored",
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
    measured = {name: measure(judge, some) for name, judge in RULES.items()}
    rates = {name: np.mean([judge(c.texts) for c in some]) for name, judge in RULES.items()}
    measured["one GPT-4 run"] = ceiling(some)
    rates["one GPT-4 run"] = np.mean([case.scores[0] > 0.5 for case in some])
    for name, m in measured.items():
      lines.append(
        f"| {part} | {name} | {m.count} | {m.accuracy:.3f} | {m.precision:.3f} | {m.recall:.3f} "
        f"| {m.kappa:.3f} | {rates[name]:.3f} | {rate:.3f} |"
      )
  bias, weights = fit(fitting(cases))
  held_out = [case for case in cases if is_held_out(case)]
  named = ", ".join(f"{name} {w:.2f}" for name, w in zip(FEATURES, weights, strict=True))
  lines += [
    "",
    f"Weights, fitted again: bias {bias:.2f}, {named}.",
    "",
    "# Answers that are written for the rule's sake",
    "",
    "Share that is called solved when such an answer takes the place of the real one, over the",
    "unseen runs and queries. The last row is why RL is not done on a rule's verdicts.",
    "",
    "| answer | plain | coverage |",
    "|---|---|---|",
    *(
      f"| {name} | {pleased(plain, name, held_out):.3f} | {pleased(coverage, name, held_out):.3f} |"
      for name in ADVERSARIES
    ),
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
  lines += [f"| {' | '.join(row)} |" for row in step_table(data_folder, cases)]
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description="Agreement of the rule judges with GPT-4.")
  parser.add_argument("data_folder", help="holds pass_rate_results/ and data_train/")
  parser.add_argument("query_folder", help="holds solvable_queries/")
  print(report(**vars(parser.parse_args())), end="")
