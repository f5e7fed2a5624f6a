"""--mode=evaluate and --mode=serve on ToolBench, over a small cache and a scripted policy."""

import json
import re
import signal
import subprocess
import sys
import time

import fakes
import httpx
import pytest
import tiny
from simulators.openai_server import Server, completion

from steptool_jax.data.trajectories import read_trajectories
from steptool_jax.rewards.responses import transcript
from steptool_jax.run import evaluate, train
from steptool_jax.run.parts import build, services
from steptool_jax.toolbench import rule_judge, server
from steptool_jax.toolbench.formats import judged
from steptool_jax.toolbench.formats.answers import dfs_method
from steptool_jax.toolbench.formats.converted import read_converted
from steptool_jax.toolbench.simulators.cache import Cache
from steptool_jax.types import Code, Finish, Malformed, Status, ToolCall

FIND = "find_for_ip_lookup"
BERLIN = {"error": "", "response": "Berlin, Germany"}
AGAIN = {"error": "", "response": "Berlin, Germany, by a second look"}
GOOD = "The address in question is in Berlin, Germany."


@pytest.fixture(scope="module")
def bench_folder(tmp_path_factory):
  """Ten queries with one API, ids 1 to 5 held out, and a cache that knows two addresses."""
  folder = tmp_path_factory.mktemp("bench")
  api = {
    "category_name": "Data",
    "tool_name": "ip lookup",
    "api_name": "find",
    "api_description": "Finds the place of an address.",
    "required_parameters": [{"name": "ip", "type": "STRING", "description": "", "default": ""}],
    "optional_parameters": [],
  }
  queries = [
    {
      "query_id": n,
      "query": f"Case {n}: where is the address 10.0.0.1?",
      "api_list": [api],
      "relevant APIs": [["ip lookup", "find"]],
    }
    for n in range(1, 11)
  ]
  path = folder / "solvable_queries/test_instruction/G1_x.json"
  path.parent.mkdir(parents=True)
  path.write_text(json.dumps(queries[:5]))
  path.with_name("G2_x.json").write_text(json.dumps(queries[5:]))
  cached = folder / "cache/Data/ip_lookup_for_Data/find.json"
  cached.parent.mkdir(parents=True)
  cached.write_text(json.dumps({"{'ip': '10.0.0.1'}": BERLIN, "{'ip': '10.0.0.2'}": AGAIN}))
  return folder


def call(ip="10.0.0.1"):
  return ToolCall(FIND, {"ip": ip})


def policy(text):
  """1: call, answer. 2: nonsense. 3: call, gives up; as a sibling another call, answer. 4: a call
  that the cache does not know, then an apology. 5: calls for ever."""
  case = int(re.search(r"Case (\d)", text)[1])
  if case == 2:
    return Malformed("")
  if case == 3:
    if "been at this point before" in text:
      return call("10.0.0.2")
    if "Berlin" not in text:
      return call()
    return Finish(GOOD) if "second look" in text else Finish("", gave_up=True)
  if case == 4:
    return Finish("Sorry, I could not find it.") if "not working" in text else call("10.9.9.9")
  if case == 5 or "Berlin" not in text:
    return call()
  return Finish(GOOD)


def make(folder, compiled, **changes):
  fields = {
    "environment__name": "toolbench",
    "environment__toolbench__folder": str(folder),
    "environment__toolbench__subsets": ("G1_x",),
    "environment__toolbench__train_subsets": ("G2_x",),
    "simulator__cache": str(folder / "cache"),
    "rollout__max_tokens": 1200,
    "rollout__max_step_tokens": 200,
    "rollout__max_steps": 4,
    "train__row_tokens": 1200,
    "evaluation__tasks": 9,
    "compilation_cache": compiled,
  }
  return tiny.make(**(fields | changes))


@pytest.fixture
def scripted(monkeypatch):
  """Evaluates with the scripted policy in place of a model; gives the engine back."""

  def run(config, workdir, policy=policy):
    engines = []

    def build_engine(config, static, mesh):
      size = build.slot_tokens(config)
      engines.append(fakes.ScriptedEngine(static.chat_format, policy, slots=3, size=size))
      return engines[-1]

    monkeypatch.setattr(build, "build_engine", build_engine)
    monkeypatch.setattr(build, "initial_variables", lambda config, policy, mesh: {})
    workdir.mkdir(exist_ok=True)
    summary = evaluate.run(config, workdir)
    assert json.loads((workdir / "summary.json").read_text()) == summary
    return summary, engines[0]

  return run


