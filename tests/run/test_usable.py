"""SFT learns what can be learnt from, and says what it leaves out; nothing that hangs hangs it."""

import dataclasses
import time
import types

import faulty_tasks
import pytest
import tiny

from steptool_jax.rollout.chain import Interrupted
from steptool_jax.run import train
from steptool_jax.run.data.order import Order
from steptool_jax.run.parts import opening, rollouts, tokenizers
from steptool_jax.run.training import usable
from steptool_jax.run.training.sft_batches import SftBatches
from steptool_jax.types import Status

RIGHT = [
  faulty_tasks.task(f"t{n}", f"Ann, {n}?", faulty_tasks.number(10), faulty_tasks.ANN, "10")
  for n in range(6)
]
BAD = {name: faulty_tasks.FAULTS[name][0][0] for name in ("wrong", "hangs", "steps", "fails")}
TOOLS = faulty_tasks.TOOLS.replace("owner) ->", "owner: str) ->")


def made(folder, records, **changes):
  """Config of a run on these tasks."""
  fields = faulty_tasks.write(folder, [*records, faulty_tasks.GOOD[1]], TOOLS)
  common = {"rollout__tool_timeout": 0.3, "check__before_training": 0, "evaluation__tasks": 1}
  return tiny.make(**fields | common | changes)


@pytest.fixture
def opened(tmp_path):
  def open_(records, stop=None, **changes):
    config = made(tmp_path, records, **changes)
    return opening.open_parts(config, tmp_path / "run", stop or opening.Stop())

  (tmp_path / "run").mkdir()
  return open_


def test_where_nothing_is_wrong_nothing_changes(opened):
  with opened(RIGHT) as parts:
    tasks = list(parts.environment.tasks("train"))
    assert usable.usable(parts, tasks) == tasks


def test_what_is_left_out_and_why(opened, caplog):
  records = [RIGHT[0], *BAD.values(), *RIGHT[1:]]
  with opened(records, sft__steps=1, sft__batch=16) as parts:
    tasks = list(parts.environment.tasks("train"))
    kept = usable.usable(parts, tasks)
    source = SftBatches(parts)
    batch = source.batch(0)
  assert [task.id for task in kept] == [record["id"] for record in RIGHT]
  assert {t.task_id for t in batch} == {record["id"] for record in RIGHT}
  assert all(t.solved == 1 for t in batch)
  said = caplog.text
  assert "sft: 4 of 10 demonstrations are left out: 1 need 8, rollout.max_steps is 4; " in said
  assert "2 their own checker rejects (wrong, fails)" in said
  assert "1 whose tools fail or hang (hangs)" in said


def test_all_are_looked_at_as_soon_as_one_that_is_drawn_is_bad(opened):
  """What was not drawn at first takes the place of what is left out: it must be right, too."""
  drawn = [Order(len(RIGHT) + 2, 0)[k] for k in range(4)]
  undrawn = next(n for n in range(8) if n not in drawn)
  records = list(RIGHT)
  for place in sorted([drawn[0], undrawn]):
    records.insert(place, BAD["wrong"] | {"id": f"wrong {place}"})
  with opened(records, sft__steps=1, sft__batch=4) as parts:
    tasks = list(parts.environment.tasks("train"))
    assert [t.id for t in usable.usable(parts, tasks)] == [r["id"] for r in RIGHT]


def test_none_that_fits_is_found_before_any_work(tmp_path):
  config = made(tmp_path, RIGHT, rollout__max_steps=1)
  with pytest.raises(
    ValueError, match=r"6 of 6 .* need 2, rollout.max_steps is 1.*Nothing is left"
  ):
    train.run(config, tmp_path / "run")
  assert not (tmp_path / "run/config.json").exists(), "the folder is not bound"
  assert not (tmp_path / "run/metrics.jsonl").exists()


def test_sft_without_demonstrations_is_refused_before_weights_are_made(tmp_path, monkeypatch):
  records = [{k: v for k, v in r.items() if k != "demonstration"} for r in RIGHT]
  monkeypatch.setattr(train, "Run", None)
  with pytest.raises(ValueError, match=r"config\.sft\.steps: 2, but no training task has"):
    train.run(made(tmp_path, records), tmp_path / "run")


