import dataclasses

import numpy as np
import official_rows
import pytest
from toolbench.official_rows import CALL, FINISH, OBSERVED, QUERY, SYSTEM, row

from steptool_jax.dialogue import listing, template
from steptool_jax.toolbench.formats import conversations, training_rows
from steptool_jax.toolbench.formats.training_rows import Dialogue, Message
from steptool_jax.types import Code, Finish, Malformed, Status, ToolCall, ToolSpec

FORMATS = ("toolllama", "chatml_react", "llama31")
TOOLS = (ToolSpec("rain_for_sky", "rain", {"type": "object", "properties": {}}),)


def make(name, codecs):
  return template.get_format(name, codecs[name])


def convert(rows, chat_format, limit=10_000):
  return conversations.from_step_rows(rows, chat_format, limit, "t.csv")


def ids(trajectory):
  parts = [trajectory.prompt_tokens]
  for step in trajectory.steps:
    parts += [step.tokens, step.observation_tokens]
  return np.concatenate(parts)


@pytest.mark.parametrize("family", FORMATS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_becomes_one_conversation_in_any_format(name, family, codecs):
  chat_format = make(name, codecs)
  result = convert([row(family)], chat_format)
  (record,) = result.records
  trajectory = record.trajectory
  codec = chat_format.codec
  first, last = trajectory.steps
  assert codec.decode(first.tokens[:-1]) == CALL
  assert codec.decode(last.tokens[:-1]) == FINISH
  for step in trajectory.steps:
    assert step.tokens[-1] == chat_format.stop_ids[0]
    assert step.tokens.dtype == np.int32
  assert first.observation_tokens.tolist() == chat_format.observation(OBSERVED).tolist()
  assert not len(last.observation_tokens)
  assert last.observation is None
  assert (first.action, first.observation.code) == (
    ToolCall("rain_for_sky", {"place": "Oslo"}),
    Code.OK,
  )
  assert isinstance(last.action, Finish)
  assert [s.reward for s in trajectory.steps] == list(official_rows.REWARDS)
  assert trajectory.solved == official_rows.REWARDS[-1]
  assert trajectory.status is Status.ANSWERED
  assert record.query == QUERY
  assert trajectory.task_id == "t.csv:1"


@pytest.mark.parametrize("name", FORMATS)
def test_the_prompt_is_the_chat_formats_own(name, codecs):
  """Trained in the layout that a rollout uses: only the system text comes from the row."""
  chat_format = make(name, codecs)
  text = listing.react_system("Be brief.", TOOLS)
  expected = chat_format.prompt("Be brief.", TOOLS, "Rain?").tolist()
  plain = row(name, query="Rain?")
  swapped = dataclasses.replace(
    plain, prompts=(plain.prompts[0].replace(SYSTEM, text), plain.prompts[1])
  )
  (record,) = convert([swapped], chat_format).records
  assert record.trajectory.prompt_tokens.tolist() == expected


@pytest.mark.parametrize("name", FORMATS)
def test_one_bos_and_no_control_token_from_text(name, codecs):
  chat_format = make(name, codecs)
  codec = chat_format.codec
  (record,) = convert([row(name)], chat_format).records
  found = ids(record.trajectory).tolist()
  if name != "chatml_react":
    assert found.count(codec.bos_id) == 1
    assert found[0] == codec.bos_id
  # The query spells <|im_end|> and </s>, the observation <|im_start|>: all stay text.
  turns = {"toolllama": 2, "chatml_react": 5, "llama31": 5}[name]
  assert found.count(chat_format.stop_ids[0]) == turns
  assert QUERY in codec.decode(found)
  assert OBSERVED in codec.decode(found)


def test_behaviour_logprobs_are_unknown_and_said_to_be(codecs):
  (record,) = convert([row("llama31")], make("toolllama", codecs)).records
  assert not record.logprobs_known
  for step in record.trajectory.steps:
    assert np.isnan(step.logprobs).all()
    assert step.logprobs.shape == step.tokens.shape
    assert step.logprobs.dtype == np.float32


def test_long_rows_are_left_out_whole_and_reported(codecs):
  chat_format = make("llama31", codecs)
  rows = [row("llama31"), row("llama31", observed="x" * 500), row("llama31")]
  lengths = [r.trajectory.num_tokens for r in convert(rows, chat_format).records]
  assert lengths[1] > lengths[0]
  result = convert(rows, chat_format, lengths[0])
  assert result.kept == (1, 3)
  assert result.too_long == ((2, lengths[1]),)
  assert [r.trajectory.task_id for r in result.records] == ["t.csv:1", "t.csv:3"]
  assert [r.trajectory.num_tokens for r in result.records] == [lengths[0]] * 2
  assert "2 of 3 rows" in result.report()
  assert f"row 2 ({lengths[1]})" in result.report()
  nothing = convert(rows, chat_format, lengths[0] - 1)
  assert (nothing.records, len(nothing.too_long)) == ((), 3)


def test_a_row_that_does_not_finish_is_terminated(codecs):
  cut = row("llama31", rewards=(0.5, 0.0), responses=(CALL, "Thought: what now"))
  (record,) = convert([cut], make("llama31", codecs)).records
  assert record.trajectory.status is Status.GAVE_UP
  assert not record.trajectory.truncated
  assert isinstance(record.trajectory.steps[-1].action, Malformed)


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"prompts": ("Hello", "x")}, r"t\.csv, row 2.*no known family.*Hello"),
    ({"prompts": (row("llama31").prompts[0], "x")}, r"row 2, step 1: the observation"),
    ({"rewards": (0.5, 1.5)}, r"row 2: the final reward is 1\.5"),
  ],
)
def test_bad_rows_are_named(change, match, codecs):
  bad = dataclasses.replace(row("llama31"), **change)
  with pytest.raises(ValueError, match=match):
    convert([row("llama31"), bad], make("llama31", codecs))