def read_answers(workdir, method, rollout=0):
  folder = workdir / f"answers/rollout_{rollout}/G1_x"
  return {
    path.name.removesuffix(f"_{method}.json"): json.loads(path.read_text())
    for path in sorted(folder.iterdir())
  }


def test_chains_over_a_cache(bench_folder, tmp_path, compiled, scripted):
  summary, engine = scripted(make(bench_folder, compiled), tmp_path)
  assert (summary["method"], summary["budget_llm_calls"], summary["tasks"]) == ("CoT@1", 4, 5)
  # 2 + 3 nonsense turns + 2 + 2 + the budget of 4
  assert summary["llm_calls_per_task"] == 13 / 5
  assert summary["most_llm_calls"] == 4
  assert summary["answered"] == 2 / 5
  assert summary["gave_up"] == 2 / 5
  assert summary["recall"] == 4 / 5
  # Ten calls and nonsense turns: one call of cases 1 and 3 and four of case 5 were executed.
  assert summary["invocation_success"] == 6 / 10
  assert summary["calls_per_task"] == 10 / 5
  assert summary["simulator"]["cache"]["misses"] == 1
  work = summary["work"]
  assert work["forced_tokens"] == engine.forced > 0
  assert work["prefilled_again_tokens"] == 0
  assert 0 <= work["host_share"] <= 1

  records = list(read_trajectories(tmp_path / "trajectories.jsonl"))
  assert [r.metadata["query_id"] for r in records] == ["1", "2", "3", "4", "5"]
  solved = [rule_judge.coverage(transcript(r.query, r.trajectory)) for r in records]
  assert solved == [r.trajectory.solved for r in records] == [1, 0, 0, 0, 0]
  assert summary["pass_rate"] == summary["subsets"]["G1_x"]["pass_rate"] == 1 / 5
  assert summary["pass_rate_interval"][0] < 1 / 5 < summary["pass_rate_interval"][1]
  for figure in (summary["figure"], summary["subsets"]["G1_x"]["figure"]):
    assert "20.0 % of 5 tasks" in figure
    assert "rule judge, against GPT-4 on 1140 results: accuracy 0.784" in figure
  first = records[0].trajectory
  # The first call's result stands in the answer, so the step rules give it credit.
  assert first.steps[0].success_calling == 1
  assert first.steps[0].contribution > 0
  assert first.steps[-1].reward == 1

  answers = read_answers(tmp_path, "CoT@1")
  assert set(answers) == {"1", "2", "3", "4", "5"}
  assert answers["1"]["win"] is True
  assert answers["5"]["forward_args"]["max_llm_calls"] == 4
  converted = read_converted(tmp_path / "converted/rollout_0/G1_x.json")
  assert set(converted) == set(answers)
  assert GOOD in json.dumps(
    json.loads((tmp_path / "converted/rollout_0/G1_x.json").read_text())["1"]["answer"]
  )
  verdicts = judged.read_results(tmp_path / "pass_rate/rollout_0/G1_x_rollout_0.json")
  scores = [verdict.score for result in verdicts.values() for verdict in result.verdicts]
  assert scores == solved
  for result, record in zip(verdicts.values(), records, strict=True):
    assert result.transcript.answer == transcript(record.query, record.trajectory).answer


