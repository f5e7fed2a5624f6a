"""Information gain: what is asked, what is scored, and what is refused."""

import dataclasses

import numpy as np
import pytest

from steptool_jax.config import Rewards
from steptool_jax.dialogue.codec import Codec
from steptool_jax.dialogue.template import get_format
from steptool_jax.rewards import assembly, information
from steptool_jax.run.parts.tokenizers import ASSETS
from steptool_jax.types import Finish, Status, Step, Task, ToolCall, ToolCalls, Trajectory


@pytest.fixture(scope="module")
def chat_format():
  return get_format("auto", Codec.load(ASSETS / "quickstart"))


def task(answer="4711", kind="value"):
  return Task("t", "nested_api", "?", (), {"type": kind}, (Finish(answer),))


def step(tokens, observed):
  ids = np.array(tokens, np.int32)
  action = ToolCall("f", {}) if observed else Finish("x")
  return Step(
    ids, np.zeros(len(ids), np.float32), action, None, np.array(observed, np.int32), 1.0, 0.5
  )


@pytest.fixture
def conversation():
  steps = (step([3, 4], [5]), step([6], [7, 8]), step([9], []))
  return Trajectory("t", 0, np.array([1, 2], np.int32), steps, Status.ANSWERED)


def test_only_the_answer_is_scored(chat_format):
  """The scaffolding's log-probs say whether the policy would stop now, not what it knows."""
  found = information.gold(task(), chat_format)
  whole = chat_format.render_action(Finish("4711"))
  assert chat_format.codec.decode(found.answer.tolist()).strip() == "4711"
  assert (np.concatenate([found.given, found.answer]) == whole[: len(found)]).all()
  assert len(found) < len(whole)


def test_what_is_asked(conversation):
  """The answer behind the prompt, and behind each observation with the header that follows it."""
  gold = information.Gold(np.array([20], np.int32), np.array([21, 22], np.int32))
  asked = information.questions(conversation, gold)
  assert [q.prompt_tokens.tolist() for q in asked] == [
    [1, 2, 20],
    [1, 2, 3, 4, 5, 20],
    [1, 2, 3, 4, 5, 6, 7, 8, 20],
  ]
  assert all(q.steps[0].tokens.tolist() == [21, 22] for q in asked)


def test_gains_by_hand(conversation):
  """p = exp of the mean: .25, .5, .4. The second step leads away and earns 0, the answer too."""
  logprobs = [np.log(np.array(p, np.float32)) for p in ([0.5, 0.125], [0.25, 1.0], [0.4, 0.4])]
  found = information.gains(conversation, logprobs)
  assert [s.contribution for s in found.steps] == pytest.approx([0.25, 0.0, 0.0])
  assert [s.success_calling for s in found.steps] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("row", "earned"), [("progress", 0.25), ("sum", 0.625)])
def test_a_turn_of_several_calls_earns_its_gain_once(row, earned, conversation):
  """Progress counts Con once a call: two calls for one gain were paid twice."""
  both = ToolCalls((ToolCall("f", {}), ToolCall("g", {})))
  first = dataclasses.replace(conversation.steps[0], action=both)
  turn = dataclasses.replace(conversation, steps=(first, *conversation.steps[1:]))
  logprobs = [np.log(np.array([p, p], np.float32)) for p in (0.25, 0.5, 0.5)]
  options = Rewards(source="info_gain", shaping=row)
  for t in (conversation, turn):
    (paid,) = assembly.pay([task()], [information.gains(t, logprobs)], options)
    assert paid.steps[0].reward == pytest.approx(earned)


def test_without_a_gold_answer_progress_counts_calls(conversation):
  """Of such tasks Con stays that of progress, a mean over a turn's calls."""
  gold = (*(ToolCall("f", {"x": k}) for k in range(2)), Finish(""))
  checked = dataclasses.replace(task(kind="state"), demonstration=gold)
  first = dataclasses.replace(conversation.steps[0], action=ToolCalls(gold[:2]), contribution=1.0)
  turn = dataclasses.replace(conversation, steps=(first, *conversation.steps[2:]))
  (paid,) = assembly.pay([checked], [turn], Rewards(source="info_gain"))
  assert paid.steps[0].reward == pytest.approx(1.0)


@pytest.mark.parametrize(
  "without", [task(kind="state"), task(answer=""), dataclasses.replace(task(), demonstration=())]
)
def test_tasks_without_a_gold_answer_are_refused(without, chat_format):
  """The policy would be paid for repeating a word that proves nothing."""
  with pytest.raises(ValueError, match="needs tasks with a gold answer.*use 'progress'"):
    information.refuse_without_gold([without], chat_format, 100, 50)
  information.refuse_without_gold([without, task()], chat_format, 100, 50)


def test_a_row_has_room_for_the_answer(chat_format):
  """Without it the first long conversation would end the run."""
  need = 50 + len(information.gold(task(), chat_format))
  information.refuse_without_gold([task()], chat_format, need, 50)
  with pytest.raises(ValueError, match=rf"train.row_tokens: {need - 1}.*set it to {need}"):
    information.refuse_without_gold([task()], chat_format, need - 1, 50)
