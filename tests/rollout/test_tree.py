"""The search over a scripted and over a real engine: order, contexts, sessions, counts."""

import random
import threading
import time

import fakes
import jax
import numpy as np
import pytest

from steptool_jax.dialogue import compact
from steptool_jax.dialogue.codec import Codec
from steptool_jax.dialogue.template import get_format
from steptool_jax.environments.nested_api import NestedApi
from steptool_jax.policy import engine, model
from steptool_jax.rollout import chain, tree
from steptool_jax.rollout.branching import ROOT
from steptool_jax.rollout.conversation import Limits
from steptool_jax.rollout.setting import Sampling, Setting
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.runner import ToolRunner
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

ECHO = ToolSpec("echo", "", {"type": "object", "properties": {}})
LIMITS = Limits(
  max_steps=3, max_step_tokens=40, max_tokens=2000, max_invalid=9, max_observation_chars=60
)
ANSWER, GIVE_UP = Finish("7"), Finish("", gave_up=True)


def echo(n=0):
  return ToolCall("echo", {"n": n})


@pytest.fixture(scope="module")
def chat_format(tmp_path_factory):
  out = tmp_path_factory.mktemp("tokenizer")
  compact.build_tokenizer(['echo {"n":1} answer 7 give_up'] * 50, 300, out)
  return get_format("compact", Codec.load(out))


class Counter:
  """A stateful environment: `echo` adds up and says the sum."""

  name = "counter"
  forkable = False

  def __init__(self, answer=None):
    self.answer, self.open_sessions, self.opened, self.lock = answer, 0, 0, threading.Lock()
    self.graded = []

  def open(self, task, sample):
    with self.lock:
      self.opened += 1
    return (ForkableSession if self.forkable else CounterSession)(self, ())


class CounterSession:
  def __init__(self, environment, done):
    self.environment, self.done, self.closed = environment, done, False
    with environment.lock:
      environment.open_sessions += 1

  def call(self, call):
    self.done = (*self.done, call.arguments.get("n", 0))
    if self.environment.answer is not None:
      return self.environment.answer(self, call)
    return Observation(f"sum {sum(self.done)}", Code.OK, sum(self.done), changed=True)

  def grade(self, answer):
    self.environment.graded.append((self.done, answer))
    return float(answer == "7")

  def close(self):
    if not self.closed:
      self.closed = True
      with self.environment.lock:
        self.environment.open_sessions -= 1


class ForkableSession(CounterSession):
  def fork(self):
    return ForkableSession(self.environment, self.done)


class ForkableCounter(Counter):
  forkable = True


def script(*actions):
  left = list(actions)
  return lambda text: left.pop(0)


def run(eng, environment, chat_format, jobs, strategy, limits=LIMITS, variables=None, **kwargs):
  sampling = kwargs.pop("sampling", Sampling(0, 0, 1.0))
  with ToolRunner(timeout_s=5, workers=4, retries=0) as runner:
    setting = Setting(eng, variables, environment, chat_format, limits, runner, sampling)
    return tree.search(setting, jobs, strategy, **kwargs)


def task(name="t", query="say seven"):
  return Task(name, "counter", query, (ECHO,), {})


def shape(result):
  return [(node.parent, node.status) for node in result.nodes]


def one(chat_format, actions, environment=None, limits=LIMITS, size=4000, **strategy):
  eng = fakes.ScriptedEngine(chat_format, script(*actions), size=size)
  environment = environment or Counter()
  (result,), stats = run(
    eng, environment, chat_format, [(task(), 0)], tree.Search(**strategy), limits
  )
  assert environment.open_sessions == 0
  return result, stats, eng, environment


def test_a_first_answer_is_a_chain(chat_format):
  result, stats, _, environment = one(chat_format, [echo(1), echo(2), ANSWER])
  assert shape(result) == [(ROOT, None), (0, None), (1, Status.ANSWERED)]
  assert (result.trajectory.status, result.trajectory.solved) == (Status.ANSWERED, 1.0)
  assert [s.action for s in result.trajectory.steps] == [echo(1), echo(2), ANSWER]
  assert (result.calls, stats.diversity_tokens, stats.replaced_tokens) == (3, 0, 0)
  assert environment.graded == [((1, 2), "7")]


