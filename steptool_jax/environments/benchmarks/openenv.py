"""openenv: the environment of an OpenEnv server, each session an episode of it over its WebSocket.

Tools are those of its MCP interface, or `act`, with an action of the environment's own. A task is
what `reset` is given: split and index of the task API, else a seed, even to train on and odd held
out. Solved is the last reward reported, as openenv's own runner has it (core/harness/rollout.py).
"""

import contextlib
import functools
import importlib.util
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from steptool_jax.config import Config
from steptool_jax.environments.base import Split, check_split
from steptool_jax.simulators.errors import InfrastructureError
from steptool_jax.simulators.render import as_json, plain, render
from steptool_jax.types import Code, Observation, Task, ToolCall, ToolSpec

ACT = "act"
_CODES = {"tool_not_found": Code.UNKNOWN_TOOL, "timeout": Code.TIMEOUT}
_CODES |= {"invalid_args": Code.BAD_ARGUMENTS, "VALIDATION_ERROR": Code.BAD_ARGUMENTS}
_CODES |= {"execution_error": Code.TOOL_ERROR, "EXECUTION_ERROR": Code.TOOL_ERROR}


class Refused(InfrastructureError):  # the server answered with an error
  def __init__(self, said: Mapping[str, Any]):
    self.code = _CODES.get(said["code"], Code.INFRASTRUCTURE)
    super().__init__("; ".join([said["message"], *(e["msg"] for e in said.get("errors", ()))]))