def test_a_tree_search_over_a_cache_under_the_same_budget(
  bench_folder, tmp_path, compiled, scripted
):
  config = make(
    bench_folder,
    compiled,
    rollout__strategy="dfsdt",
    rollout__max_steps=3,
    rollout__budget=6,
    rollout__search__room=700,
  )
  summary, engine = scripted(config, tmp_path)
  method = dfs_method(build.build_search(config))
  assert (summary["method"], summary["budget_llm_calls"]) == (method, 6)
  assert summary["most_llm_calls"] == 6  # case 5 spends all
  assert summary["pass_rate"] == 2 / 5  # case 3 is solved at its second try
  work = summary["work"]
  assert work["forced_tokens"] == engine.forced
  assert work["diversity_tokens"] > 0
  assert work["replaced_tokens"] > 0
  assert work["prefilled_again_tokens"] == 0
  answers = read_answers(tmp_path, method)
  assert answers["3"]["win"] is True
  assert answers["5"]["answer_generation"]["query_count"] == 6
  assert set(read_converted(tmp_path / "converted/rollout_0/G1_x.json")) == set(answers)
  records = list(read_trajectories(tmp_path / "trajectories.jsonl"))
  assert records[4].metadata | {"llm_calls": 6} == records[4].metadata
  # The report draws the tree and the tokens.
  nodes = records[4].metadata["search"]["nodes"]
  assert len(nodes) == 6
  assert nodes[0]["parent"] == -1
  assert nodes[0]["action"].keys() & {"call", "malformed", "finish"}
  steps = records[2].trajectory.steps
  assert [len(t) for t in records[2].metadata["texts"]] == [len(step.tokens) for step in steps]
  assert records[2].trajectory.status is Status.ANSWERED


def test_the_win_rate_over_another_evaluation(bench_folder, tmp_path, compiled, scripted):
  config = make(bench_folder, compiled)
  scripted(config, tmp_path / "a", lambda text: policy(text.replace("Case 1", "Case 4")))
  better = tiny.replace(config, evaluation__against=str(tmp_path / "a"))
  wins = scripted(better, tmp_path / "b")[0]["win_rate"]
  assert (wins["wins"], wins["ties"], wins["losses"]) == ([0.2, 0], [0.8, 0], [0, 0])
  assert (wins["tasks"], wins["their_method"], wins["their_budget_llm_calls"]) == (5, "CoT@1", 4)
  assert "win rate 20.0 % (rule judge" in wins["figure"]
  with pytest.raises(FileNotFoundError, match=r"against: .*nowhere/trajectories\.jsonl does not"):
    scripted(tiny.replace(config, evaluation__against="/nowhere"), tmp_path / "c")
  one = tiny.replace(config, environment__toolbench__ids=("1",))
  scripted(one, tmp_path / "a")
  with pytest.raises(ValueError, match=r"lacks 4 of 5 tasks, the first is toolbench/G1_x/2"):
    scripted(better, tmp_path / "c")


def test_cot_at_n_spends_one_budget(bench_folder, tmp_path, compiled, scripted):
  config = make(
    bench_folder,
    compiled,
    evaluation__attempts=3,
    evaluation__rollouts=2,
    evaluation__temperature=1.0,
    rollout__budget=5,
  )
  tries = {"1": 0}

  def second_try_works(text):
    if "Case 1" in text and "Berlin" not in text:
      tries["1"] += 1
      return Finish("", gave_up=True) if tries["1"] == 1 else call()
    return policy(text)

  summary, _ = scripted(config, tmp_path, second_try_works)
  assert (summary["method"], summary["rollouts"]) == ("CoT@3", 2)
  answers = [read_answers(tmp_path, "CoT@3", k) for k in (0, 1)]
  # Case 1: gave up (1 call), then 2 calls; in the second rollout 2 calls at once.
  tried = [len(a["1"]["trys"]) for a in answers]
  assert tried == [2, 1]
  assert answers[0]["1"]["answer_generation"]["query_count"] == 3
  # Case 2: 3 nonsense turns, then the 2 calls that are left. Case 3: 2 calls, 2 calls, 1 call.
  assert [len(answers[0][n]["trys"]) for n in "2345"] == [2, 3, 1, 2]
  counts = [answers[0][n]["answer_generation"]["query_count"] for n in "2345"]
  assert counts == [5, 5, 2, 5]
  assert answers[0]["2"]["forward_args"] == {
    "max_llm_calls": 5,
    "max_chain_llm_calls": 4,
    "pass_at": 3,
    "answer": 1,
  }
  assert summary["most_llm_calls"] == 5
  assert summary["work"]["prefilled_again_tokens"] == 0
  records = list(read_trajectories(tmp_path / "trajectories.jsonl"))
  assert [r.metadata["rollout"] for r in records] == [0] * 5 + [1] * 5
  assert records[0].trajectory.status is records[5].trajectory.status is Status.ANSWERED
  assert (records[0].trajectory.sample, records[5].trajectory.sample) == (1, 3)
  assert summary["variance"]["within_task"] == 0