def test_pre_order_with_width_and_back_up_lengths(chat_format):
  """Depth 3 ends a chain (1 up); giving up goes 2 up, here to node 0."""
  actions = [echo(1), echo(2), echo(3), GIVE_UP, echo(5), ANSWER]
  result, _, _, environment = one(chat_format, actions)
  assert shape(result) == [
    (ROOT, None),
    (0, None),
    (1, Status.STEP_BUDGET),
    (1, Status.GAVE_UP),
    (0, None),
    (4, Status.ANSWERED),
  ]
  assert [n.depth for n in result.nodes] == [1, 2, 3, 3, 2, 3]
  assert [n.index for n in result.path(result.leaf)] == [0, 4, 5]
  # The state followed the tree: the answer was graded after the calls 1 and 5 alone.
  assert environment.graded == [((1, 5), "7")]
  assert result.nodes[4].step.observation.text == "sum 6"


def test_what_is_repeated_has_time_of_its_own(chat_format):
  """It counted against the next call, which the model was then told had timed out."""

  def slow(session, call):
    time.sleep(0.4)
    return Observation(f"sum {sum(session.done)}", Code.OK, sum(session.done), changed=True)

  environment = Counter()
  environment.answer = slow
  actions = script(echo(1), echo(2), echo(3), GIVE_UP, echo(5), ANSWER)
  eng = fakes.ScriptedEngine(chat_format, actions, size=4000)
  with ToolRunner(timeout_s=0.7, workers=4, retries=0) as runner:
    sampling = Sampling(0, 0, 1.0)
    setting = Setting(eng, None, environment, chat_format, LIMITS, runner, sampling)
    (result,), _ = tree.search(setting, [(task(), 0)], tree.Search())
  assert result.nodes[4].step.observation.text == "sum 6"
  assert result.trajectory.status is Status.ANSWERED


def test_giving_up_at_once_leaves_the_root_with_the_official_back_up_and_not_with_1(chat_format):
  assert one(chat_format, [GIVE_UP])[0].trajectory.status is Status.GAVE_UP
  result = one(chat_format, [GIVE_UP, ANSWER], give_up_back=1)[0]
  assert shape(result) == [(ROOT, Status.GAVE_UP), (ROOT, Status.ANSWERED)]
  assert result.trajectory.status is Status.ANSWERED


def test_more_answers_go_on_after_the_first(chat_format):
  actions = [echo(1), Finish("6"), ANSWER]
  result = one(chat_format, actions, answers=2, answer_back=1)[0]
  assert shape(result) == [(ROOT, None), (0, Status.ANSWERED), (0, Status.ANSWERED)]
  assert result.leaf == 1  # the first one counts
  assert result.trajectory.solved == 0.0


def test_an_answer_backs_up_two_levels(chat_format):
  actions = [echo(1), echo(2), Finish("6"), echo(3), ANSWER]
  result = one(chat_format, actions, answers=2)[0]
  assert shape(result) == [
    (ROOT, None),
    (0, None),
    (1, Status.ANSWERED),
    (0, None),
    (3, Status.ANSWERED),
  ]


def test_the_budget_counts_llm_calls(chat_format):
  result, stats, eng, _ = one(chat_format, [echo(n) for n in range(9)], max_calls=5)
  assert (result.calls, stats.calls, len(eng.turns)) == (5, 5, 5)
  assert result.trajectory.status is Status.STEP_BUDGET
  assert result.leaf == 4
  # The last node's observation is recorded, to bootstrap from, and was not computed.
  assert len(result.nodes[4].step.observation_tokens) > 0


def test_without_an_answer_the_first_give_up_is_chosen(chat_format):
  actions = [echo(1), echo(2), GIVE_UP, echo(3), echo(4)]
  result = one(chat_format, actions, max_calls=5)[0]
  assert (result.leaf, result.trajectory.status) == (2, Status.GAVE_UP)


def test_a_whole_tree_ends_by_itself(chat_format):
  result, _, _, _ = one(chat_format, [echo(n) for n in range(20)])
  assert [n.parent for n in result.nodes] == [-1, 0, 1, 1, 0, 4, 4, -1, 7, 8, 8, 7, 11, 11]
  assert result.trajectory.status is Status.STEP_BUDGET


