"""Several user turns and several calls a turn: what is shown, what is paid, by hand."""

import dataclasses
import json
import random
import threading
import time
import types

import jax
import numpy as np
import pytest
from dialogue import conftest as tokenizers

from steptool_jax.config import Rewards, base_config
from steptool_jax.data import trajectories as files
from steptool_jax.dialogue.codec import Codec
from steptool_jax.dialogue.template import get_format
from steptool_jax.environments import base, custom, mistakes, users
from steptool_jax.environments.custom import Custom
from steptool_jax.environments.faults import Faults, FaultyEnvironment
from steptool_jax.evaluation.metrics import rollout_metrics
from steptool_jax.learning import advantages, batching, steptable
from steptool_jax.policy.kv_slots import Decoded
from steptool_jax.rewards import rules, shaping
from steptool_jax.rollout import chain, replaying
from steptool_jax.rollout.conversation import Limits
from steptool_jax.rollout.replaying import perform, replay_actions
from steptool_jax.rollout.setting import Sampling, Setting
from steptool_jax.run.parts import build
from steptool_jax.run.parts import tokenizers as tokenizer_parts
from steptool_jax.simulators import parallel
from steptool_jax.simulators.functions import Toolbox, tool
from steptool_jax.simulators.runner import ToolRunner, TooManyStuck
from steptool_jax.types import Code, Finish, Observation, Status, ToolCall, ToolCalls, by_call

LIMITS = Limits(
  max_steps=8, max_step_tokens=256, max_tokens=4096, max_invalid=3, max_observation_chars=300
)


def price(item: str) -> int:
  """Price of an item."""
  return {"lamp": 12, "rug": 30, "desk": 45}[item]


def calls(*items, name="price"):
  return ToolCalls(tuple(ToolCall(name, {"item": item}) for item in items))


TASK = {
  "id": "two",
  "query": "What do a lamp and a rug cost together?",
  "checker": {"type": "number", "value": 87},
  "turns": [{"reply": "And with a desk?", "checker": {"type": "number", "value": 42}}],
  "demonstration": [
    {"calls": [{"tool": "price", "arguments": {"item": i}} for i in ("lamp", "rug")]},
    {"answer": "42"},
    {"tool": "price", "arguments": {"item": "desk"}},
    {"answer": "87"},
  ],
  "split": "train",
}


@pytest.fixture(scope="module")
def hermes(tmp_path_factory):
  out = tokenizers.byte_level(
    tmp_path_factory.mktemp("t") / "qwen25",
    tokenizers.QWEN2,
    tokenizers.TOOL_TAGS,
    tokenizers.HERMES_TEMPLATE,
    None,
    "<|im_end|>",
  )
  return get_format("hermes", Codec.load(out), parallel_calls=True)


def environment(tmp_path, functions=(price,), **changes):
  path = tmp_path / "tasks.jsonl"
  path.write_text(json.dumps(TASK | changes) + "\n")
  env = Custom(functions, path)
  return env, env.tasks("train")[0]


def paid(env, task, actions, chat_format, **options):
  found = replay_actions(env, task, actions, chat_format, LIMITS)
  marked = rules.annotate(task, found, causal=True)
  return shaping.shape(marked, Rewards(**options), needed=rules.needed(task))


def test_two_turns_with_two_parallel_calls_by_hand(tmp_path, hermes):
  """Three calls are needed: the pair earns 2/3, the answer of turn 1 its own checker's 1, the desk
  1/3, the end 1. GAE, gamma = .5, lambda = 1, V = 0: each step's reward and half of what follows.
  """
  env, task = environment(tmp_path)
  found = paid(env, task, task.demonstration, hermes)
  assert (found.status, found.solved) == (Status.ANSWERED, 1.0)
  assert [s.success_calling for s in found.steps] == [1, 1, 1, 0]
  assert [s.contribution for s in found.steps] == [1, 0, 1, 0]
  assert [s.reward for s in found.steps] == pytest.approx([2 / 3, 1, 1 / 3, 1])
  assert found.reward_parts == pytest.approx(
    {"success_calling": 0, "contribution": 1, "turns": 1, "solved": 1}
  )
  packed = batching.pack([found], found.num_tokens + 1)
  batch = packed.batch
  zeros = np.zeros(batch.tokens.shape, np.float32)
  adv, _ = advantages.gae(batch, jax.numpy.asarray(batch.rewards), zeros, gamma=0.5, lam=1.0)
  by_step = [float(np.asarray(adv)[batch.step_ids == k][0]) for k in range(4)]
  # 1; 1/3 + 1/2 = 5/6; 1 + 5/12 = 17/12; 2/3 + 17/24 = 33/24
  assert by_step == pytest.approx([33 / 24, 17 / 12, 5 / 6, 1])
  table = steptable.build(packed)
  assert table.succeeded[0, :4].tolist() == [0, 2, 2, 3]
  assert table.failed[0, :4].tolist() == [0, 0, 0, 0]


