"""--mode=annotate: from stored trajectories to annotated ones."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import stored
import tiny
from rewards.replays import replay, step
from simulators.openai_server import Server, completion
from toolbench.official_rows import OBSERVED

from steptool_jax.config import Rewards
from steptool_jax.data import annotated_trajectories
from steptool_jax.data.trajectories import (
  AnnotatedTrajectory,
  read_trajectories,
  write_trajectories,
)
from steptool_jax.data.trajectories import dump as dump_record
from steptool_jax.rewards import responses, rules, shaping
from steptool_jax.rewards.scores import StepScores, apply
from steptool_jax.run import annotate
from steptool_jax.run.parts import build, services
from steptool_jax.types import (
  Code,
  Finish,
  Malformed,
  Observation,
  Status,
  ToolCall,
  ToolCalls,
  Trajectory,
)

CALL = {"name": "rain_for_sky", "arguments": '{"place": "Oslo"}', "response": OBSERVED}
FINISH = {
  "name": "Finish",
  "arguments": '{"return_type": "give_answer", "final_answer": "Light rain."}',
  "response": "",
}


def converted(calls, query="Will it rain in Oslo?"):
  """One entry of an official converted file."""
  nodes = [("system", ""), ("user", ""), *(("tool", call) for call in calls)]
  details = []
  for role, message in reversed(nodes):
    details = [{"role": role, "message": message, "next": details}]
  return {
    "query": query,
    "available_tools": [{"function": {"name": n}} for n in ("rain_for_sky", "Finish")],
    "answer": {
      "method": "CoT@1",
      "total_steps": len(nodes),
      "final_answer": "",
      "answer_details": details,
    },
  }


def annotation(calls, runs, query="Will it rain in Oslo?"):
  """One entry of an official annotation file; runs: (SC, Con, verdict) each."""
  *steps, final = calls
  return {
    "query": query,
    "tool_names": ["rain_for_sky", "Finish"],
    "answer_steps": [f"Step {k}: {call!r}" for k, call in enumerate(steps, start=1)],
    "process_reward": {
      str(k): {"succeed_tool_calling": sc, "contributions": con}
      for k, (sc, con, _) in enumerate(runs)
    },
    "final_step": f"Final step: {final!r}",
    "is_solved": {str(k): f"AnswerStatus.{run[2]}" for k, run in enumerate(runs)},
  }


def dump(path, document):
  path.write_text(json.dumps(document))
  return str(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  texts = [json.dumps(CALL), json.dumps(FINISH)]
  return stored.tokenizer(tmp_path_factory.mktemp("tokens") / "tokenizer", texts)


@pytest.fixture
def config(tokenizer):
  def make(source, **changes):
    base = {
      "model__tokenizer": str(tokenizer),
      "model__chat_format": "chatml_react",
      "train__row_tokens": 4096,
      "rewards__shaping": "sum",
      "annotate__source": source,
    }
    return tiny.make(**(base | changes))

  return make


def annotated(workdir):
  return list(read_trajectories(workdir / "annotated.jsonl"))


def rewards(record):
  return [step.reward for step in record.trajectory.steps]


RUNS = (([1, 0], [5, 1], "Solved"), ([1, 1], [4, 0], "Unsure"), ([0, 1], [3, 2], "Unsolved"))
REWARDS = [0.5 * 2 / 3 + 0.5 * 12 / 3 / 5, 0.5 * 2 / 3 + 0.5 * 3 / 3 / 5, 0.5]


@pytest.mark.parametrize("kind", ["annotations", "converted"])
def test_a_table_gives_the_released_numbers(kind, config, tmp_path):
  calls = [CALL, CALL, FINISH]
  table = dump(tmp_path / "table.json", {"7": annotation(calls, RUNS)})
  changes = {"annotate__input": table, "annotate__format": kind}
  if kind == "converted":
    changes["annotate__table"] = table
    changes["annotate__input"] = dump(tmp_path / "in.json", {"7": converted(calls)})
  summary = annotate.run(config("table", **changes), tmp_path)
  (record,) = annotated(tmp_path)
  assert rewards(record) == pytest.approx(REWARDS)
  assert record.trajectory.solved == pytest.approx(0.5)
  first = record.trajectory.steps[0]
  assert (first.success_calling, first.contribution) == pytest.approx((2 / 3, 0.8))
  assert record.trajectory.task_id == "7"
  assert not record.logprobs_known
  assert record.metadata["annotation"] == {
    "source": "table",
    "alpha": 1.0,
    "shaping": "sum",
    "weight": 1.0,
  }
  assert json.loads((tmp_path / "summary.json").read_text()) == summary
  assert (summary["trajectories"], summary["annotated"], summary["runs"]) == (1, 1, 3)
  assert summary["calls"] == 2
  assert summary["mean_success_calling"] == pytest.approx(2 / 3)
  assert summary["mean_contribution"] == pytest.approx(0.5)
  assert summary["mean_reward"] == pytest.approx(sum(REWARDS))


def test_alpha_and_shaping_are_those_of_the_config(config, tmp_path):
  table = dump(tmp_path / "table.json", {"7": annotation([CALL, CALL, FINISH], RUNS)})
  changes = {"annotate__input": table, "annotate__format": "annotations"}
  changes |= {"rewards__alpha": 3.0, "rewards__shaping": "episode_mean"}
  annotate.run(config("table", **changes), tmp_path)
  expected = [(3 * 2 / 3 + 0.8) / 4 / 2, (3 * 2 / 3 + 0.2) / 4 / 2, 0.5]
  assert rewards(annotated(tmp_path)[0]) == pytest.approx(expected)


@pytest.mark.parametrize("shaping", ["progress", "potential"])
def test_what_the_goal_needs_is_not_known_of_stored_trajectories(shaping, config, tmp_path):
  """Counted against a goal of one call, the first call that helps would earn everything."""
  table = dump(tmp_path / "table.json", {"7": annotation([CALL, FINISH], RUNS)})
  changes = {"annotate__input": table, "annotate__format": "annotations"}
  with pytest.raises(
    ValueError, match=r"rewards\.shaping: .*use 'sum', as the release, or 'prefix"
  ):
    annotate.run(config("table", rewards__shaping=shaping, **changes), tmp_path)


def test_stored_calls_become_one_conversation(config, tmp_path):
  """Prompt with the function names, empty thoughts, as the released training rows spell it."""
  broken = CALL | {"arguments": "{no"}
  document = {"7": converted([CALL, broken, FINISH]), "8": converted([CALL, CALL])}
  changes = {"annotate__input": dump(tmp_path / "in.json", document)}
  settings = config("rules", annotate__format="converted", **changes)
  annotate.run(settings, tmp_path)
  codec = build.build_chat_format(settings, tmp_path).codec
  whole, cut = (record.trajectory for record in annotated(tmp_path))
  prompt = codec.decode(whole.prompt_tokens)
  assert "Specifically, you have access to the following APIs: ['rain_for_sky', 'Finish']" in prompt
  assert "\nWill it rain in Oslo?\nBegin!\n" in prompt
  first, second, last = whole.steps
  assert codec.decode(first.tokens[:-1]) == (
    'Thought: \nAction: rain_for_sky\nAction Input: {"place": "Oslo"}'
  )
  assert (first.action, first.observation.text) == (
    ToolCall("rain_for_sky", {"place": "Oslo"}),
    OBSERVED,
  )
  assert isinstance(second.action, Malformed)
  assert second.observation.code is Code.MALFORMED
  assert isinstance(last.action, Finish)
  assert (last.observation, len(last.observation_tokens)) == (None, 0)
  assert (whole.status, cut.status) == (Status.ANSWERED, Status.STEP_BUDGET)
  assert [s.observation.text for s in cut.steps] == [OBSERVED] * 2
  assert cut.steps[0].observation_tokens.tolist() == cut.steps[1].observation_tokens.tolist()
  assert OBSERVED in codec.decode(cut.steps[1].observation_tokens)


def test_what_official_files_do_not_hold_is_counted(config, tmp_path):
  bad_finish = FINISH | {"arguments": "{cut"}
  document = {
    "1": converted([CALL, FINISH]),
    "2": converted([CALL, CALL | {"name": ""}, FINISH]),
    "3": converted([CALL, bad_finish]),
    "4": converted([]),
    "5": converted([CALL | {"response": "x" * 9000}, FINISH]),
  }
  changes = {"annotate__input": dump(tmp_path / "in.json", document)}
  changes |= {"annotate__format": "converted", "train__row_tokens": 1000}
  summary = annotate.run(config("rules", **changes), tmp_path)
  assert [r.trajectory.task_id for r in annotated(tmp_path)] == ["1"]
  assert (summary["trajectories"], summary["annotated"]) == (5, 1)
  assert summary["left_out"] == {"too_long": 1, "unusable": 3}
  assert "rule judge" in summary["is_solved_by"]
  assert "kappa" in summary["is_solved_by"], "no verdict of a rule without its agreement"
  named = " ".join(summary["left_out_names"]["unusable"])
  for words in ("2 (a turn names no function", "3 (the arguments of Finish", "4 (it has no call"):
    assert words in named


# --- rules -----------------------------------------------------------------------------------


@pytest.fixture
def replayed(tmp_path):
  """(environment, tasks, path) of demonstrated trajectories; one ended in a fault of a tool."""
  environment = build.build_environment(tiny.make())
  tasks = list(environment.tasks("train"))[:4]
  made = [replay(environment, task, task.demonstration) for task in tasks]
  made[3] = dataclasses.replace(made[3], status=Status.INFRASTRUCTURE_ERROR)
  records = [
    AnnotatedTrajectory(t, query=task.query, metadata={"kept": task.id})
    for task, t in zip(tasks, made, strict=True)
  ]
  path = tmp_path / "t.jsonl"
  write_trajectories(path, records)
  return tasks, made, str(path)


def test_the_rules_of_the_environment(replayed, config, tmp_path):
  tasks, made, path = replayed
  changes = {"annotate__input": path, "annotate__rule": "environment"}
  summary = annotate.run(config("rules", **changes), tmp_path)
  records = annotated(tmp_path)
  expected = [
    shaping.shape(rules.annotate(task, t), Rewards(shaping="sum"))
    for task, t in zip(tasks[:3], made[:3], strict=True)
  ]
  assert [rewards(r) for r in records] == [[s.reward for s in t.steps] for t in expected]
  assert all(sum(rewards(r)) > 1 for r in records)
  assert [r.metadata["kept"] for r in records] == [task.id for task in tasks[:3]]
  assert summary["left_out"] == {"infrastructure_error": 1}
  changes |= {"environment__name": "data_pipeline", "environment__min_calls": 3}
  changes |= {"environment__max_calls": 4, "environment__tools_per_task": 0}
  settings = config("rules", **changes)
  with pytest.raises(ValueError, match=r"annotate\.rule: 3 trajectories are of no task of env"):
    annotate.run(settings, tmp_path)


@pytest.mark.parametrize("rule", ["evidence", "lcs"])
def test_the_rules_on_texts_keep_the_verdict(rule, replayed, config, tmp_path):
  tasks, made, path = replayed
  annotate.run(config("rules", annotate__input=path, annotate__rule=rule), tmp_path)
  for task, before, record in zip(tasks, made, annotated(tmp_path), strict=False):
    expected = shaping.shape(responses.score(task.query, before, rule), Rewards(shaping="sum"))
    assert rewards(record) == [s.reward for s in expected.steps]
    assert record.trajectory.solved == before.solved == 1.0


# --- judge -----------------------------------------------------------------------------------


def grades(sc, con, status):
  names = ("succeed_tool_calling", "contribution_to_final_answer", "final_answer_status")
  return completion(arguments=dict(zip(names, (sc, con, status), strict=True)))


@pytest.fixture(autouse=True)
def asked_once(monkeypatch):
  """A judge is asked in order and not again, so that what it says can be counted."""
  monkeypatch.setattr(services, "LLM_RETRIES", 0)
  monkeypatch.setattr(services, "IN_FLIGHT", 1)


def judge_config(config, server, path, **changes):
  settings = {
    "annotate__input": path,
    "annotate__format": "converted",
    "judge__kind": "llm",
    "judge__endpoint__base_url": server.url,
    "judge__endpoint__model": "m",
    "judge__endpoint__prompt_price": 2.0,
    "judge__endpoint__completion_price": 10.0,
  }
  return config("judge", **(settings | changes))


def test_the_judge_over_loopback(config, tmp_path):
  """Mean of three runs by the formula; failures are left out; a second run asks only for those."""
  queries = ("fine", "broken", "prose")
  document = {q: converted([CALL, CALL, FINISH], f"{q} query") for q in queries}
  path = dump(tmp_path / "in.json", document)
  given = []

  def behaviour(body, _):
    text = body["messages"][1]["content"]
    if "broken" in text:
      return (500, {}, "down")
    if "prose" in text:
      return completion("Both calls were fine, I think.")
    given.append(RUNS[len(given)])
    return grades(*given[-1])

  with Server(behaviour) as server:
    summary = annotate.run(judge_config(config, server, path), tmp_path)
  (record,) = annotated(tmp_path)
  assert record.trajectory.task_id == "fine"
  assert len(given) == 3
  assert rewards(record) == pytest.approx(REWARDS)
  assert (summary["trajectories"], summary["annotated"]) == (3, 1)
  assert summary["left_out"] == {"too_long": 0, "unusable": 0, "judge_failed": 2}
  named = " ".join(summary["left_out_names"]["judge_failed"])
  assert "status 500" in named
  assert "no valid grades" in named
  usage = summary["usage"]
  assert usage["calls"] == 12  # 3 and, for prose, 3 runs of 3 replies
  assert usage["cost_usd"] == pytest.approx(12 * (100 * 2 + 20 * 10) / 1e6)

  with Server(lambda body, _: grades([1, 1], [5, 5], "Solved")) as server:
    again = annotate.run(judge_config(config, server, path), tmp_path)
    asked = [body["messages"][1]["content"] for body in server.bodies]
  assert len(asked) == 6
  assert not any("fine query" in text for text in asked)
  assert again["usage"]["cached_calls"] == 3
  assert rewards(annotated(tmp_path)[0]) == pytest.approx(REWARDS)
  assert [rewards(r) for r in annotated(tmp_path)[1:]] == [pytest.approx([1, 1, 1])] * 2
  assert again["left_out"]["judge_failed"] == 0


def test_a_judge_that_is_down_ends_the_run(config, tmp_path):
  path = dump(tmp_path / "in.json", {"7": converted([CALL, FINISH])})
  down = r"judge failed on all 1 .*status 503.*run the same"
  with (
    Server(lambda body, _: (503, {}, "down")) as server,
    pytest.raises(RuntimeError, match=down),
  ):
    annotate.run(judge_config(config, server, path), tmp_path)
  assert not (tmp_path / "annotated.jsonl").exists()


def test_a_stop_leaves_no_half_file(config, monkeypatch, tmp_path):
  """SIGTERM in the second of three rounds: no file yet, and the same command asks for the rest."""
  document = {str(n): converted([CALL, FINISH], f"query {n}") for n in range(3)}
  path = dump(tmp_path / "in.json", document)
  monkeypatch.setattr(annotate, "ROUND", 1)
  asked = []

  def behaviour(body, _):
    asked.append(body)
    if len(asked) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return grades([1], [5], "Solved")

  with Server(behaviour) as server:
    settings = judge_config(config, server, path, judge__runs=1)
    assert annotate.run(settings, tmp_path)["interrupted"] is True
    assert not (tmp_path / "annotated.jsonl").exists()
    summary = annotate.run(settings, tmp_path)
  assert len(asked) == 3
  assert (summary["annotated"], summary["usage"]["cached_calls"]) == (3, 2)


def test_figures_are_of_calls_and_not_of_turns():
  """Of a turn of three calls and an answer the answer was taken for a failed call."""
  calls = ToolCalls(tuple(ToolCall("f", {"x": k}) for k in range(3)))
  seen = Observation("ok", Code.OK, parts=(Observation("ok", Code.OK),) * 3)
  turn = step(calls, seen, success_calling=1.0, contribution=1.0)
  t = Trajectory("t", 0, np.zeros(1, np.int32), (turn, step(Finish("7"))), Status.ANSWERED)
  found = annotate._means([t])
  assert (found["calls"], found["mean_success_calling"], found["mean_contribution"]) == (3, 1, 1)


def test_a_new_source_is_a_row(replayed, config, monkeypatch, tmp_path):
  """Adding a source of rewards takes a function and its row; the mode does the rest."""
  _, _, path = replayed

  def toy(config, workdir, work, stop):
    """Every call is worth something, every task is solved by half."""
    del config, workdir, stop

    def scored(record):
      calls = len(responses.transcript(record.query, record.trajectory).steps)
      return apply(StepScores((1.0,) * calls, (0.6,) * calls, 0.5), record.trajectory)

    work.mark(scored)
    return {"toy": True}

  monkeypatch.setitem(annotate.SOURCES, "toy", toy)
  settings = config("rules", annotate__input=path)
  summary = annotate.run(tiny.replace(settings, annotate__source="toy"), tmp_path)
  assert (summary["source"], summary["toy"], summary["annotated"]) == ("toy", True, 3)
  for record in annotated(tmp_path):
    *calls, last = rewards(record)
    assert calls == pytest.approx([0.8] * len(calls))
    assert last == 0.5
    assert record.metadata["annotation"]["source"] == "toy"


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("source", "changes", "match"),
  [
    ("rules", {}, r"config\.annotate\.input: empty"),
    ("rules", {"annotate__input": "/absent/x"}, r"config\.annotate\.input: '/absent/x' is no file"),
    ("judge", {"annotate__input": "IN"}, r"config\.judge\.kind: annotate\.source 'judge'"),
    (
      "judge",
      {"annotate__input": "IN", "judge__kind": "llm"},
      r"config\.judge\.endpoint: base_url is ''",
    ),
    ("table", {"annotate__input": "IN"}, r"config\.annotate\.table: empty"),
    ("rules", {"annotate__input": "IN", "annotate__format": "jsonl"}, r"in\.json, line 1"),
    (
      "rules",
      {"annotate__input": "IN", "annotate__rule": "environment"},
      r"config\.annotate\.rule: 'environment' needs tasks",
    ),
    (
      "rules",
      {"annotate__input": "IN", "train__row_tokens": 320},
      r"none of 1 trajectories .* can be annotated; left out: \{'too_long'",
    ),
  ],
)
def test_bad_settings_are_named(source, changes, match, config, tmp_path):
  long = CALL | {"response": "z " * 600}
  path = dump(tmp_path / "in.json", {"7": converted([long, FINISH])})
  changes = {"annotate__format": "converted"} | changes
  changes = {k: path if v == "IN" else v for k, v in changes.items()}
  with pytest.raises((ValueError, OSError), match=match):
    annotate.run(config(source, **changes), tmp_path)


def test_annotations_of_other_trajectories_are_refused(config, tmp_path):
  path = dump(tmp_path / "in.json", {"7": converted([CALL, FINISH])})
  one = (([1], [5], "Solved"),)
  changes = {"annotate__input": path, "annotate__format": "converted"}
  for document, match in (
    ({"8": annotation([CALL, FINISH], one)}, "no annotation for 1 trajectories, e.g. 7"),
    ({"7": annotation([CALL, CALL, FINISH], RUNS[:1])}, "'7' annotates other calls"),
    ({"7": annotation([CALL | {"name": "sun"}, FINISH], one)}, "'7' annotates other calls"),
    ({"7": annotation([CALL, FINISH], (([1], [6], "Solved"),))}, "integers of 0 to 5"),
  ):
    table = dump(tmp_path / "table.json", document)
    with pytest.raises(ValueError, match=match):
      annotate.run(config("table", annotate__table=table, **changes), tmp_path)


def test_a_judge_needs_the_query(replayed, config, tmp_path):
  _, _, path = replayed
  records = [dataclasses.replace(r, query="") for r in read_trajectories(path)]
  write_trajectories(path, records)
  with pytest.raises(ValueError, match=r"config\.annotate\.input: .* has no 'query'"):
    annotate.run(config("rules", annotate__input=path), tmp_path)


def test_array_record_holds_the_same_and_is_not_written_twice(replayed, config, tmp_path):
  """A second output of its own would drift from the first; an old folder is never mixed with."""
  _, _, path = replayed
  annotate.run(config("rules", annotate__input=path), tmp_path)
  made = config("rules", annotate__input=path, annotate__output="tfds")
  annotate.run(made, tmp_path)
  found = annotated_trajectories.open_source(tmp_path, "train")
  assert [dump_record(r) for r in found] == [dump_record(r) for r in annotated(tmp_path)]
  with pytest.raises(ValueError, match=r"annotated_trajectories/1\.0\.0 exists: remove it"):
    annotate.run(made, tmp_path)


def test_by_the_command_line(config, tokenizer, tmp_path):
  path = dump(tmp_path / "in.json", {"7": converted([CALL, FINISH])})
  flags = {
    "annotate.input": path,
    "annotate.format": "converted",
    "train.row_tokens": 4096,
    "rewards.shaping": "sum",
    "model.tokenizer": tokenizer,
    "model.chat_format": "chatml_react",
  }
  done = tiny.main(tmp_path, "--mode=annotate", *(f"--config.{k}={v}" for k, v in flags.items()))
  assert done.returncode == 0, done.stderr[-3000:]
  assert "annotated: 1" in done.stdout
  assert len(annotated(tmp_path)) == 1


# --- the released sample ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["annotations", "converted"])
def test_the_released_annotations_end_to_end(kind, shared, config, tmp_path):
  table = shared / "steptool/data/reward_annotation/qwen2/G123_example_5.json"
  inputs = {"annotations": table}
  inputs["converted"] = shared / "steptool/data/model_predictions_converted/qwen2/G123_example.json"
  changes = {"annotate__input": str(inputs[kind]), "annotate__format": kind}
  changes |= {"annotate__table": str(table), "train__row_tokens": 20_000}
  summary = annotate.run(config("table", **changes), tmp_path)
  assert (summary["trajectories"], summary["annotated"], summary["runs"]) == (5, 5, 3)
  raw = json.loads(table.read_text())
  points = {"AnswerStatus.Solved": 1, "AnswerStatus.Unsure": 0.5, "AnswerStatus.Unsolved": 0}
  records = annotated(tmp_path)
  assert {r.trajectory.task_id for r in records} == set(raw)
  for record in records:
    entry = raw[record.trajectory.task_id]
    runs = list(entry["process_reward"].values())
    expected = [
      sum(0.5 * run["succeed_tool_calling"][k] + 0.5 * run["contributions"][k] / 5 for run in runs)
      / len(runs)
      for k in range(len(record.trajectory.steps) - 1)
    ]
    solved = [points[verdict] for verdict in entry["is_solved"].values()]
    assert rewards(record) == pytest.approx([*expected, sum(solved) / len(solved)])
    assert isinstance(record.trajectory.steps[-1].action, Finish)
