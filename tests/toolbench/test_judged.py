import dataclasses
import json
import lzma

import pytest

from steptool_jax.toolbench.formats import judged, training_rows
from steptool_jax.toolbench.formats.converted import Converted, read_converted
from steptool_jax.toolbench.formats.judged import StoredStep, Verdict
from steptool_jax.toolbench.formats.training_rows import Message

STEP = {"name": "rain_for_sky", "arguments": '{"place": "Oslo"}', "response": "a\nb'\""}
FINISH = {"name": "Finish", "arguments": '{"final_answer": "rain"}', "response": ""}


def result(**change):
  entry = {
    "query": "Rain?",
    "tool_names": ["rain_for_sky", "Finish"],
    "answer_steps": f"Step 1: {STEP}\nStep 2: {FINISH}",
    "final_step": f"Final step: {FINISH}",
    "is_solved": {
      "2": "AnswerStatus.Unsure",
      "0": "AnswerStatus.Solved",
      "1": "AnswerStatus.Unsolved",
    },
    "length": 2,
  }
  return {k: v for k, v in (entry | change).items() if v is not ...}


def annotation(**change):
  run = {"succeed_tool_calling": [1], "contributions": [3]}
  entry = result(
    answer_steps=[f"Step 1: {STEP}"], process_reward={"0": run, "1": run, "2": run}, length=...
  )
  return {k: v for k, v in (entry | change).items() if v is not ...}


def write(path, value):
  path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
  return path


def table(*rows, header=("prompt", "response", "reward")):
  quoted = ["\t".join('"' + str(c).replace('"', '""') + '"' for c in row) for row in rows]
  return "\n".join(["\t".join(header), *quoted]) + "\n"


def test_step_rows(tmp_path):
  long = "x" * 200_000  # csv's own limit is 131,072
  text = table((["p\n0", long], ["r\t0", 'r"1'], [0.1, 1]))
  (row,) = training_rows.read_step_rows(write(tmp_path / "a.csv", text))
  assert row.prompts == ("p\n0", long)
  assert row.responses == ("r\t0", 'r"1')
  assert row.rewards == (0.1, 1.0)


@pytest.mark.parametrize(
  ("row", "match"),
  [
    (("['p']", "['r']", "__import__('os').getcwd()"), "column 'reward': not a Python list literal"),
    (("['p'", "['r']", "[1]"), "column 'prompt': not a Python list literal"),
    (("{'p': 1}", "['r']", "[1]"), "column 'prompt': must be of type list"),
    ((["p"], ["r"], [1, 1]), "1, 1 and 2 entries"),
    (([], [], []), "0, 0 and 0 entries"),
    (([7], ["r"], [1]), "column 'prompt', step 0: must be text"),
    ((["p"], ["r"], ["1"]), "column 'reward', step 0: must be a finite number"),
    ((["p"], ["r"], [True]), "step 0: must be a finite number"),
    ((["p"], ["r"], "[1e999]"), "must be a finite number"),
    ((["p"], ["r"]), "2 columns, must be 3"),
    (("[" * 5000, "[]", "[]"), "not a Python list literal"),
  ],
)
def test_bad_step_rows_are_named(row, match, tmp_path):
  path = write(tmp_path / "a.csv", table((["p"], ["r"], [1]), row))
  with pytest.raises(ValueError, match=rf"a\.csv, row 2.*{match}"):
    training_rows.read_step_rows(path)


def test_tables_that_are_none(tmp_path):
  with pytest.raises(ValueError, match=r"a\.csv: the header must be prompt, response, reward"):
    training_rows.read_step_rows(write(tmp_path / "a.csv", table(header=("prompt", "chosen", "x"))))
  with pytest.raises(ValueError, match="an empty file"):
    training_rows.read_step_rows(write(tmp_path / "a.csv", ""))
  with pytest.raises(OSError, match="none"):
    training_rows.read_step_rows(tmp_path / "none.csv")
  broken = "prompt\tresponse\treward\n\"['p']\t1"
  with pytest.raises(ValueError, match="not a tab-separated table"):
    training_rows.read_step_rows(write(tmp_path / "a.csv", broken))


def dialogue(*turns, cnt=1):
  turns = [{"from": role, "value": text} for role, text in turns]
  return {"5": {"cnt": cnt, "instances": [{"id": "Step 2: q", "conversations": turns}]}}


def test_dialogues(tmp_path):
  turns = (("system", "s"), ("user", "u"), ("tool", "t"), ("assistant", "a"))
  path = write(tmp_path / "s.json", dialogue(*turns))
  (read,) = training_rows.read_dialogues(path)
  assert (read.query_id, read.number, read.title) == ("5", 0, "Step 2: q")
  assert read.messages == (
    Message("system", "s"),
    Message("user", "u"),
    Message("function", "t"),
    Message("assistant", "a"),
  )