def test_malformed_turns_are_nodes(chat_format):
  result, _, eng, _ = one(chat_format, [Malformed(""), ANSWER, ANSWER], answers=2, answer_back=1)
  assert shape(result) == [(ROOT, None), (0, Status.ANSWERED), (0, Status.ANSWERED)]
  assert result.nodes[0].step.observation.code is Code.MALFORMED
  assert '"final_answer": "7"' in chat_format.codec.decode(eng.turns[2][0])


def test_the_diversity_prompt_is_the_siblings_alone(chat_format):
  actions = [echo(1), echo(2), echo(3), echo(4), echo(5), echo(6), ANSWER]
  result, _, eng, _ = one(chat_format, actions, max_calls=6)
  contexts = [chat_format.codec.decode(ids) for ids, _ in eng.turns]
  assert ["been at this point" in c for c in contexts] == [False, False, False, True, True, False]
  assert [len(n.diversity_tokens) > 0 for n in result.nodes] == [
    "been at this point" in c for c in contexts
  ]
  # The sibling of node 2 (call 3 after calls 1 and 2) sees call 3 and its result.
  assert '"n": 3' in contexts[3]
  assert "sum 6" in contexts[3]
  assert contexts[5].count('echo {"n":5}<|end|>') == 1


def expected_context(result, node):
  """Prompt, the turns and observations above the node, and its own diversity prompt."""
  above = result.path(node.parent)
  ids = result.trajectory.prompt_tokens.tolist()
  for n in above:
    ids += n.step.tokens.tolist() + n.step.observation_tokens.tolist()
  if len(node.diversity_tokens):
    ids = ids[:-1]  # the header of this format is one token, <|call|>
  return ids + node.diversity_tokens.tolist()


def random_policy(seed, numbers=100):
  def policy(text):
    rng = random.Random(f"{seed}/{text}")
    kind = rng.random()
    if kind < 0.6:
      return echo(rng.randrange(numbers))
    return rng.choice([GIVE_UP, GIVE_UP, Malformed(""), Finish("no") if kind < 0.9 else ANSWER])

  return policy


@pytest.mark.parametrize("environment", [Counter, ForkableCounter])
@pytest.mark.parametrize("width", [2, 3])
def test_every_context_is_its_path_and_every_token_is_forced_once(chat_format, environment, width):
  """Random trees, more of them than slots, two samples a task: contexts, counts and states."""
  world = environment()
  eng = fakes.ScriptedEngine(chat_format, random_policy(width), slots=3)
  jobs = [(task(f"t{i}", f"query {i}"), s) for i in range(6) for s in range(2)]
  strategy = tree.Search(max_calls=25, width=width, give_up_back=1, answers=3, answer_back=1)
  results, stats = run(eng, world, chat_format, jobs, strategy)
  assert world.open_sessions == 0
  assert max(r.calls for r in results) > 10
  expected = [(expected_context(r, n), n.step.tokens.tolist()) for r in results for n in r.nodes]
  assert sorted(expected) == sorted(eng.turns)
  shown = replaced = diversity = 0
  for r in results:
    parents = {n.parent for n in r.nodes}
    for n in r.nodes:
      diversity += len(n.diversity_tokens)
      if n.index in parents:
        shown += len(n.step.observation_tokens)
        replaced += (1 + len(n.step.tokens)) * (len(n.diversity_tokens) > 0)
      if isinstance(n.step.action, ToolCall):
        done = [
          a.step.action.arguments["n"]
          for a in r.path(n.index)
          if isinstance(a.step.action, ToolCall)
        ]
        assert n.step.observation.text == f"sum {sum(done)}"
  prompts = sum(len(r.trajectory.prompt_tokens) for r in results)
  shared = prompts - (stats.forced_tokens - shown - diversity - replaced)
  assert stats.forced_tokens == eng.forced
  assert (stats.diversity_tokens, stats.replaced_tokens) == (diversity, replaced)
  per_prompt = len(results[0].trajectory.prompt_tokens)
  assert shared == stats.shared_prefills * per_prompt  # all queries are equally long here
  assert stats.sampled_tokens == sum(len(n.step.tokens) for r in results for n in r.nodes)
  assert (stats.replayed_calls > 0) == (environment is Counter)


