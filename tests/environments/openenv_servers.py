"""A world behind OpenEnv's protocol: a stand-in without sockets, and openenv's own server.

The stand-in sends the messages of openenv 0.10.
"""

import contextlib
import json
import sys
import threading
import time
import types

import httpx

from steptool_jax.environments.benchmarks import openenv

SCHEMA = {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}
SPLITS = [{"name": "easy", "type": "train"}, {"name": "hard", "type": "test"}]
SIZES = {"easy": 3, "hard": 2}


class World:
  """Reach the goal by adding; the reward is the share that is there, too much is worth nothing."""

  scale, drawn = 1.0, None

  def reset(self, seed=0, split="", index=0):
    seed = next(self.drawn) if self.drawn else 10 * len(split) + index if split else seed
    self.total, self.goal = 0, 3 + seed % 5
    return f"Reach {self.goal}."

  def add(self, number):
    if number < 0:
      raise ValueError("only positive numbers")
    self.total += number
    return f"total {self.total}"

  def paid(self):
    """Reward and end of the episode."""
    share = self.total / self.goal
    return {"reward": self.scale * share * (share <= 1), "done": share >= 1}


class StandIn:
  """own: the environment has an action of its own. listed: it has a task API."""

  address = "http://stand-in:1"

  def __init__(self, patch, world, room, own, listed):
    self.world, self.room, self.own, self.listed = world, room, own, listed
    self.live, self.deaf = set(), False
    client = types.ModuleType("websockets.sync.client")
    client.connect = lambda url, **options: Socket(self, url, **options)
    patch.setitem(sys.modules, "websockets.sync.client", client)
    patch.setattr(openenv.httpx, "request", self.request)

  @property
  def active(self):
    return len(self.live)

  def request(self, method, url, json, timeout):
    action = SCHEMA["properties"] if self.own else {"tool_name": {}, "arguments": {}}
    found = {
      "schema": {"action": {"type": "object", "properties": action | {"metadata": {}}}},
      "metadata": {"name": "Sum", "description": "ByMcp environment"},
      "list_environments": ["Sum"],
    }
    if self.listed:
      found |= {"Sum/splits": SPLITS, "Sum/num_tasks": {"num_tasks": json and SIZES[json["split"]]}}
    answer = found.get(url.removeprefix(f"{self.address}/"))
    return httpx.Response(200 if answer else 501, json=answer, request=httpx.Request(method, url))


class Socket:
  """A client's end of a connection, as of websockets.sync.client."""

  def __init__(self, server, url, open_timeout, max_size):
    assert url == "ws://stand-in:1/ws"
    self.server, self.world, self.answers = server, server.world(), []
    self.open = server.active < server.room
    if self.open:
      server.live.add(self)
    else:
      self.answers.append(error("Server at capacity", "CAPACITY_REACHED"))

  def send(self, text):
    message = json.loads(text)
    if not self.open:
      raise ConnectionError("closed")
    if message["type"] == "close":
      self.server.live.discard(self)
      self.close()
    elif not self.server.deaf:
      self.answers.append(getattr(self, message["type"])(message.get("data", {})))

  def recv(self, timeout):
    if not self.answers:
      raise TimeoutError("late") if self.open else ConnectionError("closed")
    return json.dumps(self.answers.pop(0))

  def close(self):
    """The server hears of it sooner or later: here never."""
    self.open = False

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def state(self, _):
    return {"type": "state", "data": {"episode_id": None, "step_count": 0, "error": None}}

  def reset(self, data):
    told = {"message": self.world.reset(**data)}
    seen = told | {"metadata": {}} if self.server.own else {"metadata": told}
    return {"type": "observation", "data": {"observation": seen, "reward": None, "done": False}}

  def mcp(self, _):
    tool = {"name": "add", "description": "Adds a number.", "inputSchema": SCHEMA}
    return {"type": "mcp", "data": {"jsonrpc": "2.0", "id": 1, "result": {"tools": [tool]}}}

  def step(self, data):
    arguments = data if self.server.own else data["arguments"]
    failed = seen = None
    try:
      assert self.server.own or data["tool_name"] == "add"
      seen = self.world.add(arguments["number"])
    except AssertionError:
      failed = {"error_type": "tool_not_found", "message": "Unknown tool"}
    except KeyError:
      if self.server.own:
        return error("Invalid message", "VALIDATION_ERROR", errors=[{"msg": "Field required"}])
      failed = {"error_type": "invalid_args", "message": "Missing required argument"}
    except ValueError as why:
      if self.server.own:
        return error(str(why), "EXECUTION_ERROR")
      failed = {"error_type": "execution_error", "message": str(why)}
    if self.server.own:
      found = {"message": seen, "metadata": {}}
    else:
      result = {"content": [{"type": "text", "text": seen}], "is_error": False}
      found = {"tool_name": data["tool_name"], "result": seen and result, "error": failed}
    return {"type": "observation", "data": {"observation": found} | self.world.paid()}


