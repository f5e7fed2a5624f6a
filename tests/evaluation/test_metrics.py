import collections
import dataclasses

import numpy as np
import pytest

from steptool_jax.evaluation import figures as figures_lib
from steptool_jax.evaluation import metrics, panels, records
from steptool_jax.evaluation.comparison import DONE, Cell
from steptool_jax.evaluation.metrics import rollout_metrics
from steptool_jax.types import (
  Code,
  Finish,
  Malformed,
  Observation,
  Status,
  Step,
  Task,
  ToolCall,
  Trajectory,
)


def step(action, code=None, **rest):
  """A step with 2 sampled and 3 observed tokens; rest goes into the observation."""
  observation = None if code is None else Observation("x", code, **rest)
  ids = np.zeros(2, np.int32)
  return Step(ids, np.zeros(2, np.float32), action, observation, np.zeros(3, np.int32))


def call(name="f", code=Code.OK, rest=None, **arguments):
  return step(ToolCall(name, arguments), code, **(rest or {}))


def trajectory(*steps, task="t", solved=1.0, status=Status.ANSWERED, **rest):
  return Trajectory(task, 0, np.zeros(4, np.int32), steps, status, solved, **rest)


def malformed():
  return step(Malformed("?"), Code.MALFORMED)


def finish(answer="1"):
  return step(Finish(answer))


def test_nothing_to_take_a_mean_of():
  figures = rollout_metrics([])
  assert set(figures.values()) == {0.0}
  lost = trajectory(call(), finish(), status=Status.INFRASTRUCTURE_ERROR)
  assert rollout_metrics([lost]) == figures | {"infrastructure_errors": 1.0}


def test_pass_rates_of_kinds_of_tasks():
  """Tasks without a kind, and conversations that the infrastructure ended, are not counted."""
  kinds = ["late", "fee", "late", None, "fee"]
  tasks = [
    Task(str(n), "fake", "q", (), {}, (), {} if kind is None else {"kind": kind})
    for n, kind in enumerate(kinds)
  ]
  lost = trajectory(finish(), task="4", status=Status.INFRASTRUCTURE_ERROR, solved=0.0)
  found = [trajectory(finish(), task=str(n), solved=s) for n, s in enumerate((1.0, 1.0, 0.5, 0.0))]
  assert metrics.by_kind(tasks, [*found, lost]) == {"late": 0.75, "fee": 1.0}


def test_useless_calls_are_those_that_contributed_nothing():
  """Two of three calls here, one of one there; the answer is no call, and half a Con is some."""
  helped = dataclasses.replace(call(), contribution=0.5)
  first = trajectory(call(), helped, call("g", Code.TOOL_ERROR), finish())
  figures = rollout_metrics([first, trajectory(call(), finish())])
  assert figures["useless_calls"] == (2 + 1) / 2


def test_figures_by_hand():
  group = [
    trajectory(
      call(x=1, rest={"cost": 0.5, "latency": 2.0}), call(x=1, rest={"cost": 0.25}), finish()
    ),
    trajectory(
      call("g", Code.TOOL_ERROR),
      malformed(),
      call("h", Code.UNKNOWN_TOOL),
      solved=0.0,
      status=Status.STEP_BUDGET,
    ),
    trajectory(call(), finish("none"), solved=0.0, status=Status.GAVE_UP, task="u"),
    trajectory(call(), solved=1.0, status=Status.INFRASTRUCTURE_ERROR, task="u"),
  ]
  figures = rollout_metrics(group)
  assert figures["pass_rate"] == pytest.approx(1 / 3)
  assert figures["calls_per_task"] == pytest.approx((2 + 2 + 1) / 3)
  assert figures["tokens_per_task"] == pytest.approx((19 + 19 + 14) / 3)
  assert figures["cost_per_task"] == pytest.approx(0.75 / 3)
  assert figures["latency_per_task"] == pytest.approx(2.0 / 3)
  assert figures["invalid_call_rate"] == pytest.approx(2 / 6)  # of calls and malformed turns
  assert figures["invocation_success"] == pytest.approx(3 / 6)
  assert figures["repeated_calls"] == pytest.approx(1 / 5)
  assert figures["solved_after_error"] == 0.0
  assert figures["recovery"] == 0.0
  assert (figures["answered"], figures["gave_up"]) == pytest.approx((1 / 3, 1 / 3))
  assert figures["truncated"] == pytest.approx(1 / 3)
  assert figures["infrastructure_errors"] == 1.0


