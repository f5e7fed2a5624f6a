"""A question to a language model until its reply is of use: what is refused is asked for again."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from steptool_jax.simulators.errors import InfrastructureError

T = TypeVar("T")


class Reply(Protocol):
  text: str


Accept = Callable[[Any], None]


def ask(
  chat: Callable[[list[dict], int, Accept], object],
  messages: Sequence[dict],
  read: Callable[[Any], T],
  correction: Callable[[str, str], Sequence[dict]],
  attempts: int,
  failure: str,
) -> T:
  """What `read` makes of the first reply that it does not refuse with a ValueError.

  Args:
    chat: (messages, number of the attempt, accept) -> anything; hands each reply to `accept` and
      lets its ValueError through, as Endpoint.chat does, which then does not keep the reply.
    correction: (text of the refused reply, reason) -> messages that follow `messages` in the next
      attempt, instead of those of the attempt before.

  Raises:
    InfrastructureError: "<failure>: <reasons>" after the last attempt.
    ValueError: of `chat` itself, about no reply.
  """
  reasons: list[str] = []
  added: Sequence[dict] = ()
  for attempt in range(attempts):
    replies: list[Reply] = []
    values: list[T] = []

    def accept(reply: Reply, replies: list = replies, values: list = values) -> None:
      replies.append(reply)
      values.append(read(reply))

    try:
      chat([*messages, *added], attempt, accept)
      return values[-1]
    except ValueError as error:
      if not replies:
        raise
      reasons.append(str(error))
      added = correction(replies[-1].text, reasons[-1])
  raise InfrastructureError(f"{failure}: {'; '.join(reasons)}")