def test_a_replay_that_differs_is_infrastructure_and_no_failure_of_the_model(chat_format):
  calls = iter(range(100))
  environment = Counter(lambda session, call: Observation(f"number {next(calls)}", Code.OK))
  result, _, _, _ = one(chat_format, [echo(1), echo(2), echo(3), echo(4)], environment)
  assert result.trajectory.status is Status.INFRASTRUCTURE_ERROR
  assert "answered differently" in result.nodes[-1].step.observation.text
  assert environment.graded == []


def test_infrastructure_ends_the_search_and_is_not_graded(chat_format):
  environment = Counter(lambda session, call: Observation("down", Code.INFRASTRUCTURE))
  result, _, _, _ = one(chat_format, [echo(1), ANSWER], environment)
  assert result.trajectory.status is Status.INFRASTRUCTURE_ERROR
  assert (result.calls, environment.graded) == (1, [])


@pytest.mark.parametrize("search", [True, False])
def test_a_judge_that_is_down_is_infrastructure(chat_format, monkeypatch, search):
  def down(self, answer):
    raise InfrastructureError("the judge is down")

  monkeypatch.setattr(CounterSession, "grade", down)
  eng = fakes.ScriptedEngine(chat_format, script(ANSWER))
  if search:
    (result,), _ = run(eng, Counter(), chat_format, [(task(), 0)], tree.Search())
    trajectory = result.trajectory
  else:
    with ToolRunner(timeout_s=5, workers=4, retries=0) as runner:
      setting = Setting(eng, None, Counter(), chat_format, LIMITS, runner, Sampling(0, 0, 1.0))
      (trajectory,), _ = chain.rollout(setting, [(task(), 0)])
  assert (trajectory.status, trajectory.solved) == (Status.INFRASTRUCTURE_ERROR, 0.0)


@pytest.mark.parametrize("method", ["open", "grade"])
def test_an_environment_that_hangs_loses_one_search_in_time(chat_format, monkeypatch, method):
  release = threading.Event()
  where = Counter if method == "open" else CounterSession
  real = getattr(where, method)
  calls = []

  def hang_once(self, *args):
    calls.append(args)
    if len(calls) == 1:
      release.wait(30)
    return real(self, *args)

  monkeypatch.setattr(where, method, hang_once)
  eng = fakes.ScriptedEngine(chat_format, lambda text: ANSWER)
  jobs = [(task(), sample) for sample in range(2)]
  try:
    with ToolRunner(timeout_s=0.3, workers=4, retries=0) as runner:
      setting = Setting(eng, None, Counter(), chat_format, LIMITS, runner, Sampling(0, 0, 1.0))
      results, _ = tree.search(setting, jobs, tree.Search())
  finally:
    release.set()
  # Sessions are opened side by side: either search may be the one that meets the hanging call.
  ends = (result.trajectory for result in results)
  lost, found = sorted(ends, key=lambda t: t.status is Status.ANSWERED)
  assert (lost.status, lost.solved) == (Status.INFRASTRUCTURE_ERROR, 0.0)
  assert found.status is Status.ANSWERED


def test_a_diversity_prompt_that_does_not_fit_is_counted(chat_format):
  actions = [echo(1), echo(2), echo(3)]
  prompt = len(chat_format.prompt(None, (ECHO,), task().query))
  result, stats, _, _ = one(chat_format, actions, size=prompt + 100)
  assert shape(result) == [(ROOT, None), (0, None), (1, Status.STEP_BUDGET)]
  assert stats.siblings_without_room == 3
  assert stats.diversity_tokens == 0


def test_a_prompt_that_does_not_fit_ends_alone(chat_format):
  eng = fakes.ScriptedEngine(chat_format, script(ANSWER))
  jobs = [(task("long", "word " * 4000), 0), (task(), 0)]
  (long, short), _ = run(eng, Counter(), chat_format, jobs, tree.Search())
  assert (long.trajectory.status, long.nodes, long.leaf) == (Status.TOKEN_BUDGET, (), ROOT)
  assert short.trajectory.status is Status.ANSWERED


def test_a_diversity_text_without_a_place_for_the_candidates_is_refused():
  with pytest.raises(ValueError, match=r"search\.diversity"):
    tree.Search(diversity="none")


