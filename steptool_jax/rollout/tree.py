"""DFSDT: depth-first search over an engine's slots; backing up is a rewind.

A search sits in one slot, as a conversation does, and many searches run at once. Its slot holds
the path from the prompt to the node in work; backing up cuts the slot to the ancestor's length,
and nothing that was computed once is computed again.

A node's second child must differ from the first. So the slot is cut to just before the assistant
header, a user's turn that lists the earlier candidates is appended, and the sibling is sampled.
That turn is for the sibling alone: before the search goes on below the sibling, the slot is cut
again and the sibling's own turn is put where the diversity prompt stood (`replaced_tokens`: it has
to be computed again, as it attended to the prompt). Descendants never see the prompt. A sibling's
log-probs are those of the distribution that it was sampled from, diversity prompt included.

Everything is counted in LLM calls: one turn of the model is one call.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.rollout.branching import ROOT, Branches
from steptool_jax.rollout.chain import Loop, Seat, judged
from steptool_jax.rollout.conversation import Conversation, Limits, State
from steptool_jax.rollout.setting import Setting, Stats
from steptool_jax.rollout.strategy import CANDIDATES, Node, Search, SearchResult
from steptool_jax.simulators import parallel
from steptool_jax.simulators.render import shorten
from steptool_jax.simulators.runner import TooManyStuck
from steptool_jax.types import (
  Code,
  Finish,
  Malformed,
  Observation,
  Status,
  Step,
  Task,
  Trajectory,
  by_call,
)


@dataclasses.dataclass
class TreeStats(Stats):
  """forced_tokens = prompts + observations + diversity_tokens + replaced_tokens."""

  calls: int = 0  # LLM calls of all searches
  diversity_tokens: int = 0  # user's turns in front of siblings
  replaced_tokens: int = 0  # siblings' turns and headers, put where a diversity prompt stood
  siblings_without_room: int = 0  # not sampled: the diversity prompt would not have fitted
  replayed_calls: int = 0  # tool calls repeated in fresh sessions


def search(
  setting: Setting,
  jobs: Sequence[tuple[Task, int]],
  strategy: Search,
  should_stop: Callable[[], bool] = lambda: False,
  on_done: Callable[[Trajectory], None] = lambda trajectory: None,
) -> tuple[list[SearchResult], TreeStats]:
  """Searches all (task, sample) jobs, results in their order, chosen chains graded.

  The first chain of a search is the one that chain.rollout samples in the same setting. A slot
  that is larger than limits.max_tokens leaves room for diversity prompts. Else as chain.rollout.
  """
  loop = _TreeLoop(setting, strategy)
  loop.run(jobs, should_stop, on_done)
  return [loop.results[task.id, sample] for task, sample in jobs], loop.stats


@dataclasses.dataclass(eq=False)
class _Visit:
  """A node in work: the conversation after its observation, and where its children begin."""

  index: int
  parent: "_Visit | None"
  conversation: Conversation
  shown: np.ndarray  # what the model saw last: the prompt, or this node's observation
  diverse: bool = False  # its turn follows a diversity prompt in the slot
  tried: int = 0
  children: list["_Visit"] = dataclasses.field(default_factory=list)
  cut: int = 0  # of `shown`, taken back in front of a diversity prompt

  @property
  def step(self) -> Step:
    return self.conversation.steps[-1]


class _Tree:
  """One search as a state machine, with the methods of a Conversation that the loop uses."""

  def __init__(
    self,
    start: Conversation,
    chat_format: ChatFormat,
    limits: Limits,
    strategy: Search,
    size: int,
  ):
    self.task, self.sample = start.task, start.sample
    self.prompt_tokens = start.prompt_tokens
    self._format, self._limits, self._strategy, self._size = chat_format, limits, strategy, size
    # (node, its parent, its path) of every node, before the search goes on. A session that is still
    # being opened hears of them when it is open: nothing was called till then.
    self._on_node: Callable[[int, int, tuple[Step, ...]], None] = lambda *node: (
      self._unheard.append(node)
    )
    self._unheard: list[tuple[int, int, tuple[Step, ...]]] = []
    self.nodes: list[Node] = []
    self.without_room = 0
    self._root = _Visit(ROOT, None, start, start.prompt_tokens)
    self._visits: list[_Visit] = []
    self._at = self._root  # whose child is being made
    self._child = start  # the child's conversation
    self._diversity = np.zeros(0, np.int32)  # in front of the child
    # What the slot needs before the child can be sampled: a length, and pieces by kind.
    self.rewind_to: int | None = None
    self.pieces: dict[str, np.ndarray] = {}
    self._over = start.state is State.DONE
    if not self._over:
      self._expand(self._root)

  @property
  def state(self) -> State:
    return State.DONE if self._over else self._child.state

  @property
  def call(self):
    return self._child.call

  @property
  def turns(self) -> int:
    return len(self.nodes)

  @property
  def length(self) -> int:
    """Tokens of the path to the node in work."""
    return self._child.length

  @property
  def node(self) -> int:
    """The node after which a call is made."""
    return self._at.index

  @property
  def holds_prompt(self) -> bool:
    """A diversity prompt after the root overwrites the prompt's assistant header for a while."""
    return not (self._at is self._root and len(self._diversity)) and not (
      self._at.parent is self._root and self._at.diverse and self.state is State.NEEDS_APPEND
    )

  def follow(self, on_node: Callable[[int, int, tuple[Step, ...]], None]) -> None:
    """From now on `on_node` hears of every node, and at once of those that there are."""
    for node in self._unheard:
      on_node(*node)
    self._on_node, self._unheard = on_node, []

  def pending_tokens(self) -> np.ndarray:
    return np.concatenate(list(self.pieces.values()))

  def appended(self) -> None:
    self._child.appended()

  def budget(self) -> int:
    return self._child.budget()

  def sampled(
    self, tokens: np.ndarray, logprobs: np.ndarray, stopped: bool, *recorded: np.ndarray | None
  ) -> State:
    state = self._child.sampled(tokens, logprobs, stopped, *recorded)
    if state in (State.NEEDS_APPEND, State.DONE):
      self._grow()
    return self.state

  def observe(self, observation: Observation) -> State:
    self._child.observe(observation)
    self._grow()
    return self.state

  def result(self, version: int) -> tuple[int, Trajectory]:
    """(index of the chosen leaf, its chain, not graded yet)."""
    leaf = self._choose()
    conversation = leaf.conversation
    trajectory = Trajectory(
      task_id=self.task.id,
      sample=self.sample,
      prompt_tokens=conversation.prompt_tokens,
      steps=conversation.steps,
      status=conversation.status or Status.STEP_BUDGET,
      policy_version=version,
    )
    return leaf.index, trajectory

  def path(self, index: int) -> tuple[Step, ...]:
    return () if index == ROOT else self._visits[index].conversation.steps

  def answer(self, index: int) -> str | None:
    return None if index == ROOT else self._visits[index].conversation.answer

  def _choose(self) -> _Visit:
    if not self._visits:
      return self._root
    last = self._visits[-1]
    if last.conversation.status is Status.INFRASTRUCTURE_ERROR:
      return last
    for wanted in (Status.ANSWERED, Status.GAVE_UP):
      for visit in self._visits:
        if visit.conversation.status is wanted:
          return visit
    return last

  def _grow(self) -> None:
    """The child's turn has ended: makes it a node and decides what comes next."""
    parent, child = self._at, self._child
    depth = len(child.steps)
    visit = _Visit(
      len(self.nodes), parent, child, child.steps[-1].observation_tokens, len(self._diversity) > 0
    )
    parent.children.append(visit)
    self._visits.append(visit)
    node = Node(visit.index, parent.index, depth, child.steps[-1], child.status, self._diversity)
    self.nodes.append(node)
    self._on_node(visit.index, parent.index, child.steps)
    answers = sum(node.status is Status.ANSWERED for node in self.nodes)
    if (
      child.status is Status.INFRASTRUCTURE_ERROR
      or answers >= self._strategy.answers
      or len(self.nodes) >= self._strategy.max_calls
    ):
      self._over = True
    elif child.status is None:
      self._expand(visit)
    else:
      self._back_up(visit, self._levels(child))

  def _levels(self, ended: Conversation) -> int:
    if ended.status is Status.ANSWERED:
      return self._strategy.answer_back
    action = ended.steps[-1].action
    return self._strategy.give_up_back if isinstance(action, Finish) else 1

  def _back_up(self, visit: _Visit, levels: int) -> None:
    """Goes up, then on to the nearest ancestor that still has a child to try."""
    place: _Visit | None = visit
    for _ in range(levels):
      place = place.parent if place is not None else None
    while place is not None:
      if place.tried < self._strategy.width and self._expand(place):
        return
      place = place.parent
    self._over = True

  def _expand(self, visit: _Visit) -> bool:
    """Prepares the slot for the next child; False when its diversity prompt does not fit."""
    visit.tried += 1
    child = visit.conversation.branch()
    length = visit.conversation.length
    pieces: dict[str, np.ndarray] = {}
    rewind_to = None
    diversity = np.zeros(0, np.int32)
    if not visit.children:
      pieces["observation"] = visit.shown  # the root's is the prompt
      if visit.diverse:
        above = visit.parent
        rewind_to = above.conversation.length - above.cut
        header = above.shown[len(above.shown) - above.cut :]
        pieces = {"replaced": np.concatenate([header, visit.step.tokens])} | pieces
    else:
      visit.cut, diversity = self._format.interject(visit.shown, self._diversity_text(visit))
      rewind_to = length - visit.cut
      pieces["diversity"] = diversity
      if rewind_to + len(diversity) + child.budget() > self._size:
        self.without_room += 1
        return False
    self._at, self._child, self._diversity = visit, child, diversity
    self.rewind_to, self.pieces = rewind_to, pieces
    return True

  def _diversity_text(self, visit: _Visit) -> str:
    listed = [self._candidate(child.step) for child in visit.children]
    text = json.dumps(listed, indent=2, ensure_ascii=False)
    return self._strategy.diversity.replace(CANDIDATES, text)

  def _candidate(self, step: Step) -> dict[str, Any]:
    action = step.action
    if isinstance(action, Malformed):
      return {"malformed": action.reason}
    if isinstance(action, Finish):
      kind = "gave up" if action.gave_up else "answered"
      return {"name": "Finish", "result": kind, "final_answer": action.answer}
    listed = [self._made(part) for part in by_call([step])]
    return listed[0] if len(listed) == 1 else {"calls": listed}

  def _made(self, step: Step) -> dict[str, Any]:
    output = step.observation.text if step.observation is not None else ""
    output = shorten(output, self._limits.max_observation_chars)
    return {
      "name": step.action.name,
      "arguments": dict(step.action.arguments),
      "function_output": output,
    }