@pytest.mark.parametrize(
  ("steps", "expected"),
  [
    # A tool's failure is made good by the same tool, however late and with other arguments.
    ([call("f", Code.NOT_FOUND, x=1), call("g"), call("f", x=2)], 1.0),
    ([call("f", Code.NOT_FOUND), call("g"), call("h")], 0.0),
    ([call("f"), call("f", Code.TIMEOUT)], 0.0),
    ([call("f", Code.BAD_ARGUMENTS), call("f", Code.RATE_LIMIT), call("f")], 1.0),
    ([call("f", Code.BAD_ARGUMENTS), call("f", Code.RATE_LIMIT), call("g")], 0.0),
    # Where no tool was named, the next call is what was meant.
    ([malformed(), call("f")], 1.0),
    ([malformed(), call("f", Code.NOT_FOUND), call("f")], 0.5),
    ([call("?", Code.UNKNOWN_TOOL), call("f")], 1.0),
    ([call("?", Code.UNKNOWN_TOOL), finish()], 0.0),
  ],
)
def test_recovery_is_a_later_success_in_the_failed_calls_place(steps, expected):
  assert rollout_metrics([trajectory(*steps)])["recovery"] == expected


def test_recovery_counts_failed_calls_and_not_trajectories():
  good = trajectory(*[s for _ in range(3) for s in (call(code=Code.TIMEOUT), call())])
  bad = trajectory(call(code=Code.TIMEOUT), solved=0.0)
  figures = rollout_metrics([good, bad])
  assert figures["recovery"] == 0.75
  assert figures["solved_after_error"] == 0.5


@pytest.mark.parametrize(
  ("steps", "expected"),
  [
    ([call(a=1, b=2), call(b=2, a=1)], 1 / 2),  # the order of arguments does not matter
    ([call(a=1), call(a=2), call("g", a=1)], 0.0),
    ([call(a=1), call(a=1), call(a=1)], 2 / 3),
    ([call(a=1), call("set", rest={"changed": True}), call(a=1)], 0.0),  # it may answer otherwise
    ([call(a=1), malformed(), call(a=1)], 1 / 2),
    ([call("set", rest={"changed": True}), call("set", rest={"changed": False})], 1 / 2),
  ],
)
def test_repeated_calls(steps, expected):
  assert rollout_metrics([trajectory(*steps)])["repeated_calls"] == expected


def test_diversity_compares_the_samples_of_a_task():
  a = [call(x=1), finish()]
  b = [call(x=2), finish()]
  c = [call(x=1), finish("2")]

  def of(*groups):
    made = [trajectory(*s, task=f"t{k}") for k, group in enumerate(groups) for s in group]
    return rollout_metrics(made)["diversity"]

  assert of([a, a, a]) == 0.0
  assert of([a, b, c]) == 1.0
  assert of([a, a, b]) == 0.5
  assert of([a, a, b], [a, c]) == 0.75
  assert of([a], [b]) == 0.0  # one sample each: nothing to compare
  assert of([a], [b], [a, b]) == 1.0
  shorter = [finish()]
  assert of([a, shorter]) == 1.0
  other_thought = [step(ToolCall("f", {"x": 1}, "hm"), Code.OK), finish()]
  assert of([a, other_thought]) == 0.0


def test_rewards_by_part():
  group = [
    trajectory(finish(), reward_parts={"success_calling": 0.2, "solved": 1.0}),
    trajectory(finish(), reward_parts={"success_calling": 0.4, "solved": 0.0}),
    trajectory(finish(), reward_parts={"solved": 9.0}, status=Status.INFRASTRUCTURE_ERROR),
  ]
  figures = rollout_metrics(group)
  assert figures["reward_success_calling"] == pytest.approx(0.3)
  assert figures["reward_solved"] == 0.5


def test_a_new_figure_is_its_definition_and_its_measure(monkeypatch, tmp_path):
  """A list of names between measure, record and chart would leave a new figure out of one."""
  definition = figures_lib.Figure("steps", "steps of a trajectory")
  monkeypatch.setitem(figures_lib.ROLLOUTS, "toy", definition)
  monkeypatch.setitem(metrics.MEASURES, "toy", metrics._per(lambda t: [len(t.steps)]))
  found = rollout_metrics([trajectory(call(), finish()), trajectory(finish())])
  assert found["toy"] == 1.5
  lines = [{f"heldout/{k}": v for k, v in found.items()} | {"heldout/llm_calls": n} for n in (0, 9)]
  run = records.Run(tmp_path, {}, {}, tuple(lines), {}, ())
  (chart,) = panels.charts([Cell("run", "", "", "ppo", 0, DONE, "", run, {})])
  assert chart["data"]["toy"]["llm_calls"][0]["mean"] == [1.5, 1.5]


def test_every_figure_has_its_definition():
  """A figure of no definition cannot be read by anyone; one without a measure is never written."""
  defined = {name for name in figures_lib.ROLLOUTS if not name.startswith("reward_")}
  assert set(metrics.MEASURES) | {"infrastructure_errors"} == defined


def test_rows_of_the_heat_map_are_shares_of_all_that_followed():
  """Of tools that the table cuts off, too; they were left out of the sum."""
  pairs = collections.Counter({("a", f"t{k}"): 5 for k in range(20)})
  (row,) = panels._heat(pairs, ["(start)", "a", "t0", "t1"])
  assert row["total"] == 100
  assert [c["label"] for c in row["cells"]][1:] == ["t0 after a: 5 of 100", "t1 after a: 5 of 100"]