def test_what_the_model_is_shown(tmp_path, hermes):
  """Results of one turn in one user turn, in the order of the calls; the reply as a user's turn."""
  env, task = environment(tmp_path)
  found = replay_actions(env, task, task.demonstration, hermes, LIMITS)
  text = hermes.codec.decode
  assert hermes.parse(found.steps[0].tokens) == task.demonstration[0]
  shown = text(found.steps[0].observation_tokens.tolist())
  assert "<tool_response>\n12\n</tool_response>\n<tool_response>\n30\n</tool_response>" in shown
  assert shown.count("user\n") == 1
  assert "user\nAnd with a desk?" in text(found.steps[1].observation_tokens.tolist())
  assert perform(env, task, task.demonstration).solved == 1.0


def test_a_bundle_earns_no_more_than_its_calls_one_by_one(tmp_path, hermes):
  """And calls without use, or made twice, in a bundle earn nothing."""
  env, task = environment(tmp_path)
  lamp, rug = task.demonstration[0].calls
  rest = task.demonstration[1:]
  single = paid(env, task, [lamp, rug, *rest], hermes)
  bundled = paid(env, task, task.demonstration, hermes)
  assert sum(s.reward for s in single.steps) == pytest.approx(sum(s.reward for s in bundled.steps))
  padded = paid(env, task, [calls("lamp", "lamp", "rug"), *rest], hermes)
  assert padded.steps[0].contribution == pytest.approx(2 / 3)
  assert padded.steps[0].success_calling == pytest.approx(2 / 3)
  assert [s.reward for s in padded.steps] == pytest.approx([s.reward for s in bundled.steps])


def test_a_wrong_turn_earns_nothing_and_the_end_is_judged_by_itself(tmp_path, hermes):
  env, task = environment(tmp_path)
  pair, _, desk, last = task.demonstration
  found = paid(env, task, [pair, Finish("41"), desk, last], hermes, turns=0.5)
  assert found.steps[1].observation.solved == 0.0
  assert found.reward_parts["turns"] == 0.0
  assert found.solved == 1.0
  right = paid(env, task, task.demonstration, hermes, turns=0.5)
  assert right.reward_parts["turns"] == 0.5
  marked = rules.annotate(task, right, causal=True)
  outcome = shaping.shape(marked, Rewards(), outcome_only=True, needed=3)
  assert [s.reward for s in outcome.steps] == [0, 0, 0, 1]


def test_what_the_user_says_is_not_found_out_by_a_call(tmp_path, hermes):
  """A value of the user's message is known: a call that shows it again contributes nothing new."""
  changes = {"turns": [{"reply": "A desk is 45. And with it?"}]}
  env, task = environment(tmp_path, **changes)
  task = dataclasses.replace(task, demonstration=(*task.demonstration[:2], Finish("45")))
  pair, first, last = task.demonstration
  found = paid(env, task, [pair, first, ToolCall("price", {"item": "desk"}), last], hermes)
  assert found.steps[2].contribution == 0.0


def test_stored_and_read_again(tmp_path, hermes):
  env, task = environment(tmp_path)
  found = paid(env, task, task.demonstration, hermes)
  record = files.AnnotatedTrajectory(found, True, task.query, {})
  again = files.load(files.dump(record)).trajectory
  for a, b in zip(again.steps, found.steps, strict=True):
    assert (a.action, a.observation) == (b.action, b.observation)
  assert again.steps[0].observation.parts[1].value == 30
  assert again.steps[1].observation.solved == 1.0