@pytest.mark.parametrize(
  ("value", "match"),
  [
    (dialogue(("system", "s"), ("user", "u")), "the last message must be the assistant's"),
    (dialogue(("assistant", "a")), "instance 0: must start with a system and a user message"),
    ('{"5": {}, "5": {}}', "the key '5' stands twice"),  # one of them was lost without a word
    (dialogue(("assistant", "a"), cnt=2), "cnt is 2, but there are 1 instances"),
    (dialogue(("robot", "a")), "message 0, field 'from': must be one of"),
    (dialogue((["assistant"], "a")), "message 0, field 'from': must be one of"),
    (dialogue(("assistant", 7)), "message 0, field 'value': must be of type str"),
    ({"5": {"cnt": 1}}, "the field 'instances' is missing"),
    ({"5": 7}, "the field 'cnt' is missing"),
    ([], "must hold a JSON dict"),
    ('{"5": ', "not valid JSON"),
  ],
)
def test_bad_dialogues_are_named(value, match, tmp_path):
  with pytest.raises(ValueError, match=rf"s\.json.*{match}"):
    training_rows.read_dialogues(write(tmp_path / "s.json", value))


@pytest.mark.parametrize("suffix", [".json", ".json.xz"])
def test_results(suffix, tmp_path):
  text = json.dumps({"12": result()}).encode()
  path = tmp_path / f"G1{suffix}"
  path.write_bytes(lzma.compress(text) if suffix.endswith("xz") else text)
  read = judged.read_results(path)["12"]
  assert read.steps == (StoredStep(**STEP), StoredStep(**FINISH))
  assert read.final == StoredStep(**FINISH)
  # By run number, not in the order of the file.
  assert read.verdicts == (Verdict.SOLVED, Verdict.UNSOLVED, Verdict.UNSURE)
  assert [v.score for v in read.verdicts] == [1, 0, 0.5]


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"is_solved": ...}, "the field 'is_solved' is missing"),
    ({"is_solved": {}}, "numbered from 0"),
    ({"is_solved": {"0": "AnswerStatus.Solved", "2": "AnswerStatus.Solved"}}, "numbered from 0"),
    ({"is_solved": {"0": "Solved"}}, "field 'is_solved': must be one of AnswerStatus.Solved"),
    ({"answer_steps": f"Step 2: {STEP}"}, "line 1 must start with 'Step 1: '"),
    ({"answer_steps": "Step 1: open('x')"}, "step 1: not a Python dict literal"),
    ({"answer_steps": "Step 1: {'name': 'f'}"}, "step 1: the field 'arguments' is missing"),
    ({"final_step": f"{FINISH}"}, "must start with 'Final step: '"),
    ({"tool_names": "f"}, "field 'tool_names': must be of type list"),
    ({"query": None}, "field 'query': must be of type str"),
  ],
)
def test_bad_results_are_named(change, match, tmp_path):
  path = write(tmp_path / "G1.json", {"11": result(), "12": result(**change)})
  with pytest.raises(ValueError, match=rf"G1\.json, id '12'.*{match}"):
    judged.read_results(path)


def test_a_result_without_steps(tmp_path):
  path = write(tmp_path / "G1.json", {"1": result(answer_steps="")})
  assert judged.read_results(path)["1"].steps == ()


def test_verdicts_are_written_as_they_are_read(tmp_path):
  nothing = judged.Result("13", "q", (), (), StoredStep("", "", ""), (Verdict.UNSOLVED,) * 3)
  results = {**judged.read_results(write(tmp_path / "a.json", {"12": result()})), "13": nothing}
  judged.write_results(tmp_path / "b" / "G1.json", results.values())
  assert judged.read_results(tmp_path / "b" / "G1.json") == results
  document = json.loads((tmp_path / "b" / "G1.json").read_text())
  assert document["12"]["is_solved"] == {
    "0": "AnswerStatus.Solved",
    "1": "AnswerStatus.Unsolved",
    "2": "AnswerStatus.Unsure",
  }
  assert [document[k]["length"] for k in ("12", "13")] == [2, 0]
  assert document["13"]["final_step"] == document["13"]["answer_steps"] == ""


@pytest.mark.parametrize(
  ("arguments", "answer"),
  [
    ('{"return_type": "give_answer", "final_answer": "a\nb"}', "a\nb"),
    ('{"return_type": "give_up_and_restart", "final_answer": "a"}', ""),
    ('{"return_type": "give_answer"}', ""),
    ('{"return_type": "give_answer", "final_answer": "cut \\"of', 'cut "of'),
    ('{"return_type": "give_up_and_restart", "final_answer": "cut', ""),
    ("prose", ""),
    ("[1]", ""),
  ],
)
def test_answer_of(arguments, answer):
  assert judged.answer_of(arguments) == answer


