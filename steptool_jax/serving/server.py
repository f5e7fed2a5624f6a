"""POST /v1/chat/completions and GET /v1/models over a policy, as OpenAI's own clients expect them.

A training run opens sessions, each with a path (/v1/sessions/NAME) and a key of its own; what is
said in one is recorded as sampled (recording.py). Without a session, the server is open to everyone
with its key.
"""

import asyncio
import dataclasses
import hashlib
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from steptool_jax.config import Limits
from steptool_jax.dialogue.chatformat import ChatFormat
from steptool_jax.serving import guards, recording, replies, stops
from steptool_jax.serving.decoding import Decoder, Turn
from steptool_jax.serving.messages import ApiError, ChatRequest, parse_request
from steptool_jax.serving.recording import Ask, Session

_MAX_REQUEST_BYTES = 8 << 20
_DRAINED_BYTES = 32 << 20
_LARGE_BYTES = 64 << 10  # a body that is parsed and tokenized beside the others
_COLDEST = 1e-4  # a temperature below it is 0
_KINDS = {401: "authentication_error", 403: "permission_error"}  # of errors, by status

# (conversation, turn, draw) -> uint32[2], the key of a turn.
Keys = Callable[[int, int, int], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
  """A session that a run has opened. temperature: None = as each request says."""

  session: Session
  url: str  # base_url for a client
  key: str
  keys: Keys | None
  temperature: float | None


class PolicyServer:
  """Serves in a thread of its own what the owner of `decoder` samples.

  name: of the model. key: what clients without a session must send; "" = none. everyone: whether
  there are any. temperature: where a request names none.
  """

  def __init__(
    self,
    decoder: Decoder,
    chat_format: ChatFormat,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    name: str = "policy",
    system: str | None = None,
    key: str = "",
    everyone: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
  ):
    """Starts to serve; OSError when the address cannot be had."""
    self._decoder, self._format, self._system = decoder, chat_format, system
    self._host, self._key, self._name, self._top_p = host, key, name, top_p
    self._sessions: dict[str, Opened] = {}
    self._by_key: dict[str, Opened] = {}
    self._everyone: Opened | None = None
    if everyone:
      limits, keep = recording.unlimited(decoder.size), 8 * 64
      session = Session("", chat_format, limits, system, keep)
      self._everyone = Opened(session, "", key, None, None)
    self._temperature = temperature
    self.requests = self.tokens = 0
    post, get = {"methods": ["POST"]}, {"methods": ["GET"]}
    self._listener = guards.Listener(
      host,
      port,
      [
        Route(f"{prefix}/{path}", handler, **methods)
        for prefix in ("/v1", "/v1/sessions/{session}")
        for path, handler, methods in (
          ("chat/completions", self._chat, post),
          ("models", self._models, get),
          ("models/{model:path}", self._models, get),
        )
      ],
      {ApiError: _refused, HTTPException: _refused_by_guard},
    )
    self.url = f"{self._listener.root}/v1"

  def open(self, name: str, limits: Limits, keys: Keys, temperature: float) -> Opened:
    """A session with a path and key of its own."""
    session = Session(name, self._format, limits, self._system)
    key = f"sk-{uuid.uuid4().hex}"
    opened = Opened(session, f"{self.url}/sessions/{name}", key, keys, temperature)
    self._sessions[name] = self._by_key[key] = opened
    return opened

  def close_session(self, opened: Opened) -> None:
    """Further requests are refused, those under way cancelled."""
    self._sessions.pop(opened.session.name, None)
    self._by_key.pop(opened.key, None)
    self._decoder.forget(opened.session.name)

  def close(self, grace_s: float = 1.0) -> None:
    self._decoder.close()
    self._listener.close(grace_s)

  def __enter__(self) -> "PolicyServer":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  # --- requests ------------------------------------------------------------------------------

  def _sender(self, http: Request) -> Opened:
    """Whose request it is; HTTPException or ApiError where it is nobody's."""
    name = http.path_params.get("session")
    found = self._by_key.get(guards.bearer(http) or "")
    if name is not None and (found is None or found.session.name != name):
      found = self._sessions.get(name)
      if found is None:
        raise ApiError(404, f"there is no session {name!r}; it may be over", code="no_session")
    if found is None:
      found = self._everyone
    if found is None:
      raise HTTPException(401, "the key is of no session: use the one that came with base_url")
    guards.check_sender(http, self._host, found.key)
    return found

  async def _models(self, http: Request) -> Response:
    self._sender(http)
    model = {"id": self._name, "object": "model", "created": 0, "owned_by": "steptool_jax"}
    wanted = http.path_params.get("model")
    if wanted is None:
      return _json(200, {"object": "list", "data": [model]})
    if wanted != self._name:
      raise ApiError(404, f"there is no model {wanted!r}, only {self._name!r}", "model")
    return _json(200, model)

  async def _chat(self, http: Request) -> Response:
    self.requests += 1
    opened = self._sender(http)
    body = await guards.read_body(http, _MAX_REQUEST_BYTES, _DRAINED_BYTES)

    def read() -> tuple[ChatRequest, Ask]:
      request = parse_request(body, self._top_p)
      return request, opened.session.ask(request)

    request, ask = await (guards.in_thread(read) if len(body) > _LARGE_BYTES else _now(read))
    turn = self._turn(opened, request, ask)
    answering = _Answering(self, opened, ask, turn)
    if not request.stream:
      self._decoder.submit(turn)
      return _json(200, await answering.whole(http))
    return StreamingResponse(answering.events(http), media_type="text/event-stream")

  def _turn(self, opened: Opened, request: ChatRequest, ask: Ask) -> Turn:
    temperature = opened.temperature
    if temperature is None:
      temperature = self._temperature if request.temperature is None else request.temperature
      temperature = temperature if temperature >= _COLDEST else 0.0
    ids = ask.conversation.ids()
    if ask.forced:
      ids = np.concatenate([ids, np.asarray(ask.forced, np.int32)])
    return Turn(
      ids,
      ask.limit,
      _key_of(request) if opened.keys is None else opened.keys(*ask.draw),
      temperature,
      opened.session.name or None,
      stops.cutter(self._format, request.stops),
    )


class _Answering:
  """One request that is being answered."""

  def __init__(self, server: PolicyServer, opened: Opened, ask: Ask, turn: Turn):
    self._server, self._opened, self._ask, self._turn = server, opened, ask, turn
    self._is_answered = False
    self._head = {
      "id": f"chatcmpl-{uuid.uuid4().hex}",
      "created": int(time.time()),
      "model": server._name,
      "system_fingerprint": None,
    }

  async def whole(self, http: Request) -> dict[str, Any]:
    """The document of the whole answer."""
    try:
      await self._sampled(http)
      answer, probs, used = self._answered()
    finally:
      self._leave()
    return replies.completion(self._head, answer, probs, used)

  async def events(self, http: Request) -> AsyncIterator[bytes]:
    """The same in pieces. A conversation without tools streams its text as it is sampled; of one
    with tools nobody can say what a turn is before it ends."""
    request, loop, said = self._ask.request, asyncio.get_running_loop(), 0
    heard: asyncio.Queue[str] = asyncio.Queue()
    if not request.tools:
      decode = self._server._format.codec.decode
      held = max(map(len, request.stops), default=1)  # the beginning of a stop text, or of a letter

      def hear(tokens: list[int]) -> None:
        ended = tokens[-1] in self._server._format.stop_ids
        text = decode(tokens[:-1] if ended else tokens)
        text = text[: stops.first_stop(text, request.stops)][:-held]
        loop.call_soon_threadsafe(heard.put_nowait, text)

      self._turn.heard = hear
    self._server._decoder.submit(self._turn)
    sampled = asyncio.ensure_future(self._sampled(http))
    try:
      yield replies.piece(self._head, {"role": "assistant", "content": ""})
      while not sampled.done():
        listening = asyncio.ensure_future(heard.get())
        await asyncio.wait({sampled, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not listening.done() or sampled.done():
          listening.cancel()
        elif listening.result()[said:].rstrip("�"):
          new = listening.result()[said:].rstrip("�")
          said += len(new)
          yield replies.piece(self._head, {"content": new})
      await sampled
      answer, probs, used = self._answered()
      shown = used if request.usage_in_stream else None
      for piece in replies.ending(self._head, answer, said, probs, shown):
        yield piece
    except ApiError as error:
      yield replies.event(error.document())
    finally:
      self._leave()
      self._turn.future.cancel()
      sampled.cancel()

  def _leave(self) -> None:
    if not self._is_answered:
      self._opened.session.dropped()

  async def _sampled(self, http: Request) -> None:
    """Waits for the turn; one whose client goes away is cancelled, and its slot is free."""
    future = asyncio.wrap_future(self._turn.future)
    gone = asyncio.ensure_future(http.receive())  # the body is read: what comes next is the end
    try:
      await asyncio.wait({future, gone}, return_when=asyncio.FIRST_COMPLETED)
      if not future.done():
        raise ApiError(499, "the client went away", kind="server_error")
      if future.cancelled():
        raise ApiError(503, "the server, or this session, is closing", kind="server_error")
      if future.exception() is not None:
        raise ApiError(500, str(future.exception()), kind="server_error")
    finally:
      self._turn.future.cancel()
      future.cancel()
      gone.cancel()

  def _answered(self) -> tuple[recording.Answer, dict[str, Any] | None, dict[str, Any]]:
    turn, server = self._turn, self._server
    server.tokens += len(turn.tokens)
    self._is_answered = True
    answer = self._opened.session.answered(
      self._ask, turn.tokens, turn.logprobs, turn.stopped, f"call_{uuid.uuid4().hex[:24]}"
    )
    probs = None
    if self._ask.request.logprobs:
      probs = replies.logprobs(server._format.codec, turn.tokens, turn.logprobs)
    return answer, probs, replies.usage(len(turn.ids), turn.cached, len(turn.tokens))


async def _now(call: Callable[[], Any]) -> Any:
  return call()


def _key_of(request: ChatRequest) -> np.ndarray:
  """uint32[2]: by the request's seed, else by chance."""
  text = os.urandom(8) if request.seed is None else str(request.seed).encode()
  return np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), np.uint32)


def _refused(request: Request, error: ApiError) -> Response:
  if error.status >= 500:
    logging.warning("%s: %s", request.url.path, error.message)
  return _json(error.status, error.document())


def _refused_by_guard(request: Request, error: HTTPException) -> Response:
  kind = _KINDS.get(error.status_code, "invalid_request_error")
  document = ApiError(error.status_code, str(error.detail), kind=kind).document()
  return _json(error.status_code, document, error.headers)


def _json(
  status: int, content: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> Response:
  return Response(json.dumps(content), status, headers, media_type="application/json")
