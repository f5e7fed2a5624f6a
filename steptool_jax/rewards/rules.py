"""SuccCalling and Contribution by rules, from what a trajectory really did. Exact, no model.

In a turn with several calls each is marked by itself, in their order; the step has their means.
SC = 1: the call was executed (code OK) and repeats nothing.
Con = 1, by progress (`causal`): SC = 1 and the step is one of the demonstration's, or the first to
obtain a value that the goal needs: an argument of a demonstrated call, or the answer. It depends on
the steps up to this one alone. Where a session's handles are the values, and where neither
demonstration nor answer is known, nobody can tell what the goal needs but from the demonstration.
Con = 1, in hindsight: SC = 1 and the step is one of the demonstration's in a solved trajectory,
made a required change, or was the first to produce a value that is used later: in the arguments of
a correct step or in the correct final answer. Correct steps are those of the demonstration and, so
that other ways to the goal count too, those that contribute.
Where a demonstrated step produces a value again, the credit is its own and not a distractor's.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from steptool_jax.environments.checkers import number, whole_word, written_numbers
from steptool_jax.rewards import marks
from steptool_jax.simulators.render import leaves
from steptool_jax.types import (
  Code,
  Finish,
  Observation,
  Step,
  Task,
  ToolCall,
  Trajectory,
  by_call,
  calls_of,
)

# Here the final state is checked and the answer's text is free, so it proves no use of a value.
_STATE_CHECKERS = frozenset({"state", "table"})
_LONGEST = 40  # characters of a number; more digits are compared as text


def annotate(task: Task, trajectory: Trajectory, causal: bool = False) -> Trajectory:
  """The same trajectory with success_calling and contribution (0 or 1) on every step.

  causal: contribution is progress, which no later step changes; else hindsight tells it.

  Reads task.demonstration, task.query and, for environments whose intermediate results go by a
  session's own handles (t1, t2, ...), task.metadata["handles"]: the handle that each demonstrated
  call produces ("" = none). ValueError when the trajectory belongs to another task.
  """
  if trajectory.task_id != task.id:
    raise ValueError(f"trajectory of task {trajectory.task_id!r} annotated with task {task.id!r}")
  facts = _forward(task, by_call(trajectory.steps))
  contributions = _progress(task, facts) if causal else _backward(task, trajectory, facts)
  found = [(float(f.success), float(con)) for f, con in zip(facts, contributions, strict=True)]
  return marks.on_steps(trajectory, found)


def needed(task: Task) -> int:
  """Contributions (by progress) that the goal needs: the demonstrated calls; 0: nobody knows."""
  return len(_demonstrated(task))


def knows_the_goal(task: Task) -> bool:
  """Whether a call of this task can have a Con above 0 by progress: something says what helps."""
  return bool(needed(task) or any(_goal_answers(task)))


def _goal_answers(task: Task) -> list[str]:
  """Answers whose values the goal needs; none where a state is checked, or values are handles."""
  if task.checker.get("type") in _STATE_CHECKERS or "handles" in task.metadata:
    return []
  demonstrated = [a.answer for a in task.demonstration if isinstance(a, Finish)]
  return demonstrated or [str(task.checker.get("value", ""))]


def _demonstrated(task: Task) -> list[ToolCall]:
  return [call for action in task.demonstration for call in calls_of(action)]


@dataclasses.dataclass(frozen=True)
class _Fact:
  success: bool = False
  gold: bool = False  # a call of the demonstration, for the first time
  changed: bool = False
  produced: frozenset[str] = frozenset()  # values that it may claim
  arguments: frozenset[str] = frozenset()


_NOTHING = _Fact()
_ANSWERED = _Fact(success=True)  # a turn's answer, to which the user has replied


def _forward(task: Task, steps: Sequence[Step]) -> list[_Fact]:
  defaults = _defaults(task)
  gold = collections.Counter(_gold_calls(task, defaults))
  by_handle = "handles" in task.metadata
  goals = _goals(task)
  origins: dict[str, str] = {}  # handle -> canonical call that made it
  done: set[str] = set()  # calls since the last change of state
  seen: set[str] = set()
  seen_in_gold: set[str] = set()
  said = task.query
  facts = []
  for step in steps:
    call, observation = step.action, step.observation
    if isinstance(call, Finish) and observation is not None:
      said += f" {observation.text}"  # what the user tells needs no call
      facts.append(_ANSWERED)
      continue
    if (
      not isinstance(call, ToolCall)
      or observation is None
      or observation.code != Code.OK
      or observation.injected
    ):
      facts.append(_NOTHING)
      continue
    key = _canonical(call, origins, defaults)
    values = frozenset(_values(observation, goals))
    is_gold = gold[key] > 0
    repeat = key in done and not is_gold  # a demonstration may make the same call again
    if observation.changed:
      done.clear()
    done.add(key)
    handle = _handle_of(observation.value) if by_handle else ""
    if handle:
      # A repeat's handle stands for the same content, so a later use of either one is correct.
      origins[handle] = key
      values = frozenset({_key(handle)})
    # A distractor that lists values at random must not rob the call that singles one out.
    new = values - (seen_in_gold if is_gold else seen)
    new = frozenset(v for v in new if handle or not _mentions(said, v))
    seen |= values
    if repeat:
      facts.append(_NOTHING)
      continue
    if is_gold:
      gold[key] -= 1
      seen_in_gold |= values
    arguments = frozenset(_leaves(call.arguments))
    facts.append(_Fact(True, is_gold, observation.changed, new, arguments))
  return facts


def _progress(task: Task, facts: Sequence[_Fact]) -> list[bool]:
  answers, wanted = _goal_answers(task), _goals(task)
  obtained: set[str] = set()
  contributions = []
  for fact in facts:
    values = {
      v for v in fact.produced - obtained if v in wanted or any(_mentions(a, v) for a in answers)
    }
    obtained |= values
    contributions.append(fact.gold or bool(values))
  return contributions


def _backward(task: Task, trajectory: Trajectory, facts: Sequence[_Fact]) -> list[bool]:
  solved = trajectory.solved == 1.0
  used: set[str] = set()  # values in the arguments of later correct steps
  answer = ""
  if solved and trajectory.steps and task.checker.get("type") not in _STATE_CHECKERS:
    last = trajectory.steps[-1].action
    answer = last.answer if isinstance(last, Finish) else ""
  claimed: set[str] = set()  # values of the answer that have their producer
  asked = _key(task.checker["name"]) if task.checker.get("type") == "table" else None
  contributions = []
  for fact in reversed(facts):
    # Without a demonstration the checker is the only witness that a change was required; and of a
    # table, which may come about in another way, that the last one of this name was.
    witnessed = not task.demonstration or asked in fact.arguments
    required = fact.changed and (fact.gold or (solved and witnessed))
    if required and asked in fact.arguments:
      asked = None
    credited = {
      v for v in fact.produced if v in used or (v not in claimed and _mentions(answer, v))
    }
    used -= credited
    claimed |= credited
    useful = required or bool(credited) or (solved and fact.gold)
    contributions.append(useful)
    if useful or fact.gold:
      used |= fact.arguments
  return contributions[::-1]


def _goals(task: Task) -> set[str]:
  """Values that the goal needs: arguments of demonstrated calls, and the whole answer; none where
  the values are a session's own handles."""
  if "handles" in task.metadata:
    return set()
  calls = [_leaves(call.arguments) for call in _demonstrated(task)]
  return {v for values in calls for v in values} | set(filter(None, map(_key, _goal_answers(task))))