def test_imperfect_demonstrations_are_not_refused_for_being_wrong(opened):
  with opened(RIGHT, sft__mistakes=1.0) as parts:
    batch = SftBatches(parts).batch(0)
  assert batch
  assert any(t.solved == 0 for t in batch)


def test_mistakes_that_fit_nowhere_leave_the_clean_demonstrations(opened, monkeypatch):
  with opened(RIGHT, sft__mistakes=1.0) as parts:
    source = SftBatches(parts)
    cut = types.SimpleNamespace(status=Status.STEP_BUDGET, steps=())
    monkeypatch.setattr(source, "_draw", lambda index, position: cut)
    batch = source.batch(0)
  assert len(batch) == parts.config.sft.batch
  assert all(t.solved == 1 for t in batch)


def test_tools_that_go_down_meanwhile_stop_it_with_a_sentence(opened, monkeypatch):
  with opened(RIGHT) as parts:
    source = SftBatches(parts)
    down = types.SimpleNamespace(status=Status.INFRASTRUCTURE_ERROR, steps=())
    monkeypatch.setattr(source, "_draw", lambda index, position: down)
    with pytest.raises(RuntimeError, match="are down or hang"):
      source.batch(0)


def test_a_stop_ends_the_look(opened):
  stop = opening.Stop()
  with opened(RIGHT, stop) as parts:
    stop.request()
    with pytest.raises(Interrupted):
      usable.usable(parts, parts.environment.tasks("train"))


def test_tools_that_all_hang_end_the_tokenizer_with_a_sentence(tmp_path):
  """The compact tokenizer learns from what tools answer."""
  entries = [{"tool": "wait", "arguments": {"seconds": 20.0}}, {"answer": "77"}]
  hanging = [BAD["hangs"] | {"id": f"h{n}", "demonstration": entries} for n in range(20)]
  config = made(tmp_path, hanging, rollout__tool_timeout=0.1)
  started = time.monotonic()
  with (
    pytest.raises(RuntimeError, match="tool calls hang for longer than 0.1 s"),
    opening.open_parts(config, tmp_path, opening.Stop()),
  ):
    pass
  assert time.monotonic() - started < 20


def test_a_tool_that_hangs_once_costs_the_tokenizer_its_text_only(tmp_path):
  config = made(tmp_path, [BAD["hangs"], RIGHT[0]])
  with opening.open_parts(config, tmp_path, opening.Stop()) as parts:
    (hangs, right) = parts.environment.tasks("train")
    texts = [list(tokenizers._texts(parts.environment, t, parts.runner)) for t in (hangs, right)]
    without = [list(tokenizers._texts(parts.environment, t, None)) for t in (hangs, right)]
  assert without[0][:-1] == texts[0]
  assert without[0][-1] == "waited"
  assert without[1] == texts[1]


def test_evaluations_say_how_many_prompts_have_no_room(opened, monkeypatch, capsys):
  with opened(RIGHT) as parts:
    (task,) = parts.environment.tasks("heldout")
    short = dataclasses.replace(parts, limits=dataclasses.replace(parts.limits, max_tokens=20))
    trajectory = usable.replays.replay_actions(
      *(parts.environment, task, task.demonstration, parts.policy.chat_format, short.limits)
    )
    monkeypatch.setattr(rollouts, "roll", lambda *_: ([trajectory], None))
    figures, _ = rollouts.evaluate_policy(
      short, {}, short.environment.tasks("heldout")[:1], "after SFT", 1.0
    )
  assert figures["prompts_without_room"] == 1
  said = capsys.readouterr()
  assert "after SFT: 1 of 1 prompts have no room for one step" in said.out + said.err


# --- the check before training ---


def test_an_error_of_the_check_stops_a_training(tmp_path):
  config = made(tmp_path, [*RIGHT, BAD["wrong"]], check__before_training=10)
  with pytest.raises(
    ValueError, match=r"1 errors in tools and tasks: wrong: its own checker .*--mod"
  ):
    train.run(config, tmp_path / "run")
  assert not (tmp_path / "run/config.json").exists()


def test_a_model_that_is_not_there_is_found_before_anything_is_opened(tmp_path):
  config = tiny.make(
    model__path="SmolLM2-135M-Instruct", model__tokenizer="", environment__num_train=10**9
  )
  with pytest.raises(FileNotFoundError, match=r"config\.model\.path: there is no 'SmolLM2.*=PATH"):
    train.run(config, tmp_path / "run")
