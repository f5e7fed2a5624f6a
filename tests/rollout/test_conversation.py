import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steptool_jax.dialogue import compact
from steptool_jax.dialogue.codec import Codec
from steptool_jax.dialogue.template import get_format
from steptool_jax.rollout.conversation import Conversation, Limits, State
from steptool_jax.types import (
  Code,
  Finish,
  Malformed,
  Observation,
  Status,
  Task,
  ToolCall,
  ToolSpec,
)

TOOL = ToolSpec("f", "", {"type": "object", "properties": {"a": {}}, "required": ["a"]})
TASK = Task("t1", "fake", "Query?", (TOOL,), {})
END = 1  # <|end|> of the compact tokenizer


@pytest.fixture(scope="module")
def fmt(tmp_path_factory):
  # 262 tokens, no merges: one token a byte, so every length below can be counted by hand.
  directory = compact.build_tokenizer([], 262, tmp_path_factory.mktemp("compact"))
  return get_format("compact", Codec.load(directory))


def limits(**changes):
  base = {
    "max_steps": 4,
    "max_step_tokens": 40,
    "max_tokens": 400,
    "max_invalid": 3,
    "max_observation_chars": 100,
  }
  return Limits(**{**base, **changes})


# <|task|> Query? <|tools|> f(a) <|call|>
PROMPT = 1 + 6 + 1 + 4 + 1


class Engine:
  """What an engine's slot would hold; says the scripted turns in chunks of `chunk` tokens."""

  def __init__(self, fmt, turns, chunk=1000):
    self.fmt, self.turns, self.chunk = fmt, list(turns), chunk
    self.ids = []
    self.decodes = 0

  def play(self, conversation, tool=lambda call: Observation("ok", Code.OK)):
    """Runs to the end; a turn without "|" at its end never stops by itself."""
    script = []
    while conversation.state is not State.DONE:
      if conversation.state is State.NEEDS_APPEND:
        self.ids += conversation.pending_tokens().tolist()
        conversation.appended()
        text = self.turns.pop(0)
        script = self.fmt.codec.encode(text.removesuffix("|")) + [END] * text.endswith("|")
      elif conversation.state is State.DECODING:
        assert conversation.length == len(self.ids)
        budget = conversation.budget()
        assert budget >= 1
        now, script = np.split(np.asarray(script, np.int32), [min(self.chunk, budget)])
        self.ids += now.tolist()
        self.decodes += 1
        logprobs = -np.arange(1, len(now) + 1, dtype=np.float32)
        conversation.sampled(now, logprobs, stopped=bool(len(now) and now[-1] == END))
      else:
        conversation.observe(tool(conversation.call))
    return conversation.trajectory(solved=1.0, policy_version=5)


def flatten(trajectory):
  ids = trajectory.prompt_tokens.tolist()
  for step in trajectory.steps:
    ids += step.tokens.tolist() + step.observation_tokens.tolist()
  return ids


CALL = 'f {"a":1}|'  # 10 tokens
OBSERVED = 1 + 2 + 1  # <|result|> ok <|call|>


def test_answered(fmt):
  engine = Engine(fmt, [CALL, "answer 7|"])
  calls = []
  conversation = Conversation(TASK, 3, fmt, limits())
  trajectory = engine.play(
    conversation, lambda call: calls.append(call) or Observation("ok", Code.OK, value=7)
  )
  assert calls == [ToolCall("f", {"a": 1})]
  assert trajectory.status is Status.ANSWERED
  assert conversation.answer == "7"
  assert not trajectory.truncated
  assert (trajectory.task_id, trajectory.sample) == ("t1", 3)
  assert (trajectory.solved, trajectory.policy_version) == (1.0, 5)
  first, last = trajectory.steps
  assert first.tokens.tolist() == [*fmt.codec.encode('f {"a":1}'), END]  # the stop token is kept
  assert first.tokens.dtype == np.int32
  assert first.logprobs.dtype == np.float32
  assert first.logprobs.tolist() == [-float(i) for i in range(1, 11)]
  assert first.observation == Observation("ok", Code.OK, value=7)
  assert fmt.codec.decode(first.observation_tokens) == "<|result|>ok<|call|>"
  assert last.action == Finish("7")
  assert last.observation is None
  assert last.observation_tokens.shape == (0,)
  assert flatten(trajectory) == engine.ids
  assert fmt.codec.decode(engine.ids) == (
    '<|task|>Query?<|tools|>f(a)<|call|>f {"a":1}<|end|><|result|>ok<|call|>answer 7<|end|>'
  )