def test_should_stop_interrupts_and_closes(chat_format):
  environment = Counter()
  eng = fakes.ScriptedEngine(chat_format, script(echo(1), ANSWER))
  asked = iter([False, True])
  search = tree.Search()
  with pytest.raises(chain.Interrupted):
    run(eng, environment, chat_format, [(task(), 0)], search, should_stop=lambda: next(asked))
  assert environment.open_sessions == 0


def test_nested_api_databases_follow_the_tree(tmp_path_factory):
  """A real stateful environment: a change made in one branch is not there in its sibling."""
  env = NestedApi(num_train=300, num_heldout=0)
  changing = next(
    t for t in env.tasks("train") if t.checker["type"] == "state" and len(t.demonstration) == 3
  )
  first, change, done = changing.demonstration
  out = tmp_path_factory.mktemp("tokenizer")
  compact.build_tokenizer(list(compact.task_texts(changing)) * 5, 400, out)
  fmt = get_format("compact", Codec.load(out))
  # The first branch makes the change and gives up; the sibling only claims that it did.
  eng = fakes.ScriptedEngine(fmt, script(first, change, GIVE_UP, first, done))
  (result,), stats = run(eng, env, fmt, [(changing, 0)], tree.Search(max_calls=6))
  assert [n.parent for n in result.nodes] == [ROOT, 0, 1, 0, 3]
  assert (result.trajectory.status, result.trajectory.solved) == (Status.ANSWERED, 0.0)
  assert stats.replayed_calls == 1
  eng = fakes.ScriptedEngine(fmt, script(first, GIVE_UP, change, done))
  (result,), _ = run(eng, env, fmt, [(changing, 0)], tree.Search(give_up_back=1, max_calls=6))
  assert result.trajectory.solved == 1.0


def test_over_a_real_engine_sampler_logprobs_are_the_forward_pass(chat_format):
  """Random weights: every node's log-probs in the context that the search says it had."""
  config = fakes.tiny_config(vocab_size=chat_format.codec.vocab_size, max_position_embeddings=1024)
  variables = {"params": model.init_params(config, jax.random.key(0))}
  eng = engine.make_engine(config, slots=2, size=512, chunk=5)
  limits = Limits(
    max_steps=2, max_step_tokens=6, max_tokens=400, max_invalid=9, max_observation_chars=60
  )
  strategy = tree.Search(max_calls=6, diversity="not {candidates}")
  jobs = [(task(f"t{i}"), 0) for i in range(3)]
  results, stats = run(eng, Counter(), chat_format, jobs, strategy, limits, variables)
  assert stats.replaced_tokens > 0

  @jax.jit
  def log_probs(ids):
    positions, segments = np.arange(512)[None], np.ones((1, 512), np.int32)
    hidden = model.forward(config, variables, ids, positions, segments)
    return jax.nn.log_softmax(model.project_logits(config, variables, hidden))[0]

  for r in results:
    assert r.calls == 6
    for n in r.nodes:
      context = expected_context(r, n)
      ids = np.zeros((1, 512), np.int32)  # one compiled shape; what follows changes nothing
      end = len(context) + len(n.step.tokens)
      ids[0, :end] = [*context, *n.step.tokens]
      where = np.arange(len(context), end) - 1
      expected = np.asarray(log_probs(ids))[where, n.step.tokens]
      np.testing.assert_allclose(n.step.logprobs, expected, atol=2e-5)
  # The first chain is the one that plain rollouts sample.
  with ToolRunner(timeout_s=5, workers=4, retries=0) as runner:
    setting = Setting(eng, variables, Counter(), chat_format, limits, runner, Sampling(0, 0, 1.0))
    chains, _ = chain.rollout(setting, jobs)
  for r, c in zip(results, chains, strict=True):
    for n, step in zip(r.nodes[:2], c.steps, strict=True):
      assert n.step.tokens.tolist() == step.tokens.tolist()
  alone, _ = run(eng, Counter(), chat_format, jobs[2:], strategy, limits, variables)
  assert [n.step.tokens.tolist() for n in alone[0].nodes] == [
    n.step.tokens.tolist() for n in results[2].nodes
  ]
