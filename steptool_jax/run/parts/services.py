"""What a run talks to besides its model: simulators, judges, MCP servers. Built from the config."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from steptool_jax.config import Config, Endpoint
from steptool_jax.run.hosts import hosts
from steptool_jax.simulators import endpoint as endpoint_lib
from steptool_jax.simulators.mcp import McpServers
from steptool_jax.simulators.posting import clean_key
from steptool_jax.toolbench.judging import Judging
from steptool_jax.toolbench.simulators.cache import Cache, Recorded
from steptool_jax.toolbench.simulators.http import HttpSimulator
from steptool_jax.toolbench.simulators.llm import LlmSimulator
from steptool_jax.toolbench.simulators.virtual import FirstAnswer, Simulator

HTTP_RETRIES, LLM_RETRIES = 4, 3  # further attempts at a server, with growing pauses
IN_FLIGHT = 64  # requests to one server at the same time


@dataclasses.dataclass(frozen=True)
class Answering:
  """A chain of simulators, and its parts that count."""

  simulator: Simulator
  cache: Cache | None
  endpoint: endpoint_lib.Endpoint | None

  def report(self) -> dict[str, Any]:
    """JSON data: what the cache and the simulating model did so far."""
    report: dict[str, Any] = {}
    if self.cache is not None:
      report["cache"] = dataclasses.asdict(self.cache.stats())
    if self.endpoint is not None:
      report["llm"] = dataclasses.asdict(self.endpoint.usage())
    return report


def total(reports: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
  """The sums of what the simulators of several processes did."""
  return {
    part: {name: sum(report[part][name] for report in reports) for name in figures}
    for part, figures in reports[0].items()
  }


@dataclasses.dataclass(frozen=True)
class Services:
  """None where the environment needs none."""

  answering: Answering | None = None  # toolbench
  judging: Judging | None = None  # toolbench
  toolbench_key: str = ""  # toolbench: of the http server, sent with every call
  mcp: McpServers | None = None  # custom, with environment.mcp
  user: endpoint_lib.Endpoint | None = None  # custom, with environment.user
  processes: int = 1  # that share the slots

  def beside(self, figure: str) -> str:
    """A printed figure, with who judged where there is a judge."""
    return figure if self.judging is None else self.judging.beside(figure)


NO_SERVICES = Services()


@contextlib.contextmanager
def open_services(config: Config) -> Iterator[Services]:
  """The services of config.environment; closed in the end. Errors as of the parts."""
  c, count = config.environment, hosts.peers().count
  with contextlib.ExitStack() as stack:
    if c.name == "toolbench":
      answering = stack.enter_context(open_answering(config))
      endpoint = None
      if config.judge.kind == "llm":
        endpoint = open_endpoint(config.judge.endpoint, "judge.endpoint", stack)
      name = "simulator.toolbench_key_variable"
      key = secret(config.simulator.toolbench_key_variable, name)
      yield Services(answering, Judging(endpoint, config.judge.runs), key, processes=count)
      return
    user = mcp = None
    if c.user.base_url:
      user = open_endpoint(c.user, "environment.user", stack)
    if c.mcp:
      is_url = len(c.mcp) == 1 and c.mcp[0].startswith(("http://", "https://"))
      servers = McpServers(
        command=None if is_url else c.mcp,
        url=c.mcp[0] if is_url else None,
        shared=c.mcp_shared,
        timeout_s=config.rollout.tool_timeout,
      )
      mcp = stack.enter_context(servers)
    yield Services(mcp=mcp, user=user, processes=count)


@contextlib.contextmanager
def open_answering(config: Config) -> Iterator[Answering]:
  """The simulators of config.simulator in their order: cache, http, llm.

  With a writable cache, what http and llm answer is kept there. Raises ValueError or OSError for
  a config without any simulator and for parts that cannot be built, naming the field or folder.
  """
  c = config.simulator
  with contextlib.ExitStack() as stack:
    cache = endpoint = None
    live: list[Simulator] = []
    if c.writable_cache and hosts.peers().count > 1:
      raise ValueError(
        "config.simulator.writable_cache: the processes of several hosts cannot share its database "
        "on a network share; serve it from one machine (--mode=serve) and set simulator.http"
      )
    if c.cache or c.writable_cache:
      cache = Cache(c.cache or None, c.writable_cache or None)
      stack.callback(cache.close)
    if c.http:
      http = HttpSimulator(
        c.http,
        timeout_s=c.http_timeout,
        retries=HTTP_RETRIES,
        max_in_flight=IN_FLIGHT,
      )
      stack.callback(http.close)
      live.append(http)
    if c.llm.base_url:
      endpoint = open_endpoint(c.llm, "simulator.llm", stack)
      examples = cache.examples if cache is not None and c.llm_style == "gpt" else None
      live.append(LlmSimulator(endpoint, c.llm_style, examples=examples))
    if cache is not None and live and c.writable_cache:
      chain: list[Simulator] = [Recorded(cache, FirstAnswer(live))]
    else:
      chain = [*([cache] if cache is not None else []), *live]
    if not chain:
      raise ValueError(
        "config.simulator: there is none; set at least one of simulator.cache (a folder), "
        "simulator.http (an address) and simulator.llm.base_url"
      )
    yield Answering(FirstAnswer(chain), cache, endpoint)


def open_endpoint(
  endpoint: Endpoint, name: str, stack: contextlib.ExitStack
) -> endpoint_lib.Endpoint:
  """The client of an endpoint, closed with the stack. `name`: the config group, for errors.

  Raises ValueError for an empty or wrong address, a missing model and a missing key.
  """
  key = secret(endpoint.api_key_variable, f"{name}.api_key_variable")
  try:
    client = endpoint_lib.Endpoint(
      endpoint.base_url,
      endpoint.model,
      api_key=key,
      timeout_s=endpoint.timeout,
      retries=LLM_RETRIES,
      max_in_flight=IN_FLIGHT,
      cache_dir=pathlib.Path(endpoint.cache) if endpoint.cache else None,
      prices=(endpoint.prompt_price, endpoint.completion_price),
    )
  except ValueError as error:
    raise ValueError(f"config.{name}: {error}") from None
  stack.callback(client.close)
  return client


def secret(variable: str, name: str) -> str:
  """The value of an environment variable, "" for no variable: keys stay out of configs and logs."""
  key = clean_key(os.environ.get(variable, ""), f"config.{name}: the variable {variable}")
  if variable and not key:
    raise ValueError(f"config.{name}: the environment variable {variable} is not set, or empty")
  return key
