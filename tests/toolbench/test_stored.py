import json
import lzma

import numpy as np
import pytest

from steptool_jax.toolbench.stored import GROUPS, figures_of, stored_summary

FINISH = "{'name': 'Finish', 'arguments': '{}', 'response': ''}"


def entry(verdicts):
  return {
    "query": "q",
    "tool_names": [],
    "answer_steps": f"Step 1: {FINISH}",
    "final_step": f"Final step: {FINISH}",
    "is_solved": {str(run): f"AnswerStatus.{verdict}" for run, verdict in enumerate(verdicts)},
  }


def write(folder, name, rows):
  folder.mkdir(exist_ok=True, parents=True)
  text = json.dumps({str(n): entry(row) for n, row in enumerate(rows)}).encode()
  (folder / name).write_bytes(lzma.compress(text) if name.endswith(".xz") else text)


def rows(total, solved, unsure=(0, 0, 0)):
  """`total` tasks of which solved[j] are Solved and unsure[j] Unsure in judge run j."""
  return [
    [
      "Solved" if n < s else "Unsure" if n < s + u else "Unsolved"
      for s, u in zip(solved, unsure, strict=True)
    ]
    for n in range(total)
  ]


def test_the_published_figures(shared):
  summary = stored_summary(shared / "steptool" / "pass_rate_results")
  published = summary["published_aggregation"]
  assert published["toolllama_sft_cot"] == {"I1": [50.6, 1.6]}
  assert published["baseline-ppo_cot"] == {"I1": [50.9, 1.0]}
  assert published["baseline-ppo_dfs"] == {"I1": [59.6, 1.1]}
  assert published["baseline-eto_cot"] == {}  # G1_category was not published
  assert len(published) == 8
  eto = [e for e in summary["incomplete"] if e["run"] == "baseline-eto_cot"]
  assert {"run": "baseline-eto_cot", "group": "I1", "why": ["G1_category is missing"]} in eto
  assert [e["group"] for e in eto] == ["I1", "I2", "I3"]
  assert summary["subsets"]["toolllama_sft_cot"]["G1_instruction"] == [56.4, 1.8, 163]
  json.dumps(summary)


def test_rounded_per_subset_then_weighted(tmp_path):
  """A case in which rounding late gives 58.6 and 0.7."""
  counts = {"G2_instruction": ((47, 48, 50), 106), "G2_category": ((86, 87, 86), 124)}
  for name, (solved, total) in counts.items():
    write(tmp_path / "run", f"{name}.json", rows(total, solved))
  got = stored_summary(tmp_path)["published_aggregation"]["run"]["I2"]
  means, stds = [], []
  for solved, total in counts.values():
    percent = [100 * s / total for s in solved]
    means.append(round(float(np.mean(percent)), 1))
    stds.append(round(float(np.std(percent)), 1))
  assert got == [
    round((106 * means[0] + 124 * means[1]) / 230, 1),
    round((106 * stds[0] + 124 * stds[1]) / 230, 1),
  ]
  assert (means, stds) == ([45.6, 69.6], [1.2, 0.4])
  assert got == [58.5, 0.8]


def test_unsure_is_a_half_and_the_std_that_of_the_population():
  scores = np.array([[1, 0.5], [0.5, 0.5], [0, 0.5], [1, 0]])
  assert figures_of(scores) == (50.0, 12.5)


def test_names_and_archives(tmp_path):
  write(tmp_path / "cot", "G3_instruction_cot.json.xz", rows(61, (30, 30, 33), (2, 2, 2)))
  (tmp_path / "cot" / "G3_instruction_cot.csv").write_text("not read")
  (tmp_path / "notes").mkdir()
  summary = stored_summary(tmp_path)
  percent = [100 * (s + 1) / 61 for s in (30, 30, 33)]
  expected = [round(float(np.mean(percent)), 1), round(float(np.std(percent)), 1)]
  assert summary["published_aggregation"] == {"cot": {"I3": expected}}
  assert summary["subsets"] == {"cot": {"G3_instruction": [*expected, 61]}}
  assert [e["group"] for e in summary["incomplete"]] == ["I1", "I2"]


def test_incomplete_groups_are_named_with_the_reason(tmp_path):
  write(tmp_path / "a", "G2_instruction.json", rows(106, (50, 50, 50)))
  write(tmp_path / "a", "G2_category.json", rows(123, (50, 50, 50)))
  uneven = [*rows(60, (1, 1, 1)), ["Solved"]]
  write(tmp_path / "a", "G3_instruction.json", uneven)
  summary = stored_summary(tmp_path)
  assert summary["published_aggregation"] == {"a": {}}
  assert set(summary["subsets"]["a"]) == {"G2_instruction", "G2_category"}
  why = {e["group"]: e["why"] for e in summary["incomplete"]}
  assert why["I2"] == ["G2_category has 123 of 124 queries"]
  assert why["I3"] == ["G3_instruction: its queries have 1 or 3 judge runs, must be equal"]
  assert why["I1"] == [f"{subset} is missing" for subset in GROUPS["I1"]]


def test_bad_folders(tmp_path):
  with pytest.raises(OSError, match="none"):
    stored_summary(tmp_path / "none")
  with pytest.raises(ValueError, match="holds no run"):
    stored_summary(tmp_path)
  write(tmp_path / "a", "G3_instruction.json", rows(2, (1, 1, 1)))
  (tmp_path / "a" / "G3_instruction.json").write_text("{")
  with pytest.raises(ValueError, match=r"G3_instruction\.json: not valid JSON"):
    stored_summary(tmp_path)
  write(tmp_path / "a", "G3_instruction.json.xz", rows(2, (1, 1, 1)))
  with pytest.raises(ValueError, match="are of one subset: remove one"):
    stored_summary(tmp_path)


def test_an_empty_file_is_incomplete(tmp_path):
  write(tmp_path / "a", "G3_instruction.json", [])
  why = stored_summary(tmp_path)["incomplete"][2]["why"]
  assert why == ["G3_instruction: its queries have no judge runs, must be equal"]