class OpenEnvSession:
  """A connection, so a session of the server. InfrastructureError where it breaks."""

  def __init__(self, address: str, timeout_s: float, max_chars: int, by_mcp: bool):
    self._timeout_s, self._max_chars, self._by_mcp = timeout_s, max_chars, by_mcp
    self._lock, self._done, self._reward = threading.Lock(), False, 0.0
    try:
      client = importlib.import_module("websockets.sync.client")
      self._socket = client.connect(f"ws{address[4:]}/ws", open_timeout=timeout_s, max_size=None)
    except Exception as error:
      raise InfrastructureError(f"{address}: {type(error).__name__}: {error}") from error

  def ask(self, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """The data of its answer to a message of this kind; Refused where that is an error."""
    message = json.dumps({"type": kind} | ({"data": data} if data else {}))
    try:
      with contextlib.suppress(Exception):  # closed; there may be last words to read
        self._socket.send(message)
      answer = json.loads(self._socket.recv(self._timeout_s))
    except Exception as error:
      self._socket.close()  # a late answer would be taken for that to the next message
      raise InfrastructureError(f"OpenEnv server: {type(error).__name__}: {error}") from error
    if answer["type"] == "error" or (kind == "mcp" and "error" in answer["data"]):
      raise Refused(answer["data"].get("error", answer["data"]))
    return answer["data"]

  def call(self, call: ToolCall) -> Observation:
    action = dict(call.arguments)
    if self._by_mcp:
      action = {"type": "call_tool", "tool_name": call.name, "arguments": action}
    elif call.name != ACT:
      return Observation(f"error: the only tool is {ACT}", Code.UNKNOWN_TOOL)
    with self._lock:
      if self._done:
        return Observation("error: the episode is over; answer now", Code.TOOL_ERROR)
      try:
        data = self.ask("step", action)
      except Refused as error:
        return Observation(render(f"error: {error}", self._max_chars), error.code)
      self._done = bool(data.get("done"))
      if data.get("reward") is not None:
        self._reward = float(data["reward"])
    text, code = _shown(data, self._max_chars)
    return Observation(text, code, plain(text) if code is Code.OK else None)

  def grade(self, answer: str | None) -> float:
    """The last reward, whatever the answer; 0 without one."""
    if not 0 <= self._reward <= 1:
      raise InfrastructureError(f"the server's last reward is {self._reward:g}; scale it to [0, 1]")
    return 0.0 if answer is None else self._reward

  def close(self) -> None:
    """Waits until the server has freed the session, which ends the connection; 2 s at most."""
    with contextlib.suppress(Exception), self._socket:
      self._socket.send('{"type": "close"}')
      self._socket.recv(2.0)


class OpenEnv:
  name = "openenv"

  def __init__(self, address: str, counts: Mapping[Split, int], seed: int, sessions: int, *limits):
    """counts: most tasks of a split. sessions: how many are open at once. limits: timeout_s and
    max_observation_chars. ValueError where no server answers, or not as this needs it."""
    self._address, self._limits = address.rstrip("/"), limits
    self._starts: dict[str, str] = {}  # task id -> what its reset shows
    try:
      self._action = self._get("schema")["action"]
      self._about = self._get("metadata").get("description") or ""
      self._fields = {k: v for k, v in self._action["properties"].items() if k != "metadata"}
      self._by_mcp = not self._fields or "tool_name" in self._fields
      self._session = functools.partial(OpenEnvSession, self._address, *limits, self._by_mcp)
      with contextlib.ExitStack() as stack:
        for _ in range(sessions):  # whether there is room for so many
          session = stack.enter_context(contextlib.closing(self._session()))
          session.ask("state", {})
        resets = self._resets(counts, seed)
        self._tasks = {s: [self._task(session, r) for r in resets[s]] for s in resets}
        for task in (t for tasks in self._tasks.values() for t in tasks[:1]):
          self._begin(session, task.id, task.metadata)  # the same way again
    except (httpx.HTTPError, InfrastructureError, LookupError, TypeError, ValueError) as error:
      raise ValueError(
        f"config.environment.openenv: {address}: {type(error).__name__}: {error}; start an OpenEnv "
        f"server there, its max_concurrent_envs at least rollout.slots ({sessions} of this process)"
      ) from error

  def _get(self, path: str, method: str = "GET", body: Any = None) -> Any:
    url = f"{self._address}/{path}"
    return httpx.request(method, url, json=body, timeout=self._limits[0]).raise_for_status().json()

  def _resets(self, counts: Mapping[Split, int], seed: int) -> dict[Split, list[dict[str, Any]]]:
    found: dict[Split, list[dict[str, Any]]] = {"train": [], "heldout": []}
    try:
      (name,) = self._get("list_environments")
      splits = self._get(f"{name}/splits")
    except httpx.HTTPStatusError:  # no task API
      return {
        split: [{"seed": 2 * (seed + k) + odd} for k in range(counts[split])]
        for odd, split in enumerate(found)
      }
    for theirs in splits:
      split = "train" if theirs["type"] == "train" else "heldout"
      size = self._get(f"{name}/num_tasks", "POST", {"split": theirs["name"]})["num_tasks"]
      for k in range(min(size, counts[split] - len(found[split]))):
        found[split].append({"split": theirs["name"], "index": k, "seed": seed})
    return found

  def _task(self, session: OpenEnvSession, reset: dict[str, Any]) -> Task:
    name = "/".join(["openenv", *(str(reset[k]) for k in list(reset)[:2])])
    query = "\n\n".join(filter(None, (self._about, self._begin(session, name, reset))))
    return Task(name, "openenv", query, self._tools(session), {"type": "openenv"}, (), reset)

  def _tools(self, session: OpenEnvSession) -> tuple[ToolSpec, ...]:
    if not self._by_mcp:
      about = self._action.get("description") or "One step in the environment."
      return (ToolSpec(ACT, about, self._action | {"properties": self._fields}),)
    rpc = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
    return tuple(
      ToolSpec(t["name"], t.get("description") or "", t.get("inputSchema") or t["input_schema"])
      for t in session.ask("mcp", rpc)["result"]["tools"]
    )

  def tasks(self, split: Split) -> Sequence[Task]:
    return self._tasks[check_split(split)]

  def open(self, task: Task, sample: int) -> OpenEnvSession:
    """A new episode, the same for each `sample`. InfrastructureError where it begins otherwise."""
    with contextlib.ExitStack() as stack:
      session = stack.enter_context(contextlib.closing(self._session()))
      self._begin(session, task.id, task.metadata)
      stack.pop_all()
      return session

  def _begin(self, session: OpenEnvSession, name: str, reset: Mapping[str, Any]) -> str:
    start, _ = _shown(session.ask("reset", reset), self._limits[1])
    if start != self._starts.setdefault(name, start):
      raise InfrastructureError(f"reset({dict(reset)}) does not repeat: it has to follow its seed")
    return start


def _shown(data: Mapping[str, Any], limit: int) -> tuple[str, Code]:
  """(text, code) of what the server shows after a reset or a step."""
  seen = data["observation"]
  if "tool_name" not in seen:
    told = {k: v for k, v in seen.items() if k != "metadata" and v not in (None, "", [], {})}
    return render(as_json(told or seen.get("metadata") or "", limit), limit), Code.OK
  if error := seen.get("error"):
    code = _CODES.get(error["error_type"], Code.INFRASTRUCTURE)
    return render(f"error: {error['message']}", limit), code
  result, failed = seen.get("result"), False
  if isinstance(result, Mapping) and isinstance(result.get("content"), list):
    failed = bool(result.get("is_error"))
    result = "\n".join(part.get("text", f"<{part.get('type')}>") for part in result["content"])
  return render(as_json(result, limit), limit), Code.TOOL_ERROR if failed else Code.OK


def from_config(config: Config, services: Any) -> OpenEnv:
  """The row of base.ENVIRONMENTS."""
  if importlib.util.find_spec("websockets") is None:
    raise ValueError("environment 'openenv' needs websockets: pip install 'steptool-jax[openenv]'")
  e, r = config.environment, config.rollout
  counts = {"train": e.num_train, "heldout": e.num_heldout}
  mine = -(-r.slots // services.processes)  # each process asks for its part
  return OpenEnv(e.openenv, counts, e.seed, mine, r.tool_timeout, r.max_observation_chars)
