"""What a tool may raise to say more than "it failed"; the codes are in types.Code."""

from steptool_jax.types import Code


class NotFound(Exception):
  """Executed, but there is no such thing."""


class Unavailable(Exception):
  """Transient failure: the same call may succeed later."""


class RateLimited(Exception):
  """Too many calls."""


class InfrastructureError(Exception):
  """The simulator itself failed: not the policy's doing, never trained on."""


def code_of(error: BaseException) -> Code:
  """The observation code of an exception that a tool raised; TOOL_ERROR for foreign ones."""
  if isinstance(error, NotFound):
    return Code.NOT_FOUND
  if isinstance(error, Unavailable):
    return Code.UNAVAILABLE
  if isinstance(error, RateLimited):
    return Code.RATE_LIMIT
  if isinstance(error, InfrastructureError):
    return Code.INFRASTRUCTURE
  return Code.TOOL_ERROR
