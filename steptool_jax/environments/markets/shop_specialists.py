"""Specialists for nested_api: they answer questions about the shop.

A question is put as the tasks put it, "city of the supplier of the last order of customer karo
mine". Where a specialist gets a relation wrong, it goes on with another entity's value. It knows
facts, not words: asking by another route gives the same.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from steptool_jax.environments import shop
from steptool_jax.environments.markets.specialists import Knowledge, Specialty
from steptool_jax.environments.nested_api import HOPS, READS, STARTS
from steptool_jax.simulators.functions import NotFound
from steptool_jax.types import Action, Finish, Task, ToolCall

_SKILLS = {
  "customer": "people",
  "supplier": "people",
  "product": "goods",
  "warehouse": "goods",
  "order": "orders",
  "shipment": "orders",
}


@dataclasses.dataclass(frozen=True)
class Question:
  """The way from a named entity: (kind asked, tool, field) of each relation, and where it ends."""

  start: str  # kind of the named entity
  name: str
  relations: tuple[tuple[str, str, str], ...]
  end: str  # kind of the entity at the end; "" where a field was read


def parse(text: str) -> Question:
  """ "[field of] [the relation of]* kind name"; without a field it asks for the id.

  NotFound for anything else: that is what the specialist then says.
  """
  text = " ".join(text.casefold().strip(" ?.").split()).removeprefix("what is ")
  question = _parse_read(text.removeprefix("the ")) or _parse_phrase(text)
  if question is None:
    raise NotFound("I do not understand; ask like: city of the supplier of product NAME")
  return question


def _parse_read(text: str) -> Question | None:
  word, of, rest = text.partition(" of ")
  inner = _parse_phrase(rest) if of else None
  for tool, field, name in READS[inner.end] if inner else ():
    if name == word:
      relations = (*inner.relations, (inner.end, tool, field))
      return dataclasses.replace(inner, relations=relations, end="")
  return None


def _parse_phrase(text: str) -> Question | None:
  text = text.removeprefix("the ")
  for kind, hops in HOPS.items():
    for tool, field, end, phrase in hops:
      words = phrase.removeprefix("the ").removesuffix("{}")
      inner = _parse_phrase(text.removeprefix(words)) if text.startswith(words) else None
      if inner is not None and inner.end == kind:
        relations = (*inner.relations, (kind, tool, field))
        return dataclasses.replace(inner, relations=relations, end=end)
  for kind, (_, _, word) in STARTS.items():
    name = text.removeprefix(f"{word} ")
    if name not in ("", text):
      return Question(kind, name, (), kind)
  return None


def question_of(task: Task) -> str | None:
  """The whole question of a reading task of nested_api in these words; None for other tasks."""
  path, _, word = task.metadata.get("composition", "").partition(".")
  if not word:
    return None
  kinds = path.split(">")
  first: ToolCall = task.demonstration[0]
  phrase = f"{STARTS[kinds[0]][2]} {next(iter(first.arguments.values()))}"
  for kind, following in itertools.pairwise(kinds):
    words = next(words for _, _, end, words in HOPS[kind] if end == following)
    phrase = words.format(phrase)
  return f"{word} of {phrase}"


def ask(session: shop.ShopSession, knowledge: Knowledge, question: str) -> dict[str, Any]:
  """{"answer": …} from the present state of the shop.

  Raises:
    NotFound: it does not understand, or there is no such entity.
  """
  asked = parse(question)
  finder, _, _ = STARTS[asked.start]
  key = asked.name
  if finder:
    key = _recall_fact(session, knowledge, asked.start, finder, key, "id")
  for kind, tool, field in asked.relations:
    key = _recall_fact(session, knowledge, kind, tool, key, field)
  return {"answer": key}


def _recall_fact(
  session: shop.ShopSession, knowledge: Knowledge, kind: str, tool: str, key: str, field: str
) -> str | int:
  right = session.look(tool, key)[field]
  knows, rng = knowledge.of(_SKILLS[kind], f"{tool}/{key}/{field}")
  if knows:
    return right
  keys = session.keys(f"{kind}s")
  rng.shuffle(keys)
  for other in keys:
    try:
      wrong = other if field == "id" else session.look(tool, other)[field]
    except NotFound:  # a customer without an order
      continue
    if wrong != right:
      return wrong
  return right


def rest(task: Task, value: Mapping[str, Any]) -> tuple[Action, ...]:
  return (Finish(str(value["answer"])),)


SHOP = Specialty(
  "city of the supplier of product NAME",
  {
    "small": {"people": 0.85, "goods": 0.7, "orders": 0.6},
    "medium": {"people": 0.95, "goods": 0.85, "orders": 0.8},
    "large": {"people": 0.99, "goods": 0.97, "orders": 0.95},
  },
  question_of,
  ask,
  rest,
)
