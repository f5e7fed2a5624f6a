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


_CODES = {
  NotFound: Code.NOT_FOUND,
  Unavailable: Code.UNAVAILABLE,
  RateLimited: Code.RATE_LIMIT,
  InfrastructureError: Code.INFRASTRUCTURE,
}


def code_of(error: BaseException) -> Code:
  """The observation code of an exception that a tool raised; TOOL_ERROR for foreign ones."""
  return next((code for kind, code in _CODES.items() if isinstance(error, kind)), Code.TOOL_ERROR)