def test_formats_that_are_not_react_are_refused(codecs):
  with pytest.raises(ValueError, match="choose toolllama, chatml_react or llama31"):
    convert([row("llama31")], make("hermes", codecs))


def test_a_dialogue_trains_its_last_turn_only(codecs):
  chat_format = make("chatml_react", codecs)
  messages = [
    Message("system", SYSTEM),
    Message("user", f"\n{QUERY}\nBegin!\n"),
    Message("assistant", CALL),
    Message("function", OBSERVED),
    Message("user", "Try another way."),
    Message("assistant", FINISH),
  ]
  full = Dialogue("7", 3, "", tuple(messages))
  plain = Dialogue("7", 2, "", (*messages[:4], messages[5]))
  result = conversations.from_dialogues([full, plain], chat_format, 10_000)
  other, same = (r.trajectory for r in result.records)
  (as_row,) = convert([row("chatml_react")], chat_format).records
  assert ids(same).tolist() == ids(as_row.trajectory).tolist()
  assert len(same.steps) == 1
  assert same.steps[0].tokens.tolist() == as_row.trajectory.steps[1].tokens.tolist()
  assert same.task_id == "7:2"
  assert "<|im_start|>user\nTry another way.<|im_end|>" in chat_format.codec.decode(
    other.prompt_tokens
  )


@pytest.mark.parametrize(
  ("text", "code"),
  [
    ('{"error": "", "response": "something wrong"}', Code.OK),
    ('{"error": "", "response": {"a": ...', Code.OK),
    ("{'error': '', 'response': 1}", Code.OK),
    ('{"error": "Timeout error...", "response": ""}', Code.TIMEOUT),
    ('{"error": "Rate limit per minute error...", "response": ""}', Code.RATE_LIMIT),
    ('{"error": "API not working error...", "response": ""}', Code.UNAVAILABLE),
    ('{"error": "No such function name: f", "response": ""}', Code.UNKNOWN_TOOL),
    ('{"error": "Message error...", "response": ""}', Code.TOOL_ERROR),
    ("plain", Code.TOOL_ERROR),
  ],
)
def test_codes_of_stored_observations(text, code):
  assert conversations.observation_code(text) is code


@pytest.mark.parametrize("family", ["toolllama", "qwen2", "llama3-1"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_released_samples_convert(name, family, shared, codecs):
  path = shared / "steptool" / "data_train" / family / "step_grained_for_ppo_example.csv"
  rows = training_rows.read_step_rows(path)
  chat_format = make(name, codecs)
  result = convert(rows, chat_format, 1 << 20)
  assert len(result.records) == 10
  for record, source in zip(result.records, rows, strict=True):
    assert [s.reward for s in record.trajectory.steps] == list(source.rewards)
    assert record.trajectory.status is Status.ANSWERED
    assert not any(isinstance(s.action, Malformed) for s in record.trajectory.steps)
    text = chat_format.codec.decode(ids(record.trajectory))
    for response in source.responses:
      assert (
        response.removesuffix("\n").removesuffix("<|im_end|>").removesuffix("<|eot_id|>") in text
      )
    spelled = "".join(p + r for p, r in zip(source.prompts, source.responses, strict=True))
    if (name, family) == ("chatml_react", "qwen2"):
      assert text == spelled.removesuffix("\n")
    if (name, family) == ("llama31", "llama3-1"):  # its files leave out the newline before a query
      user = "user<|end_header_id|>\n\n"
      assert text == "<|begin_of_text|>" + spelled.replace(user, user + "\n", 1)
