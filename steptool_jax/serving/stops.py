"""Stop texts of a request: where they begin, in text and in tokens."""

from collections.abc import Callable, Sequence

from steptool_jax.dialogue.chatformat import ChatFormat


def first_stop(text: str, stops: Sequence[str]) -> int | None:
  """Where the first of the stop texts begins."""
  found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
  return min(found, default=None)


def cutter(chat_format: ChatFormat, stops: Sequence[str]) -> Callable[[list[int]], int]:
  """Turn.cut for these stop texts: the fewest tokens whose text holds one."""

  def cut(tokens: list[int]) -> int:
    decode = chat_format.codec.decode
    if not stops or first_stop(decode(tokens), stops) is None:
      return 0
    low, high = 1, len(tokens)
    while low < high:
      middle = (low + high) // 2
      if first_stop(decode(tokens[:middle]), stops) is None:
        low = middle + 1
      else:
        high = middle
    return low

  return cut