def test_figures_count_calls_and_not_turns(tmp_path, hermes):
  env, task = environment(tmp_path)
  figures = rollout_metrics([paid(env, task, task.demonstration, hermes)])
  assert figures["calls_per_task"] == 3
  assert figures["invocation_success"] == 1
  assert figures["useless_calls"] == 0
  assert figures["tokens_per_task"] == sum(
    len(s.tokens) + len(s.observation_tokens)
    for s in by_call(replay_actions(env, task, task.demonstration, hermes, LIMITS).steps)
  ) + len(hermes.prompt(None, task.tools, task.query))


def test_users_that_are_functions(tmp_path):
  """None ends the conversation; a pair has the verdict; a user that raises marks the trajectory."""
  (tmp_path / "mine.py").write_text(
    "def price(item: str) -> int:\n  '''Price.'''\n  return 12\n"
    "def again(answer, tools, turn, most):\n"
    "  if answer == 'boom': raise KeyError('x')\n"
    '  return None if turn > most else (f\'{turn}, {tools["price"]("a")}?\', 0.5)\n'
    "TOOLS = [price]\n"
  )
  user = {"turns": None, "user": {"type": "again", "most": 2}, "checker": {"type": "none"}}
  env, task = environment(tmp_path, str(tmp_path / "mine.py"), demonstration=[], **user)
  session = env.open(task, 0)
  said = [session.reply("a") for _ in range(3)]
  assert [None if s is None else (s.text, s.solved) for s in said] == [
    ("1, 12?", 0.5),
    ("2, 12?", 0.5),
    None,
  ]
  with pytest.raises(RuntimeError, match="user again raised KeyError"):
    env.open(task, 0).reply("boom")


def test_spoiled_demonstrations_end_for_good(tmp_path, hermes):
  """Giving up in the middle ends the conversation; of a turn's calls one may be forgotten."""
  env, task = environment(tmp_path)
  kinds = set()
  for seed in range(60):
    actions = mistakes.imperfect(env, task, random.Random(seed), 0.4)
    found = replay_actions(env, task, actions, hermes, LIMITS)
    kinds.add((found.status, type(actions[0]).__name__))
    assert found.status in (Status.ANSWERED, Status.GAVE_UP)
  assert {(Status.ANSWERED, "ToolCalls"), (Status.GAVE_UP, "ToolCalls")} <= kinds
  assert (Status.ANSWERED, "ToolCall") in kinds


def test_a_compact_tokenizer_learns_from_users_too(tmp_path):
  """Its corpus has what users say; a demonstration's answer is no call of a tool."""
  desk = TASK["demonstration"][2:]
  env, task = environment(tmp_path, demonstration=[{"answer": "42"}, *desk])
  with ToolRunner(timeout_s=1, workers=2) as runner:
    for texts in (
      tokenizer_parts._texts(env, task, runner),
      tokenizer_parts._texts(env, task, None),
    ):
      assert [*texts][-2:] == ["And with a desk?", "45"]


def test_a_tree_search_is_refused(tmp_path):
  """Its leaves are answers; here an answer is no leaf."""
  environment(tmp_path)
  (tmp_path / "mine.py").write_text(
    "def price(item: str) -> int:\n  '''Price.'''\n  return 1\nTOOLS = [price]\n"
  )
  config = base_config()
  config.environment.functions = str(tmp_path / "mine.py")
  config.environment.tasks = str(tmp_path / "tasks.jsonl")
  custom.from_config(config, None)
  config.rollout.strategy = "dfsdt"
  config.environment.name = "custom"
  with pytest.raises(ValueError, match="rollout.strategy: 'dfsdt' .*task two .*'chain'"):
    build.build_environment(config)


