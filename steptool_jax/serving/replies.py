"""Answers as OpenAI's documents, whole or in pieces (server-sent events)."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from steptool_jax.dialogue.codec import Codec
from steptool_jax.serving.recording import Answer
from steptool_jax.types import Action, Finish, Malformed


def message(answer: Answer) -> dict[str, Any]:
  """The assistant's message. `action` is ours: what the turn was, and why it is malformed."""
  out: dict[str, Any] = {"role": "assistant", "content": answer.text or None, "refusal": None}
  if answer.calls:
    out["tool_calls"] = [
      {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
      }
      for call in answer.calls
    ]
  elif answer.text == "":
    out["content"] = ""
  return out | {"action": _action(answer.action)}


def _action(action: Action) -> dict[str, Any]:
  if isinstance(action, Malformed):
    return {"kind": "malformed", "reason": action.reason}
  if isinstance(action, Finish):
    return {"kind": "gave_up" if action.gave_up else "answer"}
  return {"kind": "call"}


def logprobs(
  codec: Codec, tokens: Sequence[int], values: Sequence[float]
) -> dict[str, list[dict[str, Any]]]:
  """Of the tokens as sampled, the stop token and what the format takes as scaffolding included."""
  content = []
  for token, value in zip(tokens, values, strict=True):
    text = codec.decode([token])
    content.append(
      {
        "token": text,
        "logprob": value if math.isfinite(value) else -9999.0,
        "bytes": list(codec.token_bytes(token)),
        "top_logprobs": [],
      }
    )
  return {"content": content, "refusal": None}


def usage(prompt: int, cached: int, completion: int) -> dict[str, Any]:
  return {
    "prompt_tokens": prompt,
    "completion_tokens": completion,
    "total_tokens": prompt + completion,
    "prompt_tokens_details": {"cached_tokens": cached},
  }


def completion(
  head: dict[str, Any], answer: Answer, probs: dict[str, Any] | None, used: dict[str, Any]
) -> dict[str, Any]:
  """head: id, created and model of the answer."""
  choice = {
    "index": 0,
    "message": message(answer),
    "logprobs": probs,
    "finish_reason": answer.finish,
  }
  return head | {"object": "chat.completion", "choices": [choice], "usage": used}


def event(document: dict[str, Any] | str) -> bytes:
  """One server-sent event."""
  text = document if isinstance(document, str) else json.dumps(document)
  return f"data: {text}\n\n".encode()


def piece(head: dict[str, Any], delta: dict[str, Any], **choice: Any) -> bytes:
  """An event with a piece of the message."""
  first = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None} | choice
  return event(head | {"object": "chat.completion.chunk", "choices": [first]})


def ending(
  head: dict[str, Any],
  answer: Answer,
  said: int,
  probs: dict[str, Any] | None,
  used: dict[str, Any] | None,
) -> Iterator[bytes]:
  """The events after the first `said` characters of the text. used: None where nobody asked."""
  whole = message(answer)
  delta = {"action": whole["action"]}
  if answer.text[said:]:
    delta["content"] = answer.text[said:]
  if answer.calls:
    delta["tool_calls"] = [{"index": k} | call for k, call in enumerate(whole["tool_calls"])]
  yield piece(head, delta, logprobs=probs)
  yield piece(head, {}, finish_reason=answer.finish)
  if used is not None:
    yield event(head | {"object": "chat.completion.chunk", "choices": [], "usage": used})
  yield event("[DONE]")