class _TreeLoop(Loop):
  """The chain's scheduler with a search in every seat."""

  stats_class = TreeStats

  def __init__(self, setting: Setting, strategy: Search):
    super().__init__(setting)
    self.strategy = strategy
    self.results: dict[tuple[str, int], SearchResult] = {}

  def _conversation(self, task: Task, sample: int) -> "_Tree":
    start = super()._conversation(task, sample)
    return _Tree(
      start, self.setting.chat_format, self.setting.limits, self.strategy, self.engine.size
    )

  def _session(self, task: Task, sample: int) -> Branches:
    return Branches(self.environment, task, sample)

  def _opened(self, seat: Seat) -> None:
    super()._opened(seat)
    if seat.session is not None:
      seat.conversation.follow(seat.session.enter)

  def _status(self, seat: Seat) -> Status:
    return seat.conversation.result(self.sampling.weights)[1].status

  def _grade(self, seat: Seat) -> Future:
    tree, branches = seat.conversation, seat.session
    leaf, trajectory = tree.result(self.sampling.weights)
    path, answer = tree.path(leaf), tree.answer(leaf)
    times = 1 + branches.repeats(path)
    return self._verdict(trajectory.status, seat, lambda: branches.grade(leaf, path, answer), times)

  def _graded(self, seat: Seat) -> dict[str, Any]:
    return super()._graded(seat) | {"replayed_calls": seat.session.replayed_calls}

  def _finished(self, seat: Seat, verdict: dict[str, Any]) -> Trajectory:
    tree = seat.conversation
    leaf, trajectory = tree.result(self.sampling.weights)
    trajectory = judged(trajectory, verdict)
    self.stats.calls += len(tree.nodes)
    self.stats.siblings_without_room += tree.without_room
    self.stats.replayed_calls += verdict["replayed_calls"]
    self.results[tree.task.id, tree.sample] = SearchResult(tuple(tree.nodes), leaf, trajectory)
    return trajectory

  def _unopened(self, task: Task, sample: int) -> Trajectory:
    trajectory = super()._unopened(task, sample)
    self.results[task.id, sample] = SearchResult((), ROOT, trajectory)
    return trajectory

  def _submit(self, seat: Seat) -> Future:
    tree = seat.conversation
    branch = seat.session.branch(tree.node, tree.path(tree.node))
    if not branch.repeats:
      return parallel.submit(self.runner, branch, tree.call)
    # What is repeated has the time of so many calls, and the call its own.
    whole: Future = Future()

    def go_on(back: Future) -> None:
      try:
        back.result()
        parallel.submit(self.runner, branch, tree.call).add_done_callback(settle)
      except TooManyStuck as error:
        whole.set_exception(error)
      except Exception as error:
        whole.set_result(Observation(f"error: {error}", Code.INFRASTRUCTURE))

    def settle(answer: Future) -> None:
      error = answer.exception()
      whole.set_result(answer.result()) if error is None else whole.set_exception(error)

    what = f"going back in the search of task {tree.task.id}"
    back = functools.partial(self.runner.persist, branch.go_back)
    self._begin(what, back, times=branch.repeats).add_done_callback(go_on)
    return whole

  def _holds_prompt(self, seat: Seat) -> bool:
    return seat.conversation.holds_prompt

  def _append(self) -> None:
    waiting = {
      slot: seat.conversation
      for slot, seat in self.seats.items()
      if seat.conversation.state is State.NEEDS_APPEND
    }
    lengths = {s: tree.rewind_to for s, tree in waiting.items() if tree.rewind_to is not None}
    if lengths:
      with self.stats.device():
        self.state = self.engine.rewind(self.state, lengths)
    sizes: collections.Counter[str] = collections.Counter()
    for tree in waiting.values():
      sizes.update({kind: len(ids) for kind, ids in tree.pieces.items()})
    self.stats.diversity_tokens += sizes["diversity"]
    self.stats.replaced_tokens += sizes["replaced"]
    super()._append()