class ScriptedEngine:
  """Says each slot's next action; remembers what was appended."""

  slots, size, classes = 2, 4096, ((2, 4096),)

  def __init__(self, chat_format, actions):
    self.format, self.actions, self.turn, self.shown = chat_format, actions, {}, []

  def init(self):
    return None

  def rewind(self, state, lengths):
    return state

  def fork(self, state, copies):
    return state

  def append(self, variables, state, pieces):
    self.shown += [self.format.codec.decode(ids.tolist()) for ids in pieces.values()]
    return state

  def decode(self, variables, state, budgets, seeds, stop_ids, temperature):
    tokens = np.zeros((self.slots, 256), np.int32)
    count = np.zeros(self.slots, np.int32)
    for slot in budgets:
      turn = self.turn[slot] = self.turn.get(slot, -1) + 1
      ids = self.format.render_action(self.actions[turn])
      tokens[slot, : len(ids)], count[slot] = ids, len(ids)
    found = Decoded(tokens, np.zeros(tokens.shape, np.float32), count, count > 0)
    return state, found


def rolled_out(env, task, actions, chat_format):
  engine = ScriptedEngine(chat_format, actions)
  with ToolRunner(timeout_s=1, workers=4) as runner:
    setting = Setting(engine, {}, env, chat_format, LIMITS, runner, Sampling(0, 0, 1.0))
    (found,), _ = chain.rollout(setting, [(task, 0)])
  return found, engine.shown


def test_a_rollout_is_what_the_replay_is(tmp_path, hermes):
  """The scheduler asks the user after each answer and makes a turn's calls in threads."""
  env, task = environment(tmp_path)
  found, shown = rolled_out(env, task, task.demonstration, hermes)
  replayed = replay_actions(env, task, task.demonstration, hermes, LIMITS)
  assert (found.status, found.solved) == (Status.ANSWERED, 1.0)
  assert len(shown) == 4
  for a, b in zip(found.steps, replayed.steps, strict=True):
    assert a.action == b.action
    assert a.tokens.tolist() == b.tokens.tolist()
    assert a.observation_tokens.tolist() == b.observation_tokens.tolist()


def test_a_user_that_fails_or_hangs_marks_the_conversation(tmp_path, hermes):
  """Nothing of it is trained on: it is not the policy's failure."""
  hang = threading.Event()

  class Broken:
    name = "custom"

    def __init__(self, env, reply):
      self.env, self.reply = env, reply

    def open(self, task, sample):
      session = self.env.open(task, sample)
      return types.SimpleNamespace(
        call=session.call, reply=self.reply, grade=session.grade, close=session.close
      )

  env, task = environment(tmp_path)
  try:
    for reply in (lambda answer: 1 / 0, lambda answer: hang.wait(9)):
      found, _ = rolled_out(Broken(env, reply), task, task.demonstration, hermes)
      assert found.status is Status.INFRASTRUCTURE_ERROR
      assert isinstance(found.steps[-1].action, Finish)
  finally:
    hang.set()


def test_a_user_that_thinks_has_a_time_out_of_its_own(tmp_path, hermes):
  """A model behind an endpoint was cut at a tool's time-out; many such replies ended the run."""
  env, task = environment(tmp_path)

  class Thinking:
    name = "custom"

    def open(self, task, sample):
      session = env.open(task, sample)
      slowly = lambda answer: (time.sleep(0.3), session.reply(answer))[1]  # noqa: E731
      return types.SimpleNamespace(
        call=session.call, reply=slowly, grade=session.grade, close=session.close
      )

  for reply_s, status in ((None, Status.INFRASTRUCTURE_ERROR), (20.0, Status.ANSWERED)):
    with ToolRunner(timeout_s=0.1, workers=4, reply_s=reply_s) as runner:
      engine = ScriptedEngine(hermes, task.demonstration)
      setting = Setting(engine, {}, Thinking(), hermes, LIMITS, runner, Sampling(0, 0, 1.0))
      (found,), _ = chain.rollout(setting, [(task, 0)])
      assert found.status is status
      if reply_s:
        again = replay_actions(Thinking(), task, task.demonstration, hermes, LIMITS, runner=runner)
        assert again.status is status