def test_a_real_tiny_model_searches(bench_folder, tmp_path, compiled):
  config = make(
    bench_folder,
    compiled,
    rollout__strategy="dfsdt",
    rollout__budget=5,
    rollout__max_step_tokens=16,
    rollout__search__room=300,
    evaluation__temperature=1.0,
  )
  summary = evaluate.run(config, tmp_path)
  assert summary["scored_tasks"] == 5
  assert 1 <= summary["most_llm_calls"] <= 5
  assert summary["work"]["prefilled_again_tokens"] == 0
  assert summary["work"]["device_share"] > 0.5
  assert len(list((tmp_path / "answers/rollout_0/G1_x").iterdir())) == 5


def test_rl_learns_from_the_verdicts(bench_folder, tmp_path, compiled):
  config = make(
    bench_folder,
    compiled,
    sft__steps=0,
    train__iterations=1,
    rollout__max_step_tokens=12,
    evaluation__tasks=1,
  )
  # A rule that a policy is paid by is learnt, and not the task.
  with pytest.raises(ValueError, match=r"config\.judge\.kind: 'rule' is for evaluation"):
    train.run(config, tmp_path)
  with Server(lambda body, number: verdict("solved")) as judge:
    config = tiny.replace(
      config,
      judge__kind="llm",
      judge__runs=1,
      judge__endpoint__base_url=judge.url,
      judge__endpoint__model="judge-1",
    )
    summary = train.run(config, tmp_path)
  assert summary["conversations"] == 8
  assert summary["judge"]["kind"] == "llm"
  with pytest.raises(ValueError, match=r"config\.rollout\.strategy: 'dfsdt' is for --mode=eval"):
    train.run(tiny.replace(config, rollout__strategy="dfsdt"), tmp_path)


# --- servers ---------------------------------------------------------------------------------


def verdict(word):
  return completion(arguments={"reasons": "", "verdict": word}, name="report_verdict")


def test_an_llm_judge(bench_folder, tmp_path, compiled, scripted, monkeypatch):
  """Verdicts by run; where the judge fails, the task is named and nobody's failure."""

  def judge(body, number):
    del number
    shown = json.loads(body["messages"][1]["content"])
    if "Case 4" in shown["query"]:
      return (400, {}, "refused")
    return verdict("solved" if "calls" in shown else "unsure")

  monkeypatch.setenv("JUDGE_KEY", "secret-key")
  with Server(judge) as server:
    config = make(
      bench_folder,
      compiled,
      judge__kind="llm",
      judge__runs=2,
      judge__endpoint__base_url=server.url,
      judge__endpoint__model="judge-1",
      judge__endpoint__api_key_variable="JUDGE_KEY",
      judge__endpoint__cache=str(tmp_path / "replies"),
      judge__endpoint__prompt_price=10.0,
    )
    summary, _ = scripted(config, tmp_path / "a")
    asked = len(server.bodies)
    again, _ = scripted(config, tmp_path / "b")
    assert "Bearer secret-key" in server.headers[0][1].values()
  assert summary["left_out"] == ["toolbench/G1_x/4"]
  assert summary["scored_tasks"] == 4
  assert summary["pass_rate"] == again["pass_rate"] == 1 / 4
  assert "(judged by judge-1, 2 runs)" in summary["figure"]
  usage = summary["judge"]["usage"]
  assert usage["calls"] == 4  # two looks in each of two runs
  assert usage["cost_usd"] == pytest.approx(usage["prompt_tokens"] * 10e-6)
  assert again["judge"]["usage"]["cached_calls"] == 4
  assert asked == 4 + 2  # and case 4, refused in both runs
  assert set(read_answers(tmp_path / "a", "CoT@1")) == {"1", "2", "3", "5"}
  text = "".join(p.read_text(errors="ignore") for p in tmp_path.rglob("*") if p.is_file())
  assert "secret-key" not in text