def error(message, code, **more):
  return {"type": "error", "data": {"message": message, "code": code} | more}


class Real:
  """openenv's own server in a thread."""

  def __init__(self, world, room, own, listed):
    import uvicorn
    from fastapi import FastAPI
    from openenv.core.env_server.http_server import HTTPEnvServer

    environment, action, observation = self.classes(world, own, listed)
    self.server = HTTPEnvServer(environment, action, observation, room, env_name="Sum")
    app = FastAPI()
    self.server.register_routes(app)
    self.uvicorn = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
    self.thread.start()
    while not self.uvicorn.started:
      time.sleep(0.01)
    self.address = f"http://127.0.0.1:{self.uvicorn.servers[0].sockets[0].getsockname()[1]}"

  @staticmethod
  def classes(world, own, listed):
    from fastmcp import FastMCP
    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.mcp_environment import MCPEnvironment
    from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
    from openenv.core.env_server.types import Action, Observation, State

    class Add(Action):
      number: int

    class Seen(Observation):
      message: str = ""

    class Listed:
      SUPPORTS_CONCURRENT_SESSIONS = True
      state = State()

      if listed:
        list_splits = staticmethod(lambda: SPLITS)
        num_tasks = staticmethod(SIZES.__getitem__)

    class Own(Listed, Environment):
      def __init__(self):
        super().__init__()
        self.world = world()

      def reset(self, seed=0, episode_id=None, split="", index=0):
        return Seen(message=self.world.reset(seed, split, index))

      def step(self, action, timeout_s=None):
        return Seen(message=self.world.add(action.number), **self.world.paid())

    class ByMcp(Listed, MCPEnvironment):
      def __init__(self):
        mcp, self.world = FastMCP("sum"), world()

        @mcp.tool()
        def add(number: int) -> str:
          """Adds a number."""
          return self.world.add(number)

        super().__init__(mcp)

      def reset(self, seed=0, episode_id=None, split="", index=0):
        return Observation(metadata={"message": self.world.reset(seed, split, index)})

      async def step_async(self, action, timeout_s=None, **more):
        found = await super().step_async(action, timeout_s, **more)
        return found.model_copy(update=self.world.paid()) if hasattr(found, "result") else found

      def _step_impl(self, action, timeout_s=None, **more):
        raise NotImplementedError

    return (Own, Add, Seen) if own else (ByMcp, CallToolAction, CallToolObservation)

  @property
  def active(self):
    return self.server.active_sessions

  def close(self):
    self.uvicorn.should_exit = True
    self.thread.join(10)


@contextlib.contextmanager
def serving(kind, patch, world=World, room=4, own=False, listed=False):
  if kind == "stand-in":
    yield StandIn(patch, world, room, own, listed)
  else:
    with contextlib.closing(Real(world, room, own, listed)) as server:
      yield server