class Model:
  """An endpoint that keeps what it was asked."""

  def __init__(self, *texts):
    self.texts, self.asked = list(texts), []

  def chat(self, messages, **_):
    self.asked.append(messages)
    return dataclasses.make_dataclass("Reply", ["text"])(self.texts.pop(0))


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("<think>If it is wrong I say ###STOP###.</think> And twice that?", "And twice that?"),
    ("Hm.</think>And twice that?", "And twice that?"),
    ("<think>So long that it was cut", ""),
    ("", ""),
  ],
)
def test_thoughts_of_the_user_are_neither_shown_nor_the_end(text, said):
  """A talk ended with a word in a thought, or where the thought was cut, and was graded at once."""
  assert users._words(text) == said
  reply = types.SimpleNamespace(text=text)
  if said:
    users._accept(reply)
  else:
    with pytest.raises(ValueError, match="says nothing, or only thinks"):
      users._accept(reply)


def test_what_the_user_says_is_not_cut(tmp_path, hermes):
  """As of BFCL, where functions come with the user's words: they lost their end."""
  env, task = environment(tmp_path)
  long = "x " * 400 + "what about now?"
  turns = [{"reply": long}]
  task = dataclasses.replace(task, metadata=task.metadata | {base.TURNS: turns})
  limits = dataclasses.replace(LIMITS, max_observation_chars=60, max_tokens=4000)
  found = replay_actions(env, task, [Finish("1"), Finish("2")], hermes, limits)
  shown = hermes.codec.decode(found.steps[0].observation_tokens)
  assert long in shown


def test_a_user_that_is_a_model(tmp_path):
  """It speaks as the assistant of its own conversation, in which the policy is the user."""
  path = tmp_path / "tasks.jsonl"
  user = {"type": "model", "wants": "You want prices.", "turns": 2}
  line = {k: v for k, v in TASK.items() if k not in ("turns", "demonstration")} | {"user": user}
  path.write_text(json.dumps(line) + "\n")
  model = Model("And a rug?", "Thanks ###STOP###")
  env = Custom([price], path, user=model)
  session = env.open(env.tasks("train")[0], 0)
  assert session.reply("12").text == "And a rug?"
  assert session.reply("30") is None
  system, *talk = model.asked[1]
  assert "You want prices." in system["content"]
  assert [(m["role"], m["content"]) for m in talk] == [
    ("assistant", TASK["query"]),
    ("user", "12"),
    ("assistant", "And a rug?"),
    ("user", "30"),
  ]
  with pytest.raises(ValueError, match=r"tasks.jsonl:1: user 'model' .*environment.user.base_url"):
    Custom([price], path)


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"turns": []}, "field 'turns' must be a non-empty list"),
    ({"turns": [{"says": "x"}]}, "turns, entry 0: must be"),
    ({"turns": [{"reply": " "}]}, "entry 0: 'reply' must be a non-empty string"),
    ({"turns": [{"reply": "x", "checker": {"type": "nope"}}]}, "entry 0: unknown checker type"),
    ({"user": {"type": "model"}}, "has 'turns' and 'user'"),
    ({"turns": None, "user": {"type": "nobody"}}, "unknown user type 'nobody'"),
    ({"turns": None}, "entry 1: the last entry, and no other"),
    ({"demonstration": [{"calls": []}, {"answer": "1"}]}, "entry 0: 'calls' must be a list of two"),
    (
      {"demonstration": [{"calls": [{"tool": "price", "arguments": {}}] * 2}, {"answer": "1"}]},
      "entry 0: 'item' is a required property",
    ),
  ],
)
def test_what_is_wrong_with_a_task_is_said_with_its_line(tmp_path, changes, reason):
  with pytest.raises(ValueError, match=f"tasks.jsonl:1: .*{reason}"):
    environment(tmp_path, **changes)


def meeting(barrier):
  def wait(item: str) -> str:
    """Waits for the other one."""
    barrier.wait(timeout=5)
    return item

  return wait


def answered(session, action, **options):
  with ToolRunner(timeout_s=8, workers=4, **options) as runner:
    return parallel.submit(runner, session, action).result(timeout=9)


def test_tools_that_share_nothing_run_side_by_side(tmp_path):
  """Each of the two returns only when the other one has begun."""
  env, task = environment(tmp_path, [meeting(threading.Barrier(2))], demonstration=[])
  found = answered(env.open(task, 0), calls("a", "b", "c", "d", name="wait"))
  assert [part.value for part in found.parts] == ["a", "b", "c", "d"]
  assert (found.code, found.value) == (Code.OK, ["a", "b", "c", "d"])