def test_cache_then_http_then_llm_and_what_they_say_is_kept(
  bench_folder, tmp_path, compiled, scripted, monkeypatch
):
  """Our own server (over the cache) stands for http; it does not know 10.9.9.9."""
  monkeypatch.setattr(services, "HTTP_RETRIES", 0)
  asked = []

  class Misses:
    def answer(self, request):
      asked.append(request.tool_input)
      return cache.answer(request)

  cache = Cache(bench_folder / "cache")
  config = make(
    bench_folder, compiled, simulator__cache="", simulator__writable_cache=str(tmp_path / "new")
  )
  with server.Server(Misses(), "127.0.0.1", 0) as own:
    config = tiny.replace(config, simulator__http=f"http://127.0.0.1:{own.port}/virtual")
    summary, _ = scripted(config, tmp_path / "a")
  assert summary["infrastructure_errors"] == 0
  # Six calls; those that three slots make at the same time may all come too early for the cache.
  assert 1 <= asked.count({"ip": "10.0.0.1"}) <= 3
  assert asked.count({"ip": "10.9.9.9"}) == 1
  assert summary["simulator"]["cache"]["appended"] == 1
  # The server is gone now: what was kept is answered, the rest is infrastructure.
  summary, _ = scripted(config, tmp_path / "b")
  assert summary["left_out"] == ["toolbench/G1_x/4"]
  assert set(read_answers(tmp_path / "b", "CoT@1")) == {"1", "2", "3", "5"}

  def api(body, number):
    del number
    assert "Finds the place" in body["messages"][1]["content"]
    return completion(json.dumps({"error": "", "response": "not working hours in Oslo"}))

  with Server(api) as model:
    config = tiny.replace(
      config,
      simulator__http="",
      simulator__llm__base_url=model.url,
      simulator__llm__model="api-1",
    )
    summary, _ = scripted(config, tmp_path / "c")
  assert len(model.bodies) == 1
  assert summary["simulator"]["llm"]["calls"] == 1
  assert summary["left_out"] == []


def test_serve_until_sigterm(bench_folder, tmp_path, compiled):
  flags = [
    "--mode=serve",
    "--config.environment.name=nested_api",
    "--config.serve.port=0",
    f"--config.simulator.cache={bench_folder / 'cache'}",
  ]
  command = tiny.command(tmp_path, *flags)
  process = subprocess.Popen(
    command, env=tiny.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  try:
    path = tmp_path / "summary.json"
    deadline = time.monotonic() + 90
    while not path.exists():
      assert process.poll() is None, process.communicate()[1]
      assert time.monotonic() < deadline
      time.sleep(0.1)
    summary = json.loads(path.read_text())
    assert summary["running"] is True
    body = {
      "category": "Data",
      "tool_name": "ip_lookup",
      "api_name": "find",
      "tool_input": {"ip": "10.0.0.1"},
      "strip": "filter",
      "toolbench_key": "",
    }
    assert httpx.post(summary["url"], json=body).json() == BERLIN
    assert httpx.post(summary["url"], json=body | {"tool_input": {}}).json()["error"]
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
  finally:
    process.kill()
  assert process.returncode == 0, err
  assert "Traceback" not in err
  summary = json.loads(path.read_text())
  assert (summary["running"], summary["requests"]) == (False, 2)
  assert summary["cache"]["exact_hits"] == 1
  assert "requests: 2" in out


# --- stored results --------------------------------------------------------------------------


def test_the_published_figures_by_the_command(tmp_path, shared):
  runs = shared / "steptool/pass_rate_results"
  done = tiny.main(
    tmp_path,
    "--mode=evaluate",
    f"--config.evaluation.stored={runs}",
    config=f"{tiny.ROOT}/configs/stabletoolbench.py",
  )
  assert done.returncode == 0, done.stderr
  summary = json.loads((tmp_path / "summary.json").read_text())
  published = summary["published_aggregation"]
  assert published["toolllama_sft_cot"] == {"I1": [50.6, 1.6]}
  assert published["baseline-ppo_cot"] == {"I1": [50.9, 1.0]}
  assert published["baseline-ppo_dfs"] == {"I1": [59.6, 1.1]}
  assert summary["subsets"]["baseline-ppo_cot"]["G1_category"] == [50.4, 0.6, 153]
  assert {"run": "baseline-eto_cot", "group": "I1", "why": ["G1_category is missing"]} in (
    summary["incomplete"]
  )


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"environment__toolbench__folder": ""}, r"toolbench\.folder: is empty, needed"),
    ({"environment__toolbench__subsets": ()}, r"toolbench\.subsets: is empty"),
    ({"environment__mcp": ("server",)}, r"environment\.mcp: is for environment 'custom'"),
    (
      {"environment__mcp_shared": True},
      r"environment\.mcp_shared: set, but environment\.mcp names",
    ),
    (
      {"simulator__http": "host:80"},
      r"config\.simulator\.http is 'host:80': give http://host:port",
    ),
    ({"simulator__http": "http://me:pw@host"}, r"config\.simulator\.http: .* password"),
    ({"judge__endpoint__base_url": "//pw@host"}, r"config\.judge\.endpoint\.base_url: .* password"),
    (
      {
        "environment__mcp": ("http://pw@x",),
        "environment__name": "custom",
        "environment__tasks": "x",
      },
      r"config\.environment\.mcp: .* password",
    ),
    ({"serve__host": ""}, r"config\.serve\.host: is empty; name 0\.0\.0\.0"),
    ({"serve__port": 70000}, r"serve\.port: must be at most 65535"),
    (
      {"evaluation__against": "x", "environment__name": "nested_api"},
      r"evaluation\.against: a win rate needs a judge",
    ),
    ({"judge__kind": "llm2"}, r"judge\.kind: 'llm2' is not one of"),
    ({"simulator__llm_style": "chat"}, r"simulator\.llm_style: 'chat'"),
    ({"rollout__strategy": "cot"}, r"rollout\.strategy: 'cot'"),
    ({"rollout__budget": -1}, r"rollout\.budget: must not be negative"),
    ({"rollout__search__width": 0}, r"rollout\.search\.width: must be above 0"),
    ({"evaluation__attempts": 2}, r"attempts: 2, but at temperature 0 all are the same"),
    ({"evaluation__rollouts": 2}, r"rollouts: 2, but at temperature 0 all are the same"),
    (
      {"evaluation__attempts": 2, "rollout__strategy": "dfsdt", "evaluation__temperature": 1.0},
      r"attempts: 2, but 'dfsdt' searches a task once",
    ),
  ],
)
def test_bad_fields(bench_folder, changes, words):
  with pytest.raises(ValueError, match=words):
    make(bench_folder, "", **changes)


