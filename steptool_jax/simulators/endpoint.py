"""Client of an OpenAI-compatible chat endpoint, for judges and simulated tools.

Thread-safe and synchronous: callers use threads. Replies are kept on disk by what was asked, so
that an interrupted run goes on where it stopped and a repeated one costs nothing.
"""

import dataclasses
import hashlib
import json
import pathlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steptool_jax.files import replacing
from steptool_jax.simulators.posting import Failed, Patience, Poster, check_address

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_MAX_BODY_BYTES = 16 << 20
_MAX_BACKOFF_S = 20.0
_MAX_WAIT_S = 120.0  # a server that asks for more patience than this counts as down


@dataclasses.dataclass(frozen=True)
class Reply:
  """`arguments`: those of the forced function call; None when there is none that parses."""

  text: str
  arguments: dict[str, Any] | None
  prompt_tokens: int
  completion_tokens: int
  cached: bool


@dataclasses.dataclass(frozen=True)
class Usage:
  """Calls answered by the server, and what they cost; those answered from disk cost nothing."""

  calls: int = 0
  cached_calls: int = 0
  prompt_tokens: int = 0
  completion_tokens: int = 0
  cost_usd: float = 0.0


class Endpoint:
  """POST {base_url}/chat/completions with one model, e.g. base_url = http://localhost:8000/v1.

  timeout_s: seconds for one attempt, from the look-up to the last byte. retries: further
  attempts, after backoff_s, 2 backoff_s, ... at most 20 s (each times a random 0.5 to 1.5) and not
  before a Retry-After; a server that asks for more than two minutes has failed. max_in_flight:
  requests at the same time, further ones wait. cache_dir: replies are kept there, one file each,
  by model and request (not by base_url: the same model may move); None keeps none. prices: USD per
  million prompt and completion tokens.
  """

  def __init__(
    self,
    base_url: str,
    model: str,
    *,
    api_key: str = "",
    timeout_s: float = 60.0,
    retries: int = 3,
    max_in_flight: int = 64,
    cache_dir: pathlib.Path | str | None = None,
    prices: tuple[float, float] = (0.0, 0.0),
    backoff_s: float = 0.5,
  ):
    check_address(base_url, "base_url", "http://host:port/v1")
    if not model:
      raise ValueError("model is empty: name the model that the endpoint serves")
    if len(prices) != 2 or not min(prices) >= 0:
      raise ValueError(f"prices is {prices}: must be USD per million (prompt, completion) tokens")
    self.model = model
    self.max_in_flight = max_in_flight
    self._poster = Poster(
      base_url.rstrip("/") + "/chat/completions",
      Patience(retries, backoff_s, _MAX_BACKOFF_S, _MAX_WAIT_S),
      timeout_s=timeout_s,
      max_in_flight=max_in_flight,
      max_body_bytes=_MAX_BODY_BYTES,
      key=api_key,
    )
    self._prices = prices
    self._cache = pathlib.Path(cache_dir) if cache_dir is not None else None
    if self._cache is not None:
      self._cache.mkdir(parents=True, exist_ok=True)
    self._lock = threading.Lock()
    self._usage = Usage()

  def chat(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    function: Mapping[str, Any] | None = None,
    json_mode: bool = False,
    max_tokens: int = 1024,
    temperature: float = 0.0,
    sample: int = 0,
    accept: Callable[[Reply], None] | None = None,
  ) -> Reply:
    """One completion; blocks. `function` (an OpenAI function schema) is forced to be called.

    `sample` tells apart draws from the same request: each has its own place in the cache.
    `accept` may raise ValueError on a reply that is no use to the caller; it is then not kept.
    InfrastructureError when the attempts are used up or the server refuses the request.
    """
    body: dict[str, Any] = {
      "model": self.model,
      "messages": list(messages),
      "max_tokens": max_tokens,
      "temperature": temperature,
    }
    if function is not None:
      body["tools"] = [{"type": "function", "function": dict(function)}]
      body["tool_choice"] = {"type": "function", "function": {"name": function["name"]}}
    if json_mode:
      body["response_format"] = {"type": "json_object"}
    content = json.dumps(body, sort_keys=True)
    file = self._file(content, sample)
    name = function["name"] if function is not None else ""
    document = self._stored(file)
    if document is not None:
      reply = dataclasses.replace(_reply(document, name), cached=True)
      self._count(cached_calls=1)
      if accept is not None:
        accept(reply)
      return reply
    document = self._ask(content)
    reply = _reply(document, name)
    prompt, completion = reply.prompt_tokens, reply.completion_tokens
    cost = (prompt * self._prices[0] + completion * self._prices[1]) / 1e6
    self._count(calls=1, prompt_tokens=prompt, completion_tokens=completion, cost_usd=cost)
    if accept is not None:
      accept(reply)
    if file is not None:
      with replacing(file) as stream:
        json.dump({"request": body, "sample": sample, "reply": document}, stream)
    return reply

  def usage(self) -> Usage:
    with self._lock:
      return self._usage

  def close(self) -> None:
    self._poster.close()

  def _count(self, **more: float) -> None:
    with self._lock:
      now = dataclasses.asdict(self._usage)
      self._usage = Usage(**{**now, **{name: now[name] + n for name, n in more.items()}})

  # --- cache ---

  def _file(self, content: str, sample: int) -> pathlib.Path | None:
    if self._cache is None:
      return None
    key = hashlib.sha256(f"{sample}\n{content}".encode()).hexdigest()
    return self._cache / key[:2] / f"{key}.json"

  def _stored(self, file: pathlib.Path | None) -> Any:
    """The kept reply; None when there is none, or the file is broken (it is then replaced)."""
    if file is None:
      return None
    try:
      document = json.loads(file.read_bytes())["reply"]
      _reply(document, "")
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
      return None
    return document

  # --- network ---

  def _ask(self, content: str) -> Any:
    # The place is kept while waiting: an overloaded server sees fewer requests, not others.
    with self._poster.slots:
      return self._poster.persist(lambda: self._attempt(content), f", model {self.model}")

  def _attempt(self, content: str) -> Any:
    reply = self._poster.post(content)
    if reply.status != 200:
      raise Failed(
        f"status {reply.status}: {reply.start}",
        again=reply.status in _RETRIED and reply.wait_s <= _MAX_WAIT_S,
        wait_s=reply.wait_s,
      )
    try:
      document = json.loads(reply.body)
      _reply(document, "")
    except (ValueError, RecursionError) as error:
      raise Failed(f"the reply is no chat completion ({error}): {reply.start}") from None
    return document


