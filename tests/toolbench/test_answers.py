"""Answer files: the official examples convert exactly, and our own survive the same converter."""

import json
import os

import numpy as np
import official_data
import pytest

from steptool_jax.rollout.branching import ROOT
from steptool_jax.rollout.conversation import Limits
from steptool_jax.rollout.strategy import Node, Search, SearchResult
from steptool_jax.toolbench.formats import answers
from steptool_jax.toolbench.formats.converted import convert
from steptool_jax.types import (
  Code,
  Finish,
  Malformed,
  Observation,
  Status,
  Step,
  Task,
  ToolCall,
  ToolSpec,
  Trajectory,
)

EXAMPLES = official_data.DATA / "stabletoolbench/data_example"
LIMITS = Limits(
  max_steps=4, max_step_tokens=64, max_tokens=999, max_invalid=3, max_observation_chars=20
)
SPEC = ToolSpec("f_for_t", "does f", {"type": "object", "properties": {}, "required": []})
TASK = Task(
  "toolbench/G1/7", "toolbench", "Q?", (SPEC,), {}, metadata={"query_id": "7", "system": "S"}
)
RESPONSE = '{"error": "", "response": "1"}'


def step(action, text=RESPONSE, code=Code.OK):
  observation = None if isinstance(action, Finish) else Observation(text, code)
  return Step(np.arange(3), np.zeros(3, np.float32), action, observation, np.arange(2))


CALL = step(ToolCall("f_for_t", {"a": 1}, thought="try"))
TIMEOUT = step(
  ToolCall("f_for_t", {}), '{"error": "Timeout error...", "response": ""}', Code.TIMEOUT
)
BROKEN = step(Malformed("no JSON"), '{"error": "no JSON"}', Code.MALFORMED)
ANSWER = step(Finish("forty-two"))
GIVE_UP = step(Finish("", gave_up=True))


def trajectory(*steps, status=Status.ANSWERED, task=TASK):
  return Trajectory(task.id, 0, np.arange(5), tuple(steps), status)


def tools_of(converted):
  """The converted chain as (role, name or text, arguments, response)."""
  out, level = [], converted["answer"]["answer_details"]
  while level:
    (node,) = level
    message = node["message"]
    if node["role"] == "tool":
      out.append(("tool", message["name"], message["arguments"], message["response"]))
    else:
      out.append((node["role"], message))
    level = node["next"]
  return out


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason=f"needs the official examples in {EXAMPLES}")
@pytest.mark.parametrize(
  ("run", "method"),
  [("virtual_chatgpt_cot", "CoT@1"), ("virtual_chatgpt_dfs", "DFS_woFilter_w2")],
)
def test_the_official_examples_convert_exactly(run, method):
  folder = EXAMPLES / "answer" / run / "G1_instruction"
  got = {
    path.name.removesuffix(f"_{method}.json"): convert(json.loads(path.read_text()), method)
    for path in folder.iterdir()
  }
  path = EXAMPLES / "model_predictions_converted" / run / "G1_instruction.json"
  expected = json.loads(path.read_text())
  assert len(expected) == 3
  # Key order inside an answer counts; the order of the answers is the file system's.
  assert {k: json.dumps(v) for k, v in got.items()} == {
    k: json.dumps(v) for k, v in expected.items()
  }


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason=f"needs the official examples in {EXAMPLES}")
@pytest.mark.parametrize(
  ("name", "make"),
  [
    (
      "virtual_chatgpt_cot/G1_instruction/1073_CoT@1.json",
      lambda: answers.cot_answer(TASK, [trajectory(CALL, ANSWER)], LIMITS),
    ),
    (
      "virtual_chatgpt_dfs/G1_instruction/588_DFS_woFilter_w2.json",
      lambda: answers.dfs_answer(TASK, searched(), Search(), LIMITS),
    ),
  ],
)
def test_our_files_have_the_official_fields_and_types(name, make):
  official = json.loads((EXAMPLES / "answer" / name).read_text())
  ours = json.loads(json.dumps(make()))

  def compare(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, dict) and path != "/forward_args":
      if "node_type" in a:
        assert set(a) - {"observation", "observation_code", "io_state"} <= set(b), path
      elif "role" not in a:
        assert set(a) == set(b), path
      # A function's parameters and a node's children are the task's and the search's own.
      for key in (set(a) & set(b)) - {"parameters", "children"}:
        compare(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list) and a:
      assert b, path
      compare(a[0], b[0], f"{path}[0]")

  compare(official, ours)