@pytest.mark.parametrize(
  ("changes", "kind", "words"),
  [
    ({"simulator__cache": ""}, ValueError, r"config\.simulator: there is none; set at least one"),
    ({"simulator__cache": "/nowhere"}, OSError, r"cache folder /nowhere does not exist"),
    (
      {"simulator__toolbench_key_variable": "NO_SUCH_KEY"},
      ValueError,
      r"toolbench_key_variable: the environment variable NO_SUCH_KEY is not set",
    ),
    ({"judge__kind": "llm"}, ValueError, r"config\.judge\.endpoint: base_url is ''"),
    (
      {"simulator__llm__base_url": "http://x/v1"},
      ValueError,
      r"config\.simulator\.llm: model is empty",
    ),
    (
      {"simulator__llm__base_url": "http://x/v1", "simulator__llm__api_key_variable": "NO_KEY"},
      ValueError,
      r"simulator\.llm\.api_key_variable: the environment variable NO_KEY is not set",
    ),
    ({"environment__toolbench__ids": ("77",)}, ValueError, r"ids: query 77 is in none"),
    (
      {"environment__toolbench__subsets": ("G9",)},
      ValueError,
      r"subset 'G9': .*there are G1_x, G2_x",
    ),
    ({"environment__toolbench__tools": "/nowhere"}, OSError, r"tools folder /nowhere"),
    ({"environment__toolbench__prompt": "/nowhere"}, OSError, r"/nowhere"),
    ({"evaluation__stored": "/nowhere"}, OSError, r"evaluation\.stored: there is no folder"),
  ],
)
def test_bad_folders_and_addresses(bench_folder, tmp_path, compiled, changes, kind, words):
  with pytest.raises(kind, match=words):
    evaluate.run(make(bench_folder, compiled, **changes), tmp_path)


