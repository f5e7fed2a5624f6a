"""The official layout, names, schemas, prompts and codes; sessions over a fake simulator."""

import ast
import json
import shutil

import official_data
import pytest

from steptool_jax.environments.base import Environment, Session
from steptool_jax.rollout.branching import Forkable
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.toolbench.environment import ToolBench
from steptool_jax.toolbench.formats.codes import codes_of, official_code
from steptool_jax.toolbench.names import Prompts, system_text
from steptool_jax.toolbench.simulators.virtual import VirtualResponse
from steptool_jax.types import Code, ToolCall

DATA = official_data.DATA / "stabletoolbench"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the official data in {DATA}")


class Fake:
  """Answers from a function of the request; keeps the requests."""

  def __init__(self, answer=lambda request: VirtualResponse("", request.api_name)):
    self.answer_of, self.requests = answer, []

  def answer(self, request):
    self.requests.append(request)
    return self.answer_of(request)


def parameter(name, kind="STRING", default="", description=""):
  return {"name": name, "type": kind, "description": description, "default": default}


def api(name, tool="My Tool!", category="News, Media", required=(), optional=(), text="Does it."):
  return {
    "category_name": category,
    "tool_name": tool,
    "api_name": name,
    "api_description": text,
    "required_parameters": list(required),
    "optional_parameters": list(optional),
    "method": "GET",
  }


def query(query_id, *apis, relevant=()):
  return {
    "query_id": query_id,
    "query": f"Question {query_id}?",
    "api_list": list(apis),
    "relevant APIs": [list(pair) for pair in relevant],
  }


@pytest.fixture
def layout(tmp_path):
  """Writes a subset in the official layout; returns the folder."""

  def write(queries, ids=None, subset="G1_x"):
    base = tmp_path / "solvable_queries"
    for folder in ("test_instruction", "test_query_ids"):
      (base / folder).mkdir(parents=True, exist_ok=True)
    (base / "test_instruction" / f"{subset}.json").write_text(json.dumps(queries))
    if ids is not None:
      text = json.dumps({str(i): 0 for i in ids})
      (base / "test_query_ids" / f"{subset}.json").write_text(text)
    return tmp_path

  return write


def one(layout, *apis, simulator=None, relevant=(), **kwargs):
  folder = layout([query(1, *apis, relevant=relevant)])
  env = ToolBench(folder, simulator or Fake(), ["G1_x"], **kwargs)
  (task,) = env.tasks("heldout")
  return env, task


def call(env, task, arguments, name=None):
  return env.open(task, 0).call(ToolCall(name or task.tools[0].name, arguments))


def test_layout_subsets_and_ids(layout):
  layout([query(n, api("a")) for n in (3, 4)], subset="G2_y")
  folder = layout([query(n, api("a")) for n in (1, 2, 5)], ids=[1, 5])
  env = ToolBench(folder, Fake(), ["G1_x", "G2_y"])
  assert isinstance(env, Environment)
  assert [t.id for t in env.tasks("heldout")] == [
    "toolbench/G1_x/1",
    "toolbench/G1_x/5",
    "toolbench/G2_y/3",
    "toolbench/G2_y/4",
  ]
  assert env.tasks("heldout")[0].metadata["query_id"] == "1"
  assert env.tasks("train") == ()
  env = ToolBench(folder / "solvable_queries", Fake(), ["G1_x"], train_subsets=["G2_y"], ids=[5])
  assert [t.id for t in env.tasks("heldout")] == ["toolbench/G1_x/5"]
  assert len(env.tasks("train")) == 2
  with pytest.raises(ValueError, match="split 'test' does not exist"):
    env.tasks("test")


