"""Market: prices, latencies, specialists and the user's wishes around another environment's tasks.

As in ToolOrchestra every task has its own price list and its own choice of specialists. All of it
is drawn per task from (seed, split, task id), so train and held-out tasks share no draw. Prices are
in the tools' descriptions; specialists' prices and the wish are in the query too, since the compact
chat format shows no descriptions. A latency is a number: nobody waits for it.
"""

import dataclasses
import random
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from steptool_jax.config import Market
from steptool_jax.environments.base import Environment, Session, Split, check_split
from steptool_jax.environments.markets.pipeline_specialists import PIPELINE
from steptool_jax.environments.markets.shop_specialists import SHOP
from steptool_jax.environments.markets.specialists import TIERS, Knowledge, Specialty
from steptool_jax.simulators.functions import Tool, Toolbox
from steptool_jax.types import Action, Code, Observation, Task, ToolCall, ToolSpec

_CENTS, _SECONDS = 0.3, 1.0  # usual price and latency of a call of the environment's own tools
_PREFIX = "ask_"
# Whose tables there are specialists for.
SPECIALTIES = {"nested_api": SHOP, "data_pipeline": PIPELINE}
# Refused before anything ran, or the simulator's own failure: nobody pays for it.
_FREE = frozenset({Code.MALFORMED, Code.UNKNOWN_TOOL, Code.BAD_ARGUMENTS, Code.INFRASTRUCTURE})


class MarketEnvironment:
  """An environment whose calls cost something. Tasks stay solvable without any specialist.

  metadata gains "prices" (tool -> [USD, seconds]) and, where the user has a wish, "preference": its
  weights for rewards/orchestra.py. A task that comes down to one question is demonstrated, with
  probability `asked`, by asking a specialist that is right.
  """

  def __init__(self, environment: Environment, market: Market):
    if market.specialists and environment.name not in SPECIALTIES:
      raise ValueError(
        f"market.specialists: they know {' and '.join(SPECIALTIES)}, not {environment.name!r}"
      )
    self._environment, self._market = environment, market
    self._specialty = SPECIALTIES.get(environment.name)
    self._lock = threading.Lock()
    self._tasks: dict[str, tuple[Task, ...]] = {}
    self.name = environment.name

  def tasks(self, split: Split) -> Sequence[Task]:
    check_split(split)
    with self._lock:
      if split not in self._tasks:
        self._tasks[split] = tuple(
          self._put_on_market(t, split) for t in self._environment.tasks(split)
        )
      return self._tasks[split]

  def open(self, task: Task, sample: int) -> "MarketSession":
    session = self._environment.open(task, sample)
    return MarketSession(session, task, self._market, self._specialty)

  def _put_on_market(self, task: Task, split: Split) -> Task:
    """The task on the market, a function of (seed, split, task)."""
    rng = random.Random(f"{self._market.seed}/{split}/{task.id}/market")
    on_offer = [tier for tier in TIERS if tier in self._market.specialists]
    chosen = set(rng.sample(on_offer, rng.randint(1, len(on_offer)))) if on_offer else set()
    tiers = [tier for tier in on_offer if tier in chosen]
    prices = self._price_list(rng, task, tiers)
    words, wish = "", {}
    if self._market.preferences:
      words, wish = _draw_wish(rng, [_PREFIX + tier for tier in tiers])
    told = ", ".join(f"{_PREFIX}{tier} {_price(prices[_PREFIX + tier])}" for tier in tiers)
    query = " ".join([task.query, *([f"{told}."] if told else []), *([words] if words else [])])
    metadata: dict[str, Any] = {
      "prices": {
        name: [round(cents / 100, 3), seconds] for name, (cents, seconds) in prices.items()
      }
    }
    if wish:
      metadata["preference"] = wish
    specs = (*task.tools, *(_spec(self._specialty, tier) for tier in tiers))
    priced = dataclasses.replace(
      task,
      query=query,
      tools=tuple(
        dataclasses.replace(spec, description=f"{spec.description} ({_price(prices[spec.name])})")
        for spec in specs
      ),
      metadata={**task.metadata, **metadata},
    )
    if rng.random() >= self._market.asked:
      return priced
    avoided = [tool for tool, weight in wish.get("tools", {}).items() if weight < 0]
    return self._demonstrate_asking(
      priced, [t for t in rng.sample(tiers, len(tiers)) if _PREFIX + t not in avoided]
    )

  def _price_list(
    self, rng: random.Random, task: Task, tiers: Sequence[str]
  ) -> dict[str, tuple[float, float]]:
    """tool -> (cents, seconds)."""
    usual = {spec.name: (_CENTS, _SECONDS) for spec in task.tools}
    for tier in tiers:
      usual[_PREFIX + tier] = (TIERS[tier].cents, TIERS[tier].seconds)

    def draw(value: float) -> float:
      # With one decimal, so that the text tells the truth and reads like no value of a task.
      return max(round(value * self._market.spread ** rng.uniform(-1, 1), 1), 0.1)

    return {name: (draw(cents), draw(seconds)) for name, (cents, seconds) in usual.items()}

  def _demonstrate_asking(self, task: Task, tiers: Sequence[str]) -> Task:
    """The task with a demonstration that asks the first of these specialists that is right."""
    question = self._specialty.question_of(task) if tiers else None
    for tier in tiers if question else ():
      session = self.open(task, 0)
      try:
        asking = ToolCall(_PREFIX + tier, {"question": question})
        observation = session.call(asking)
        if observation.code is not Code.OK:
          continue
        *calls, last = self._specialty.rest(task, observation.value)
        for call in calls:
          session.call(call)
        if session.grade(last.answer) == 1.0:
          return _demonstrated(task, (asking, *calls, last), observation.value)
      finally:
        session.close()
    return task