def test_tools_with_a_state_keep_the_order_of_the_turn(tmp_path):
  """Results must not depend on timing: the second call sees what the first one did."""

  def make_tools():
    seen = []

    def note(item: str) -> list:
      """Notes it."""
      seen.append(item)
      return list(seen)

    return [note]

  env, task = environment(tmp_path, make_tools, demonstration=[])
  faulty = FaultyEnvironment(env, Faults(transient=1e-12))
  for where in (env, faulty):
    found = answered(where.open(task, 0), calls(*"abcdefgh", name="note"))
    assert [part.value for part in found.parts] == [list("abcdefgh"[: k + 1]) for k in range(8)]
    assert found.changed


def test_calls_that_no_fault_has_hit_are_not_made_again(tmp_path, hermes):
  """Of two payments the one that had gone through was made twice, and its demonstration failed."""

  def make_tools():
    paid = []

    def pay(item: str) -> int:
      """Pays."""
      paid.append(item)
      return len(paid)

    return [pay]

  demonstration = [
    {"calls": [{"tool": "pay", "arguments": {"item": i}} for i in ("lamp", "rug")]},
    {"tool": "pay", "arguments": {"item": "desk"}},
    {"answer": "3"},
  ]
  changes = {"turns": None, "demonstration": demonstration, "checker": {"type": "none"}}
  env, task = environment(tmp_path, make_tools, **changes)
  faulted = 0
  for seed in range(30):
    faulty = FaultyEnvironment(env, Faults(transient=0.3, seed=seed))
    found = replay_actions(faulty, task, task.demonstration, hermes, LIMITS)
    again = perform(faulty, task, task.demonstration)
    for t in (found, again):
      parts = [part for s in by_call(t.steps) if (part := s.observation) is not None]
      assert [p.value for p in parts if p.code is Code.OK][-1] == 3
    faulted += any(p.injected for p in parts)
  assert faulted > 3


@pytest.mark.parametrize(
  ("hit", "left"), [((True, False), "lamp"), ((False, True), "rug"), ((True, True), None)]
)
def test_what_is_to_be_repeated(hit, left):
  turn = calls("lamp", "rug")
  parts = tuple(Observation("", Code.UNAVAILABLE, injected=h) for h in hit)
  found = replaying.to_repeat(turn, parallel.combined(parts))
  assert found == (turn if left is None else ToolCall("price", {"item": left}))


def test_what_a_turn_of_calls_comes_to():
  parts = [
    Observation("a", Code.OK, 1, seconds=1, cost=0.25, latency=2),
    Observation("b", Code.NOT_FOUND, seconds=3, cost=0.5, latency=1, injected=True),
  ]
  found = parallel.combined(parts)
  assert (found.text, found.code, found.value) == ("a\nb", Code.NOT_FOUND, None)
  assert (found.seconds, found.cost, found.latency) == (3, 0.75, 2)
  assert (found.injected, found.changed, found.parts) == (True, False, tuple(parts))
  down = parallel.combined([*parts, Observation("c", Code.INFRASTRUCTURE)])
  assert down.code is Code.INFRASTRUCTURE


def test_a_call_that_hangs_is_a_timeout_of_its_own():
  """The others of its turn are answered, and a turn whose runner gave up raises as single calls."""
  released = threading.Event()

  def slow(item: str) -> str:
    """Hangs for 'b'."""
    if item == "b":
      released.wait(9)
    return item

  class Session:
    side_by_side = True
    call = Toolbox([tool(slow)]).call

  try:
    with ToolRunner(timeout_s=0.3, workers=4, max_stuck=8) as runner:
      found = parallel.submit(runner, Session(), calls("a", "b", "c", name="slow")).result(9)
    assert [part.code for part in found.parts] == [Code.OK, Code.TIMEOUT, Code.OK]
    with ToolRunner(timeout_s=0.3, workers=1, max_stuck=0) as runner, pytest.raises(TooManyStuck):
      parallel.submit(runner, Session(), calls("b", "b", name="slow")).result(9)
  finally:
    released.set()