def test_names_and_schemas(layout):
  _, task = one(
    layout,
    api(
      "Get /v1 Top-10",
      text="Call Get /v1 Top-10 now.",
      required=[parameter("From", "NUMBER", default=3, description="d" * 300)],
      optional=[parameter("2nd id", "boolean"), parameter("list", "ARRAY", default="x")],
    ),
    api("100%", text="  ", optional=[parameter("q")]),
  )
  first, second = task.tools
  assert [t.name for t in task.tools] == ["get_v1_top_10_for_my_tool", "get_100_for_my_tool"]
  assert first.description.endswith("Call get_v1_top_10_for_my_tool now.")
  assert first.parameters == {
    "type": "object",
    "properties": {
      "is_from": {"type": "integer", "description": "d" * 256, "example_value": 3},
      "get_2nd_id": {"type": "boolean", "description": ""},
      "list": {"type": "string", "description": "", "example_value": "x"},
    },
    "required": ["is_from"],
    "optional": ["get_2nd_id", "list"],
  }
  # Officially lost, because nothing is required.
  assert second.parameters["optional"] == ["q"]
  assert task.metadata["apis"]["get_100_for_my_tool"]["documentation"]["api_name"] == "100%"


def test_apis_that_collide_in_a_name_are_told_apart(layout):
  """After a cut at 64 characters, or by the rules of names alone: each name calls its own API."""
  tool = "a tool whose name is long enough to be cut by the official rule"
  apis = [api(name, tool=tool) for name in ("Yesterday goals", "Today goals")]
  apis += [api(name) for name in ("Goals!", "goals", "goals?")]
  simulator = Fake(lambda request: VirtualResponse("", [request.tool_name, request.api_name]))
  env, task = one(layout, *apis, simulator=simulator)
  names = [t.name for t in task.tools]
  assert len(set(names)) == 5
  assert names[0] == "for_a_tool_whose_name_is_long_enough_to_be_cut_by_the_official_rule"[-64:]
  assert names[1] == (
    "today_goals_for_a_tool_whose_name_is_long_enough_to_be_cut_by_the_official_rule"
  )
  assert names[2:] == ["goals_for_my_tool", "goals_for_my_tool_2", "goals_for_my_tool_3"]
  documents = []
  for name in names:
    assert call(env, task, {}, name).code is Code.OK
    documents.append(simulator.requests[-1].documentation["api_name"])
  assert documents == ["Yesterday goals", "Today goals", "Goals!", "goals", "goals?"]


def test_the_request_is_the_official_one(layout):
  simulator = Fake()
  env, task = one(layout, api("From"), simulator=simulator, toolbench_key="k")
  call(env, task, {"b": 1, "a": [2]})
  (request,) = simulator.requests
  names = (request.category, request.tool_name, request.api_name)
  assert names == ("News, Media", "my_tool", "is_from")
  sent = (request.tool_input, request.strip, request.toolbench_key)
  assert sent == ({"b": 1, "a": [2]}, "filter", "k")


def test_relevant_apis_are_function_names(layout):
  _, task = one(layout, api("a"), api("b?"), relevant=[("My Tool!", "b?")])
  assert task.metadata["relevant"] == ("b_for_my_tool",)


def test_a_relevant_api_that_is_not_offered_stays_in_the_denominator_of_recall(layout, tmp_path):
  """It was dropped, so a tool environment with half of the tools had a recall of 1."""
  relevant = [("My Tool!", "a"), ("My Tool!", "gone"), ("My Tool!", "unknown")]
  _, task = one(
    layout, api("a"), api("gone"), relevant=relevant, tools_folder=tools_folder(tmp_path)
  )
  assert [t.name for t in task.tools] == ["a_for_my_tool"]
  assert task.metadata["relevant"] == (
    "a_for_my_tool",
    "gone_for_my_tool",
    "unknown_for_my_tool",
  )


def test_a_query_is_not_trained_on_and_held_out(layout):
  """One query in both splits was taken silently, and held-out figures were those of training."""
  layout([query(n, api("a")) for n in (2, 3)], subset="G2_y")
  folder = layout([query(n, api("a")) for n in (1, 2)])
  with pytest.raises(ValueError, match=r"train_subsets: 1 held-out .*G1_x/2 \(in.*: .*G2_y/2\)"):
    ToolBench(folder, Fake(), ["G1_x"], train_subsets=["G2_y"])
  ToolBench(folder, Fake(), ["G1_x"], train_subsets=["G2_y"], ids=[1])
  with pytest.raises(ValueError, match=r"toolbench\.subsets: .* names one twice"):
    ToolBench(folder, Fake(), ["G1_x", "G1_x"])


