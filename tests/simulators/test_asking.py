"""The loop itself; its three users (judges, simulated tools) are tested in their own files."""

import dataclasses

import pytest

from steptool_jax.simulators.asking import ask
from steptool_jax.simulators.errors import InfrastructureError

QUESTION = [{"role": "user", "content": "a number?"}]


@dataclasses.dataclass
class Reply:
  text: str


def asked(*texts, attempts=3):
  """(value or error, messages of every attempt)."""
  seen = []

  def chat(messages, attempt, accept):
    assert attempt == len(seen)
    seen.append(messages)
    accept(Reply(texts[attempt]))

  def correction(text, reason):
    return [{"role": "user", "content": f"{text}: {reason}"}]

  try:
    return ask(chat, QUESTION, lambda r: int(r.text), correction, attempts, "no number"), seen
  except InfrastructureError as error:
    return str(error), seen


def test_the_first_reply_of_use_counts():
  assert asked("7", "8") == (7, [QUESTION])


def test_what_is_refused_is_asked_for_again_with_the_last_reason_alone():
  value, seen = asked("one", "two", "3")
  assert value == 3
  assert [len(messages) for messages in seen] == [1, 2, 2]
  assert seen[2][-1]["content"].startswith("two: invalid literal")


def test_after_the_last_attempt_it_is_infrastructure_with_all_reasons():
  error, seen = asked("one", "two", "3", attempts=2)
  assert error.startswith("no number: ")
  assert "'one'" in error
  assert "'two'" in error
  assert len(seen) == 2


def test_an_error_about_no_reply_is_the_callers():
  def chat(messages, attempt, accept):
    raise ValueError("the request is not JSON data")

  with pytest.raises(ValueError, match="not JSON data"):
    ask(chat, QUESTION, lambda r: r, lambda *_: [], 3, "no number")