def test_only_calls_of_an_answer_stand_in_its_result():
  call, finish = StoredStep(**STEP), StoredStep(**FINISH)
  chain = (("system", ""), ("user", ""), ("assistant", "let me think"), ("tool", call))
  tools = ({"name": "f"}, {"function": {"name": "g"}})
  answer = Converted("7", "q", tools, "CoT@1", 4, "", (*chain, ("tool", finish)))
  read = answer.judged([Verdict.SOLVED])
  assert (read.query_id, read.tool_names, read.steps) == ("7", ("f", "g"), (call, finish))
  assert (read.final, read.verdicts) == (finish, (Verdict.SOLVED,))
  silent = dataclasses.replace(answer, chain=chain[:3])
  assert silent.judged([Verdict.UNSOLVED]).final.name == ""


def test_a_published_file_is_written_as_it_was(shared, tmp_path):
  path = shared / "steptool/pass_rate_results/toolllama_sft_cot/G2_instruction.json.xz"
  judged.write_results(tmp_path / "again.json", judged.read_results(path).values())
  published = json.loads(lzma.decompress(path.read_bytes()))
  assert json.loads((tmp_path / "again.json").read_text()) == published


def test_a_broken_archive_is_named(tmp_path):
  path = tmp_path / "G1.json.xz"
  path.write_bytes(lzma.compress(json.dumps({"12": result()}).encode())[:-20])
  with pytest.raises(ValueError, match=r"G1\.json\.xz"):
    judged.read_results(path)


def test_annotations(tmp_path):
  read = judged.read_annotations(write(tmp_path / "r.json", {"3": annotation()}))["3"]
  assert read.steps == (StoredStep(**STEP),)
  assert read.success_calling == ((1,),) * 3
  assert read.contribution == ((3,),) * 3


@pytest.mark.parametrize(
  ("scores", "match"),
  [
    ({"succeed_tool_calling": [1, 1], "contributions": [3]}, "2 scores for 1 steps"),
    ({"succeed_tool_calling": [2], "contributions": [3]}, "must be integers of 0 to 1, found 2"),
    ({"succeed_tool_calling": [1], "contributions": [6]}, "must be integers of 0 to 5, found 6"),
    ({"succeed_tool_calling": [1], "contributions": [True]}, "integers of 0 to 5"),
    ({"succeed_tool_calling": [1]}, "the field 'contributions' is missing"),
  ],
)
def test_bad_annotations_are_named(scores, match, tmp_path):
  good = {"succeed_tool_calling": [1], "contributions": [3]}
  bad = annotation(process_reward={"0": good, "1": scores, "2": good})
  path = write(tmp_path / "r.json", {"3": bad})
  with pytest.raises(ValueError, match=rf"id '3', process_reward 1, .*{match}"):
    judged.read_annotations(path)


def test_annotations_have_as_many_runs_as_verdicts(tmp_path):
  bad = annotation(process_reward={"0": {"succeed_tool_calling": [1], "contributions": [3]}})
  with pytest.raises(ValueError, match="1 runs of process_reward, 3 of is_solved"):
    judged.read_annotations(write(tmp_path / "r.json", {"3": bad}))


def chain(*messages):
  level = []
  for role, message in reversed(messages):
    level = [{"role": role, "message": message, "next": level}]
  return level


def converted(details):
  answer = {"method": "CoT@1", "total_steps": 2, "final_answer": "a", "answer_details": details}
  return {"12": {"query": "q", "available_tools": [], "answer": answer}}


def test_converted_files(tmp_path):
  path = write(tmp_path / "c.json", converted(chain(("user", "u"), ("tool", STEP))))
  read = read_converted(path)["12"]
  assert read.chain == (("user", "u"), ("tool", StoredStep(**STEP)))
  forked = converted(chain(("user", "u")) + chain(("user", "v")))
  with pytest.raises(ValueError, match="id '12', answer_details, depth 0: .*not a tree"):
    read_converted(write(tmp_path / "c.json", forked))


def test_the_released_files_read(shared):
  """Every file of both releases that these readers are for."""
  steptool, example = shared / "steptool", shared / "stabletoolbench" / "data_example"
  rows = [training_rows.read_step_rows(p) for p in sorted(steptool.glob("data_train/*/step_*.csv"))]
  assert [len(r) for r in rows] == [10, 10, 10]
  dialogues = [
    training_rows.read_dialogues(p) for p in sorted(steptool.glob("data_train/*/*.json"))
  ]
  assert [len(d) for d in dialogues] == [38, 38, 22]
  (path,) = (steptool / "data" / "reward_annotation").glob("*/*.json")
  assert len(judged.read_annotations(path)) == 5
  for path in (steptool / "pass_rate_results").glob("*_cot/G2_instruction.json.xz"):
    assert len(judged.read_results(path)) == 106
  for path in example.glob("pass_rate_results/*/*.json"):
    assert len(judged.read_results(path)) == 3
  files = [*example.glob("model_predictions_converted/*/*.json")]
  files += (steptool / "data" / "model_predictions_converted").glob("*/*.json")
  assert sorted(len(read_converted(p)) for p in files) == [3, 3, 5]