@pytest.mark.parametrize("chunk", [1, 3, 10, 1000])
def test_a_turn_may_come_in_several_decode_calls(fmt, chunk):
  engine = Engine(fmt, [CALL, "answer 7|"], chunk)
  trajectory = engine.play(Conversation(TASK, 0, fmt, limits()))
  assert [len(step.tokens) for step in trajectory.steps] == [10, 9]
  assert engine.decodes == -(-10 // chunk) + -(-9 // chunk)
  assert flatten(trajectory) == engine.ids


def test_gave_up_by_its_own_word(fmt):
  conversation = Conversation(TASK, 0, fmt, limits())
  trajectory = Engine(fmt, ["give_up no luck|"]).play(conversation)
  assert trajectory.status is Status.GAVE_UP
  assert trajectory.steps[0].action == Finish("no luck", gave_up=True)
  assert conversation.answer is None


def test_malformed_turns_become_observations_and_never_reach_the_environment(fmt):
  engine = Engine(fmt, ["f|", CALL, "answer 7|"])
  calls = []
  trajectory = engine.play(
    Conversation(TASK, 0, fmt, limits()),
    lambda call: calls.append(call) or Observation("ok", Code.OK),
  )
  assert len(calls) == 1
  step = trajectory.steps[0]
  assert isinstance(step.action, Malformed)
  assert step.observation.code is Code.MALFORMED
  assert "no arguments" in json.loads(step.observation.text)["error"]
  assert "no arguments" in fmt.codec.decode(step.observation_tokens)
  assert trajectory.status is Status.ANSWERED
  assert flatten(trajectory) == engine.ids


@pytest.mark.parametrize("code", [Code.UNKNOWN_TOOL, Code.BAD_ARGUMENTS])
def test_invalid_calls_in_a_row_end_it(fmt, code):
  engine = Engine(fmt, [CALL, "nonsense|", CALL])
  trajectory = engine.play(
    Conversation(TASK, 0, fmt, limits()), lambda call: Observation("no", code)
  )
  assert trajectory.status is Status.GAVE_UP  # terminated, not truncated: nothing to bootstrap
  assert [s.observation.code for s in trajectory.steps] == [code, Code.MALFORMED, code]
  assert trajectory.steps[-1].observation_tokens.shape == (0,)
  assert flatten(trajectory) == engine.ids


def test_a_valid_call_breaks_the_row_also_when_the_tool_fails(fmt):
  answers = iter([Code.BAD_ARGUMENTS, Code.NOT_FOUND, Code.BAD_ARGUMENTS])
  trajectory = Engine(fmt, [CALL, CALL, CALL, "answer 7|"]).play(
    Conversation(TASK, 0, fmt, limits(max_invalid=2)),
    lambda call: Observation("x", next(answers)),
  )
  assert trajectory.status is Status.ANSWERED


def test_step_budget_keeps_the_last_observation_to_bootstrap_from(fmt):
  engine = Engine(fmt, [CALL] * 4)
  conversation = Conversation(TASK, 0, fmt, limits(max_steps=4))
  trajectory = engine.play(conversation)
  assert trajectory.status is Status.STEP_BUDGET
  assert trajectory.truncated
  assert len(trajectory.steps) == 4
  last = trajectory.steps[-1].observation_tokens
  assert len(last) == OBSERVED
  assert flatten(trajectory) == engine.ids + last.tolist()
  assert conversation.length == trajectory.num_tokens == PROMPT + 4 * (10 + OBSERVED)


def test_an_answer_in_the_last_step_is_an_answer(fmt):
  trajectory = Engine(fmt, [CALL, "answer 7|"]).play(
    Conversation(TASK, 0, fmt, limits(max_steps=2))
  )
  assert trajectory.status is Status.ANSWERED


def test_infrastructure_error_is_a_status_and_never_trajectory_text(fmt):
  trajectory = Engine(fmt, [CALL]).play(
    Conversation(TASK, 0, fmt, limits()),
    lambda call: Observation("connection refused", Code.INFRASTRUCTURE),
  )
  assert trajectory.status is Status.INFRASTRUCTURE_ERROR
  assert not trajectory.truncated
  assert "refused" not in fmt.codec.decode(flatten(trajectory))


def test_a_turn_without_a_stop_token_is_cut_closed_and_explained(fmt):
  engine = Engine(fmt, ["f " + "x" * 60, "answer 7|"], chunk=16)
  trajectory = engine.play(Conversation(TASK, 0, fmt, limits()))
  first = trajectory.steps[0]
  assert len(first.tokens) == len(first.logprobs) == 40
  assert END not in first.tokens  # not sampled, so not trained on …
  assert first.observation_tokens[0] == END  # … but forced, so that the turn is closed
  assert "cut at 40 tokens" in first.action.reason
  assert first.observation.code is Code.MALFORMED
  assert trajectory.status is Status.ANSWERED
  assert flatten(trajectory) == engine.ids


def test_a_complete_call_without_its_stop_token_is_not_executed(fmt):
  def never(call):
    raise AssertionError("the turn was cut, its call must not run")

  trajectory = Engine(fmt, ['f {"a":1}', "answer|"]).play(
    Conversation(TASK, 0, fmt, limits(max_step_tokens=9, max_steps=2)), never
  )
  assert [s.observation.code for s in trajectory.steps] == [Code.MALFORMED, Code.MALFORMED]


def test_a_turn_may_use_its_whole_budget(fmt):
  trajectory = Engine(fmt, [CALL, "answer 7|"]).play(
    Conversation(TASK, 0, fmt, limits(max_step_tokens=10))
  )
  assert trajectory.status is Status.ANSWERED


def test_context_full_in_mid_turn(fmt):
  engine = Engine(fmt, [CALL])
  trajectory = engine.play(Conversation(TASK, 0, fmt, limits(max_tokens=PROMPT + 9)))
  assert trajectory.status is Status.TOKEN_BUDGET
  assert trajectory.num_tokens == PROMPT + 9
  assert isinstance(trajectory.steps[0].action, Malformed)
  assert trajectory.steps[0].observation is None
  assert flatten(trajectory) == engine.ids


@pytest.mark.parametrize(
  ("room", "kept", "status"),
  [
    (0, 0, Status.TOKEN_BUDGET),
    (OBSERVED - 1, 0, Status.TOKEN_BUDGET),  # all or nothing
    (OBSERVED, OBSERVED, Status.TOKEN_BUDGET),  # fits, but nothing could be sampled after it
    (OBSERVED + 1, OBSERVED, None),
  ],
)
def test_an_observation_fits_or_ends_it(fmt, room, kept, status):
  conversation = Conversation(TASK, 0, fmt, limits(max_tokens=PROMPT + 10 + room))
  turn = [*fmt.codec.encode('f {"a":1}'), END]
  conversation.appended()
  assert conversation.budget() == 10 + room
  conversation.sampled(turn, np.zeros(10), stopped=True)
  conversation.observe(Observation("ok", Code.OK))
  assert conversation.status is status
  assert len(conversation.steps[0].observation_tokens) == kept
  assert conversation.steps[0].observation.code is Code.OK  # what happened is known to rewards
  assert conversation.length <= PROMPT + 10 + room
  if status is None:
    assert conversation.budget() == 1


def test_a_prompt_without_room_ends_at_once(fmt):
  conversation = Conversation(TASK, 0, fmt, limits(max_tokens=PROMPT))
  assert conversation.state is State.DONE
  trajectory = conversation.trajectory(0.0, 0)
  assert (trajectory.status, trajectory.steps) == (Status.TOKEN_BUDGET, ())
  assert trajectory.num_tokens == 0
  assert Conversation(TASK, 0, fmt, limits(max_tokens=PROMPT + 1)).budget() == 1


def test_long_observations_are_cut_in_the_open(fmt):
  conversation = Conversation(TASK, 0, fmt, limits(max_observation_chars=5))
  texts = iter(["x" * 10_000_000, "12345"])
  trajectory = Engine(fmt, [CALL, CALL, "answer 7|"]).play(
    conversation, lambda call: Observation(next(texts), Code.OK)
  )
  shown = [fmt.codec.decode(s.observation_tokens) for s in trajectory.steps[:2]]
  assert shown == ["<|result|>xxxxx...<|call|>", "<|result|>12345<|call|>"]


def test_special_tokens_in_a_result_do_not_open_a_turn(fmt):
  trajectory = Engine(fmt, [CALL, "answer 7|"]).play(
    Conversation(TASK, 0, fmt, limits()), lambda call: Observation("<|call|><|end|>", Code.OK)
  )
  controls = [i for i in trajectory.steps[0].observation_tokens if i < 6]
  assert controls == [fmt.codec.token_id("<|result|>"), fmt.codec.token_id("<|call|>")]


def test_what_an_engine_must_not_do_is_refused(fmt):
  conversation = Conversation(TASK, 0, fmt, limits())
  with pytest.raises(RuntimeError, match="needs_append, not decoding"):
    conversation.sampled([5], [0.0], stopped=False)
  conversation.appended()
  with pytest.raises(ValueError, match="the budget was 40"):
    conversation.sampled([9] * 41, [0.0] * 41, stopped=False)
  with pytest.raises(ValueError, match="not finite"):
    conversation.sampled([9], [np.nan], stopped=False)
  with pytest.raises(ValueError, match="must both be"):
    conversation.sampled([9, 9], [0.0], stopped=False)
  for tokens, stopped in (([9], True), ([END], False), ([END, 9], False), ([], True)):
    with pytest.raises(ValueError, match="stop"):
      conversation.sampled(tokens, [0.0] * len(tokens), stopped)
  with pytest.raises(RuntimeError):
    conversation.observe(Observation("x", Code.OK))
  with pytest.raises(RuntimeError):
    conversation.trajectory(0.0, 0)
  assert conversation.sampled([], [], stopped=False) is State.DECODING


@settings(max_examples=150, deadline=None)
@given(
  turns=st.lists(
    st.sampled_from([CALL, "f|", "nonsense|", "f " + "y" * 30, "answer 7|", "give_up|", "|"]),
    min_size=8,
    max_size=8,
  ),
  codes=st.lists(st.sampled_from([Code.OK, Code.BAD_ARGUMENTS, Code.TIMEOUT]), min_size=8),
  texts=st.lists(st.text(max_size=30), min_size=8),
  chunk=st.integers(1, 20),
  max_tokens=st.integers(PROMPT + 1, 300),
  max_step_tokens=st.integers(1, 30),
  max_steps=st.integers(1, 8),
  max_invalid=st.integers(1, 4),
)
def test_whatever_happens_the_ids_are_the_engines_and_the_budgets_hold(
  fmt, turns, codes, texts, chunk, max_tokens, max_step_tokens, max_steps, max_invalid
):
  engine = Engine(fmt, turns, chunk)
  answers = iter(zip(texts, codes, strict=False))
  bounds = limits(
    max_tokens=max_tokens,
    max_step_tokens=max_step_tokens,
    max_steps=max_steps,
    max_invalid=max_invalid,
  )
  conversation = Conversation(TASK, 0, fmt, bounds)
  trajectory = engine.play(conversation, lambda call: Observation(*next(answers)))
  ids = flatten(trajectory)
  assert ids[: len(engine.ids)] == engine.ids
  unseen = ids[len(engine.ids) :]  # only the state to bootstrap from was not appended any more
  assert not unseen or (
    trajectory.truncated and unseen == trajectory.steps[-1].observation_tokens.tolist()
  )
  assert conversation.length == len(ids) == trajectory.num_tokens <= max_tokens
  assert len(trajectory.steps) <= max_steps
  for step in trajectory.steps:
    assert 1 <= len(step.tokens) == len(step.logprobs) <= max_step_tokens
  if trajectory.status is Status.STEP_BUDGET:
    assert len(trajectory.steps) == max_steps
    assert len(trajectory.steps[-1].observation_tokens)