class MarketSession:
  """A session that puts cost and latency on what it answers, and asks specialists itself."""

  def __init__(self, session: Session, task: Task, market: Market, specialty: Specialty | None):
    self._session, self._prices = session, task.metadata["prices"]
    tiers = {_PREFIX + tier: tier for tier in market.specialists}
    asking = [
      _asking(session, spec, specialty, tiers[spec.name], f"{market.seed}/{task.id}")
      for spec in task.tools
      if spec.name in tiers
    ]
    self._names = frozenset(spec.name for spec, _ in asking)
    self._box = Toolbox(asking)

  def call(self, call: ToolCall) -> Observation:
    observation = (self._box if call.name in self._names else self._session).call(call)
    if observation.code in _FREE:
      return observation
    cost, latency = self._prices.get(call.name, (0.0, 0.0))
    return dataclasses.replace(observation, cost=cost, latency=latency)

  @property
  def side_by_side(self) -> bool:
    return getattr(self._session, "side_by_side", False)

  def reply(self, answer: str) -> Observation | None:
    return self._session.reply(answer)

  def grade(self, answer: str | None) -> float:
    return self._session.grade(answer)

  def close(self) -> None:
    self._session.close()


def _demonstrated(task: Task, actions: tuple[Action, ...], value: Mapping[str, Any]) -> Task:
  """The task with another demonstration, whose first call gave `value`."""
  metadata = dict(task.metadata)
  if "handles" in metadata:  # rewards/rules.py: what each call of the demonstration produces
    metadata["handles"] = (value["table"], *[""] * (len(actions) - 2))
  return dataclasses.replace(task, demonstration=actions, metadata=metadata)


def _asking(session: Any, spec: ToolSpec, specialty: Specialty, tier: str, seed: str) -> Tool:
  knowledge = Knowledge(specialty.accuracy[tier], f"{seed}/{tier}")
  return Tool(spec, lambda question: specialty.ask(session, knowledge, question))


def _spec(specialty: Specialty, tier: str) -> ToolSpec:
  right = ", ".join(f"{k} {v:.0%}" for k, v in specialty.accuracy[tier].items())
  return ToolSpec(
    f"{_PREFIX}{tier}",
    f"Ask a {tier} model, e.g. {specialty.example}. Right on {right}",
    {
      "type": "object",
      "properties": {"question": {"type": "string"}},
      "required": ["question"],
      "additionalProperties": False,
    },
  )


def _price(price: tuple[float, float]) -> str:
  return f"{price[0]:.1f} cents {price[1]:.1f} s"


def _draw_wish(rng: random.Random, tools: Sequence[str]) -> tuple[str, Mapping[str, Any]]:
  """(words for the query, weights of rewards.orchestra.Preference that they stand for)."""
  wishes: list[tuple[str, Mapping[str, Any]]] = [
    ("", {}),
    ("keep it cheap.", {"cost": 1.0, "latency": 0.0}),
    ("be quick.", {"cost": 0.0, "latency": 1.0}),
  ]
  if tools:
    tool = rng.choice(tools)
    wishes += [
      (f"avoid {tool}.", {"tools": {tool: -1.0}}),
      (f"prefer {tool}.", {"tools": {tool: 1.0}}),
    ]
  return rng.choice(wishes)