def test_observations_are_official_text_cut_at_1024(layout):
  long = "x" * 2000
  env, task = one(layout, api("a"), simulator=Fake(lambda r: VirtualResponse("", long)))
  observation = call(env, task, {})
  assert observation.text == json.dumps({"error": "", "response": long})[:1024] + "..."
  env, task = one(layout, api("a"), simulator=Fake(lambda r: VirtualResponse("", {"é": [1]})))
  observation = call(env, task, {})
  assert observation.text == '{"error": "", "response": {"\\u00e9": [1]}}'
  assert (observation.code, observation.value) == (Code.OK, {"é": [1]})


@pytest.mark.parametrize(
  ("error", "number", "code"),
  [
    ("", 0, Code.OK),
    ("Tool input parse error...\n", 0, Code.BAD_ARGUMENTS),
    ("something of the API's own", 0, Code.TOOL_ERROR),
    ("Timeout error...", 5, Code.TIMEOUT),
    ("API not working error...", 6, Code.UNAVAILABLE),
    ("Unauthorized error...", 7, Code.TOOL_ERROR),
    ("Unsubscribed error...", 8, Code.TOOL_ERROR),
    ("Too many requests error...", 9, Code.RATE_LIMIT),
    ("Rate limit per minute error...", 10, Code.RATE_LIMIT),
    ("Message error...", 11, Code.TOOL_ERROR),
  ],
)
def test_environment_codes(layout, error, number, code):
  assert codes_of(error) == (number, code)
  env, task = one(layout, api("a"), simulator=Fake(lambda r: VirtualResponse(error, "")))
  observation = call(env, task, {})
  assert observation.code is code
  if code is not Code.BAD_ARGUMENTS:  # that one is 2 where the environment itself refuses
    assert official_code(observation) == number


def test_no_answer_is_not_working_and_a_broken_simulator_is_infrastructure(layout):
  env, task = one(layout, api("a"), simulator=Fake(lambda r: None))
  assert official_code(call(env, task, {})) == 6

  def down(request):
    raise InfrastructureError("connection refused")

  env, task = one(layout, api("a"), simulator=Fake(down))
  observation = call(env, task, {})
  assert (observation.code, official_code(observation)) == (Code.INFRASTRUCTURE, 12)
  assert "connection refused" in observation.text


def test_unknown_functions_are_never_matched_by_a_suffix(layout):
  simulator = Fake()
  env, task = one(layout, api("a"), simulator=simulator)
  for name in ("for_my_tool", "", "a"):
    observation = env.open(task, 0).call(ToolCall(name, {}))
    assert (observation.code, official_code(observation)) == (Code.UNKNOWN_TOOL, 1)
    assert json.loads(observation.text)["error"] == f"No such function name: {name}"
  assert not simulator.requests


def test_arguments_are_passed_on_as_they_are(layout):
  """The API complains of missing and unknown ones, as officially; no object is refused here."""
  simulator = Fake()
  env, task = one(layout, api("a", required=[parameter("q")]), simulator=simulator)
  for arguments in ({}, {"q": 1, "z": 2}):
    assert call(env, task, arguments).code is Code.OK
    assert simulator.requests[-1].tool_input == arguments
  observation = call(env, task, "no object")
  assert (observation.code, official_code(observation)) == (Code.BAD_ARGUMENTS, 2)


