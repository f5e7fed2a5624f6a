"""Rollouts on vLLM servers: the engine's methods, with token ids in and ids and log-probs out.

The state of a slot is its list of ids, held here; a decode call posts them to
/inference/v1/generate, whose prefix cache makes the history cheap. Weights go out once a rollout
(`lay_out`): the policy is written to a folder that the servers see, they load it, drop their
caches, and are labelled with its version. Every answer says which version sampled it; one of
another version (a server that was restarted, or that serves old weights) is not taken: the server
is given the weights again, and the request is made again.

How the servers are started is said in docs/vllm.md.
"""

import concurrent.futures
import dataclasses
import json
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from steptool_jax.files import parse_json
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.posting import Failed, Patience, Poster

_RETRIES, _BACKOFF_S, _MAX_BACKOFF_S, _MAX_WAIT_S = 4, 0.5, 10.0, 60.0
_MAX_BODY_BYTES = 64 << 20
_ADAPTER = "policy"  # the name that an adapter is served by

# (variables) -> the folder that holds them, as the servers see it.
Publish = Callable[[Any], str]


class Decoded(NamedTuple):
  """As policy/kv_slots.py's."""

  tokens: np.ndarray  # int32[N, K], the stop token included
  logprobs: np.ndarray  # float32[N, K]
  count: np.ndarray  # int32[N]
  stopped: np.ndarray  # bool[N]
  values: None = None  # no server gives these
  hidden: None = None


class Wrong(Exception):
  """A server did not do what it was asked for; the text is for its log and ours."""


@dataclasses.dataclass(frozen=True)
class Sampling:
  """What is the same in all requests. vocab_size: ids that the policy knows."""

  vocab_size: int
  top_k: int = 0
  top_p: float = 1.0


