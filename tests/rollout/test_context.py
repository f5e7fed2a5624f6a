"""History that is changed between turns: what the engine sees is what is recorded, and no more."""

import dataclasses

import numpy as np
import pytest
import thinker

from steptool_jax.config import Config, Environment, Model, Rollout
from steptool_jax.dialogue.codec import Control
from steptool_jax.dialogue.template import get_format
from steptool_jax.rollout import context
from steptool_jax.types import Finish, Status, Step
from steptool_jax.validation import validate


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
  return thinker.tokenizer(tmp_path_factory.mktemp("qwen3") / "tokenizer")


@pytest.mark.parametrize(
  "text",
  [
    "<think>\nhm\n</think>\n\n<tool_call>\n{}\n</tool_call>",
    "<think>\n\n</think>\n\nseven",
    "<think>a</think><tool_call>\n{}\n</tool_call>",
    "<think>a</think>\n\n\n  seven\n",
    "a</think>\nb</think>\n\nseven",
    "<think>\nnever closed",
    "no thoughts\n\n",
    "<think>all</think>\n\n",
  ],
)
def test_thoughts_go_as_in_qwen3s_template(codec, text):
  """Its line for an assistant's turn in history is content.split('</think>')[-1].lstrip('\\n')."""

  def ids(content):
    pieces = []
    for part in content.replace("<", "\0<").replace(">", ">\0").split("\0"):
      pieces.append(Control(part) if part in thinker.TAGS else part)
    return codec.join(pieces)

  turn = np.append(ids(text), codec.token_id("<|im_end|>"))
  left = thinker.hermes(codec).without_thoughts(turn)
  wanted = text.split("</think>")[-1].lstrip("\n")
  if "</think>" not in text:
    wanted = text
  assert codec.decode(left) == wanted + "<|im_end|>"
  np.testing.assert_array_equal(left[:-1], ids(wanted))


def test_a_thinker_whose_thoughts_are_stripped(codec):
  """Every turn sees the calls and results of earlier ones and no thought, and is recorded behind
  exactly that; the slot keeps what has not changed."""
  (t,), engine = thinker.rollouts(thinker.hermes(codec, "stripped"), thinker.LIMITS, calls=3)
  assert t.status is Status.ANSWERED
  assert t.solved == 1.0
  assert [(p.start, p.stop) for p in t.parts] == [(0, 1), (1, 2), (2, 3), (3, 4)]
  assert thinker.contexts(t) == [seen for seen, _ in engine.turns]
  assert [s.tokens.tolist() for s in t.steps] == [ids for _, ids in engine.turns]
  for k, seen in enumerate(map(codec.decode, thinker.contexts(t))):
    assert "thought" not in seen
    assert seen.count("result number") == k
    assert seen.count('"name": "look"') == k
    assert seen.endswith("<|im_start|>assistant\n")
    assert f"<think>\nthought {k}\n" in codec.decode(t.steps[k].tokens)
  whole = sum(map(len, thinker.contexts(t)))
  again = len(t.prompt_tokens) + sum(
    len(here) - len(before) for before, here in zip(*both(thinker.contexts(t)), strict=True)
  )
  assert again <= engine.forced < whole / 2  # the stripped turn and what follows, not all


def both(contexts):
  return contexts[:-1], contexts[1:]


def test_thoughts_that_are_kept_break_nothing(codec):
  """The default is one growing list of ids, as it was before there were segments."""
  (kept,), one = thinker.rollouts(thinker.hermes(codec), thinker.LIMITS, calls=3)
  (same,), two = thinker.rollouts(thinker.hermes(codec, "template"), thinker.LIMITS, calls=3)
  assert len(kept.parts) == len(same.parts) == 1
  assert one.turns == two.turns
  assert one.forced == len(kept.prompt_tokens) + sum(len(s.observation_tokens) for s in kept.steps)


def test_results_older_than_n_steps_are_folded(codec):
  """The newest two stay; older ones are a line, and what was sampled is as it was."""
  limits = dataclasses.replace(thinker.LIMITS, fold=2)
  (t,), engine = thinker.rollouts(thinker.hermes(codec), limits, calls=5)
  assert [(p.start, p.stop) for p in t.parts] == [(0, 3), (3, 4), (4, 5), (5, 6)]
  assert thinker.contexts(t) == [seen for seen, _ in engine.turns]
  seen = list(map(codec.decode, thinker.contexts(t)))
  assert [s.count("result number") for s in seen] == [0, 1, 2, 2, 2, 2]
  assert [s.count(context.FOLDED) for s in seen] == [0, 0, 0, 1, 2, 3]
  assert [s.count("thought") for s in seen] == [0, 1, 2, 3, 4, 5]
  assert "result number 3" in seen[5]
  assert "result number 2" not in seen[5]