def test_a_session_grades_only_that_there_is_an_answer(layout):
  """The verdict comes after the rollout: a judge in here would be asked once more."""
  env, task = one(layout, api("a"))
  session = env.open(task, 0)
  assert isinstance(session, Session)
  assert isinstance(session, Forkable)
  assert [session.grade(answer) for answer in (None, " ", "anything")] == [0, 0, 1]
  assert call(env, task, {}).text == session.fork().call(ToolCall("a_for_my_tool", {})).text


def tools_folder(tmp_path, name="my_tool", apis=("a",)):
  folder = tmp_path / "tools" / "News_Media"
  folder.mkdir(parents=True)
  entry = {
    "tool_name": "My Tool!",
    "tool_description": "All\nnews {apis}. ",
    "api_list": [
      {
        "name": n,
        "description": "From the environment.",
        "required_parameters": [parameter("here")],
        "optional_parameters": [],
      }
      for n in apis
    ],
  }
  (folder / f"{name}.json").write_text(json.dumps(entry))
  return tmp_path / "tools"


def test_a_tool_environment_gives_schemas_and_descriptions(layout, tmp_path):
  tools = tools_folder(tmp_path)
  env, task = one(layout, api("a", text="old"), api("gone"), tools_folder=tools)
  (spec,) = task.tools
  assert spec.description.endswith("From the environment.")
  assert spec.parameters["required"] == ["here"]
  assert env.missing == ("1: News, Media/My Tool!/gone",)
  assert "1.my_tool: Allnews {apis}.\n" in task.metadata["system"]
  with pytest.raises(ValueError, match=r"G1_x\.json, query 0 \(id 1\): none of its APIs is known"):
    one(layout, api("gone"), tools_folder=tools)
  with pytest.raises(FileNotFoundError, match="tools folder .* does not exist"):
    one(layout, api("a"), tools_folder=tmp_path / "no")


@pytest.mark.parametrize("category", ["..", "../tools", "News_Media/../..", ".", "", "ABSOLUTE"])
def test_no_category_leads_out_of_the_tools_folder(layout, tmp_path, category):
  """A query file with the category ".." read a JSON file beside the folder."""
  tools = tools_folder(tmp_path)
  for outside in (tmp_path, tools, tmp_path / "ABSOLUTE"):
    outside.mkdir(exist_ok=True)
    shutil.copy(tools / "News_Media" / "my_tool.json", outside)
  outside = category.replace("ABSOLUTE", str(tmp_path / "ABSOLUTE"))
  env, _ = one(layout, api("a"), api("a", category=outside), tools_folder=tools)
  assert env.missing == (f"1: {outside}/My Tool!/a",)


def test_a_query_id_that_leads_to_another_folder_is_refused(layout):
  """Answers are written to files of this name."""
  with pytest.raises(ValueError, match=r"query 0: the query id '../x' is no name of a file"):
    ToolBench(layout([query("../x", api("a"))]), Fake(), ["G1_x"])


def test_prompts(layout):
  prompts = Prompts(system="T\n{tools}A {apis}\nN {names}", function="{tool}|{description}")
  _, task = one(layout, api("a"), api("b", tool="Other"), prompts=prompts)
  lines = task.metadata["system"].split("\n")
  assert lines[:3] == ["T", "1.my_tool: None", "2.other: None"]
  functions = ast.literal_eval(lines[3].removeprefix("A "))
  assert [f["name"] for f in functions] == ["a_for_my_tool", "b_for_other", "Finish"]
  assert functions[0]["description"] == "my_tool|Does it."
  assert lines[4] == "N ['a_for_my_tool', 'b_for_other', 'Finish']"
  with pytest.raises(ValueError, match=r"prompts\.system"):
    Prompts(system="none")