def _reply(document: Any, function: str) -> Reply:
  """ValueError when the document is no chat completion; an odd function call is the caller's."""
  try:
    message = document["choices"][0]["message"]
    text = message.get("content") or ""
    calls = message.get("tool_calls") or []
    usage = document.get("usage") or {}
    tokens = [_count_of(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
  except (KeyError, IndexError, TypeError, AttributeError) as error:
    raise ValueError(f"{type(error).__name__}: {error}") from None
  if not isinstance(text, str) or not isinstance(calls, list):
    raise ValueError("content is no text, or tool_calls no list")
  arguments = None
  if function:
    for call in calls:
      called = call.get("function") if isinstance(call, dict) else None
      if isinstance(called, dict) and called.get("name") == function:
        raw = called.get("arguments")
        text = text or (raw if isinstance(raw, str) else "")
        arguments = _object(raw)
        break
  return Reply(text, arguments, *tokens, cached=False)


def _count_of(tokens: Any) -> int:
  """What a server says of its usage; a figure that is none must not cost a good reply."""
  return int(tokens) if isinstance(tokens, (int, float)) and 0 <= tokens < 1e12 else 0


def _object(text: Any) -> dict[str, Any] | None:
  try:
    value = json.loads(text) if isinstance(text, str) else text
  except (ValueError, RecursionError):
    return None
  return value if isinstance(value, dict) else None
