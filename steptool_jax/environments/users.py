"""Users of custom tasks who go on after a final answer: a script, a function, or a language model.

A task says one of

  "turns": [{"reply": "And twice that?", "checker": {"type": "number", "value": 12}}, …]
  "user": {"type": "ask_again", …}        def ask_again(answer, tools, turn, **rest)
  "user": {"type": "model", "wants": "You want to know …", "turns": 4}

`turns` is a script: what the user says after the first answer, the second, and so on; a checker,
where there is one, tells how well the turn before the reply was solved, and the task's own checker
judges the answer after the last reply. A function returns None (no more to say), the reply, or
(reply, verdict on the turn: 0, .5 or 1); `turn` counts from 1. A model speaks through the endpoint
environment.user, until it writes ###STOP### or has replied `turns` times.
"""

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steptool_jax.environments import checkers
from steptool_jax.environments.base import TURNS
from steptool_jax.types import Code, Observation

FIELDS = ("turns", "user")
STOP = "###STOP###"
_MOST_TOKENS = 1024  # of a model's reply, its thoughts included
_THOUGHT = re.compile(r"<think>.*?</think>|^.*?</think>", re.S)
_RULES = (
  "You play the user of an assistant that works with tools. {wants} Write the user's next message "
  f"and nothing else. When you have what you want, or cannot get it, write {STOP}."
)

# (checker, answer) -> IsSolved.
Grade = Callable[[Mapping[str, Any], str], float]


def metadata_of(
  record: Mapping[str, Any],
  functions: Mapping[str, Callable[..., Any]],
  check_checker: Callable[[Any], Mapping[str, Any]],
  has_model: bool,
) -> dict[str, Any]:
  """What the task keeps of its record's `turns` or `user`. ValueError names the field.

  functions: those that may be a user. check_checker: raises ValueError for what is no checker.
  has_model: whether environment.user names an endpoint.
  """
  if all(record.get(field) is None for field in FIELDS):
    return {}
  if all(record.get(field) is not None for field in FIELDS):
    raise ValueError("has 'turns' and 'user': a user follows a script or thinks, not both")
  if record.get("turns") is not None:
    return {TURNS: _script(record["turns"], check_checker)}
  user = record["user"]
  if not isinstance(user, dict) or not isinstance(user.get("type"), str):
    raise ValueError("field 'user' must be an object with a 'type'")
  rest = {k: v for k, v in user.items() if k != "type"}
  if user["type"] == "model":
    _check_model(rest, has_model)
  elif user["type"] not in functions:
    known = ", ".join(["model", *functions])
    raise ValueError(f"unknown user type {user['type']!r}: there are {known}")
  else:
    try:
      inspect.signature(functions[user["type"]]).bind("answer", {}, 1, **rest)
    except TypeError as error:
      raise ValueError(f"user {user['type']}(answer, tools, turn, ...): {error}") from None
  return {TURNS: user}


def _script(turns: Any, check_checker: Callable[[Any], Mapping[str, Any]]) -> list[dict[str, Any]]:
  if not isinstance(turns, list) or not turns:
    raise ValueError("field 'turns' must be a non-empty list of {'reply': …, 'checker': …}")
  for k, turn in enumerate(turns):
    at = f"turns, entry {k}"
    if not isinstance(turn, dict) or not {"reply"} <= set(turn) <= {"reply", "checker"}:
      raise ValueError(
        f"{at}: must be {{'reply': …}}, with a 'checker' of the turn before it or none"
      )
    if not isinstance(turn["reply"], str) or not turn["reply"].strip():
      raise ValueError(f"{at}: 'reply' must be a non-empty string")
    if "checker" in turn:
      try:
        check_checker(turn["checker"])
      except ValueError as error:
        raise ValueError(f"{at}: {error}") from None
  return turns


def _check_model(rest: Mapping[str, Any], has_model: bool) -> None:
  if set(rest) != {"wants", "turns"} or not isinstance(rest["wants"], str) or not rest["wants"]:
    raise ValueError("user 'model' needs 'wants' (what the user is after, text) and 'turns'")
  if not isinstance(rest["turns"], int) or isinstance(rest["turns"], bool) or rest["turns"] < 1:
    raise ValueError("user 'model': 'turns' is the most replies, a number above 0")
  if not has_model:
    raise ValueError(
      "user 'model' speaks through an endpoint: set environment.user.base_url and .model"
    )


class User:
  """The user of one session. `tools` maps names to the session's functions."""

  def __init__(
    self,
    query: str,
    says: Any,
    functions: Mapping[str, Callable[..., Any]],
    tools: Mapping[str, Callable[..., Any]],
    grade: Grade,
    model: Any = None,
  ):
    self._says, self._functions, self._tools = says, functions, tools
    self._grade, self._model = grade, model
    self._talk = [query]  # what user and assistant said in turn
    self._turn = 0

  def reply(self, answer: str) -> Observation | None:
    """The next message, with the verdict on the turn that `answer` ends; None: no more to say.

    RuntimeError where a function raises or returns nonsense; InfrastructureError of the endpoint.
    """
    self._turn += 1
    self._talk.append(answer)
    text, solved = self._next(answer)
    if text is None:
      return None
    self._talk.append(text)
    return Observation(text, Code.OK, solved=solved)

  def _next(self, answer: str) -> tuple[str | None, float | None]:
    if isinstance(self._says, Sequence):
      if self._turn > len(self._says):
        return None, None
      turn = self._says[self._turn - 1]
      checker = turn.get("checker", {"type": "none"})
      return turn["reply"], self._grade(checker, answer) if checkers.known(checker) else None
    # A copy: what a function takes out of a list is there for the next conversation.
    rest = copy.deepcopy({k: v for k, v in self._says.items() if k != "type"})
    if self._says["type"] == "model":
      return self._asked(**rest), None
    return _read(self._says["type"], self._called(answer, rest))

  def _called(self, answer: str, rest: Mapping[str, Any]) -> Any:
    name = self._says["type"]
    try:
      return self._functions[name](answer, dict(self._tools), self._turn, **rest)
    except Exception as error:
      raise RuntimeError(f"user {name} raised {type(error).__name__}: {error}") from error

  def _asked(self, wants: str, turns: int) -> str | None:
    if self._turn > turns:
      return None
    roles = ("assistant", "user")  # the user's own words are what the model has said
    said = [{"role": roles[k % 2], "content": text} for k, text in enumerate(self._talk)]
    system = {"role": "system", "content": _RULES.format(wants=wants)}
    reply = self._model.chat([system, *said], max_tokens=_MOST_TOKENS, accept=_accept)
    text = _words(reply.text)
    return None if STOP in text else text


def _words(text: str) -> str:
  """What the user says: a model's thoughts are not for the policy, and end no talk."""
  return "" if "<think>" in (text := _THOUGHT.sub("", text)) else text.strip()


def _accept(reply: Any) -> None:
  if not _words(reply.text):
    raise ValueError(f"the user says nothing, or only thinks: {reply.text!r:.80}")


def _read(name: str, said: Any) -> tuple[str | None, float | None]:
  text, solved = said if isinstance(said, tuple) and len(said) == 2 else (said, None)
  good = text is None or (isinstance(text, str) and text.strip())
  if not good or (solved is not None and solved not in (0, 0.5, 1)):
    raise RuntimeError(
      f"user {name} returned {said!r:.80}, not None, a text, or (text, 0, .5 or 1)"
    )
  return text, None if solved is None else float(solved)