class Server:
  """One vLLM server. Blocks; safe from any thread."""

  def __init__(self, address: str, *, key: str, timeout_s: float, in_flight: int):
    self.address = address.rstrip("/")
    patience = Patience(_RETRIES, _BACKOFF_S, _MAX_BACKOFF_S, _MAX_WAIT_S)
    self._posters = {
      path: Poster(
        self.address + path,
        patience,
        timeout_s=timeout_s,
        max_in_flight=in_flight,
        max_body_bytes=_MAX_BODY_BYTES,
        key=key,
      )
      for path in (
        "/inference/v1/generate",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/update_weight_version",
        "/v1/load_lora_adapter",
      )
    }

  def load(self, folder: str, version: str, adapter: bool) -> None:
    """The weights (or the LoRA adapter) in `folder`, under this label. InfrastructureError."""
    if adapter:
      self._post(
        "/v1/load_lora_adapter", {"lora_name": _ADAPTER, "lora_path": folder, "load_inplace": True}
      )
    else:
      kwargs = {"weights_path": folder}
      self._post("/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})
    self._post("/reset_prefix_cache", {})
    self._post("/update_weight_version", {"new_version": version})

  def generate(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first choice of the answer. InfrastructureError, also for what is no answer."""
    answer = self._post("/inference/v1/generate", request)
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
      raise InfrastructureError(f"{self.address}: an answer without choices: {answer!r:.200}")
    return choices[0]

  def _post(self, path: str, body: Mapping[str, Any]) -> Any:
    poster = self._posters[path]

    def attempt() -> Any:
      with poster.slots:
        reply = poster.post(json.dumps(body))
      if reply.status != 200:
        again = reply.status in (408, 429) or reply.status >= 500
        raise Failed(f"status {reply.status}, {reply.start}", again=again, wait_s=reply.wait_s)
      if not reply.body:
        return None
      try:
        return parse_json(reply.body.decode())
      except ValueError as error:
        if path == "/v1/load_lora_adapter":
          return None  # a sentence
        raise Failed(f"no JSON ({error}): {reply.start}", again=False) from None

    return poster.persist(attempt)

  def close(self) -> None:
    for poster in self._posters.values():
      poster.close()


class HttpEngine:
  """The methods of policy/engine.py's Engine that rollouts use, over several servers.

  slots: conversations at the same time; size: ids of one. Slot n talks to server n modulo their
  number, and to the next one where that is down.
  """

  def __init__(
    self,
    servers: Sequence[Server],
    publish: Publish,
    sampling: Sampling,
    *,
    slots: int,
    size: int,
    adapter: bool = False,
  ):
    self.slots, self.size, self.classes = slots, size, ((slots, size),)
    self._servers, self._publish, self._sampling = tuple(servers), publish, sampling
    self._adapter = adapter
    self._pool = concurrent.futures.ThreadPoolExecutor(slots, "decode")
    self._sent: Any = None  # a leaf of the variables that the servers have
    self._folder, self._version = "", 0
    self._run = uuid.uuid4().hex[:8]  # a server may still have the weights of another run

  # --- weights -------------------------------------------------------------------------------

  def lay_out(self, variables: Any) -> Any:
    """Sends the variables to the servers, unless they have them.

    One that is down gets them when it is asked to sample (_sample); InfrastructureError where all
    are.
    """
    leaf = _leaf(variables)
    if leaf is not self._sent:
      self._version += 1
      self._folder = self._publish(variables)
      down = []
      for server in self._servers:
        try:
          self._load(server)
        except InfrastructureError as error:
          down.append(str(error))
      if len(down) == len(self._servers):
        raise InfrastructureError(f"rollout.http.servers: none takes weights; {'; '.join(down)}")
      for why in down:
        logging.warning("rollout.http.servers: one is passed over, %s", why)
      self._sent = leaf
    return variables

  def _load(self, server: Server) -> None:
    server.load(self._folder, self._label, self._adapter)

  @property
  def _label(self) -> str:
    return f"steptool-{self._run}-{self._version}"

  # --- slots ---------------------------------------------------------------------------------

  def init(self) -> list[list[int]]:
    return [[] for _ in range(self.slots)]

  def append(self, variables: Any, state: list[list[int]], pieces: Mapping[int, np.ndarray]):
    del variables
    for slot, ids in pieces.items():
      state[slot] = [*state[slot], *ids.tolist()]
    return state

  def rewind(self, state: list[list[int]], lengths: Mapping[int, int]):
    for slot, length in lengths.items():
      state[slot] = state[slot][:length]
    return state

  def fork(self, state: list[list[int]], sources: Mapping[int, int]):
    for slot, source in sources.items():
      state[slot] = [*state[source]]
    return state

  def decode(
    self,
    variables: Any,
    state: list[list[int]],
    limits: Mapping[int, int],
    seeds: Mapping[int, np.ndarray],
    stop_ids: Sequence[int],
    temperature: float,
  ) -> tuple[list[list[int]], Decoded]:
    """As Engine.decode: samples in the named slots, all at the same time.

    InfrastructureError where no server answers, or one answers with what it did not sample.
    """
    del variables
    asked = {
      slot: self._pool.submit(
        self._sample, slot, state[slot], limit, seeds[slot], stop_ids, temperature
      )
      for slot, limit in limits.items()
    }
    width = max(limits.values())
    tokens_NK = np.zeros((self.slots, width), np.int32)
    logprobs_NK = np.zeros((self.slots, width), np.float32)
    count_N, stopped_N = np.zeros(self.slots, np.int32), np.zeros(self.slots, bool)
    for slot, future in asked.items():
      ids, logprobs = future.result()
      count_N[slot], stopped_N[slot] = len(ids), ids[-1] in stop_ids
      tokens_NK[slot, : len(ids)], logprobs_NK[slot, : len(ids)] = ids, logprobs
      state[slot] = [*state[slot], *ids]
    return state, Decoded(tokens_NK, logprobs_NK, count_N, stopped_N)

  def _sample(self, slot, ids, limit, seed, stop_ids, temperature) -> tuple[list[int], list[float]]:
    request = {
      "token_ids": ids,
      "sampling_params": {
        "max_tokens": limit,
        "temperature": temperature,
        "top_p": self._sampling.top_p,
        "top_k": self._sampling.top_k,
        "seed": int(seed[0]) << 31 ^ int(seed[1]),
        "stop_token_ids": [int(i) for i in stop_ids],
        "ignore_eos": True,  # stop_ids says what ends a turn, not the model's own config
        "logprobs": 0,
        "detokenize": False,
      },
    }
    if self._adapter:
      request["model"] = _ADAPTER
    problems = []
    for k in range(len(self._servers)):
      server = self._servers[(slot + k) % len(self._servers)]
      for fresh in (False, True):
        try:
          if fresh:
            self._load(server)
          return read_choice(
            server.generate(request), self._label, limit, stop_ids, self._sampling.vocab_size
          )
        except Wrong as error:
          problems.append(f"{server.address}: {error}")
        except InfrastructureError as error:
          problems.append(str(error))
          # One that was started again knows no adapter until it is loaded.
          if not (self._adapter and "status 404" in str(error)):
            break
    raise InfrastructureError(f"rollout.http.servers: none samples; {'; '.join(problems)}")

  def close(self) -> None:
    self._pool.shutdown(cancel_futures=True)
    for server in self._servers:
      server.close()


def _leaf(variables: Any) -> Any:
  """One array of the tree: another one after each update."""
  while isinstance(variables, Mapping):
    variables = variables[max(variables)]
  return variables


def read_choice(
  choice: Mapping[str, Any], label: str, limit: int, stop_ids: Sequence[int], vocab_size: int
) -> tuple[list[int], list[float]]:
  """(ids, log-probs) of an answer; Wrong where they are not what was sampled by these weights."""
  ids = choice.get("token_ids")
  content = (choice.get("logprobs") or {}).get("content")
  if not isinstance(ids, list) or not isinstance(content, list) or not ids:
    raise Wrong("an answer without token_ids or without their log-probs")
  if not all(type(i) is int and 0 <= i < vocab_size for i in ids) or len(ids) > limit:
    raise Wrong(f"token_ids beyond the vocabulary of {vocab_size}, or more than {limit}")
  if [entry.get("token_id") for entry in content] != ids:
    raise Wrong("log-probs of other ids than those that it says it has sampled")
  logprobs = [entry.get("logprob") for entry in content]
  if not all(isinstance(p, (int, float)) and math.isfinite(p) and p < 1e-3 for p in logprobs):
    raise Wrong("log-probs that are none")
  ends = [k for k, i in enumerate(ids) if i in stop_ids]
  if ends[:1] not in ([], [len(ids) - 1]) or (not ends and len(ids) < limit):
    raise Wrong(f"a turn that ends neither at a stop token nor at its {limit} tokens")
  spans = choice.get("weight_versions")
  versions = {span.get("version") for span in spans or ()}
  if versions != {label}:
    raise Wrong(f"weights {sorted(map(str, versions)) or 'without a label'}, not {label}")
  return ids, [min(float(p), 0.0) for p in logprobs]


def refuse_gap(gap: float, most: float) -> None:
  """RuntimeError before anything is learnt from samples of another policy."""
  if most and not gap <= most:
    raise RuntimeError(
      f"the servers' log-probs are up to {gap:.3g} nats from those of the trainer, "
      f"rollout.http.gap is {most:g}: start them with --logprobs-mode processed_logprobs and "
      "--dtype float32, or raise the bound if they round on purpose"
    )