def searched():
  """call -> (give up | call -> answer); the sibling saw a diversity prompt of 4 tokens."""
  none, four = np.zeros(0, np.int32), np.arange(4)
  nodes = (
    Node(0, ROOT, 1, CALL, None, none),
    Node(1, 0, 2, GIVE_UP, Status.GAVE_UP, none),
    Node(2, 0, 2, TIMEOUT, None, four),
    Node(3, 2, 3, ANSWER, Status.ANSWERED, none),
  )
  return SearchResult(nodes, 3, trajectory(CALL, TIMEOUT, ANSWER))


FINAL = '{"return_type": "give_answer", "final_answer": "forty-two"}'


def test_cot_answer_converts(tmp_path):
  answer = answers.cot_answer(TASK, [trajectory(CALL, BROKEN, ANSWER)], LIMITS, lambda ids: "raw")
  assert answer["win"]
  assert answer["answer_generation"]["query_count"] == 3
  assert answer["answer_generation"]["total_tokens"] == 5 + 3 * 5
  assert answer["forward_args"]["max_llm_calls"] == 4
  path = answers.write_answer(tmp_path / "G1", TASK, "CoT@1", answer)
  assert path == tmp_path / "G1" / "7_CoT@1.json"
  assert [p.name for p in path.parent.iterdir()] == ["7_CoT@1.json"]  # no temporary file stays
  converted = convert(json.loads(path.read_text()), answers.cot_method(1))
  assert converted["query"] == "Q?"
  assert [f["name"] for f in converted["available_tools"]] == ["f_for_t", "Finish"]
  assert converted["answer"]["method"] == "CoT@1"
  assert converted["answer"]["total_steps"] == 5
  assert converted["answer"]["final_answer"] == FINAL
  assert tools_of(converted) == [
    ("system", ""),
    ("user", ""),
    ("tool", "f_for_t", '{"a": 1}', RESPONSE[:20] + "..."),  # as shown to the model
    ("assistant", "raw"),
    ("tool", "Finish", FINAL, ""),
  ]


def test_cot_without_an_answer_converts_the_chain_itself():
  spent = trajectory(CALL, BROKEN, TIMEOUT, status=Status.STEP_BUDGET)
  answer = answers.cot_answer(TASK, [spent], LIMITS)
  assert not answer["win"]
  assert not answer["answer_generation"]["valid_data"]
  chain = answer["trys"][0]["chain"]
  assert [n["node_type"] for n in chain] == [
    "Thought",
    "Action",
    "Action Input",
    "Thought",
    "Action",
    "Action Input",
  ]
  assert [n["depth"] for n in chain] == [1, 2, 3, 4, 5, 6]
  assert [n["observation_code"] for n in chain if "observation" in n] == [0, 2, 5]
  assert [n["pruned"] for n in chain] == [False] * 5 + [True]
  converted = convert(answer, "CoT@1")
  assert converted["answer"]["final_answer"] == ""
  assert [n[:2] for n in tools_of(converted)[2:]] == [
    ("assistant", "try"),
    ("tool", "f_for_t"),
    ("assistant", "no JSON"),
    ("tool", "f_for_t"),
  ]


def test_cot_at_n_takes_the_first_answer():
  tries = [trajectory(GIVE_UP, status=Status.GAVE_UP), trajectory(CALL, ANSWER)]
  answer = answers.cot_answer(TASK, tries, LIMITS)
  assert (answer["win"], answer["try_count"]) == (True, 2)
  assert [t["win"] for t in answer["trys"]] == [False, True]
  assert len(answer["compare_candidates"]) == 1
  assert len(tools_of(convert(answer, "CoT@2"))) == 4