def _defaults(task: Task) -> dict[str, dict[str, Any]]:
  """Tool -> parameter -> what it is where a call leaves it out."""
  parameters = {spec.name: spec.parameters.get("properties", {}) for spec in task.tools}
  return {
    tool: {
      name: schema["default"]
      for name, schema in schemas.items()
      if isinstance(schema, Mapping) and "default" in schema
    }
    for tool, schemas in parameters.items()
  }


def _gold_calls(task: Task, defaults: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
  handles: dict[str, str] = {}
  calls = _demonstrated(task)
  produced = task.metadata.get("handles", ("",) * len(calls)) if calls else ()
  for call, handle in zip(calls, produced, strict=True):
    key = _canonical(call, handles, defaults)
    if handle:
      handles[handle] = key
    yield key


def _canonical(
  call: ToolCall, handles: Mapping[str, str], defaults: Mapping[str, Mapping[str, Any]]
) -> str:
  """Tool and arguments as one string: order, case and number format of arguments do not matter,
  nor whether a default is written out."""

  def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
      return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
      return [plain(v) for v in value]
    if value is None or isinstance(value, bool):
      return value
    key = _key(value)
    return {"from": handles[key]} if key in handles else key

  arguments = plain(call.arguments)
  for name, default in defaults.get(call.name, {}).items():
    if name in arguments and arguments[name] == plain(default):
      del arguments[name]
  return json.dumps([call.name, arguments], sort_keys=True, ensure_ascii=False)


def _handle_of(value: Any) -> str:
  handle = value.get("table") if isinstance(value, Mapping) else None
  return handle if isinstance(handle, str) else ""


def _values(observation: Observation, goals: Set[str]) -> Iterator[str]:
  """Keys of all leaf values that are shown; of texts also words with a digit, and what is a goal.

  A value that was cut off has not been told, though a later call may know it.
  """
  found = list(leaves(observation.value))
  if observation.text.endswith("...") and not isinstance(observation.value, str):
    shown, begun = _written(observation.text)
    found = [leaf for leaf in found if _key(leaf) in shown] + [begun]
  for leaf in found:
    key = _key(leaf)
    if not key:
      continue
    yield key
    if not isinstance(leaf, str):
      continue
    if re.search(r"\d", leaf):
      yield from map(_key, written_numbers(leaf))
      for word in re.findall(r"[-+]?[\w.,:/-]*\d[\w.,:/-]*", leaf):
        yield _key(word.rstrip(".,:/-"))
    yield from (goal for goal in goals if len(goal) < len(key) and _mentions(leaf, goal))


def _written(text: str) -> tuple[set[str], str]:
  """(keys of the texts and numbers in JSON that is cut somewhere, the beginning of a cut text)."""
  keys, begun = set(), ""
  for part in re.findall(r'"(?:[^"\\]|\\.)*(?:"|$)|-?\d+(?:\.\d+)?(?:e[-+]?\d+)?', text):
    if part[0] != '"':
      keys.add(_key(part))
    elif part[-1] != '"':
      begun = part[1:].removesuffix("...")
    else:
      with contextlib.suppress(ValueError):  # no JSON, but somebody's text
        keys.add(_key(json.loads(part, strict=False)))
  return keys, begun


def _leaves(value: Any) -> Iterator[str]:
  """Keys of all leaf values; booleans, None and empty strings carry no information."""
  yield from filter(None, map(_key, leaves(value)))


def _key(value: Any) -> str:
  """Numbers compare by value ("12", 12, 12.0), text without case and outer white space.

  Whole numbers to the last digit, fractions to twelve; "007" is a name and not the number 7.
  """
  text = " ".join(str(value).casefold().split())
  if len(text) > _LONGEST or not re.fullmatch(r"[-+]?(0|[1-9]\d*)(\.\d+)?", text):
    return text
  whole, _, fraction = text.partition(".")
  return f"{float(text):.12g}" if fraction.strip("0") else str(int(whole))


def _mentions(text: str, key: str) -> bool:
  """Whether a value stands in a text as whole words."""
  if not text:
    return False
  whole = number(text)  # written as the checkers allow it: "1,234", "$5"
  if _key(text if whole is None else whole) == key:
    return True
  if key in _numbers_in(text):
    return True
  pattern = rf"(?<!\.){whole_word(key)}(?!\.\d)"
  return re.search(pattern, " ".join(text.casefold().split())) is not None


@functools.lru_cache(maxsize=256)  # a query is asked for every value that a result has
def _numbers_in(text: str) -> frozenset[str]:
  return frozenset(map(_key, written_numbers(text)))