@pytest.mark.parametrize(
  ("write", "reason"),
  [
    (lambda f: f.write_text("[{"), "not valid JSON"),
    (lambda f: f.write_text("{}"), "must hold a JSON list"),
    (lambda f: f.write_text("[3]"), "query 0: must be an object"),
    (lambda f: f.write_text('[{"query": "q"}]'), "none of its APIs is known"),
    (lambda f: f.write_text('[{"query": "q", "api_list": [{}]}]'), r"query 0, api_list\[0\]"),
    (lambda f: f.write_text(json.dumps([query(1, api("a"))] * 2)), "id 1 appears twice"),
    (
      lambda f: f.write_text(json.dumps([query(1, api("a", required=[{"x": 1}]))])),
      "entry of required_parameters",
    ),
  ],
)
def test_broken_files_are_named(layout, write, reason):
  folder = layout([])
  write(folder / "solvable_queries" / "test_instruction" / "G1_x.json")
  with pytest.raises(ValueError, match=rf"G1_x\.json.*{reason}"):
    ToolBench(folder, Fake(), ["G1_x"])


def test_unknown_places_are_named(layout, tmp_path):
  with pytest.raises(FileNotFoundError, match="holds no solvable_queries/test_instruction"):
    ToolBench(tmp_path, Fake(), ["G1_x"])
  folder = layout([query(1, api("a"))], ids=[1])
  with pytest.raises(ValueError, match=r"subset 'G9': .*there are G1_x"):
    ToolBench(folder, Fake(), ["G9"])
  with pytest.raises(ValueError, match="ids: query 77 is in none of the subsets G1_x"):
    ToolBench(folder, Fake(), ["G1_x"], ids=[1, 77])
  layout([query(1, api("a"))], ids=[1, 2])
  with pytest.raises(ValueError, match="query 2 is not in"):
    ToolBench(folder, Fake(), ["G1_x"])


@needs_data
def test_the_official_subsets():
  sizes = {"G1_instruction": 163, "G1_category": 153, "G1_tool": 158, "G2_instruction": 106}
  env = ToolBench(DATA, Fake(), list(sizes))
  tasks = env.tasks("heldout")
  for subset, size in sizes.items():
    assert sum(t.metadata["subset"] == subset for t in tasks) == size
  for task in tasks:
    assert len({t.name for t in task.tools}) == len(task.tools)
    assert task.metadata["relevant"], task.id


@needs_data
def test_functions_and_system_text_of_the_official_examples():
  """Schemas equal the answer files' own; their system text is reproduced byte by byte."""
  answers = {}
  for key in ("588", "608", "1073"):
    path = DATA / "data_example/answer/virtual_chatgpt_cot/G1_instruction" / f"{key}_CoT@1.json"
    answers[key] = json.loads(path.read_text())["answer_generation"]["function"][:-1]
  # The wording of a description, from the first function's: its tool and its text are known.
  wording = answers["588"][0]["description"].replace("theclique", "{tool}")
  prompts = Prompts(function=wording.replace("Concert info", "{description}"))
  env = ToolBench(DATA, Fake(), ["G1_instruction"], ids=list(answers), prompts=prompts)
  tasks = {t.metadata["query_id"]: t for t in env.tasks("heldout")}
  for key, task in tasks.items():
    for spec, official in zip(task.tools, answers[key], strict=True):
      assert spec.name == official["name"]
      document = task.metadata["apis"][spec.name]["documentation"]
      if document["required_parameters"] or not document["optional_parameters"]:
        # Elsewhere the official environment loses the optional parameters.
        assert dict(spec.parameters) == official["parameters"]
      if document["api_description"].strip():
        assert spec.description == official["description"]
  path = DATA / "data_example/answer/virtual_chatgpt_dfs/G1_instruction/588_DFS_woFilter_w2.json"
  system = json.loads(path.read_text())["answer_generation"]["train_messages"][0][0]["content"]
  listed = "1.theclique: API for TheClique company\n"
  assert listed in system
  place = "Specifically, you have access to the following APIs: {apis}"
  template = system.replace(listed, "{tools}") + f"\n{place}"
  text = system_text(
    Prompts(system=template), [("theclique", "API for TheClique company")], tasks["588"].tools
  )
  assert text.startswith(system)
  assert text.removeprefix(system).startswith(
    "\nSpecifically, you have access to the following APIs: [{'name': 'songkick_concert_for"
  )