def test_dfs_answer_converts_the_chosen_chain_alone():
  answer = answers.dfs_answer(TASK, searched(), Search(max_calls=9), LIMITS)
  assert answers.dfs_method(Search()) == "DFS_woFilter_w2"
  assert (answer["win"], answer["forward_args"]["max_llm_calls"]) == (True, 9)
  assert answer["answer_generation"]["finish_type"] == "give_answer"
  assert answer["answer_generation"]["query_count"] == 4
  assert answer["answer_generation"]["total_tokens"] == 5 + 4 * 5 + 4
  root = answer["tree"]["tree"]
  assert (answer["tree"]["size"], answer["tree"]["max_length"]) == (10, 8)
  assert (root["node_type"], root["depth"], root["child_count"]) == ("Action Input", 0, 1)
  after_call = root["children"][0]["children"][0]["children"][0]
  assert after_call["node_type"] == "Action Input"
  assert [c["description"] for c in after_call["children"]] == ["Finish", "f_for_t"]
  gave_up = after_call["children"][0]["children"][0]
  assert (gave_up["pruned"], gave_up["observation_code"]) == (True, 4)
  assert [n["description"] for n in answer["compare_candidates"][0]][-2:] == ["Finish", FINAL]
  converted = convert(json.loads(json.dumps(answer)), "DFS_woFilter_w2")
  assert [n[1] for n in tools_of(converted)[2:]] == ["f_for_t", "f_for_t", "Finish"]


def test_dfs_that_gave_up_and_dfs_without_an_end():
  result = searched()
  gave_up = SearchResult(result.nodes[:2], 1, trajectory(CALL, GIVE_UP, status=Status.GAVE_UP))
  answer = answers.dfs_answer(TASK, gave_up, Search(), LIMITS)
  assert not answer["win"]
  assert answer["answer_generation"]["finish_type"] == "give_up"
  assert answer["answer_generation"]["final_answer"] == '{"return_type": "give_up_and_restart"}'
  open_end = SearchResult(
    (result.nodes[0], result.nodes[1], result.nodes[2]),
    2,
    trajectory(CALL, TIMEOUT, status=Status.STEP_BUDGET),
  )
  answer = answers.dfs_answer(TASK, open_end, Search(), LIMITS)
  assert not answer["answer_generation"]["valid_data"]
  converted = convert(answer, "DFS_woFilter_w2")
  assert [n[1] for n in tools_of(converted)[2:]] == ["try", "f_for_t", "f_for_t"]


def test_a_refused_finish_in_the_middle_has_no_response():
  def call(name):
    return {"role": "assistant", "function_call": {"name": name, "arguments": "{}"}}

  def said(name):
    return {"role": "function", "name": name, "content": "r"}

  messages = [call("Finish"), said("Finish"), call("f"), said("f"), call("Finish")]
  generation = {"valid_data": True, "train_messages": [messages], "function": [], "query": "q"}
  converted = convert({"answer_generation": generation | {"final_answer": ""}}, "CoT@1")
  assert [n[3] for n in tools_of(converted)[2:]] == ["", "r", ""]


def test_an_infrastructure_error_is_no_answer():
  broken = trajectory(CALL, status=Status.INFRASTRUCTURE_ERROR)
  with pytest.raises(ValueError, match="7: ended in an infrastructure error"):
    answers.cot_answer(TASK, [trajectory(ANSWER), broken], LIMITS)
  with pytest.raises(ValueError, match="infrastructure error"):
    answers.dfs_answer(TASK, SearchResult(searched().nodes[:1], 0, broken), Search(), LIMITS)
  other = Task("other", "toolbench", "", (), {})
  with pytest.raises(ValueError, match="belongs to other"):
    answers.cot_answer(TASK, [trajectory(ANSWER, task=other)], LIMITS)


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / "a.json"
  answers.write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    answers.write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}
  assert os.listdir(tmp_path) == ["a.json"]