def test_every_task_in_an_infrastructure_error_is_no_pass_rate(
  bench_folder, tmp_path, compiled, scripted, monkeypatch
):
  monkeypatch.setattr(services, "HTTP_RETRIES", 0)
  config = make(
    bench_folder,
    compiled,
    environment__toolbench__ids=("1",),
    simulator__cache="",
    simulator__http="http://127.0.0.1:9/virtual",
    rollout__tool_retries=0,
  )
  with pytest.raises(RuntimeError, match="every task ended in an infrastructure error"):
    scripted(config, tmp_path)
  assert not (tmp_path / "summary.json").exists()


def test_the_prompt_of_a_file(bench_folder, tmp_path, compiled):
  path = tmp_path / "prompt.txt"
  config = make(bench_folder, compiled, environment__toolbench__prompt=str(path))
  path.write_text("Functions: {names}")
  with services.open_services(config) as found:
    (task, *_) = build.build_environment(config, found).tasks("heldout")
  assert task.metadata["system"] == f"Functions: ['{FIND}', 'Finish']"
  path.write_text("no place")
  with (
    services.open_services(config) as found,
    pytest.raises(ValueError, match=r"toolbench\.prompt: .*must contain \{apis\} or \{names\}"),
  ):
    build.build_environment(config, found)


# --- MCP -------------------------------------------------------------------------------------


CHECKERS = """
def counted(answer, tools, wanted):
  return tools["count"]() == str(wanted)
"""


def test_tasks_over_the_tools_of_an_mcp_server(tmp_path):
  """Conversations shared the server's state, and no checker could look at it."""
  pytest.importorskip("mcp", reason="the optional package mcp is missing")
  server = tiny.ROOT / "tests/simulators/mcp_plain_server.py"
  checker = {"type": "counted", "wanted": 2}
  line = {"id": "t", "query": "Count.", "checker": checker, "split": "heldout"}
  (tmp_path / "tasks.jsonl").write_text(json.dumps(line) + "\n")
  (tmp_path / "checkers.py").write_text(CHECKERS)
  (tmp_path / "tools.py").write_text(f"TOOLS = []\n{CHECKERS}")
  config = tiny.make(
    environment__name="custom",
    environment__mcp=(sys.executable, str(server)),
    environment__functions=str(tmp_path / "checkers.py"),
    environment__tasks=str(tmp_path / "tasks.jsonl"),
  )
  with services.open_services(config) as found:
    environment = build.build_environment(config, found)
    (task,) = environment.tasks("heldout")
    first, second = environment.open(task, 0), environment.open(task, 1)
    assert first.call(ToolCall("count", {})).text == "1"
    assert first.call(ToolCall("double", {"a": "x" * 3})).code is Code.BAD_ARGUMENTS
    assert [session.grade("done") for session in (first, second)] == [1, 0]
    second.close()
    assert second.call(ToolCall("count", {})).code is Code.INFRASTRUCTURE
    with pytest.raises(ValueError, match=r"tools.py has TOOLS, and there is an MCP server"):
      build.build_environment(
        tiny.replace(config, environment__functions=str(tmp_path / "tools.py")), found
      )
  assert first.call(ToolCall("count", {})).code is Code.INFRASTRUCTURE
  shared = tiny.replace(config, environment__mcp_shared=True)
  with services.open_services(shared) as found:
    environment = build.build_environment(shared, found)
    for number in (1, 2):
      session = environment.open(task, number)
      assert session.call(ToolCall("count", {})).text == str(number)
      session.close()
  with (
    pytest.raises(OSError, match="did not start"),
    services.open_services(tiny.replace(config, environment__mcp=("/no/such/server",))),
  ):
    pass


def test_keys_come_clean_from_their_variables(monkeypatch):
  """A mounted secret ends in a line end, which no header can hold; others are refused unseen."""
  monkeypatch.setenv("KEY", "sk-1\n")
  assert services.secret("KEY", "x.key_variable") == "sk-1"
  assert services.secret("", "x.key_variable") == ""
  monkeypatch.setenv("KEY", "sk-1\nsk-2")
  with pytest.raises(
    ValueError, match=r"config\.x\.key_variable: the variable KEY holds"
  ) as caught:
    services.secret("KEY", "x.key_variable")
  assert "sk-" not in str(caught.value)
  monkeypatch.setenv("KEY", " \n")
  with pytest.raises(ValueError, match="KEY is not set, or empty"):
    services.secret("KEY", "x.key_variable")