def test_folding_makes_room(codec):
  """The context is what a turn sees: a conversation that would not fit as a whole goes on."""
  (whole,), _ = thinker.rollouts(thinker.hermes(codec), thinker.LIMITS, calls=5)
  most = whole.longest - 20
  narrow = dataclasses.replace(thinker.LIMITS, max_tokens=most)
  (cut,), _ = thinker.rollouts(thinker.hermes(codec), narrow, calls=5)
  assert cut.status is Status.TOKEN_BUDGET
  folded = dataclasses.replace(narrow, fold=1)
  (t,), _ = thinker.rollouts(thinker.hermes(codec, "stripped"), folded, calls=5)
  assert t.status is Status.ANSWERED
  assert t.longest <= most


def test_a_budget_spent_with_a_break_fits_its_row(codec):
  """The last result, as history stands then, may be longer than fits; nothing may be cut of it."""
  limits = dataclasses.replace(thinker.LIMITS, fold=1, max_steps=3)
  (t,), _ = thinker.rollouts(thinker.hermes(codec), limits, calls=5)
  assert t.status is Status.STEP_BUDGET
  tight = dataclasses.replace(limits, max_tokens=t.longest - 1)
  (cut,), _ = thinker.rollouts(thinker.hermes(codec), tight, calls=5)
  assert cut.longest <= tight.max_tokens
  assert len(cut.steps[-1].observation_tokens) == 0


def test_a_user_who_speaks_again_takes_thoughts_back_and_is_not_folded(codec):
  """Qwen3's template keeps the thoughts after the user's last message; an answer that is followed
  by a turn is where the user has spoken."""
  f = thinker.hermes(codec, "template")
  turns = [f.render_action(Finish(str(n), thought=f"thought {n}")) for n in range(3)]
  user = f.others([("user", "and a message that is a good deal longer than that line?")])

  def step(turn, action):
    return Step(turn, np.zeros(len(turn)), action, None, user)

  steps = [step(turns[0], Finish("0")), step(turns[1], None), step(turns[2], None)]
  seen = codec.decode(context.shown(f, 1, codec.join(["P"]), steps))
  assert "thought 0" not in seen
  assert "thought 1" in seen
  assert seen.count("good deal") == 2  # the user's, and the newest
  assert seen.count(context.FOLDED) == 1


def test_the_newest_result_stays_when_the_user_has_spoken_since(codec):
  """The user's message took its place, just when it was asked about."""
  f = thinker.hermes(codec)
  turn = f.render_action(Finish("7"))
  result = f.observation(
    "a result that is a good deal longer than the line that would stand for it"
  )
  user = f.others([("user", "and twice that?")])
  steps = [
    Step(turn, np.zeros(len(turn)), action, None, seen)
    for action, seen in ((None, result), (Finish("7"), user))
  ]
  seen = codec.decode(context.shown(f, 1, codec.join(["P"]), steps))
  assert "good deal longer" in seen
  assert context.FOLDED not in seen


def test_formats_without_thoughts_refuse_to_strip_them(tmp_path):
  codec = thinker.tokenizer(tmp_path / "qwen25", tags=thinker.TAGS[:2])
  with pytest.raises(
    ValueError, match=r"'hermes'.*has no <think> blocks.*model\.thinking at 'kept'"
  ):
    get_format("hermes", codec, thinking="stripped")


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"algorithm": "eto"}, r"config\.algorithm: 'eto'.*rollout\.fold = 2.*use 'rft' or 'grpo'"),
    ({"rollout": Rollout(fold=2, strategy="dfsdt")}, r"config\.rollout\.fold = 2.*'dfsdt'.*to 0"),
    (
      {"environment": Environment(name="harness", functions="a.py", tasks="t.jsonl")},
      r"config\.rollout\.fold = 2.*'harness'.*set it to 0",
    ),
    (
      {"rollout": Rollout(), "model": Model(thinking="stripped"), "algorithm": "gspo"},
      r"config\.loss\.ratio.*model\.thinking = 'stripped'.*use 'step'",
    ),
    ({"model": Model(thinking="sometimes")}, r"config\.model\.thinking: 'sometimes' is not one of"),
  ],
)
def test_what_needs_a_growing_conversation_is_refused_by_name(changes, match):
  """Before anything is sampled, with the choice that helps."""
  base = Config(rollout=Rollout(fold=2), sft=dataclasses.replace(Config().sft, steps=0))
  config = dataclasses.replace(base, **changes)
  if config.environment.name == "harness":
    config = dataclasses.replace(config, model=Model(tokenizer="auto"))
  with pytest.raises(ValueError, match=match):
    validate(dataclasses.asdict(config))
